package signing

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLoadMakesOneKeyForGood(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys", "release.key")
	first, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Load(path)
	if err != nil || again.Public() != first.Public() {
		t.Errorf("loaded again: %v, another key: %v", err, again.Public() != first.Public())
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

// A new key would be refused by all nodes: nobody makes one for a file that he cannot read.
func TestLoadRefusesADamagedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "release.key")
	for _, text := range []string{"", "AAAA", "no base64 at all"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); err == nil {
			t.Errorf("%q passes for a key", text)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != text {
			t.Errorf("the file was changed to %q: %v", b, err)
		}
	}
}

func TestVerify(t *testing.T) {
	one, other := newKey(t), newKey(t)
	payload := []byte("payload")
	sig := one.Sign(payload)
	keys, err := ParseKeys("# the old one\n" + other.Public() + "\n\n" + one.Public() + "\n")
	if err != nil || len(keys) != 2 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	if !keys.Verify(payload, sig) {
		t.Error("refused, with the key among those that are taken")
	}
	if again, err := ParseKeys(keys.String()); err != nil || again.Fingerprints() != keys.Fingerprints() {
		t.Errorf("%v, %v after a round", again, err)
	}
	for what, taken := range map[string]bool{
		"another key":       Keys{other.public()}.Verify(payload, sig),
		"no key":            Keys{}.Verify(payload, sig),
		"another payload":   keys.Verify([]byte("payloads"), sig),
		"another signature": keys.Verify(payload, append([]byte{sig[0] ^ 1}, sig[1:]...)),
		"half a signature":  keys.Verify(payload, sig[:32]),
		"no signature":      keys.Verify(payload, nil),
	} {
		if taken {
			t.Errorf("taken with %s", what)
		}
	}
	if !strings.Contains(keys.Fingerprints(), one.Fingerprint()) {
		t.Errorf("fingerprints %q have no %q", keys.Fingerprints(), one.Fingerprint())
	}
}

func newKey(t *testing.T) *Key {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func FuzzParseKeys(f *testing.F) {
	f.Add("AAAA")
	f.Add("#\n\nMCowBQYDK2VwAyEA\n")
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := ParseKeys(text)
		if err != nil {
			return
		}
		again, err := ParseKeys(keys.String())
		if err != nil || again.String() != keys.String() {
			t.Errorf("%q is read back as %q: %v", keys, again, err)
		}
	})
}
