package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// distrust is the name of the file that says that no image was hashed since the file system was repaired.
const distrust = "verify"

// Distrust notes, in the cache's directory, that its file system was repaired: no name says any more that an image is
// whole. The note is on the disk when this returns, and stays until a Recover comes to its end, in whichever boot.
func Distrust(dir string) error {
	if err := atomicfile.WriteFile(filepath.Join(dir, distrust), nil, 0o600); err != nil {
		return fmt.Errorf("noting that the cache was repaired: %w", err)
	}
	return nil
}

// IsDistrusted says whether a Recover is due.
func (c *Cache) IsDistrusted() bool {
	_, err := os.Stat(c.path(distrust))
	return !errors.Is(err, fs.ErrNotExist)
}

// Recovered is what Recover took away.
type Recovered struct {
	Images int // that were not what their names say
	Lost   int // files and directories that had no name any more, in lost+found
}

// Recover looks through what a repair of the file system left. What lost its name goes: it takes room, images can be
// fetched again, and nobody looks for it on a machine that boots by itself. All images are hashed, and those go that are
// not what they were. After an error the next boot begins again.
func (c *Cache) Recover() (Recovered, error) {
	var out Recovered
	var err error
	if out.Lost, err = c.emptyLost(); err != nil {
		return out, err
	}
	if out.Images, err = c.verifyAll(); err != nil {
		return out, err
	}
	if err := os.Remove(c.path(distrust)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return out, fmt.Errorf("noting that the images of the cache are whole: %w", err)
	}
	return out, atomicfile.SyncDir(c.dir)
}

// emptyLost removes what e2fsck(8) found without a name, and returns how much that was. The directory itself stays: it
// has the blocks that a repair needs on a full disk.
func (c *Cache) emptyLost() (int, error) {
	entries, err := os.ReadDir(c.path("lost+found"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("listing what lost its name: %w", err)
	}
	gone := 0
	for _, e := range entries {
		if err := removeAll(c.path("lost+found", e.Name())); err != nil {
			c.log.Error("what lost its name cannot be removed, and takes room", "name", e.Name(), "error", err)
			continue
		}
		gone++
	}
	return gone, nil
}

// verifyAll hashes all images again, takes those out of the cache that are not what they were, and returns how many.
func (c *Cache) verifyAll() (int, error) {
	all, err := c.List()
	if err != nil {
		return 0, err
	}
	gone := 0
	var errs []error
	for _, d := range all {
		ok, err := c.Verify(d)
		if err == nil && !ok {
			c.log.Error("an image in the cache is broken and is fetched again", "digest", d.Short())
			if err = c.RemoveImage(d); err == nil {
				gone++
			}
		}
		errs = append(errs, err)
	}
	return gone, errors.Join(errs...)
}

// Verify hashes an image again, and says whether it is what its name says.
func (c *Cache) Verify(d digest.Digest) (bool, error) {
	f, err := os.Open(c.Path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("verifying image %s: %w", d.Short(), err)
	}
	defer f.Close()
	got, _, err := digest.FromReader(f)
	// A disk that cannot read the file back has lost it, too.
	return err == nil && got == d, nil
}

// RemoveImage takes an image out of the cache, because it turned out to be broken. What has its name may be anything: a
// damaged inode can have any flag, or be a directory.
func (c *Cache) RemoveImage(d digest.Digest) error {
	if err := removeAll(c.Path(d)); err != nil {
		return fmt.Errorf("removing a broken image: %w", err)
	}
	return atomicfile.SyncDir(filepath.Dir(c.Path(d)))
}
