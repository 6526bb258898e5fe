package cache

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/verity"
)

// treed is an image of 300 blocks with its tree.
func treed(t *testing.T, s *agentapitest.Server) (agentapi.Image, []byte) {
	t.Helper()
	const data = 300 * verity.BlockSize
	b := make([]byte, data+verity.Size(data))
	_, _ = rand.NewChaCha8([32]byte{2}).Read(b[:data]) // never fails
	root, err := verity.Write(bytes.NewReader(b[:data]), data, intoSlice(b))
	if err != nil {
		t.Fatal(err)
	}
	return agentapi.Image{Blob: s.Add(b), Data: data, Root: root.String()}, b
}

type intoSlice []byte

func (b intoSlice) WriteAt(p []byte, off int64) (int, error) { return copy(b[off:], p), nil }

// Bits that flip on the disk, in the data, in the superblock and in each level of the tree, are found, mended with those
// blocks from the server and no others, and counted for good.
func TestScrubMends(t *testing.T) {
	var s agentapitest.Server
	img, content := treed(t, &s)
	dir := t.TempDir()
	c := open(t, dir)
	last := len(content)/verity.BlockSize - 1
	bad := bytes.Clone(content)
	flipped := []int{0, 7, 8, 299, 300, 301, last}
	for _, block := range flipped {
		bad[block*verity.BlockSize+block] ^= 4
	}
	if err := os.WriteFile(c.Path(img.Digest), bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Scrub(t.Context(), img, nil); !errors.Is(err, ErrRotten) || n == 0 {
		t.Errorf("with nobody to ask: %d, %v", n, err)
	}
	before := c.State().Damage
	if n, err := c.Scrub(t.Context(), img, serve(t, &s)); err != nil || n != len(flipped) {
		t.Errorf("mended %d blocks, %v; want %d", n, err, len(flipped))
	}
	wantImage(t, c, img.Blob, content)
	d := open(t, dir).State().Damage
	if d.Blocks-before.Blocks != int64(len(flipped)) || d.Mended != int64(len(flipped)) || d.Image != img.Digest || d.When.IsZero() {
		t.Errorf("counted %+v after %+v", d, before)
	}
	if n, err := c.Scrub(t.Context(), img, nil); err != nil || n != 0 {
		t.Errorf("after that: %d, %v", n, err)
	}
}

// A server that has wrong bytes, too, does not make an image right.
func TestScrubIsNotFooled(t *testing.T) {
	var s agentapitest.Server
	img, content := treed(t, &s)
	c := open(t, t.TempDir())
	bad := bytes.Clone(content)
	bad[5000] ^= 1
	if err := os.WriteFile(c.Path(img.Digest), bad, 0o600); err != nil {
		t.Fatal(err)
	}
	var wrong agentapitest.Server
	path := t.TempDir() + "/wrong"
	if err := os.WriteFile(path, make([]byte, len(content)), 0o600); err != nil {
		t.Fatal(err)
	}
	wrong.AddFile(img.Digest, path)
	if _, err := c.Scrub(t.Context(), img, serve(t, &wrong)); !errors.Is(err, ErrRotten) {
		t.Errorf("mended by a wrong server: %v", err)
	}
	if d := c.State().Damage; d.Mended != 0 || d.Blocks != 1 {
		t.Errorf("counted %+v", d)
	}
}
