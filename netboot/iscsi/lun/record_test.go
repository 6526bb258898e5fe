package lun

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// A recorder is a file in memory that knows all that was done to it, so that any crash can be played.
type recorder struct {
	mu sync.Mutex
	disk
	ops  []op
	size int64
	// fault, where it is not nil, may have an op fail, after some of its blocks.
	fault func(op) error
}

// A disk is what the kernel has of a file, and what storage has. A failed sync makes all clean, as Linux does: what storage
// does not have of it is still read, but written by no later sync, unless its page is written to again.
type disk struct {
	now, stable blocks
	dirty       map[int64]bool // by page
}

// blocksPerPage is how many blocks become dirty at once.
const blocksPerPage = pageSize / sectorSize

// eachDirty calls do with each block of each page that is dirty.
func (d disk) eachDirty(do func(i int64)) {
	for page := range d.dirty {
		for at := range int64(blocksPerPage) {
			do(page*blocksPerPage + at)
		}
	}
}

// onDisk is a file that the kernel has no more of than storage.
func onDisk(b blocks) disk { return disk{maps.Clone(b), maps.Clone(b), map[int64]bool{}} }

func (d disk) clone() disk {
	return disk{maps.Clone(d.now), maps.Clone(d.stable), maps.Clone(d.dirty)}
}

// recorded is a file that begins as d and is size bytes long.
func recorded(d disk, size int64) *recorder { return &recorder{disk: d.clone(), size: size} }

// blocks are the blocks of a file that are not all zeros. No block is changed, only replaced.
type blocks map[int64][]byte

// An op is a write, a punch (data is nil) or a sync (n is 0).
type op struct {
	off, n int64
	data   []byte
	failed bool           // of a sync
	kept   map[int64]bool // of a sync that failed: the blocks that it wrote
}

func (o op) isSync() bool { return o.n == 0 }

// eachBlock calls do with what the op makes of each block.
func (o op) eachBlock(do func(i int64, b []byte)) {
	for at := int64(0); at < o.n; at += sectorSize {
		var b []byte
		if o.data != nil {
			b = o.data[at : at+sectorSize]
		}
		do((o.off+at)/sectorSize, b)
	}
}

func (b blocks) set(i int64, block []byte) {
	if block == nil {
		delete(b, i)
		return
	}
	b[i] = block
}

func (r *recorder) do(o op) error {
	if o.off%sectorSize != 0 || o.n%sectorSize != 0 {
		panic(fmt.Sprintf("%d bytes at %d: no whole blocks", o.n, o.off))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var err error
	if r.fault != nil {
		err = r.fault(o)
	}
	if o.isSync() {
		r.sync(err != nil)
		return err
	}
	if err != nil {
		o.n = int64(rand.IntN(int(o.n/sectorSize)+1)) * sectorSize
	}
	o.eachBlock(func(i int64, b []byte) {
		r.now.set(i, b)
		r.dirty[i/blocksPerPage] = true
	})
	r.ops = append(r.ops, o)
	return err
}

// sync writes all that is dirty, or some of it where it fails.
func (r *recorder) sync(fails bool) {
	o := op{failed: fails, kept: map[int64]bool{}}
	r.eachDirty(func(i int64) {
		if !fails || rand.IntN(2) == 0 {
			o.kept[i] = true
			r.stable.set(i, r.now[i])
		}
	})
	clear(r.dirty)
	r.ops = append(r.ops, o)
}

// Forget implements file.
func (r *recorder) Forget() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := maps.Clone(r.stable)
	r.eachDirty(func(i int64) { now.set(i, r.now[i]) })
	r.now = now
	return nil
}

func (r *recorder) done() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.ops)
}

func (r *recorder) ReadAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if off+int64(len(p)) > r.size {
		return 0, io.EOF
	}
	for at := 0; at < len(p); {
		i, in := (off+int64(at))/sectorSize, (off+int64(at))%sectorSize
		n := min(len(p)-at, int(sectorSize-in))
		if b, ok := r.now[i]; ok {
			copy(p[at:at+n], b[in:])
		} else {
			clear(p[at : at+n])
		}
		at += n
	}
	return len(p), nil
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	if err := r.do(op{off: off, n: int64(len(p)), data: bytes.Clone(p)}); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (r *recorder) Punch(off, n int64) error { return r.do(op{off: off, n: n}) }
func (r *recorder) Sync() error              { return r.do(op{}) }
func (r *recorder) Close() error             { return nil }

// Length implements file.
func (r *recorder) Length() (int64, error) { return r.size, nil }

// newRecorder is a file with a new delta.
func newRecorder(t *testing.T, h *header) *recorder {
	t.Helper()
	r := recorded(onDisk(blocks{}), h.fileSize())
	if _, err := r.WriteAt(h.encode(), 0); err != nil {
		t.Fatal(err)
	}
	if err := h.writeRest(r); err != nil {
		t.Fatal(err)
	}
	return recorded(onDisk(r.now), r.size) // it gets its name only when that is synced
}

// A player goes through what a recorder has recorded and says what is on the disk after each op.
type player struct {
	stable  blocks
	pending map[int64][][]byte // what was not synced, by block, oldest first; nil is zeros
	dropped blocks             // what a sync failed to write and the kernel still has; nil is zeros
}

func newPlayer(begin blocks) *player {
	return &player{maps.Clone(begin), map[int64][][]byte{}, blocks{}}
}

func (p *player) clone() *player {
	return &player{maps.Clone(p.stable), maps.Clone(p.pending), maps.Clone(p.dropped)}
}

// play adds an op.
func (p *player) play(o op) {
	if !o.isSync() {
		o.eachBlock(func(i int64, b []byte) {
			p.takeAlong(i / blocksPerPage)
			p.pending[i] = append(p.pending[i], b)
		})
		return
	}
	for i, versions := range p.pending {
		last := versions[len(versions)-1]
		if o.failed && !o.kept[i] {
			p.dropped[i] = last
			continue
		}
		delete(p.dropped, i)
		p.stable.set(i, last)
	}
	clear(p.pending)
}

// takeAlong has the next sync write what one that failed did not write of a page, as that is written to again.
func (p *player) takeAlong(page int64) {
	for i := page * blocksPerPage; i < (page+1)*blocksPerPage; i++ {
		if b, ok := p.dropped[i]; ok {
			p.pending[i] = append(p.pending[i], b)
			delete(p.dropped, i)
		}
	}
}

// lose is a loss of power: of each block that was not synced some version is there, a newer one the more likely the
// larger share is, from 0 to 1.
func (p *player) lose(share float64) disk {
	left := maps.Clone(p.stable)
	for _, i := range slices.Sorted(maps.Keys(p.pending)) {
		if rand.Float64() < share {
			versions := p.pending[i]
			n := len(versions) - 1
			if rand.IntN(4) == 0 {
				n = rand.IntN(len(versions))
			}
			left.set(i, versions[n])
		}
	}
	return onDisk(left)
}

// kill is the end of the process: the kernel has all.
func (p *player) kill() disk {
	left := onDisk(p.stable)
	for i, b := range p.dropped {
		left.now.set(i, b)
	}
	for i, versions := range p.pending {
		left.now.set(i, versions[len(versions)-1])
		left.dirty[i/blocksPerPage] = true
	}
	return left
}
