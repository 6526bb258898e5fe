package cache

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// keepFlags are the flags of an inode that keep even root from removing it: FS_IMMUTABLE_FL and FS_APPEND_FL of
// ioctl_iflags(2), chattr's +i and +a.
const keepFlags = 0x10 | 0x20

// removeAll removes a file, or a directory with all that is in it. What a role made immutable (many do that to
// resolv.conf) is its own business as long as its node delta is kept, and no longer.
func removeAll(path string) error {
	err := os.RemoveAll(path)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	// An error of the walk is one of the removal, too, which says it.
	_ = filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err == nil && (d.IsDir() || d.Type().IsRegular()) {
			_ = release(p)
		}
		return nil
	})
	return os.RemoveAll(path)
}

// release clears the flags of a regular file or directory that keep it from being removed. Only these two kinds have
// flags; a device is not opened here.
func release(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err != nil || flags&keepFlags == 0 {
		return err
	}
	return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags&^keepFlags))
}
