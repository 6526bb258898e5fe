package store_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/troupe-dev/troupe/images/store"
)

// benchSize is that of an OS base, about.
const benchSize = 200 << 20

func BenchmarkPut(b *testing.B) {
	s, err := store.Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data := content(1, benchSize)
	b.SetBytes(benchSize)
	for b.Loop() {
		blob, err := s.Put(b.Context(), bytes.NewReader(data))
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Delete(b.Context(), blob.Digest); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRange is a request for 64 KiB out of an image: what it costs above the read must not depend on the image.
func BenchmarkRange(b *testing.B) {
	s, err := store.Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	blob, err := s.Put(b.Context(), bytes.NewReader(content(1, benchSize)))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		r, err := s.Open(b.Context(), blob.Digest)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := r.Seek(benchSize/2, io.SeekStart); err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, r, 64<<10); err != nil {
			b.Fatal(err)
		}
		if err := r.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	s, err := store.Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	blob, err := s.Put(b.Context(), bytes.NewReader(content(1, benchSize)))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(benchSize)
	for b.Loop() {
		if err := s.Verify(b.Context(), blob.Digest); err != nil {
			b.Fatal(err)
		}
	}
}
