package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/verity"
)

// ErrRotten is in the chain of the error about an image that is not what it should be, and could not be mended.
var ErrRotten = errors.New("image is damaged")

// Damage counts what the disk of the cache lost.
type Damage struct {
	Blocks int64         `json:"blocks"` // of 4096 bytes, that were wrong or could not be read
	Mended int64         `json:"mended"` // of these
	Image  digest.Digest `json:"image"`  // the last image with such a block
	When   time.Time     `json:"when"`   // it was found, by the node's own clock
}

// mendRounds is how often an image is checked and mended before it is given up. A block of the tree hides what is below
// it until it is mended, and a tree has at most five levels.
const mendRounds = 8

// Scrub reads an image from the disk, block by block, and fetches those from src that are not what the root hash says. It
// returns how many those were; they are counted in the State. The file is written in place: whoever has it mounted reads
// the right bytes from then on. A nil src mends nothing.
func (c *Cache) Scrub(ctx context.Context, img agentapi.Image, src Source) (int, error) {
	root, err := verity.ParseRoot(img.Root)
	if err != nil {
		return 0, fmt.Errorf("checking image %s: %w", img.Digest.Short(), err)
	}
	f, err := openDirect(c.Path(img.Digest))
	if err != nil {
		return 0, fmt.Errorf("checking image %s: %w", img.Digest.Short(), err)
	}
	defer f.Close()
	tree, err := verity.Open(f, img.Data, root)
	if err != nil {
		return 0, fmt.Errorf("checking image %s: %w", img.Digest.Short(), err)
	}
	found := map[int64]bool{}
	for range mendRounds {
		bad, err := tree.Check(ctx, 0, tree.Blocks())
		if err != nil {
			return len(found), err
		}
		if len(bad) == 0 {
			return len(found), c.count(img.Digest, 0, len(found))
		}
		fresh := 0
		for _, b := range bad {
			if !found[b.Block] {
				found[b.Block] = true
				fresh++
			}
		}
		if err := c.count(img.Digest, fresh, 0); err != nil {
			return len(found), err
		}
		c.log.Error("blocks of an image are damaged", "image", img.Digest.Short(), "blocks", len(bad), "first", bad[0].Block, "error", bad[0].Err)
		if src == nil {
			break
		}
		if err := mend(ctx, f, img, bad, src); err != nil {
			return len(found), fmt.Errorf("%w: mending image %s: %w", ErrRotten, img.Digest.Short(), err)
		}
	}
	return len(found), fmt.Errorf("%w: %s has %d damaged blocks", ErrRotten, img.Digest.Short(), len(found))
}

// count adds to the Damage. It is on the disk when this returns.
func (c *Cache) count(image digest.Digest, blocks, mended int) error {
	if blocks == 0 && mended == 0 {
		return nil
	}
	return c.SetState(func(s *State) {
		s.Damage.Blocks += int64(blocks)
		s.Damage.Mended += int64(mended)
		if blocks > 0 {
			s.Damage.Image, s.Damage.When = image, time.Now()
		}
	})
}

// mend writes what src has over the bad blocks, those that lie side by side at once.
func mend(ctx context.Context, f *directFile, img agentapi.Image, bad []verity.Bad, src Source) error {
	slices.SortFunc(bad, func(a, b verity.Bad) int { return int(a.Block - b.Block) })
	for len(bad) > 0 {
		n := 1
		for n < len(bad) && n < directBlocks && bad[n].Block == bad[0].Block+int64(n) {
			n++
		}
		part := make([]byte, n*verity.BlockSize)
		if err := fetchRange(ctx, part, img, bad[0].Block*verity.BlockSize, src); err != nil {
			return err
		}
		if _, err := f.WriteAt(part, bad[0].Block*verity.BlockSize); err != nil {
			return err
		}
		bad = bad[n:]
	}
	return f.Sync()
}

// fetchRange fills b with the bytes of an image from offset on. What they are is for the next check to say.
func fetchRange(ctx context.Context, b []byte, img agentapi.Image, offset int64, src Source) error {
	ctx, cancel := context.WithTimeout(ctx, stallAfter)
	defer cancel()
	body, at, err := src.Blob(ctx, img.Digest, offset)
	if err != nil {
		return err
	}
	defer body.Close()
	if at != offset { // a server without Range
		if _, err := io.CopyN(io.Discard, body, offset-at); err != nil {
			return err
		}
	}
	_, err = io.ReadFull(body, b)
	return err
}

// directBlocks is how many blocks a directFile reads at once.
const directBlocks = 64

// A directFile is read and written without the page cache, whole blocks at a time: what is in memory says nothing about
// what is on the disk. A file system that cannot do that, tmpfs, has nothing on a disk.
type directFile struct {
	*os.File
	buf []byte // aligned to a block
}

func openDirect(path string) (*directFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		f, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	if err != nil {
		return nil, err
	}
	b := make([]byte, (directBlocks+1)*verity.BlockSize)
	skip := -uintptr(unsafe.Pointer(&b[0])) % verity.BlockSize
	return &directFile{File: f, buf: b[skip:][:directBlocks*verity.BlockSize]}, nil
}

// ReadAt reads at most directBlocks blocks.
func (f *directFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(f.buf[:len(p)], off)
	copy(p, f.buf[:n])
	return n, err
}

// WriteAt writes at most directBlocks blocks.
func (f *directFile) WriteAt(p []byte, off int64) (int, error) {
	return f.File.WriteAt(f.buf[:copy(f.buf, p)], off)
}
