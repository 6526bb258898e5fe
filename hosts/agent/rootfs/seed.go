package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// A File is a regular file to put into a root.
type File struct {
	Path     string // absolute
	Content  string
	Mode     uint32 // permission bits, and 0o7000
	UID, GID uint32
	// KeepLink leaves a symbolic link with that name as it is: who made it has a program of its own that writes there.
	KeepLink bool
}

// Seed writes files into the tree below root, which may be an overlay: directories that are there keep what they are,
// those that are not are made with mode 0755. Symbolic links on the way are followed as a process with that root would
// follow them, so that nothing outside it can be reached (openat2(2), RESOLVE_IN_ROOT).
func Seed(root string, files []File) error {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening %q: %w", root, err)
	}
	defer unix.Close(fd)
	for _, f := range files {
		if err := seedOne(fd, f); err != nil {
			return fmt.Errorf("writing %q of the node: %w", f.Path, err)
		}
	}
	return nil
}

func seedOne(root int, f File) error {
	if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || strings.ContainsRune(f.Path, 0) {
		return errors.New("not an absolute path of a file")
	}
	dir, err := makeDirs(root, path.Dir(f.Path))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	name := path.Base(f.Path)
	var st unix.Stat_t
	err = unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return unix.EISDIR
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK && f.KeepLink:
		return nil
	case err != nil && !errors.Is(err, unix.ENOENT):
		return err
	}
	return replace(dir, name, f)
}

// replace writes beside name and renames: whatever name was, a link too, it is a regular file then.
func replace(dir int, name string, f File) error {
	const tmp = ".troupe-seed"
	if err := unix.Unlinkat(dir, tmp, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	fd, err := unix.Openat(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), name)
	_, err = file.WriteString(f.Content)
	// The owner comes before the mode: chown clears the set-user-ID bit.
	err = errors.Join(err, unix.Fchown(fd, int(f.UID), int(f.GID)), unix.Fchmod(fd, f.Mode&0o7777), file.Close())
	if err != nil {
		return err
	}
	return unix.Renameat(dir, tmp, dir, name)
}

// makeDirs opens a directory below root and makes what is missing of it.
func makeDirs(root int, dir string) (int, error) {
	fd, err := openIn(root, dir)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	parent, err := makeDirs(root, path.Dir(dir))
	if err != nil {
		return -1, err
	}
	defer unix.Close(parent)
	if err := unix.Mkdirat(parent, path.Base(dir), 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	return openIn(root, dir) // a link to nowhere is still not there, and is the error
}

func openIn(root int, dir string) (int, error) {
	fd, err := unix.Openat2(root, strings.TrimPrefix(dir, "/")+"/.", &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return -1, fmt.Errorf("directory %q: %w", dir, err)
	}
	return fd, nil
}
