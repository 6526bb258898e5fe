package iscsi

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseText(t *testing.T) {
	long := strings.Repeat("K", maxKey)
	var many []string
	for i := range maxPairs {
		many = append(many, "K"+string(rune('A'+i/26))+string(rune('a'+i%26))+"=")
	}
	tests := []struct {
		name, in string
		want     []pair // nil: an error, but for an empty text
	}{
		{"nothing", "", nil},
		{"one", "A=b\x00", []pair{{"A", "b"}}},
		{"two", "A=b\x00C=d\x00", []pair{{"A", "b"}, {"C", "d"}}},
		{"empty value", "SendTargets=\x00", []pair{{"SendTargets", ""}}},
		{"equals sign in the value", "A=b=c\x00", []pair{{"A", "b=c"}}},
		{"padding counted in", "A=b\x00\x00\x00", []pair{{"A", "b"}}},
		{"padding alone", "\x00\x00\x00\x00", nil},
		{
			"extension keys", "X-com.example.a+b@c_d=1\x00X#NodeArchitecture=a,b\x00",
			[]pair{{"X-com.example.a+b@c_d", "1"}, {"X#NodeArchitecture", "a,b"}},
		},
		{"UTF-8", "InitiatorAlias=Knöten\x00", []pair{{"InitiatorAlias", "Knöten"}}},
		{"longest key", long + "=1\x00", []pair{{long, "1"}}},
		{"longest value", "A=" + strings.Repeat("v", maxValue) + "\x00", []pair{{"A", strings.Repeat("v", maxValue)}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := parseText([]byte(test.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(pair{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	if pairs, err := parseText(text(many...)); err != nil || len(pairs) != maxPairs {
		t.Errorf("%d keys: %d, %v", maxPairs, len(pairs), err)
	}
	bad := map[string]string{
		"last pair not closed":   "A=b\x00C=d",
		"no equals sign":         "A\x00",
		"no key":                 "=b\x00",
		"key too long":           long + "K=1\x00",
		"key with a digit first": "1A=b\x00",
		"key with a space":       "A b=c\x00",
		"key with a slash":       "A/b=c\x00",
		"same key twice":         "A=b\x00A=b\x00",
		"zero byte between":      "A=b\x00\x00C=d\x00",
		"zero byte before":       "\x00A=b\x00",
		"value too long":         "A=" + strings.Repeat("v", maxValue+1) + "\x00",
		"value not UTF-8":        "A=\xff\x00",
		"too many keys":          string(text(many...)) + "Last=1\x00",
		"more than fits a row":   strings.Repeat("\x00", maxText+1),
		"binary in place of it":  "\x01\x02\x03\x00",
	}
	for name, in := range bad {
		if pairs, err := parseText([]byte(in)); !errors.Is(err, errText) {
			t.Errorf("%s: %v, %v", name, pairs, err)
		}
	}
}

func TestParseNumber(t *testing.T) {
	good := map[string]uint64{
		"0": 0, "1": 1, "65535": 65535, "18446744073709551615": 1<<64 - 1,
		"0x0": 0, "0XfF": 255, "0x00ff": 255, "0xffffffffffffffff": 1<<64 - 1,
	}
	for s, want := range good {
		if got, err := parseNumber(s); err != nil || got != want {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	bad := []string{
		"", " 1", "1 ", "+1", "-1", "1_0", "0x", "0x1_0", "0x-1", "0b1", "0o7", "007", "1.5", "1~2", "ten",
		"18446744073709551616", "0x10000000000000000",
	}
	for _, s := range bad {
		if got, err := parseNumber(s); !errors.Is(err, errText) {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
}

func TestParseBinary(t *testing.T) {
	whole := bytes.Repeat([]byte{0xa5}, maxBinary)
	good := map[string][]byte{
		"0x00":              {0},
		"0XDeadBeef":        {0xde, 0xad, 0xbe, 0xef},
		"0b3q2+7w==":        {0xde, 0xad, 0xbe, 0xef},
		"0BAAAA":            {0, 0, 0},
		formatBinary(whole): whole,
	}
	for s, want := range good {
		if got, err := parseBinary(s); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%.20s: %x, %v", s, got, err)
		}
	}
	bad := []string{
		"", "0", "0x", "0b", "00", "17", "0xf", "0xabc", "0xzz", "0x00 ", "0b3q2+7w", "0b3q2+7w=", "0b3q2+7x==", "0b3q2-7w==",
		"0bAA AA", formatBinary(append(whole, 0)),
	}
	for _, s := range bad {
		if got, err := parseBinary(s); !errors.Is(err, errText) {
			t.Errorf("%.20q: %x, %v", s, got, err)
		}
	}
}

func TestParseList(t *testing.T) {
	longest := strings.Repeat("v", maxListItem)
	for s, want := range map[string][]string{"None": {"None"}, "CRC32C,None": {"CRC32C", "None"}, longest: {longest}} {
		if got, err := parseList(s); err != nil || !slices.Equal(got, want) {
			t.Errorf("%.20s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", ",", "None,", ",None", "a,,b", longest + "v"} {
		if got, err := parseList(s); !errors.Is(err, errText) {
			t.Errorf("%.20q: %v, %v", s, got, err)
		}
	}
}

func TestCheckName(t *testing.T) {
	good := []string{
		testInitiator, "iqn.1991-05.com.microsoft:win-host", "eui.02004567A425678D", "naa.52004567BA64678D",
		"iqn.2001-04.com.example:" + strings.Repeat("x", maxName-24),
	}
	for _, s := range good {
		if err := checkName(s); err != nil {
			t.Error(err)
		}
	}
	bad := []string{
		"", "node1", "IQN.2001-04.com.example", "iqn", "iqn.2001-04.com.example:a b", "iqn.2001-04.com.example:a\n",
		"iqn.2001-04.com.example:a\x7f", "iqn.2001-04.com.example:a,b", "iqn.2001-04.com.example:a=b",
		"iqn.2001-04.com.example:" + strings.Repeat("x", maxName-23),
	}
	for _, s := range bad {
		if err := checkName(s); !errors.Is(err, errText) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// What parseText takes, appendText gives back, and it is within its bounds.
func FuzzParseText(f *testing.F) {
	f.Add([]byte("InitiatorName=iqn.2026-11.dev.troupe:a\x00AuthMethod=CHAP,None\x00"))
	f.Add([]byte("A=b\x00A=c\x00"))
	f.Add([]byte("SendTargets=\x00\x00\x00"))
	f.Add([]byte("=\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		pairs, err := parseText(b)
		if err != nil {
			if !errors.Is(err, errText) || len(pairs) != 0 {
				t.Fatalf("%v, %v", pairs, err)
			}
			return
		}
		var again []byte
		for _, p := range pairs {
			if p.key == "" || len(p.key) > maxKey || len(p.value) > maxValue {
				t.Fatalf("out of bounds: %q", p)
			}
			again = appendText(again, p.key, p.value)
		}
		if len(pairs) > maxPairs || !bytes.Equal(bytes.TrimRight(b, "\x00"), bytes.TrimRight(again, "\x00")) {
			t.Fatalf("%q became %q", b, again)
		}
	})
}

// Values of all kinds are refused or mean what they say.
func FuzzParseValues(f *testing.F) {
	for _, s := range []string{"0x1f", "0b3q2+7w==", "262144", "CRC32C,None", "007", "0x", testInitiator} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if b, err := parseBinary(s); err == nil {
			again, err := parseBinary(formatBinary(b))
			if err != nil || !bytes.Equal(again, b) || len(b) > maxBinary {
				t.Fatalf("%q: %x became %x, %v", s, b, again, err)
			}
		}
		if list, err := parseList(s); err == nil && strings.Join(list, ",") != s {
			t.Fatalf("%q became %q", s, list)
		}
		if n, err := parseNumber(s); err == nil && n > 9 && len(s) < 2 {
			t.Fatalf("%q became %d", s, n)
		}
		if err := checkName(s); err == nil && len(s) > maxName {
			t.Fatalf("%q is a name", s)
		}
	})
}
