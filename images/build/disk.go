package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/qcow2"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
)

// The formats of a disk image's file.
const (
	formatRaw   = "raw"
	formatQCOW2 = "qcow2"
)

const (
	// reserve is how many bytes a disk image leaves free where it is fetched and unpacked: a small file can be a large
	// disk, and a server whose disk is full keeps no records.
	reserve = 1 << 30
	// checkRoom is after how many bytes it is looked whether so much is left.
	checkRoom = 64 << 20
	// sectorSize is what the size of a disk is a multiple of, in bytes.
	sectorSize = 512
)

// Disk makes the image of a disk that somebody else made: the bytes of the disk, those that are zero left out of the file,
// whatever format they came in. What went wrong in a step is a *StepError. A transfer that broke off goes on where it was,
// also in another try of the same recipe.
func (b *Builder) Disk(ctx context.Context, r images.DiskRecipe, p Progress) (images.Disk, error) {
	u, err := url.Parse(r.URL)
	if err != nil {
		return images.Disk{}, fmt.Errorf("building a disk image: %w", err)
	}
	if err := checkContext(ctx); err != nil {
		return images.Disk{}, err
	}
	s := newSteps(p)
	disk, err := b.makeDisk(ctx, r, u, s)
	if err != nil {
		return images.Disk{}, s.fail(ctx, err)
	}
	return disk, nil
}

func (b *Builder) makeDisk(ctx context.Context, r images.DiskRecipe, u *url.URL, s *steps) (images.Disk, error) {
	if err := os.MkdirAll(b.Dir, 0o755); err != nil {
		return images.Disk{}, fmt.Errorf("making the scratch directory: %w", err)
	}
	s.begin("fetch")
	f, err := b.fetch(ctx, r, u, s)
	if err != nil {
		return images.Disk{}, err
	}
	defer f.Close()
	s.begin("check")
	before, err := f.Stat()
	if err != nil {
		return images.Disk{}, err
	}
	if err := checkSum(ctx, f, r.SHA256); err != nil {
		b.forgetPart(r) // else the next try would end the same way
		return images.Disk{}, err
	}
	s.begin("unpack")
	disk := images.Disk{Recipe: r.ID(), File: before.Size()}
	if disk.Image, disk.Format, err = b.unpack(ctx, f, before.Size(), r.Format); err != nil {
		return images.Disk{}, err
	}
	after, err := f.Stat()
	if err != nil {
		return images.Disk{}, err
	}
	if after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
		return images.Disk{}, fmt.Errorf("%s was written to while it was read", r.URL)
	}
	_, _ = fmt.Fprintf(s, "%s, %d bytes: a disk of %d bytes\n", disk.Format, disk.File, disk.Image.Size)
	b.forgetPart(r)
	return disk, nil
}

// openLocal opens a disk image that lies on the server.
func openLocal(u *url.URL) (*os.File, error) {
	f, err := os.OpenFile(u.Path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe would be waited for
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", u.Path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// checkSum reads f to its end.
func checkSum(ctx context.Context, f *os.File, want string) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	got, _, err := digest.FromReader(contextReader{ctx, f})
	if err != nil {
		return fmt.Errorf("reading the disk image: %w", err)
	}
	if got.Hex() != want {
		return fmt.Errorf("%w: the SHA-256 of the disk image is %s, and the recipe says %s", digest.ErrMismatch, got.Hex(), want)
	}
	return nil
}

// A contextReader ends with its context.
type contextReader struct {
	ctx context.Context //nolint:containedctx // a Read has no other way to be told
	r   io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// unpack writes the disk in f into the store.
func (b *Builder) unpack(ctx context.Context, f *os.File, size int64, format string) (images.Blob, string, error) {
	format, err := formatOf(f, format)
	if err == nil && size == 0 {
		err = errors.New("the disk image is empty")
	}
	if err != nil {
		return images.Blob{}, "", err
	}
	w, err := b.Store.Create(ctx)
	if err != nil {
		return images.Blob{}, "", err
	}
	defer func() { _ = w.Abort() }() // does nothing after Commit
	out := &sparse{w: w, room: room{dir: b.Dir}}
	if format == formatQCOW2 {
		size, err = unpackQCOW2(ctx, out, f, size)
	} else {
		err = copyRaw(ctx, out, f, size)
	}
	if err != nil {
		return images.Blob{}, "", err
	}
	if size += -size & (sectorSize - 1); size > qcow2.MaxSize {
		return images.Blob{}, "", fmt.Errorf("a disk of %d bytes: more than %d", size, int64(qcow2.MaxSize))
	}
	if err := w.Truncate(size); err != nil {
		return images.Blob{}, "", err
	}
	blob, err := w.Commit()
	return blob, format, err
}

func unpackQCOW2(ctx context.Context, out *sparse, f *os.File, size int64) (int64, error) {
	img, err := qcow2.Open(f, size)
	if err != nil {
		return 0, err
	}
	err = img.Extents(func(off int64, data []byte) error {
		return errors.Join(ctx.Err(), out.writeAt(data, off))
	})
	return img.Size(), err
}

func copyRaw(ctx context.Context, out *sparse, f *os.File, size int64) error {
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; {
		n := min(int64(len(buf)), size-off)
		if _, err := f.ReadAt(buf[:n], off); err != nil {
			return fmt.Errorf("reading the disk image: %w", err)
		}
		if err := errors.Join(ctx.Err(), out.writeAt(buf[:n], off)); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// A sparse writes what is not zero.
type sparse struct {
	w    *store.Writer
	room room
}

// page is the unit in which a sparse looks for zeros: the block of the usual file systems, in bytes.
const page = 4096

var zeros [page]byte

func (s *sparse) writeAt(data []byte, off int64) error {
	for len(data) > 0 {
		zero := 0
		for zero < len(data) && isZero(data[zero:]) {
			zero = min(zero+page, len(data))
		}
		run := zero
		for run < len(data) && !isZero(data[run:]) {
			run = min(run+page, len(data))
		}
		if run > zero {
			if err := s.room.take(int64(run - zero)); err != nil {
				return err
			}
			if _, err := s.w.WriteAt(data[zero:run], off+int64(zero)); err != nil {
				return err
			}
		}
		data, off = data[run:], off+int64(run)
	}
	return nil
}

// isZero says whether the first page of b, or all of it, is zeros.
func isZero(b []byte) bool {
	n := min(len(b), page)
	return bytes.Equal(b[:n], zeros[:n])
}

// A room sees to it that some of a file system stays free.
type room struct {
	dir  string
	left int64 // bytes that may be written before it is asked again
}

func (r *room) take(n int64) error {
	if r.left -= n; r.left > 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(r.dir, &st); err != nil {
		return fmt.Errorf("asking for the free space of %q: %w", r.dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < reserve+checkRoom { //nolint:gosec // no file system has 2^63 bytes
		return fmt.Errorf("%w: %d MiB are free for the disk image, of which %d stay so", syscall.ENOSPC, free>>20, reserve>>20)
	}
	r.left = checkRoom
	return nil
}

// others are formats that would pass for a raw disk, by what they begin with.
var others = []struct{ magic, name string }{
	{"\x1f\x8b", "gzip"},
	{"\xfd7zXZ\x00", "xz"},
	{"\x28\xb5\x2f\xfd", "zstd"},
	{"BZh", "bzip2"},
	{"PK\x03\x04", "zip"},
	{"KDMV", "VMDK"},
	{"# Disk DescriptorFile", "VMDK"},
	{"vhdxfile", "VHDX"},
	{"conectix", "VHD"},
	{"<<< ", "VDI"},
}

// formatOf is the format of f: want, or where that is "", as f begins.
func formatOf(f io.ReaderAt, want string) (string, error) {
	if want != "" {
		return want, nil
	}
	head := make([]byte, 64)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("reading the disk image: %w", err)
	}
	if qcow2.Is(head[:n]) {
		return formatQCOW2, nil
	}
	for _, o := range others {
		if bytes.HasPrefix(head[:n], []byte(o.magic)) {
			return "", fmt.Errorf("the disk image begins like a file of format %s: unpack or convert it to raw or qcow2 first, or say format: %q if that is what the disk begins with", o.name, formatRaw)
		}
	}
	return formatRaw, nil
}
