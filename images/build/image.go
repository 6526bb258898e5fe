package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"time"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/chunks"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/verity"
)

// epoch is the SOURCE_DATE_EPOCH of every build, and the newest time that anything in an image has. It is fixed, not
// the archive's or the recipe's, so that the same packages give the same bytes on any day. Changing it changes every
// image: raise the formats in package images with it.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// An entry is a file of an image, of any kind.
type entry struct {
	mode   uint32 // as st_mode: kind and permissions
	uid    uint32
	gid    uint32
	mtime  time.Time
	rdev   uint32 // of devices, as the kernel's new_encode_dev
	target string // of symbolic links
	xattrs map[string]string
	open   func() (io.ReadCloser, error) // of regular files; nil for an empty one
}

func (e entry) kind() uint32  { return e.mode & unix.S_IFMT }
func (e entry) isDir() bool   { return e.kind() == unix.S_IFDIR }
func (e entry) isLink() bool  { return e.kind() == unix.S_IFLNK }
func (e entry) isWhite() bool { return e.kind() == unix.S_IFCHR && e.rdev == 0 }

// opaqueXattr on a directory of an overlayfs layer hides what the layers below have in it (kernel documentation,
// filesystems/overlayfs.rst, "whiteouts and opaque directories").
const opaqueXattr = "trusted.overlay.opaque"

func (e entry) isOpaque() bool { return e.xattrs[opaqueXattr] == "y" }

// An imageWriter writes an EROFS image into the store. It must be ended by commit or abort.
type imageWriter struct {
	blob *store.Writer
	out  *stoppable // to blob
	fs   *erofs.Writer
	seen map[string]bool

	store *store.Store // takes what is made for transfers of it
}

// A stoppable passes writes on until it is stopped.
type stoppable struct {
	io.WriteSeeker
	stopped bool
}

func (s *stoppable) Write(p []byte) (int, error) {
	if s.stopped {
		return 0, errors.New("writing an image that was given up")
	}
	return s.WriteSeeker.Write(p)
}

func (b *Builder) newImage(ctx context.Context, scratch string) (*imageWriter, error) {
	blob, err := b.Store.Create(ctx)
	if err != nil {
		return nil, err
	}
	out := &stoppable{WriteSeeker: blob}
	w := erofs.Create(out, erofs.WithTempDir(scratch), erofs.WithBuildTime(uint64(epoch.Unix()), 0)) //nolint:gosec // it is after 1970
	return &imageWriter{blob: blob, out: out, fs: w, seen: make(map[string]bool), store: b.Store}, nil
}

// add puts e at name, a clean path as of fs.FS. Nothing may come twice, and a directory comes before what is in it.
func (w *imageWriter) add(name string, e entry) error {
	if w.seen[name] {
		return fmt.Errorf("adding %q to the image: it is there already", name)
	}
	w.seen[name] = true
	if err := w.create(name, e); err != nil {
		return fmt.Errorf("adding %q to the image: %w", name, err)
	}
	return w.setAttributes(name, e)
}

func (w *imageWriter) create(name string, e entry) error {
	switch e.kind() {
	case unix.S_IFDIR:
		return w.fs.Mkdir(name, fs.FileMode(e.mode&0o777))
	case unix.S_IFLNK:
		return w.fs.Symlink(e.target, name)
	case unix.S_IFREG:
		return w.createFile(name, e)
	}
	return w.fs.Mknod(name, uint16(e.mode), e.rdev) //nolint:gosec // kind and permissions are 16 bits: inode(7)
}

func (w *imageWriter) createFile(name string, e entry) error {
	f, err := w.fs.Create(name)
	if err != nil {
		return err
	}
	if e.open != nil {
		r, err := e.open()
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
	}
	return f.Close()
}

func (w *imageWriter) setAttributes(name string, e entry) error {
	mtime := e.mtime
	if mtime.After(epoch) {
		mtime = epoch
	}
	err := w.fs.Chown(name, int(e.uid), int(e.gid))
	err = errors.Join(err, w.fs.Chtimes(name, mtime, mtime))
	if !e.isLink() {
		err = errors.Join(err, w.fs.Chmod(name, goMode(e.mode)))
	}
	for k, v := range e.xattrs {
		err = errors.Join(err, w.fs.Setxattr(name, k, v))
	}
	if err != nil {
		return fmt.Errorf("setting the attributes of %q in the image: %w", name, err)
	}
	return nil
}

// reopen reads again a regular file that was added before.
func (w *imageWriter) reopen(name string) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return w.fs.Open(path.Join("/", name)) }
}

// commit writes the image and its verity tree, and names it by its bytes. What nodes fetch of it is in the store before it is.
func (w *imageWriter) commit(ctx context.Context) (images.Image, error) {
	if err := w.fs.Close(); err != nil {
		return images.Image{}, errors.Join(fmt.Errorf("writing the image: %w", err), w.blob.Abort())
	}
	img, err := seal(w.blob)
	if err == nil {
		img.Chunks, err = chunks.Make(ctx, w.store, w.blob, img.Data)
	}
	if err != nil {
		return images.Image{}, errors.Join(err, w.blob.Abort())
	}
	img.Blob, err = w.blob.Commit()
	return img, err
}

// seal puts a verity tree behind the file system that was written to w. What was written is read once more: EROFS is
// not written from its start to its end.
func seal(w *store.Writer) (images.Image, error) {
	size, err := w.Seek(0, io.SeekEnd)
	if err != nil {
		return images.Image{}, fmt.Errorf("writing the image: %w", err)
	}
	data := verity.Padded(size)
	if err := w.Truncate(data); err != nil {
		return images.Image{}, fmt.Errorf("writing the image: %w", err)
	}
	root, err := verity.Write(io.NewSectionReader(w, 0, data), data, w)
	if err != nil {
		return images.Image{}, fmt.Errorf("writing the image: %w", err)
	}
	return images.Image{Data: data, Root: root.String()}, nil
}

// abort leaves nothing. After commit it does nothing.
func (w *imageWriter) abort() {
	w.out.stopped = true
	_ = w.fs.Close() // fails at its first write; it is how go-erofs lets go of its temporary file
	_ = w.blob.Abort()
}

// goMode turns the permissions of a st_mode into those of package fs.
func goMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	if mode&unix.S_ISUID != 0 {
		m |= fs.ModeSetuid
	}
	if mode&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if mode&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	return m
}

// unixMode is the st_mode of m: kind and permissions.
func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for _, c := range []struct {
		bit  fs.FileMode
		unix uint32
	}{
		{fs.ModeSetuid, unix.S_ISUID}, {fs.ModeSetgid, unix.S_ISGID}, {fs.ModeSticky, unix.S_ISVTX},
	} {
		if m&c.bit != 0 {
			mode |= c.unix
		}
	}
	return mode | unixKind(m)
}

func unixKind(m fs.FileMode) uint32 {
	switch m.Type() {
	case fs.ModeDir:
		return unix.S_IFDIR
	case fs.ModeSymlink:
		return unix.S_IFLNK
	case fs.ModeNamedPipe:
		return unix.S_IFIFO
	case fs.ModeSocket:
		return unix.S_IFSOCK
	case fs.ModeDevice:
		return unix.S_IFBLK
	case fs.ModeDevice | fs.ModeCharDevice:
		return unix.S_IFCHR
	}
	return unix.S_IFREG
}
