package rootfs

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// OpenDir opens the directory dir of root as a place to mount on, and makes what is missing of it with mode 0755. Symbolic links
// are followed as a process with that root would follow them (openat2(2), RESOLVE_IN_ROOT).
func OpenDir(root, dir string) (*os.File, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %q: %w", root, err)
	}
	defer unix.Close(fd)
	at, err := makeDirs(fd, dir)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(at), dir), nil
}
