package cache

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// spareSize is what a record of a release needs on the disk while the old one is still there, in bytes.
const spareSize = 1 << 20

// keepSpare makes the spare file where it is missing, or smaller than it should be; of a disk that is full it takes what
// there is.
func (c *Cache) keepSpare() error {
	name := c.path("spare")
	if fi, err := os.Stat(name); err == nil && fi.Size() == spareSize {
		return nil
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("setting %d KiB aside for the cache's records: %w", spareSize>>10, err)
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
	return fmt.Errorf("setting %d KiB aside for the cache's records: %w", spareSize>>10, err)
}
