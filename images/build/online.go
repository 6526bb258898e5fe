package build

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/build/vm"
)

// machineArch is the architecture for which there are machines: that of package vm's QEMU.
const machineArch = "amd64"

// boot runs the recipe's boot steps in a machine that booted the base with the layer over it, and makes the layer anew of
// what is there when that system has ended; its files can be read until done is called. The role's own files, those in keep, stay wherever they are.
func (d *deltaBuild) boot(ctx context.Context, b *Builder, base images.Base, keep []string) (done func(), err error) {
	d.s.begin("boot")
	j, err := b.machine(base, filepath.Join(d.chroot.dir, "machine"), d.s)
	if err != nil {
		return nil, err
	}
	j.Boot, j.Steps, j.Env = true, d.r.Boot, guestEnviron()
	j.Files = func(w *tar.Writer) error { return writeLayer(w, d.view.top) }
	j.Step = func(i int) { d.s.begin("boot" + strings.TrimPrefix(runStep(i, len(d.r.Boot), d.r.Boot[i]), "run")) }
	r, err := b.VMs.Run(ctx, j)
	if err != nil {
		return nil, err
	}
	done = func() { _ = r.Close() } // it is only read
	v, err := newView(d.view.base)
	if err == nil {
		err = v.takeLayer(ctx, r, keep)
	}
	if err != nil {
		done()
		return nil, fmt.Errorf("reading the layer from the machine: %w", err)
	}
	d.view = v
	return done, nil
}

// machine is a job for a machine with the base, but for what it is to do.
func (b *Builder) machine(base images.Base, scratch string, s *steps) (vm.Job, error) {
	switch {
	case b.VMs == nil:
		return vm.Job{}, errors.New("this builder runs no machines")
	case base.Arch != machineArch:
		return vm.Job{}, fmt.Errorf("the image is for %s, and a machine that runs at build time has %s", base.Arch, machineArch)
	}
	if err := os.Mkdir(scratch, 0o755); err != nil {
		return vm.Job{}, fmt.Errorf("making a scratch directory: %w", err)
	}
	for _, blob := range []images.Blob{base.Image.Blob, base.Kernel, base.Modules} {
		if err := b.Store.Verify(context.Background(), blob.Digest); err != nil {
			return vm.Job{}, err
		}
	}
	return vm.Job{
		Kernel: b.Store.Path(base.Kernel.Digest), Modules: b.Store.Path(base.Modules.Digest), Base: b.Store.Path(base.Image.Digest),
		Scratch: scratch, Console: s,
	}, nil
}

// guestEnviron is what steps in a machine get: as environ, but systemd runs there, and no proxy of this machine can be reached.
func guestEnviron() []string {
	return slices.DeleteFunc(environ(""), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return name == "SYSTEMD_OFFLINE" || strings.HasSuffix(strings.ToLower(name), "_proxy")
	})
}

// upper begins the names of what package vm puts into a machine's upper layer.
const upper = vm.UpperNames

// writeLayer writes a layer as package vm takes it.
func writeLayer(w *tar.Writer, l layer) error {
	for _, name := range sortedKeys(l) {
		if name == "." {
			continue // the machine makes it like the base's
		}
		if err := writeTarEntry(w, upper+name, l[name]); err != nil {
			return fmt.Errorf("giving %q to the machine: %w", name, err)
		}
	}
	return nil
}

// tarTypes are the kinds of files in tar streams.
var tarTypes = map[uint32]byte{
	unix.S_IFREG: tar.TypeReg, unix.S_IFDIR: tar.TypeDir, unix.S_IFLNK: tar.TypeSymlink,
	unix.S_IFCHR: tar.TypeChar, unix.S_IFBLK: tar.TypeBlock, unix.S_IFIFO: tar.TypeFifo,
}

func writeTarEntry(w *tar.Writer, name string, e entry) error {
	kind, ok := tarTypes[e.kind()]
	if !ok {
		return fmt.Errorf("it is of a kind that no image has, %o", e.kind())
	}
	mtime := e.mtime
	if mtime.After(epoch) {
		mtime = epoch
	}
	h := &tar.Header{
		Typeflag: kind, Name: name, Linkname: e.target, Mode: int64(e.mode & 0o7777), Uid: int(e.uid), Gid: int(e.gid),
		ModTime: mtime, Format: tar.FormatPAX,
		Devmajor: int64(unix.Major(uint64(e.rdev))), Devminor: int64(unix.Minor(uint64(e.rdev))),
	}
	if e.isDir() {
		h.Name += "/"
	}
	for k, v := range e.xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	if e.kind() != unix.S_IFREG || e.open == nil {
		return w.WriteHeader(h)
	}
	r, size, err := e.sized()
	if err != nil {
		return err
	}
	h.Size = size
	if err = w.WriteHeader(h); err == nil {
		_, err = io.Copy(w, r)
	}
	return errors.Join(err, r.Close())
}

// sized opens a regular file and says how many bytes it has.
func (e entry) sized() (io.ReadCloser, int64, error) {
	r, err := e.open()
	if err != nil {
		return nil, 0, err
	}
	if f, ok := r.(sizedReader); ok {
		return r, f.Size(), nil
	}
	if f, ok := r.(interface{ Stat() (fs.FileInfo, error) }); ok {
		fi, err := f.Stat()
		if err != nil {
			return nil, 0, errors.Join(err, r.Close())
		}
		return r, fi.Size(), nil
	}
	content, err := io.ReadAll(io.LimitReader(r, maxMeta+1)) // what a recipe has in it
	if err == nil && len(content) > maxMeta {
		err = fmt.Errorf("it has more than %d bytes", maxMeta)
	}
	return io.NopCloser(bytes.NewReader(content)), int64(len(content)), errors.Join(err, r.Close())
}

// takeLayer takes the upper layer that a machine hands out, as chroot.scan takes one on disk. The contents of its files are read from
// r later.
func (v *view) takeLayer(ctx context.Context, r *vm.Result, keep []string) error {
	return eachEntry(ctx, r, func(name string, e entry) error {
		if name == "." || leftOut(name, e.isDir(), keep) {
			return nil
		}
		if dir, ok := v.top[path.Dir(name)]; !ok || !dir.isDir() {
			return fmt.Errorf("%q lies in no directory", name)
		}
		if same, err := v.unchanged(name, e); err != nil || same {
			return err
		}
		v.top[name] = e
		return nil
	})
}

// maxEntries bounds the files that a machine may hand out.
const maxEntries = 2 << 20

// eachEntry calls f with each file that a machine handed out. The machine ran whatever a fleet says, so nothing in its
// stream is believed.
func eachEntry(ctx context.Context, r *vm.Result, f func(name string, e entry) error) error {
	t := tar.NewReader(r)
	seen := make(map[string]bool)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		name := path.Clean(h.Name)
		if !fs.ValidPath(name) || seen[name] || len(seen) == maxEntries {
			return fmt.Errorf("%.200q is not the name of a file there, or comes twice, or is one too many", h.Name)
		}
		seen[name] = true
		e, err := headerEntry(h)
		if err != nil {
			return fmt.Errorf("%.200q: %w", h.Name, err)
		}
		for k := range e.xattrs {
			if !keepsXattr(k) {
				delete(e.xattrs, k)
			}
		}
		if len(e.xattrs) == 0 {
			e.xattrs = nil
		}
		if e.kind() == unix.S_IFREG {
			at, err := r.Seek(0, io.SeekCurrent) // the reader reads nothing ahead
			if err != nil {
				return err
			}
			size := h.Size
			e.open = func() (io.ReadCloser, error) { return sizedReader{io.NewSectionReader(r, at, size)}, nil }
		}
		if err := f(name, e); err != nil {
			return err
		}
	}
}

// A sizedReader is part of what a machine handed out.
type sizedReader struct{ *io.SectionReader }

func (sizedReader) Close() error { return nil }
