package disk

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrHolds says that a LUN holds what nobody told a Maker to overwrite.
var ErrHolds = errors.New("it holds something else than a node disk")

// EnsureLUN returns the file system on a LUN that the server has for this machine alone: no other machine's disk can be
// taken for it, so nothing is searched, and no late disk is waited for. The file system lies on the whole of it, without
// a table. It is made where there is none, or where making it was broken off, which leaves unknown data; what has a name
// is not overwritten. Machine is to be nobody: whose the disk is, is the server's to say.
func (m Maker) EnsureLUN(ctx context.Context, path string, size int64) (Found, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Found{}, fmt.Errorf("looking at the node disk: %w", err)
	}
	holds, err := Identify(f, size)
	if err := errors.Join(err, f.Close()); err != nil {
		return Found{}, fmt.Errorf("looking at the node disk %s: %w", path, err)
	}
	switch holds {
	case Troupe, Damaged:
		return Found{Path: path}, nil
	case Blank, Unknown, Claimed:
	default:
		return Found{}, fmt.Errorf("node disk %s: %w: %s", path, ErrHolds, holds)
	}
	m.Log.Warn("making the node disk", "disk", path, "size_mib", size>>20, "holds", holds)
	found := Found{Path: path, Made: true}
	if holds != Blank {
		found.Note = "which held " + holds
	}
	return found, m.fill(context.WithoutCancel(ctx), path)
}

// Trim gives back the space of what was deleted in the file system at dir (ioctl FITRIM of linux/fs.h). A disk that takes
// nothing back is no error.
func Trim(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fitrim(f); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOTTY) {
		return fmt.Errorf("giving back the free space of %s: %w", dir, err)
	}
	return nil
}
