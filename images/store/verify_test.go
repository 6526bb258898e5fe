package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/troupe-dev/troupe/internal/digest"
)

// A Range request must not hash an image again that was hashed before, and a new process must.
func TestOpenHashesOnce(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Put(t.Context(), bytes.NewReader(make([]byte, 1000)))
	if err != nil {
		t.Fatal(err)
	}
	if !hashed(t, s, b.Digest) {
		t.Error("what the process wrote itself is not remembered")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if hashed(t, s, b.Digest) {
		t.Error("a new process believes a file that it never read")
	}
	if _, err := s.Stat(t.Context(), b.Digest); err != nil {
		t.Fatal(err)
	}
	if !hashed(t, s, b.Digest) {
		t.Error("what was hashed is not remembered")
	}
	s.doubt(b.Digest)
	if hashed(t, s, b.Digest) {
		t.Error("what a whole read found wrong is still believed")
	}
}

// hashed says whether Open would serve d's file without hashing it.
func hashed(t *testing.T, s *Store, d digest.Digest) bool {
	t.Helper()
	f, fi, err := s.openFile(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	e := s.blobs[d]
	return e != nil && s.knows(e, identOf(fi))
}

// Digests that strangers ask for must not stay in memory.
func TestUnknownDigestsAreForgotten(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 100 {
		if _, err := s.Open(t.Context(), digest.Of(fmt.Append(nil, i))); !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
	}
	if len(s.blobs) != 0 {
		t.Errorf("%d entries are left", len(s.blobs))
	}
}

// Whoever waits for a blob that another one hashes can give up, and leaves nothing.
func TestWaitingCanEnd(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	d := digest.Of(nil)
	e, err := s.acquire(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Stat(ctx, d); !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v", err)
	}
	s.release(d, e)
	if len(s.blobs) != 0 {
		t.Errorf("%d entries are left", len(s.blobs))
	}
}
