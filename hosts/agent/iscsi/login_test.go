package iscsi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseText(t *testing.T) {
	got, err := parseText([]byte("A=1\x00B=\x00C=x=y\x00\x00\x00"))
	if diff := cmp.Diff(map[string]string{"A": "1", "B": "", "C": "x=y"}, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	for _, bad := range []string{"A", "=1", "A=1\x00A=2", strings.Repeat("k", 64) + "=1", strings.Repeat("\x00x", 3)} {
		if keys, err := parseText([]byte(bad)); err == nil {
			t.Errorf("%.80q is %v", bad, keys)
		}
	}
}

func TestTextHasABoundOfKeys(t *testing.T) {
	var b bytes.Buffer
	for i := range maxKeys + 1 {
		b.WriteString("K" + strings.Repeat("k", i%60) + string(rune('a'+i/60)) + "=1\x00")
	}
	if _, err := parseText(b.Bytes()); err == nil {
		t.Errorf("%d keys are taken, at most %d shall be", maxKeys+1, maxKeys)
	}
}

func TestParseBinary(t *testing.T) {
	for s, want := range map[string]string{"0xff00": "\xff\x00", "0Xabc": "\x0a\xbc", "0bAQID": "\x01\x02\x03", "0B/w==": "\xff"} {
		if got, err := parseBinary(s); err != nil || string(got) != want {
			t.Errorf("parseBinary(%q) = %x, %v, want %x", s, got, err, want)
		}
	}
	for _, bad := range []string{"", "0x", "12", "0zff", "0xgg", "0b!", "0x" + strings.Repeat("0", 2*maxBinary+2)} {
		if got, err := parseBinary(bad); err == nil {
			t.Errorf("parseBinary(%.20q) = %x", bad, got)
		}
	}
}

// The answers were made with md5sum and sha256sum.
func TestCHAPProof(t *testing.T) {
	for algorithm, want := range map[int]string{
		chapMD5:    "0x54d74bccafffca6e12d8c0baabaf9e24",
		chapSHA256: "0x40c55df0c5da1dcc3e7fbfbefdeb71dab5eb303bc390361093362695b9f45225",
	} {
		c := chap{algorithm: algorithm}
		if got := binaryValue(c.proof(39, "a secret of troupe", []byte("challenge"))); got != want {
			t.Errorf("algorithm %d: %s, want %s", algorithm, got, want)
		}
	}
}

func TestConclude(t *testing.T) {
	digests := map[string]string{"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}
	a, err := conclude(digests)
	if want := defaults(); a != want || err != nil {
		t.Errorf("with digests alone: %+v, %v, want %+v", a, err, want)
	}
	for key, value := range map[string]string{
		"MaxBurstLength": "16777216", "FirstBurstLength": "100", "MaxRecvDataSegmentLength": "0", "InitialR2T": "yes",
		"ErrorRecoveryLevel": "2", "MaxOutstandingR2T": "4", "HeaderDigest": "None", "DataDigest": "Reject", "TargetPortalGroupTag": "-1",
	} {
		keys := map[string]string{"HeaderDigest": "CRC32C", "DataDigest": "CRC32C", key: value}
		if a, err := conclude(keys); err == nil {
			t.Errorf("%s=%s is taken: %+v", key, value, a)
		}
	}
	digests["MaxBurstLength"], digests["FirstBurstLength"], digests["ImmediateData"] = "4096", "0x2000", "Irrelevant"
	if a, err = conclude(digests); err != nil || a.firstBurst != 4096 || !a.immediate {
		t.Errorf("got %+v, %v: the first burst is at most the longest one", a, err)
	}
}

func TestMoved(t *testing.T) {
	for text, want := range map[string]string{
		"10.77.0.9:3261,1": "10.77.0.9:3261", "10.77.0.9": "10.77.0.9:3260", "[fd00::1]:860,2": "[fd00::1]:860", "[fd00::1],1": "[fd00::1]:3260",
	} {
		var m *movedError
		if err := moved([]byte("TargetAddress=" + text + "\x00")); !errors.As(err, &m) || m.to != netip.MustParseAddrPort(want) {
			t.Errorf("%q leads to %v, want %s", text, err, want)
		}
	}
	var m *movedError
	for _, bad := range []string{"", "storage.example:3260", "10.77.0.9:0", ":3260"} {
		if err := moved([]byte("TargetAddress=" + bad + "\x00")); err == nil || errors.As(err, &m) {
			t.Errorf("%q leads to %v", bad, err)
		}
	}
}

// A scripted target answers with what stands in a file.
type scripted struct{ r *bytes.Reader }

func (s scripted) exchange(_ context.Context, req header, _ []byte) (header, []byte, error) {
	h, data, err := readPDU(s.r)
	if err == nil && h[0] == 0 { // the right answer, as far as a fuzzer need not find it
		flags := h[1]
		class := [2]byte(h[36:38])
		h = answerTo(req, true, 0)
		h[1] ^= flags
		copy(h[36:], class[:])
	}
	return h, data, err
}

func FuzzLogin(f *testing.F) {
	var good bytes.Buffer
	for _, text := range []string{
		"AuthMethod=CHAP", "CHAP_A=5\x00CHAP_I=1\x00CHAP_C=0x0011", "CHAP_N=troupe\x00CHAP_R=0x00", "HeaderDigest=CRC32C\x00DataDigest=CRC32C",
	} {
		if err := writePDU(&good, header{1: 0}, []byte(text+"\x00")); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(good.Bytes(), true)
	f.Add(good.Bytes(), false)
	f.Add(bytes.Repeat(append(make([]byte, 5), append([]byte{0, 0, 8, 64}, make([]byte, 60)...)...), 20), false)
	f.Fuzz(func(t *testing.T, b []byte, secure bool) {
		cfg := testConfig(netip.MustParseAddrPort("10.77.0.1:3260"))
		if !secure {
			cfg.User, cfg.Secret, cfg.MutualUser, cfg.MutualSecret = "", "", "", ""
		}
		l := login{cfg: cfg, wire: scripted{bytes.NewReader(b)}, rand: strings.NewReader(strings.Repeat("r", 100))}
		a, err := l.run(t.Context())
		if err != nil {
			return
		}
		if secure {
			t.Error("a script without the secret proved itself")
		}
		if a.maxXmit < 512 || a.maxXmit >= 1<<24 || a.maxBurst > maxBurst || a.firstBurst > a.maxBurst || a.maxR2T != 1 {
			t.Errorf("agreed on %+v", a)
		}
	})
}

func TestLoginEndsWithATargetThatNeverAgrees(t *testing.T) {
	for name, flags := range map[string]byte{"never transits": 0x80, "never ends its text": 0x80 | 0x40} {
		var script bytes.Buffer
		for range 20000 {
			if err := writePDU(&script, header{1: flags}, []byte("AuthMethod=None\x00")); err != nil {
				t.Fatal(err)
			}
		}
		cfg := testConfig(netip.MustParseAddrPort("10.77.0.1:3260"))
		cfg.User, cfg.Secret, cfg.MutualUser, cfg.MutualSecret = "", "", "", ""
		s := scripted{bytes.NewReader(script.Bytes())}
		l := login{cfg: cfg, wire: s, rand: strings.NewReader("")}
		if _, err := l.run(t.Context()); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("a target that %s: %v", name, err)
		}
	}
}
