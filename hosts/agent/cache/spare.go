package cache

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/atomicfile"
)

// spareSize is what a state needs on the disk while the old one is still there, many times over, in bytes.
const spareSize = 256 << 10

// writeState writes state.json. Node deltas lie on the same file system, and what runs in them may fill it to the last
// block: then the spare file gives way. A node that cannot write its state could not even count its reboots.
func (c *Cache) writeState(b []byte) error {
	err := atomicfile.WriteFile(c.path("state.json"), b, 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		return err
	}
	if rmErr := os.Remove(c.path("spare")); rmErr != nil {
		return errors.Join(err, rmErr)
	}
	err = atomicfile.WriteFile(c.path("state.json"), b, 0o600)
	if spareErr := c.keepSpare(); spareErr != nil {
		c.log.Warn("the cache is full", "error", spareErr)
	}
	return err
}

// keepSpare makes the spare file where it is missing, or smaller than it should be; of a disk that is full it takes what
// there is.
func (c *Cache) keepSpare() error {
	name := c.path("spare")
	if fi, err := os.Stat(name); err == nil && fi.Size() == spareSize {
		return nil
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("setting %d KiB aside for the cache's state: %w", spareSize>>10, err)
	}
	defer f.Close()
	for size := int64(spareSize); size >= 4<<10; size /= 2 {
		if err = f.Truncate(0); err != nil {
			break
		}
		if err = unix.Fallocate(int(f.Fd()), 0, 0, size); err == nil {
			return f.Sync()
		}
	}
	return fmt.Errorf("setting %d KiB aside for the cache's state: %w", spareSize>>10, err)
}
