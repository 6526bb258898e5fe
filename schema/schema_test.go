package schema

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestEmptied(t *testing.T) {
	some := &Fleet{Hosts: map[string]Host{"n1": {}, "n2": {}}}
	for _, tc := range []struct {
		name     string
		old, new *Fleet
		refused  bool
	}{
		{"first fleet", nil, &Fleet{}, false},
		{"empty before", &Fleet{}, &Fleet{}, false},
		{"emptied", some, &Fleet{}, true},
		{"emptied and meant", some, &Fleet{AllowEmpty: true}, false},
		{"one is left", some, &Fleet{Hosts: map[string]Host{"n2": {}}}, false},
	} {
		if err := Emptied(tc.old, tc.new); (err != nil) != tc.refused {
			t.Errorf("%s: error %v, want refused %v", tc.name, err, tc.refused)
		}
	}
	if got, want := Emptied(some, &Fleet{}).Error(), "allowEmpty: true"; !strings.Contains(got, want) {
		t.Errorf("error %q does not say how to mean it: want %q in it", got, want)
	}
}

func FuzzRange(f *testing.F) {
	for _, s := range []string{"", "10.77.0.100-10.77.0.199", "10.0.0.2 - 10.0.0.1", "::1-::2", "10.0.0.1-::2", "-", "1-2-3", "fe80::1%a-fe80::1%b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var r Range
		if err := r.UnmarshalText([]byte(s)); err != nil {
			if r != (Range{}) {
				t.Errorf("range %q: error %v, and yet the value %v", s, err, r)
			}
			return
		}
		if r.IsZero() {
			if s != "" {
				t.Errorf("range %q became the empty range", s)
			}
			return
		}
		if !r.Contains(r.First) || !r.Contains(r.Last) {
			t.Errorf("range %q does not contain its own ends", s)
		}
		text, err := r.MarshalText()
		var back Range
		if err != nil || back.UnmarshalText(text) != nil || back != r {
			t.Errorf("range %q was written as %q (%v), which reads as %v", s, text, err, back)
		}
	})
}

func FuzzDuration(f *testing.F) {
	for _, s := range []string{"1h", "1h30m", "-5s", "9999999999h", "1.5ms", "", "h", "1h-1m"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var d Duration
		if err := d.UnmarshalText([]byte(s)); err != nil {
			if d != 0 {
				t.Errorf("duration %q: error %v, and yet the value %v", s, err, time.Duration(d))
			}
			return
		}
		text, err := d.MarshalText()
		var back Duration
		if err != nil || back.UnmarshalText(text) != nil || back != d {
			t.Errorf("duration %q was written as %q (%v), which reads as %v", s, text, err, time.Duration(back))
		}
	})
}

func TestRangeContains(t *testing.T) {
	var r Range
	if err := r.UnmarshalText([]byte("10.0.0.10-10.0.0.20")); err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]bool{"10.0.0.9": false, "10.0.0.10": true, "10.0.0.15": true, "10.0.0.20": true, "10.0.0.21": false} {
		if got := r.Contains(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s in 10.0.0.10-10.0.0.20: got %v, want %v", addr, got, want)
		}
	}
	if (Range{}).Contains(netip.MustParseAddr("10.0.0.1")) {
		t.Error("the empty range contains 10.0.0.1")
	}
}
