// Package rootfs makes a root file system out of images: two read-only EROFS images, mounted from block devices or from
// files through loop devices, each checked by dm-verity as it is read, and a writable directory above them, joined by overlayfs (Linux, Documentation/filesystems/overlayfs.rst).
package rootfs

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/dm"
	"github.com/troupe-dev/troupe/internal/verity"
)

// ErrImage is in the chain of the error about an image that the kernel does not mount: it may be broken.
var ErrImage = errors.New("image does not mount")

// An Image is a read-only image with its hash tree.
type Image struct {
	File string // or a block device
	Data int64  // bytes before the superblock of the tree
	// Root is the hash that every block is checked against; nil: none is checked, which is for images without a tree.
	Root *verity.Root
}

// A Spec says what to mount where. All mount points are made where they are not there.
type Spec struct {
	Base, Delta       Image
	BaseDir, DeltaDir string // where they are mounted
	Upper, Work       string // directories of the node delta, on one file system
	Root              string // where all of it is mounted together
}

// Mount mounts the images and the overlay. After an error nothing is mounted.
func Mount(s Spec) (err error) {
	var undo []string
	defer func() {
		if err != nil {
			for i := range undo {
				err = errors.Join(err, unmount(undo[len(undo)-1-i]))
			}
		}
	}()
	for _, m := range []struct {
		image Image
		dir   string
	}{{s.Base, s.BaseDir}, {s.Delta, s.DeltaDir}} {
		if err := MountImage(m.image, m.dir); err != nil {
			return err
		}
		undo = append(undo, m.dir)
	}
	if err := os.MkdirAll(s.Root, 0o755); err != nil {
		return err
	}
	opts := "lowerdir=" + s.DeltaDir + ":" + s.BaseDir + ",upperdir=" + s.Upper + ",workdir=" + s.Work
	if err := unix.Mount("troupe", s.Root, "overlay", 0, opts); err != nil {
		return fmt.Errorf("mounting the overlay on %s: %w", s.Root, err)
	}
	return nil
}

// Unmount takes down what Mount mounted.
func Unmount(s Spec) error {
	return errors.Join(unmount(s.Root), unmount(s.DeltaDir), unmount(s.BaseDir))
}

func unmount(dir string) error {
	if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it is no mount point
		return fmt.Errorf("unmounting %s: %w", dir, err)
	}
	return nil
}

// MountImage mounts an EROFS image on dir, read-only. The devices below the mount go with it.
func MountImage(img Image, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	dev, err := openDevice(img.File)
	if err != nil {
		return err
	}
	defer dev.Close() // the mount, or the device above, holds it from here on, and autoclear frees a loop device with that
	if img.Root == nil {
		return mountDevice(dev.Name(), img.File, dir)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(dev.Fd()), &st); err != nil {
		return fmt.Errorf("looking at %s: %w", dev.Name(), err)
	}
	d, err := dm.Open(dm.Image{Device: st.Rdev, Data: img.Data, Root: *img.Root})
	if err != nil {
		return fmt.Errorf("mounting %s: %w", img.File, err)
	}
	path, err := d.Path()
	if err == nil {
		err = mountDevice(path, img.File, dir)
	}
	return errors.Join(err, d.Release())
}

// openDevice opens a block device, or one that is made of a file.
func openDevice(file string) (*os.File, error) {
	fi, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if fi.Mode().Type() == os.ModeDevice { // a block device: one of characters has another bit, too
		return os.Open(file)
	}
	return attach(file)
}

func mountDevice(device, image, dir string) error {
	if err := unix.Mount(device, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("%w: %s on %s: %w", ErrImage, image, dir, err)
	}
	return nil
}

// attach gives a loop device the file, read-only, to be freed by itself with its last user.
func attach(file string) (*os.File, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("attaching a loop device: %w", err)
	}
	defer ctl.Close()
	for range 100 { // another process may take the number between the two calls
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("asking for a free loop device: %w", err)
		}
		loop, err := configure(fmt.Sprintf("/dev/loop%d", n), f)
		if errors.Is(err, unix.EBUSY) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("attaching %q to loop device %d: %w", file, n, err)
		}
		return loop, nil
	}
	return nil, fmt.Errorf("attaching %q to a loop device: %w", file, unix.EBUSY)
}

func configure(device string, f *os.File) (*os.File, error) {
	loop, err := os.OpenFile(device, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// Direct I/O: what the mounted image has in the page cache need not be there a second time as the file's.
	cfg := unix.LoopConfig{Fd: uint32(f.Fd())} //nolint:gosec // a descriptor is small
	cfg.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	err = unix.IoctlLoopConfigure(int(loop.Fd()), &cfg)
	if errors.Is(err, unix.EINVAL) { // the file system below knows no direct I/O
		cfg.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &cfg)
	}
	if err != nil {
		return nil, errors.Join(err, loop.Close())
	}
	return loop, nil
}
