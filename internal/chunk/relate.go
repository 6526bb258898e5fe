package chunk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// The metadata of an EROFS image say where everything is: an inode has the number of the block at which its data begin,
// and a directory the numbers of the inodes in it (kernel documentation, filesystems/erofs.rst, "On-disk details"). One
// file more, and nearly all of these numbers are others. So images are compared in a form in which each number is what it
// differs by from the number that is expected there: that of the first block or inode after the one before. The form
// has the same size, and can be turned back: what decides where a number is, and what is expected, is not changed itself,
// or is known by then. Of bytes that are no metadata of EROFS the form is some other bytes, no harm done.
//
// Only the writer's layout is known here: data of 4096-byte blocks first, and metadata in one piece up to the end.

const (
	blockSize = 4096

	// maxRelated bounds what is held in memory of one image: its metadata, and its large directories. An image with more
	// is compared as it is.
	maxRelated = 64 << 20

	superOffset = 1024
	superMagic  = 0xe0f5e1e2

	slot = 32 // bytes; inodes are numbered by them

	kindMask, kindDir, kindFile, kindLink = 0o170000, 0o040000, 0o100000, 0o120000
	layoutPlain, layoutInline             = 0, 2
	direntSize, direntDir                 = 12, 2
)

// metaStart is where the metadata of the EROFS image r begin; size where it is none, or one whose metadata are elsewhere or too
// large.
func metaStart(r io.ReaderAt, size int64) (int64, error) {
	var sb [128]byte
	if size < superOffset+int64(len(sb)) {
		return size, nil
	}
	if _, err := r.ReadAt(sb[:], superOffset); err != nil {
		return 0, fmt.Errorf("reading the superblock: %w", err)
	}
	start := int64(binary.LittleEndian.Uint32(sb[40:])) * blockSize
	if binary.LittleEndian.Uint32(sb[:]) != superMagic || sb[12] != 12 || start < blockSize || start >= size || size-start > maxRelated {
		return size, nil
	}
	return start, nil
}

// A patch is bytes that take the place of those at off.
type patch struct {
	off int64
	b   []byte
}

// A related is an image in one of its two forms, told as what is to be written over the other one.
type related struct {
	tail    []byte  // all from metaStart on
	patches []patch // large directories, by offset; none overlaps another
}

// relate reads what differs between the two forms of an image whose metadata begin at start, from the one, and gives it
// as in the other one: undo goes back to the image itself.
func relate(r io.ReaderAt, start, size int64, undo bool) (related, error) {
	out := related{tail: make([]byte, size-start)}
	if err := readFull(r, out.tail, start); err != nil {
		return out, fmt.Errorf("reading the metadata: %w", err)
	}
	w := walk{r: r, end: start, undo: undo, meta: out.tail, parents: make(map[uint64]uint64)}
	if err := w.inodes(); err != nil {
		return out, err
	}
	slices.SortFunc(w.patches, func(a, b patch) int { return int(min(max(a.off-b.off, -1), 1)) })
	for i := 1; i < len(w.patches); i++ {
		if before := w.patches[i-1]; before.off+int64(len(before.b)) > w.patches[i].off {
			return out, errors.New("two directories lie over each other")
		}
	}
	out.patches = w.patches
	return out, nil
}

// A walk goes over the metadata once, from the first inode to the last.
type walk struct {
	r       io.ReaderAt
	end     int64 // of the data
	undo    bool
	meta    []byte
	next    uint32            // block at which the next data are expected
	parents map[uint64]uint64 // of directories that were seen in another one
	patches []patch
	held    int64 // bytes of patches
}

// number32 turns the number at b from one form into the other, and gives it as it is in the image.
func (w *walk) number32(b []byte, expected uint32) uint32 {
	v := binary.LittleEndian.Uint32(b)
	if w.undo {
		v += expected
		binary.LittleEndian.PutUint32(b, v)
		return v
	}
	binary.LittleEndian.PutUint32(b, v-expected)
	return v
}

// number64 is number32 of eight bytes.
func (w *walk) number64(b []byte, expected uint64) uint64 {
	v := binary.LittleEndian.Uint64(b)
	if w.undo {
		v += expected
		binary.LittleEndian.PutUint64(b, v)
		return v
	}
	binary.LittleEndian.PutUint64(b, v-expected)
	return v
}

func (w *walk) inodes() error {
	for off := 0; off+slot <= len(w.meta); {
		n, err := w.inode(off)
		if err != nil {
			return err
		}
		off += (n + slot - 1) / slot * slot
	}
	return nil
}

// inode takes the inode at off, where one is, and gives its length with all that follows it; at least one slot.
func (w *walk) inode(off int) (int, error) {
	b := w.meta[off:]
	format, kind := binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[4:])&kindMask
	layout := format >> 1
	if format > 2*layoutInline+1 || layout == 1 || kind == 0 {
		return slot, nil
	}
	head, size := slot, uint64(binary.LittleEndian.Uint32(b[8:]))
	if format&1 == 1 {
		if len(b) < 2*slot {
			return slot, nil
		}
		head, size = 2*slot, binary.LittleEndian.Uint64(b[8:])
	}
	if x := int(binary.LittleEndian.Uint16(b[2:])); x > 0 {
		head += 12 + 4*(x-1)
	}
	hasData := size > 0 && (kind == kindDir || kind == kindFile || kind == kindLink)
	nid := uint64(off / slot) //nolint:gosec // it is not negative
	switch {
	case !hasData:
		return head, nil
	case layout == layoutInline:
		if uint64(head)+size > uint64(min(len(b), blockSize)) { //nolint:gosec // a head is small
			return head, nil
		}
		all := head + int(size) //nolint:gosec // it was compared just now
		if kind == kindDir {
			d := dir{w: w, nid: nid, last: nid + uint64((all+slot-1)/slot)} //nolint:gosec // it is small
			d.block(b[head:all])
		}
		return all, nil
	}
	first := w.number32(b[16:], w.next)
	if size > 1<<44 {
		return head, nil
	}
	w.next = first + uint32((size+blockSize-1)/blockSize) //nolint:gosec // it may wrap: it is a guess
	if kind == kindDir {
		return head, w.large(dir{w: w, nid: nid, last: nid + uint64((head+slot-1)/slot)}, first, int64(size)) //nolint:gosec // it is small
	}
	return head, nil
}

// large takes a directory whose entries lie among the data.
func (w *walk) large(d dir, first uint32, size int64) error {
	at := int64(first) * blockSize
	if size > w.end-at || w.held+size > maxRelated {
		return nil
	}
	w.held += size
	p := patch{at, make([]byte, size)}
	if err := readFull(w.r, p.b, at); err != nil {
		return fmt.Errorf("reading a directory: %w", err)
	}
	for b := range slices.Chunk(p.b, blockSize) {
		d.block(b)
	}
	w.patches = append(w.patches, p)
	return nil
}

// A dir is a directory on the way from one form into the other.
type dir struct {
	w    *walk
	nid  uint64
	last uint64 // number of the inode before the one that is expected next, or of the first one
}

// block takes the entries of one block: their numbers first, and their names behind.
func (d *dir) block(b []byte) {
	if len(b) < direntSize {
		return
	}
	count := int(binary.LittleEndian.Uint16(b[8:])) / direntSize
	if count*direntSize > len(b) {
		return
	}
	for i := range count {
		e := b[i*direntSize : (i+1)*direntSize]
		from, to := int(binary.LittleEndian.Uint16(e[8:])), len(b)
		if i+1 < count {
			to = int(binary.LittleEndian.Uint16(b[(i+1)*direntSize+8:]))
		}
		name := ""
		if count*direntSize <= from && from < to && to <= len(b) {
			name = string(bytes.TrimRight(b[from:to], "\x00"))
		}
		switch name {
		case ".":
			d.w.number64(e, d.nid)
		case "..":
			d.w.number64(e, d.w.parents[d.nid])
		default:
			d.last = d.w.number64(e, d.last)
			if e[10] == direntDir {
				d.w.parents[d.last] = d.nid
			}
		}
	}
}
