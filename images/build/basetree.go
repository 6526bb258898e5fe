package build

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
)

// maxMeta bounds the files of a root file system that are kept in memory, in bytes.
const maxMeta = 64 << 20

// A baseTree turns mmdebstrap's tar stream into an image, and collects what it finds on the way.
type baseTree struct {
	store *store.Store
	w     *imageWriter
	s     *steps

	image      images.Image
	kernel     images.Blob
	version    string // of the kernel
	status     []byte // dpkg's database
	kernelLock []byte // what the kernel hook left
	init       bool   // whether there is an init
	sshKeys    bool   // whether there were host keys
}

// read takes the whole stream. The end of a stream that ends too early is an error.
func (t *baseTree) read(ctx context.Context, r io.Reader) error {
	tr := tar.NewReader(r)
	for first := true; ; first = false {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading the root file system from mmdebstrap: %w", err)
		}
		if first {
			t.s.begin("image")
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.take(ctx, path.Clean(h.Name), h, tr); err != nil {
			return err
		}
	}
	// The padding behind the end of the archive must be read too, or mmdebstrap dies of a broken pipe.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("reading the root file system from mmdebstrap: %w", err)
	}
	return t.finish()
}

// take puts one file of the stream where it belongs.
func (t *baseTree) take(ctx context.Context, name string, h *tar.Header, r io.Reader) error {
	switch {
	case name == ".troupe/kernel":
		return keep(&t.kernelLock, name, r)
	case strings.HasPrefix(name, "boot/vmlinuz-") && h.Typeflag == tar.TypeReg:
		return t.takeKernel(ctx, strings.TrimPrefix(name, "boot/vmlinuz-"), r)
	case isHostKey(name):
		t.sshKeys = true
		return nil
	case name == ".troupe", name == "etc/hostname", name == "etc/resolv.conf",
		isTransient(name, h.Typeflag == tar.TypeDir), isIdle(name):
		return nil
	case name == "var/lib/dpkg/status":
		if err := keep(&t.status, name, r); err != nil {
			return err
		}
		r = bytes.NewReader(t.status)
	case name == "etc/machine-id", name == "etc/fstab":
		r = bytes.NewReader(nil)
	case name == "sbin/init", name == "usr/sbin/init":
		t.init = true
	}
	e, err := t.entryOf(h, r)
	if err != nil {
		return fmt.Errorf("taking %q from mmdebstrap: %w", name, err)
	}
	return t.w.add(name, e)
}

func keep(to *[]byte, name string, r io.Reader) error {
	b, err := io.ReadAll(io.LimitReader(r, maxMeta+1))
	if err == nil && len(b) > maxMeta {
		err = fmt.Errorf("it has more than %d bytes", maxMeta)
	}
	if err != nil {
		return fmt.Errorf("taking %q from mmdebstrap: %w", name, err)
	}
	*to = b
	return nil
}

func (t *baseTree) takeKernel(ctx context.Context, version string, r io.Reader) (err error) {
	if t.version != "" {
		return fmt.Errorf("the root file system has two kernels, %s and %s", t.version, version)
	}
	t.version = version
	t.kernel, err = t.store.Put(ctx, r)
	return err
}

// entryOf is the entry of a tar header with the content r.
func (t *baseTree) entryOf(h *tar.Header, r io.Reader) (entry, error) {
	if h.Typeflag == tar.TypeLink { // an EROFS image that go-erofs writes has none: the content comes a second time
		as := *h
		as.Typeflag = tar.TypeReg
		e, err := headerEntry(&as)
		e.open = t.w.reopen(path.Clean(h.Linkname))
		return e, err
	}
	e, err := headerEntry(h)
	e.open = func() (io.ReadCloser, error) { return io.NopCloser(r), nil }
	return e, err
}

// headerEntry is the entry of a tar header, without its content.
func headerEntry(h *tar.Header) (entry, error) {
	e := entry{
		mode: uint32(h.Mode) & 0o7777, uid: uint32(h.Uid), gid: uint32(h.Gid), mtime: h.ModTime, //nolint:gosec // a kernel has 32 bits for each
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			if e.xattrs == nil {
				e.xattrs = make(map[string]string)
			}
			e.xattrs[name] = v
		}
	}
	switch h.Typeflag {
	case tar.TypeReg:
		e.mode |= unix.S_IFREG
	case tar.TypeDir:
		e.mode |= unix.S_IFDIR
	case tar.TypeSymlink:
		e.mode |= unix.S_IFLNK
		e.target = h.Linkname
	case tar.TypeFifo:
		e.mode |= unix.S_IFIFO
	case tar.TypeChar, tar.TypeBlock:
		e.mode |= unix.S_IFCHR
		if h.Typeflag == tar.TypeBlock {
			e.mode = e.mode&^unix.S_IFMT | unix.S_IFBLK
		}
		e.rdev = uint32(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))) //nolint:gosec // so many bits the kernel has
	default:
		return entry{}, fmt.Errorf("it is of a kind that is not known, %q", h.Typeflag)
	}
	return e, nil
}

// finish checks that the base can boot and adds what is ours in it.
func (t *baseTree) finish() error {
	switch {
	case t.version == "":
		return errors.New("the kernel package has no /boot/vmlinuz-VERSION")
	case !t.init:
		return errors.New("the root file system has no /sbin/init: add systemd-sysv to the image's packages")
	case len(t.status) == 0:
		return errors.New("the root file system has no /var/lib/dpkg/status")
	}
	for _, name := range []string{"etc/fstab", "etc/machine-id"} {
		if !t.w.seen[name] {
			if err := t.w.add(name, entry{mode: unix.S_IFREG | 0o644, mtime: epoch}); err != nil {
				return err
			}
		}
	}
	if !t.sshKeys {
		return nil
	}
	return addAll(sshKeyDropIn(), t.w)
}
