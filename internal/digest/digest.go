// Package digest names bytes by their SHA-256, in the form that OCI uses: "sha256:" and 64 lower-case hex digits
// (OCI image specification, descriptor.md, "Digests").
package digest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
)

// Prefix is the algorithm part of every digest, with its colon.
const Prefix = "sha256:"

// ErrMismatch is in the chain of every error that says that bytes are not what their digest names.
var ErrMismatch = errors.New("digest mismatch")

// A Digest is the name of some bytes. The zero value names nothing. A non-empty Digest that came from this package
// is well formed: its hex part may be used as a file name.
type Digest string

// Parse takes "sha256:<64 lower-case hex digits>" and nothing else.
func Parse(s string) (Digest, error) {
	hexpart, ok := strings.CutPrefix(s, Prefix)
	if !ok {
		return "", fmt.Errorf("digest %q: does not start with %q", s, Prefix)
	}
	d, err := FromHex(hexpart)
	if err != nil {
		return "", fmt.Errorf("digest %q: %w", s, err)
	}
	return d, nil
}

// FromHex takes the 64 lower-case hex digits alone, as they stand in file names and URLs.
func FromHex(s string) (Digest, error) {
	if len(s) != 2*sha256.Size {
		return "", fmt.Errorf("has %d hex digits, want %d", len(s), 2*sha256.Size)
	}
	if strings.Trim(s, "0123456789abcdef") != "" {
		return "", errors.New("has other characters than 0-9a-f")
	}
	return Digest(Prefix + s), nil
}

// Of is the digest of b.
func Of(b []byte) Digest {
	sum := sha256.Sum256(b)
	return Digest(Prefix + hex.EncodeToString(sum[:]))
}

// FromReader reads r to its end and returns the digest of what it read, and how many bytes that were.
func FromReader(r io.Reader) (Digest, int64, error) {
	h := NewHash()
	n, err := io.Copy(h, r)
	if err != nil {
		return "", n, err
	}
	return h.Digest(), n, nil
}

// Hex is the digest without its prefix; "" for the zero Digest.
func (d Digest) Hex() string { return strings.TrimPrefix(string(d), Prefix) }

// Short is the first twelve hex digits, for people.
func (d Digest) Short() string {
	h := d.Hex()
	if len(h) > 12 {
		return h[:12]
	}
	return h
}

func (d Digest) String() string { return string(d) }

// UnmarshalText refuses a malformed digest, so that JSON from outside cannot bring one in. Empty text is the zero Digest.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*d = ""
		return nil
	}
	p, err := Parse(string(b))
	if err != nil {
		return err
	}
	*d = p
	return nil
}

// A Hash computes a Digest of what is written to it.
type Hash struct{ h hash.Hash }

// NewHash is a Hash to which nothing was written.
func NewHash() Hash { return Hash{sha256.New()} }

func (h Hash) Write(p []byte) (int, error) { return h.h.Write(p) }

// Digest is the digest of all that was written so far.
func (h Hash) Digest() Digest { return Digest(Prefix + hex.EncodeToString(h.h.Sum(nil))) }

// VerifyReader passes r through and, where io.EOF would come, returns an error that wraps ErrMismatch if the bytes
// were not those that want names, or were not size bytes long. A size below zero is not checked.
func VerifyReader(r io.Reader, want Digest, size int64) io.Reader {
	return &verifyReader{r: r, h: NewHash(), want: want, size: size}
}

type verifyReader struct {
	r    io.Reader
	h    Hash
	n    int64
	want Digest
	size int64
}

func (v *verifyReader) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	_, _ = v.h.Write(p[:n]) // a hash.Hash never returns an error
	v.n += int64(n)
	if v.size >= 0 && v.n > v.size {
		return n, fmt.Errorf("%w: got more than %d bytes for %s", ErrMismatch, v.size, v.want)
	}
	if !errors.Is(err, io.EOF) {
		return n, err
	}
	if v.size >= 0 && v.n != v.size {
		return n, fmt.Errorf("%w: got %d bytes of %d for %s", ErrMismatch, v.n, v.size, v.want)
	}
	if got := v.h.Digest(); got != v.want {
		return n, fmt.Errorf("%w: got %s, want %s", ErrMismatch, got, v.want)
	}
	return n, io.EOF
}
