package rootfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Copy copies what the directory from has into the directory to, which is there and empty, with owners, modes, times and extended
// attributes, those of overlayfs left out. from is a directory of root, which may be an overlay: links on the way to it are followed as a
// process with that root would. Sockets are left out: whoever made them makes them again. A directory that is not there is an empty one.
func Copy(root, from, to string) error {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening %q: %w", root, err)
	}
	defer unix.Close(fd)
	dir, err := openIn(fd, from)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("copying %q: %w", from, err)
	}
	defer unix.Close(dir)
	source := procPath(dir)
	err = filepath.WalkDir(source+"/.", func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(source, name)
		if err != nil {
			return err
		}
		return copyEntry(name, filepath.Join(to, rel))
	})
	if err != nil {
		return fmt.Errorf("copying %q: %w", from, err)
	}
	return nil
}

// Bind mounts a directory at a path of root, made where it is not there. Links on the way are followed as a process with that root would.
func Bind(root, path, dir string) error {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening %q: %w", root, err)
	}
	defer unix.Close(fd)
	at, err := makeDirs(fd, path)
	if err != nil {
		return fmt.Errorf("mounting on %q: %w", path, err)
	}
	defer unix.Close(at)
	if err := unix.Mount(dir, procPath(at), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting on %q: %w", path, err)
	}
	return nil
}

// Unbind takes down what Bind mounted; a path on which nothing is mounted is left as it is.
func Unbind(root, path string) error {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening %q: %w", root, err)
	}
	defer unix.Close(fd)
	at, err := openIn(fd, path)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmounting %q: %w", path, err)
	}
	name, err := os.Readlink(procPath(at)) // a descriptor would keep the mount busy
	unix.Close(at)
	if err != nil {
		return fmt.Errorf("unmounting %q: %w", path, err)
	}
	return unmount(name)
}

func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func copyEntry(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return err
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err = os.Mkdir(to, 0o700); errors.Is(err, fs.ErrExist) {
			err = nil
		}
	case unix.S_IFREG:
		err = copyFile(from, to)
	case unix.S_IFLNK:
		var target string
		if target, err = os.Readlink(from); err == nil {
			err = os.Symlink(target, to)
		}
	case unix.S_IFSOCK:
		return nil
	default:
		err = unix.Mknod(to, st.Mode, int(st.Rdev)) //nolint:gosec // 32 bits are what the kernel has
	}
	if err != nil {
		return err
	}
	return copyAttributes(from, to, &st)
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// copyAttributes gives a copy what it has beside its content. A directory's times change again with what is copied into it.
func copyAttributes(from, to string, st *unix.Stat_t) error {
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, to, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

func copyXattrs(from, to string) error {
	const most = 64 << 10 // XATTR_LIST_MAX and XATTR_SIZE_MAX of Linux
	buf := make([]byte, most)
	n, err := unix.Llistxattr(from, buf)
	if errors.Is(err, syscall.ENOTSUP) {
		return nil
	}
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, most)
		n, err := unix.Lgetxattr(from, name, value)
		if err == nil {
			err = unix.Lsetxattr(to, name, value[:n], 0)
		}
		if err != nil {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
	}
	return nil
}
