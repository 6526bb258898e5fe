package lun

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

var _ scsi.Mapper = (*Image)(nil)

// errReadOnly is what writing to an Image gives.
var errReadOnly = errors.New("write protected")

// An Image is a file that is only read, by any number of sessions, units and processes. A file whose length is no
// multiple of BlockSize reads as if zeros followed it. It is raw: a delta or a qcow2 image is refused. Nobody may write to
// the file while it is open: a Disk cannot be opened on it meanwhile.
type Image struct {
	path string
	f    osFile
	len  int64 // of the file
	size int64 // len, rounded up to BlockSize
	mem  *mapping
}

// OpenImage opens a file to read it. It fails with ErrInUse where the file is open as a Disk, and with ErrDelta where it is
// a delta.
func OpenImage(path string) (*Image, error) {
	m, err := openImage(path)
	if err != nil {
		return nil, fmt.Errorf("opening image %q: %w", path, withoutPath(err))
	}
	return m, nil
}

func openImage(path string) (*Image, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe would be waited for
	if err != nil {
		return nil, err
	}
	m := &Image{path: path, f: osFile{file}}
	if err := m.begin(); err != nil {
		_ = file.Close() // it was only read
		return nil, err
	}
	return m, nil
}

func (m *Image) begin() error {
	n, err := plainSize(m.f)
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("it is empty")
	}
	if err := m.f.lock(false); err != nil {
		return err
	}
	if err := refuseFormat(m.f, magic, qcow2Magic); err != nil {
		return err
	}
	m.len, m.size = n, roundUp(n, BlockSize)
	if taken, err := m.f.allocated(); err == nil && m.f.onTmpfs() && taken < n {
		return nil // holes in memory: see onTmpfs
	}
	// The last block is in the last page of the file, which the kernel fills up with zeros (mmap(2)).
	m.mem = mapFile(m.f, 0, m.size)
	return nil
}

// withoutPath is err, of an os function, without the path that it put into it: whoever calls names it.
func withoutPath(err error) error {
	if pe, ok := errors.AsType[*os.PathError](err); ok && error(pe) == err { //nolint:errorlint // what is around it stays
		return pe.Err
	}
	return err
}

// Size implements scsi.Medium.
func (m *Image) Size() int64 { return m.size }

// ReadOnly implements scsi.Medium.
func (m *Image) ReadOnly() bool { return true }

// ReadAt implements scsi.Medium.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	if err := within(off, int64(len(p)), m.size); err != nil {
		return 0, mediumError("reading image", m.path, off, int64(len(p)), err)
	}
	want := max(0, min(int64(len(p)), m.len-off))
	n, err := m.f.ReadAt(p[:want], off)
	if int64(n) < want {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the file was cut short, it had %d bytes", m.len)
		}
		return n, mediumError("reading image", m.path, off, int64(len(p)), withoutPath(err))
	}
	clear(p[want:])
	return len(p), nil
}

// Segments implements scsi.Mapper.
func (m *Image) Segments(dst [][]byte, off int64, n int) ([][]byte, bool) {
	if !m.mem.usable() || within(off, int64(n), m.size) != nil {
		return dst, false
	}
	return append(dst, m.mem.segment(off, int64(n))), true
}

// Unmapped implements scsi.Mapper.
func (m *Image) Unmapped() { m.mem.fail() }

// Mapped implements scsi.Medium: nothing of an image is given back, so all of it counts as taken.
func (m *Image) Mapped(off int64) (int64, bool) { return m.size - off, true }

// WriteAt implements scsi.Medium: it always fails.
func (m *Image) WriteAt(p []byte, off int64) (int, error) {
	return 0, mediumError("writing image", m.path, off, int64(len(p)), errReadOnly)
}

// Zero implements scsi.Medium: it always fails.
func (m *Image) Zero(off, n int64, _ bool) error {
	return mediumError("zeroing image", m.path, off, n, errReadOnly)
}

// Sync implements scsi.Medium: there is nothing to do.
func (m *Image) Sync() error { return nil }

// Close ends the use of the file. Nobody may use m, or a segment of it, any more.
func (m *Image) Close() error {
	if err := errors.Join(m.mem.close(), m.f.Close()); err != nil {
		return fmt.Errorf("closing image %q: %w", m.path, err)
	}
	return nil
}
