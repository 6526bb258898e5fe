package lun

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

var _ scsi.Mapper = (*Delta)(nil)

// A Delta is a medium that begins as a copy of its base and keeps what is written to it in a sparse file of its own, by
// clusters of 4096 bytes, each at its own place.
//
// What was written is in the kernel's hands when WriteAt and Zero return, so that it outlives this process, killed or not.
// After Sync it outlives a loss of power. What no Sync was called after is, after a loss of power and for each 512 bytes,
// what was there before or what was written, and nothing else.
//
// A Sync costs one fdatasync(2), or two where more than 1 MiB of the base was written over since the last. Two things
// are taken for granted of the storage: what was synced stays, and 512 bytes are written whole or not at all; and one of
// the kernel: it drops no page that it was given as long as it runs, but for one whose fdatasync(2) it says has failed.
// After that only what storage has is believed, also by whoever opens the delta next, unless this process is killed in
// the moment between the kernel's answer and the write to the file that says so.
type Delta struct {
	path string
	f    file
	base below
	h    *header
	mem  *mapping // of the data; nil where there is none
	used func() (int64, error)

	m     clusterMap
	dirty bitset // sectors that the map in the file lags behind
	// torn are sectors of the live map whose writing failed, so that nobody knows what they say. They are written before
	// anything else of theirs is.
	torn bitset

	// Who writes holds, in this order: the stripe of each cluster; epoch, shared, from the look at held to the last change
	// of the map; the lock of one sector after the other. Sync takes epoch alone when it decides what it will make last.
	stripes [stripes]sync.Mutex
	epoch   sync.RWMutex
	maps    [64]sync.Mutex // by sector, modulo

	streams streams

	held  held
	syncs group
	// wrote says that the data area was written to since the last sync; it changes under epoch.
	wrote atomic.Bool
	// unsure says that the map in the file may be other than any sync left it. Only the one who syncs uses it.
	unsure bool
	lost   lostWrites
}

// stripes is how many locks clusters share. What one call changes at a time is no more, so that it takes each but once.
const stripes = 1024

// below is what a Delta reads where nothing was written to it.
type below interface {
	io.ReaderAt
	Size() int64
	Segments(dst [][]byte, off int64, n int) ([][]byte, bool)
	Unmapped()
}

// nothing is below a Delta without a base.
type nothing struct{}

func (nothing) ReadAt([]byte, int64) (int, error)                      { return 0, io.EOF }
func (nothing) Size() int64                                            { return 0 }
func (nothing) Segments(dst [][]byte, _ int64, _ int) ([][]byte, bool) { return dst, true }
func (nothing) Unmapped()                                              {}

// OpenDelta opens the copy-on-write delta at path, alone: it fails with ErrInUse where somebody else has it open. Where
// there is no file, or an empty one, it makes a delta of size bytes; size 0 means as many as the base has. base may be
// nil: then zeros are below, and size is needed. id says which base that is, in 1024 bytes at most: a delta that was made
// with another id, or over a base of another size, is refused, as one of another size than a size that is not 0 is.
//
// The base must stay open, and as it is, for as long as the delta is used.
func OpenDelta(base *Image, path string, size int64, id string) (*Delta, error) {
	want := wanted{size: size, id: id, base: nothing{}}
	if base != nil {
		want.base = base
	}
	d, err := openDelta(path, want)
	if err != nil {
		return nil, fmt.Errorf("opening delta %q: %w", path, withoutPath(err))
	}
	return d, nil
}

// wanted is what a delta is opened as.
type wanted struct {
	base below
	size int64
	id   string
}

// newHeader is that of a new delta.
func (w wanted) newHeader() (*header, error) {
	h := &header{size: w.size, baseSize: w.base.Size(), id: w.id}
	if h.size == 0 {
		h.size = h.baseSize
	}
	switch {
	case h.size == 0:
		return nil, errors.New("it is not there, and without a base its size must be given")
	case h.size < 0 || h.size > maxSize || h.size%BlockSize != 0:
		return nil, fmt.Errorf("size %d: want a multiple of %d, %d at most", h.size, BlockSize, int64(maxSize))
	case h.size < h.baseSize:
		return nil, fmt.Errorf("size %d is too small, the base has %d: say at least so many, or leave out the size to have as many", h.size, h.baseSize)
	case len(h.id) > maxID:
		return nil, fmt.Errorf("the base's id has %d bytes, want %d at most", len(h.id), maxID)
	}
	_, _ = rand.Read(h.seed[:]) // never fails
	return h, nil
}

// check refuses a delta that is not what is wanted.
func (w wanted) check(h *header) error {
	if h.id != w.id || h.baseSize != w.base.Size() {
		return fmt.Errorf("it belongs to another base (%s), not to this one (%s): open it over its own, or remove it to begin anew without what was written to it",
			describeBase(h.id, h.baseSize), describeBase(w.id, w.base.Size()))
	}
	if w.size != 0 && w.size != h.size {
		return fmt.Errorf("it has %d bytes, not %d: its size cannot change: leave out the size", h.size, w.size)
	}
	return nil
}

func describeBase(id string, size int64) string {
	if size == 0 {
		return "none"
	}
	return fmt.Sprintf("%q, %d bytes", id, size)
}

func openDelta(path string, want wanted) (*Delta, error) {
	f, err := lockDelta(path, want)
	if err != nil {
		return nil, err
	}
	h, err := readHeader(f, want)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	d, err := newDelta(path, f, h, want.base, bootID())
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	d.used = f.allocated
	d.mem = mapFile(f, h.dataOff(), h.fileSize()-h.dataOff())
	return d, nil
}

// lockDelta opens and locks the file at path, and makes a delta of it where it is not there or empty.
func lockDelta(path string, want wanted) (osFile, error) {
	f, created, err := openLocked(path, true)
	if err != nil {
		return osFile{}, err
	}
	made, err := isMade(f)
	if err != nil {
		return osFile{}, errors.Join(withoutPath(err), f.Close())
	}
	if made {
		return f, nil
	}
	if err := makeDelta(f, path, want); err != nil {
		return osFile{}, errors.Join(withoutPath(err), unmake(f, path, created), f.Close())
	}
	return f, nil
}

// isMade says whether anything is in the file but what a process left that was killed while it made a delta.
func isMade(f osFile) (bool, error) {
	size, err := plainSize(f)
	if err != nil || size == 0 {
		return false, err
	}
	begin := make([]byte, pageSize)
	if _, err := f.ReadAt(begin, 0); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return !bytes.Equal(begin, unfinished()), nil
}

// makeDelta makes a delta of the file at path, which is empty or unfinished, in place: path may be a link. Up to the end
// it says that it is unfinished.
func makeDelta(f osFile, path string, want wanted) error {
	h, err := want.newHeader()
	if err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return f.Truncate(0) },
		func() error { _, err := f.WriteAt(unfinished(), 0); return err },
		f.Sync,
		func() error { return f.Truncate(h.fileSize()) }, // what is too large for the file system is found out now
		func() error { return h.writeRest(f) },
		f.File.Sync,
		func() error { _, err := f.WriteAt(h.encode(), 0); return err },
		f.Sync,
		func() error { return syncName(path) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// writeRest writes what is behind the header of a delta to which nothing was written. The maps are written in full, so
// that later syncs of them allocate nothing.
func (h *header) writeRest(w io.WriterAt) error {
	if _, err := w.WriteAt(make([]byte, pageSize), sessionOff); err != nil {
		return err
	}
	empty := newClusterMap(h.clusters(), h.sectors())
	return h.writeMaps(w, &empty)
}

// writeMaps has both maps be m, with no runs.
func (h *header) writeMaps(w io.WriterAt, m *clusterMap) error {
	buf, off := make([]byte, 0, min(h.mapsLen(), dataUnit)), int64(mapsOff)
	for first := int64(0); first < h.sectors(); first += perPage {
		buf = h.appendPage(buf, first, m)
		if len(buf) < cap(buf) && first+perPage < h.sectors() {
			continue
		}
		if _, err := w.WriteAt(buf, off); err != nil {
			return err
		}
		off, buf = off+int64(len(buf)), buf[:0]
	}
	return nil
}

// appendPage appends the page of the maps that begins with sector first, where both are m.
func (h *header) appendPage(b []byte, first int64, m *clusterMap) []byte {
	from := len(b)
	for i := first; i < min(first+perPage, h.sectors()); i++ {
		var s sector
		m.load(i, &s)
		b = h.encodeSector(b, i, &s)
	}
	b = append(b, zeros[:from+pageSize/2-len(b)]...)
	return append(b, b[from:]...)
}

// readHeader reads the header and checks that the file is all there.
func readHeader(f osFile, want wanted) (*header, error) {
	size, err := plainSize(f)
	if err != nil {
		return nil, err
	}
	page := make([]byte, pageSize)
	if _, err := f.ReadAt(page, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	h, err := parseHeader(page)
	if err != nil {
		return nil, err
	}
	if err := want.check(h); err != nil {
		return nil, err
	}
	if size != h.fileSize() {
		return nil, fmt.Errorf("%w: the file has %d bytes, it had %d", errDamaged, size, h.fileSize())
	}
	return h, nil
}

// bootID names this run of the kernel; it is empty where nobody knows.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Size implements scsi.Medium.
func (d *Delta) Size() int64 { return d.h.size }

// Making names the making of this delta: none that is made anew has the same.
func (d *Delta) Making() (string, error) { return "delta " + hex.EncodeToString(d.h.seed[:]), nil }

// ReadOnly implements scsi.Medium.
func (d *Delta) ReadOnly() bool { return false }

// ReadAt implements scsi.Medium.
func (d *Delta) ReadAt(p []byte, off int64) (int, error) {
	if err := within(off, int64(len(p)), d.h.size); err != nil {
		return 0, mediumError("reading delta", d.path, off, int64(len(p)), err)
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		state, n := d.runOf(at, int64(len(p)-done))
		if err := d.readRun(p[done:done+int(n)], at, state); err != nil {
			return done, mediumError("reading delta", d.path, off, int64(len(p)), err)
		}
		done += int(n)
	}
	return done, nil
}

// runOf says what the bytes from off on are, and how many of the next n are the same.
func (d *Delta) runOf(off, n int64) (state uint64, same int64) {
	first := off / clusterSize
	state, clusters := d.m.run(first, (off+n-1)/clusterSize+1)
	return state, min((first+clusters)*clusterSize-off, n)
}

func (d *Delta) readRun(p []byte, off int64, state uint64) error {
	switch state {
	case stateBase:
		return d.readBase(p, off)
	case stateZero:
		clear(p)
		return nil
	}
	n, err := d.f.ReadAt(p, d.h.dataOff()+off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return d.lost.cutShort(d.h.fileSize())
	}
	return withoutPath(err)
}

// readBase reads from below the delta; behind the end of the base are zeros.
func (d *Delta) readBase(p []byte, off int64) error {
	have := max(0, min(int64(len(p)), d.base.Size()-off))
	clear(p[have:])
	if have == 0 {
		return nil
	}
	_, err := d.base.ReadAt(p[:have], off)
	return err
}

// Segments implements scsi.Mapper.
func (d *Delta) Segments(dst [][]byte, off int64, n int) ([][]byte, bool) {
	if !d.mem.usable() || within(off, int64(n), d.h.size) != nil {
		return dst, false
	}
	for left := int64(n); left > 0; {
		state, same := d.runOf(off, left)
		ok := true
		switch state {
		case stateBase:
			dst, ok = d.baseSegments(dst, off, same)
		case stateZero:
			dst = appendZeros(dst, same)
		default:
			dst = append(dst, d.mem.segment(off, same))
		}
		if !ok {
			return dst, false
		}
		off, left = off+same, left-same
	}
	return dst, true
}

func (d *Delta) baseSegments(dst [][]byte, off, n int64) ([][]byte, bool) {
	have := max(0, min(n, d.base.Size()-off))
	ok := true
	if have > 0 {
		dst, ok = d.base.Segments(dst, off, int(have))
	}
	return appendZeros(dst, n-have), ok
}

func appendZeros(dst [][]byte, n int64) [][]byte {
	for n > 0 {
		part := min(n, int64(len(zeros)))
		dst = append(dst, zeros[:part:part])
		n -= part
	}
	return dst
}

// Unmapped implements scsi.Mapper. Nobody can tell whether it was the base or the delta.
func (d *Delta) Unmapped() {
	d.mem.fail()
	_ = d.lost.check(d.f, d.h.fileSize()) // who writes is told
	d.base.Unmapped()
}

// mappedScan is how far Mapped looks, in clusters.
const mappedScan = 1 << 18

// Mapped implements scsi.Medium. What lies in the base counts as taken, as it does not read as zeros.
func (d *Delta) Mapped(off int64) (int64, bool) {
	first := off / clusterSize
	end := min(first+mappedScan, d.m.clusters)
	taken, c := d.taken(first, end)
	for c < end {
		same, next := d.taken(c, end)
		if same != taken {
			break
		}
		c = next
	}
	return min(c*clusterSize, d.h.size) - off, taken
}

// taken says whether cluster c takes space, and up to which, end at most, that is known to be so.
func (d *Delta) taken(c, end int64) (taken bool, next int64) {
	state, n := d.m.run(c, end)
	if state != stateBase {
		return state == stateDelta, c + n
	}
	of := roundUp(d.base.Size(), clusterSize) / clusterSize
	if c >= of {
		return false, c + n
	}
	return true, min(c+n, of)
}

// Allocated is how many bytes of its file system the delta takes.
func (d *Delta) Allocated() int64 {
	n, err := d.used()
	if err != nil {
		return 0 // fstat(2) of an open file: it was closed
	}
	return n
}

// Close syncs the delta and ends the use of its file, not of the base. Nobody may use d, or a segment of it, any more.
func (d *Delta) Close() error {
	if err := errors.Join(d.Sync(), d.mem.close(), d.f.Close()); err != nil {
		return fmt.Errorf("closing delta %q: %w", d.path, err)
	}
	return nil
}

// Lost says why what was written to the delta may be lost, so that all writes fail until it is opened anew; nil: it is not.
func (d *Delta) Lost() error { return d.lost.err() }

// Discard is Close for a delta that nobody needs any more: what no Sync was called after may be lost, and no more than that.
func (d *Delta) Discard() error {
	if err := errors.Join(d.mem.close(), d.f.Close()); err != nil {
		return fmt.Errorf("closing delta %q: %w", d.path, err)
	}
	return nil
}
