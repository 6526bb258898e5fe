package chunks_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/chunks"
	"github.com/troupe-dev/troupe/images/store"
)

func TestWhatIsMissingIsMadeAgain(t *testing.T) {
	s, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	content := make([]byte, 300_000)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	blob, err := s.Put(t.Context(), bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	img := images.Image{Blob: blob, Data: blob.Size}
	if img.Chunks, err = chunks.Make(t.Context(), s, bytes.NewReader(content), img.Data); err != nil {
		t.Fatal(err)
	}
	all, err := chunks.Blobs(t.Context(), s, img)
	if err != nil || len(all) != 3 || all[0] != img.Chunks {
		t.Fatalf("the files are %v, %v", all, err)
	}
	var k chunks.Keeper
	if made, err := k.Keep(t.Context(), s, img); made || err != nil {
		t.Errorf("with all there: %v, %v", made, err)
	}
	for _, b := range all {
		if err := s.Delete(t.Context(), b.Digest); err != nil {
			t.Fatal(err)
		}
		if made, err := k.Keep(t.Context(), s, img); !made || err != nil {
			t.Errorf("without %s: %v, %v", b.Digest.Short(), made, err)
		}
		if got, err := s.Stat(t.Context(), b.Digest); err != nil || got != b {
			t.Errorf("%s was not made again: %v", b.Digest.Short(), err)
		}
	}
	// Of an image whose index nobody here can make, nothing is tried twice.
	other := img
	other.Chunks = blob
	if _, err := k.Keep(t.Context(), s, other); err == nil {
		t.Error("an index of another version was kept")
	}
	if made, err := k.Keep(t.Context(), s, other); made || err != nil {
		t.Errorf("again: %v, %v", made, err)
	}
	if all, err := chunks.Blobs(t.Context(), s, images.Image{Blob: blob}); err != nil || cmp.Diff([]images.Blob(nil), all) != "" {
		t.Errorf("of an image without an index: %v, %v", all, err)
	}
}
