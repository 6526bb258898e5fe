// Package signing signs what a server tells its nodes to run, with Ed25519 (RFC 8032), and verifies it. A key is known by
// a fingerprint: the first twelve hex digits of the SHA-256 of its public half.
package signing

import (
	"bufio"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/troupe-dev/troupe/internal/atomicfile"
)

// context is signed before each payload: a signature that was made for something else is none here.
const context = "troupe release manifest 1\n"

// A Key signs.
type Key struct{ private ed25519.PrivateKey }

// NewKey makes a key.
func NewKey() (*Key, error) {
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, fmt.Errorf("making a signing key: %w", err)
	}
	return &Key{private}, nil
}

// Load reads the key in a file, which holds its seed as a line of base64. Where there is no file it makes a key, which is
// on the disk when this returns. A file that is there and holds no key is an error: another key in its place would be
// refused by every node that runs.
func Load(path string) (*Key, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return create(path)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the signing key: %w", err)
	}
	seed, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("signing key %q is damaged: put it back from a copy, or remove it and reboot all nodes", path)
	}
	return &Key{ed25519.NewKeyFromSeed(seed)}, nil
}

func create(path string) (*Key, error) {
	k, err := NewKey()
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the signing key: %w", err)
	}
	text := base64.StdEncoding.EncodeToString(k.private.Seed()) + "\n"
	if err := atomicfile.WriteFile(path, []byte(text), 0o600); err != nil {
		return nil, fmt.Errorf("making the signing key: %w", err)
	}
	if err := atomicfile.SyncDir(filepath.Dir(dir)); err != nil {
		return nil, fmt.Errorf("making the signing key: %w", err)
	}
	return k, nil
}

// Sign signs a payload.
func (k *Key) Sign(payload []byte) []byte {
	return ed25519.Sign(k.private, append([]byte(context), payload...))
}

// Public is the public half, as ParseKeys reads it.
func (k *Key) Public() string { return base64.StdEncoding.EncodeToString(k.public()) }

// Fingerprint names the key.
func (k *Key) Fingerprint() string { return fingerprint(k.public()) }

func (k *Key) public() ed25519.PublicKey {
	return ed25519.PublicKey(k.private[ed25519.SeedSize:])
}

func fingerprint(public ed25519.PublicKey) string {
	sum := sha256.Sum256(public)
	return hex.EncodeToString(sum[:])[:12]
}

// Keys are those whose signatures are taken.
type Keys []ed25519.PublicKey

// maxKeys bounds how many keys a file may have: one, and some that it is to take the place of.
const maxKeys = 64

// ParseKeys reads one public key in base64 from each line; empty lines and those with # in front say nothing.
func ParseKeys(text string) (Keys, error) {
	var keys Keys
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		b, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(b) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("%.60q is no public key", line)
		}
		if keys = append(keys, b); len(keys) > maxKeys {
			return nil, fmt.Errorf("more than %d public keys", maxKeys)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("reading public keys: %w", err)
	}
	return keys, nil
}

// String is what ParseKeys reads.
func (k Keys) String() string {
	var b strings.Builder
	for _, public := range k {
		b.WriteString(base64.StdEncoding.EncodeToString(public) + "\n")
	}
	return b.String()
}

// Verify says whether one of the keys signed the payload.
func (k Keys) Verify(payload, signature []byte) bool {
	message := append([]byte(context), payload...)
	for _, public := range k {
		if ed25519.Verify(public, message, signature) {
			return true
		}
	}
	return false
}

// Fingerprints names the keys, for people.
func (k Keys) Fingerprints() string {
	var all []string
	for _, public := range k {
		all = append(all, fingerprint(public))
	}
	if all == nil {
		return "no key"
	}
	return strings.Join(all, ", ")
}
