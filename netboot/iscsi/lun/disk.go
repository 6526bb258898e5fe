package lun

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

var _ scsi.Mapper = (*Disk)(nil)

// A Disk is a plain file that is read and written, and as long as the disk is large. What was written is in the kernel's
// hands when WriteAt returns, so that it outlives this process; after Sync it outlives a loss of power.
type Disk struct {
	path  string
	f     osFile
	size  int64
	mem   *mapping
	dirty atomic.Bool // something was written since the last Sync began
	syncs group
	lost  lostWrites
}

// OpenDisk opens a plain file to read and write it, alone: it fails with ErrInUse where somebody else has it open. Where
// there is no file, or an empty one, it makes a sparse one of size bytes, a multiple of BlockSize; with size 0 it fails then.
// A file of another size than a size that is not 0 is refused, and a delta, with ErrDelta: who writes to it as to a disk
// destroys it.
func OpenDisk(path string, size int64) (*Disk, error) {
	d, err := openDisk(path, size)
	if err != nil {
		return nil, fmt.Errorf("opening disk %q: %w", path, withoutPath(err))
	}
	return d, nil
}

func openDisk(path string, size int64) (*Disk, error) {
	if size < 0 || size%BlockSize != 0 {
		return nil, fmt.Errorf("size %d: want a multiple of %d", size, BlockSize)
	}
	f, created, err := openLocked(path, size != 0)
	if err != nil {
		return nil, err
	}
	d := &Disk{path: path, f: f}
	if err := d.begin(size, created); err != nil {
		return nil, errors.Join(withoutPath(err), f.Close())
	}
	return d, nil
}

func (d *Disk) begin(size int64, created bool) error {
	n, err := plainSize(d.f)
	if err != nil {
		return err
	}
	if err := refuseFormat(d.f, magic); err != nil {
		return err
	}
	switch {
	case n == 0 && size == 0:
		return errors.New("it is empty: say how large it is to be")
	case n == 0:
		if err := d.make(size); err != nil {
			return errors.Join(withoutPath(err), unmake(d.f, d.path, created))
		}
		n = size
	case n%BlockSize != 0:
		return fmt.Errorf("it has %d bytes, which is no multiple of %d: lengthen it to %d (truncate -s)", n, BlockSize, roundUp(n, BlockSize))
	case size > n:
		return fmt.Errorf("it has %d bytes, not %d: leave out the size, or lengthen the file first (truncate -s %d)", n, size, size)
	case size != 0 && size < n:
		return fmt.Errorf("it has %d bytes, not %d: leave out the size", n, size)
	}
	d.size = n
	d.dirty.Store(true) // by a process, perhaps, that was killed before its Sync
	if !d.f.onTmpfs() {
		d.mem = mapFile(d.f, 0, n)
	}
	return nil
}

// make makes the empty file a sparse one that outlives a loss of power.
func (d *Disk) make(size int64) error {
	if err := d.f.Truncate(size); err != nil {
		return err
	}
	if err := d.f.File.Sync(); err != nil {
		return err
	}
	return syncName(d.path)
}

// Size implements scsi.Medium.
func (d *Disk) Size() int64 { return d.size }

// Making names the making of this file: no other that is there under the same name, before or after, has the same, where the
// file system keeps when a file was made, and else few have.
func (d *Disk) Making() (string, error) {
	var st unix.Statx_t
	if err := unix.Statx(d.f.fd(), "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &st); err != nil {
		return "", fmt.Errorf("asking when disk %q was made: %w", d.path, err)
	}
	return fmt.Sprintf("file %d of %d.%09d", st.Ino, st.Btime.Sec, st.Btime.Nsec), nil
}

// ReadOnly implements scsi.Medium.
func (d *Disk) ReadOnly() bool { return false }

// ReadAt implements scsi.Medium.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := within(off, int64(len(p)), d.size); err != nil {
		return 0, mediumError("reading disk", d.path, off, int64(len(p)), err)
	}
	n, err := d.f.ReadAt(p, off)
	if n < len(p) {
		if errors.Is(err, io.EOF) {
			err = d.lost.cutShort(d.size)
		}
		return n, mediumError("reading disk", d.path, off, int64(len(p)), withoutPath(err))
	}
	return n, nil
}

// Segments implements scsi.Mapper.
func (d *Disk) Segments(dst [][]byte, off int64, n int) ([][]byte, bool) {
	if !d.mem.usable() || within(off, int64(n), d.size) != nil {
		return dst, false
	}
	return append(dst, d.mem.segment(off, int64(n))), true
}

// Unmapped implements scsi.Mapper.
func (d *Disk) Unmapped() {
	d.mem.fail()
	_ = d.lost.check(d.f, d.size) // who writes is told
}

// WriteAt implements scsi.Medium.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	if err := errors.Join(within(off, int64(len(p)), d.size), d.lost.err()); err != nil {
		return 0, mediumError("writing disk", d.path, off, int64(len(p)), err)
	}
	n, err := d.f.WriteAt(p, off)
	d.dirty.Store(true)
	if err != nil {
		return n, mediumError("writing disk", d.path, off, int64(len(p)), withoutPath(err))
	}
	return n, nil
}

// Zero implements scsi.Medium.
func (d *Disk) Zero(off, n int64, unmap bool) error {
	err := errors.Join(within(off, n, d.size), d.lost.err())
	if err == nil && n > 0 {
		if unmap {
			err = d.punch(off, n)
		} else {
			err = writeZeros(d.f, off, n)
		}
		d.dirty.Store(true)
	}
	if err != nil {
		return mediumError("zeroing disk", d.path, off, n, withoutPath(err))
	}
	return nil
}

// punch gives back the last block of the file system, too, of which the file has a part.
func (d *Disk) punch(off, n int64) error {
	if off+n == d.size {
		n = roundUp(d.size, pageSize) - off
	}
	return d.f.Punch(off, n)
}

// Mapped implements scsi.Medium: holes take no space. Their edges are those of the file system's blocks.
func (d *Disk) Mapped(off int64) (int64, bool) {
	// The descriptor's offset, which this moves, is used by nobody.
	data, err := unix.Seek(d.f.fd(), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data from there to the end
		return d.size - off, false
	case err != nil:
		return d.size - off, true
	case data > off:
		return min(data, d.size) - off, false
	}
	hole, err := unix.Seek(d.f.fd(), off, unix.SEEK_HOLE)
	if err != nil || hole <= off { // filled or emptied in between
		return BlockSize, true
	}
	return min(hole, d.size) - off, true
}

// Sync implements scsi.Medium. Who calls it at the same time as others shares one fdatasync(2) with them.
func (d *Disk) Sync() error {
	err := d.syncs.do(func() error {
		if err := d.lost.check(d.f, d.size); err != nil {
			return err
		}
		if !d.dirty.Swap(false) {
			return nil
		}
		return d.lost.note(d.f.Sync())
	})
	if err != nil {
		return mediumError("syncing disk", d.path, 0, d.size, err)
	}
	return nil
}

// Allocated is how many bytes of its file system the disk takes.
func (d *Disk) Allocated() int64 {
	n, err := d.f.allocated()
	if err != nil {
		return 0 // fstat(2) of an open file: it was closed
	}
	return n
}

// Close syncs the disk and ends the use of the file. Nobody may use d, or a segment of it, any more.
func (d *Disk) Close() error { return errors.Join(d.Sync(), d.Discard()) }

// Lost says why what was written to the disk may be lost, so that all writes fail until it is opened anew; nil: it is not.
func (d *Disk) Lost() error { return d.lost.err() }

// Discard is Close without a Sync: for a disk that nobody needs any more, or one that has lost something. Of that, whoever
// opens it next is given what storage has: pages that the kernel could not write would be read as if they were there.
func (d *Disk) Discard() error {
	err := d.mem.close()
	if d.Lost() != nil {
		err = errors.Join(err, d.f.Forget())
	}
	if err := errors.Join(err, d.f.Close()); err != nil {
		return fmt.Errorf("closing disk %q: %w", d.path, err)
	}
	return nil
}

// lostWrites remembers why what was written may be lost. A sync failed: the kernel may have dropped the pages that it could
// not write, and the next fdatasync(2) would report success; so no later one is believed, until the file is opened anew.
// Or the file was cut short: what is written behind its end would make it long again, with zeros before.
type lostWrites struct {
	mu    sync.Mutex
	cause error
	seen  atomic.Bool
}

// note takes note of the error of a sync, if there is one, and returns it.
func (l *lostWrites) note(err error) error {
	if err != nil {
		// Without err in its chain: what that says, "no space" perhaps, is not what will help later.
		l.set(fmt.Errorf("an earlier sync failed, what was written before it may be lost; open it anew once its storage works: %v", err)) //nolint:errorlint // see above
	}
	return err
}

// cutShort takes note that a file of want bytes has less, and says so.
func (l *lostWrites) cutShort(want int64) error {
	err := fmt.Errorf("the file was cut short, it had %d bytes", want)
	l.set(err)
	return err
}

// check says what may be lost, also where a file of want bytes has less now.
func (l *lostWrites) check(f interface{ Length() (int64, error) }, want int64) error {
	if err := l.err(); err != nil {
		return err
	}
	n, err := f.Length()
	switch {
	case err != nil:
		return withoutPath(err)
	case n < want:
		return l.cutShort(want)
	}
	return nil
}

// set keeps the first cause.
func (l *lostWrites) set(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cause == nil {
		l.cause = cause
	}
	l.seen.Store(true)
}

func (l *lostWrites) err() error {
	if !l.seen.Load() {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cause
}
