package lun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// A history is what was asked of a medium, and when, so that it can be said what may be found of it afterwards.
type history struct {
	base  []byte
	clock atomic.Int64 // moments, in the order of what happens
	ops   func() int   // how many operations of the file there were

	mu       sync.Mutex
	goesOn   int64                // the block behind the last write
	versions map[int64][]*written // by block
	syncs    []*span
	ids      uint64
}

// A span is when something began and when it was acknowledged.
type span struct {
	begin, end       int64 // moments
	beginOp, endOp   int   // operations of the file
	failed, answered bool
}

// A written is what was written to a block.
type written struct {
	span *span
	id   uint64 // 0 is zeros
}

func newHistory(base []byte, ops func() int) *history {
	return &history{base: base, ops: ops, versions: map[int64][]*written{}}
}

func (h *history) begin() *span { return &span{begin: h.clock.Add(1), beginOp: h.ops()} }

func (h *history) end(s *span, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.endOp, s.end, s.failed, s.answered = h.ops(), h.clock.Add(1), err != nil, true
}

// write has m write n blocks from block on.
func (h *history) write(m mediumOf, block, n int64) error {
	h.mu.Lock()
	h.ids++
	id := h.ids
	h.mu.Unlock()
	s := h.begin()
	h.note(s, block, n, id)
	p := make([]byte, 0, n*BlockSize)
	for i := range n {
		p = append(p, content(block+i, id)...)
	}
	_, err := m.WriteAt(p, block*BlockSize)
	h.end(s, err)
	h.mu.Lock()
	h.goesOn = block + n
	h.mu.Unlock()
	return err
}

func (h *history) zero(m mediumOf, block, n int64) error {
	s := h.begin()
	h.note(s, block, n, 0)
	err := m.Zero(block*BlockSize, n*BlockSize, true)
	h.end(s, err)
	return err
}

func (h *history) sync(m mediumOf) error {
	s := h.begin()
	err := m.Sync()
	h.end(s, err)
	if err == nil {
		h.mu.Lock()
		h.syncs = append(h.syncs, s)
		h.mu.Unlock()
	}
	return err
}

func (h *history) note(s *span, block, n int64, id uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range n {
		h.versions[block+i] = append(h.versions[block+i], &written{s, id})
	}
}

// mediumOf is what a history works on.
type mediumOf interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Zero(off, n int64, unmap bool) error
	Sync() error
	Size() int64
}

// content is what is written to a block: each 8 bytes say which block that is, and which write.
func content(block int64, id uint64) []byte {
	if id == 0 {
		return zeros[:BlockSize]
	}
	b := make([]byte, BlockSize)
	for at := 0; at < len(b); at += 8 {
		binary.LittleEndian.PutUint64(b[at:], id<<32|uint64(block)^0x5a5a5a5a)
	}
	return b
}

// A crash is when and how a process ended.
type crash struct {
	op    int  // so many operations of the file were done
	power bool // lost, or the process was only killed
}

// acknowledged says up to which moment what was answered must be found after the crash: all of what was there of it, or
// where power was lost what the last sync that was answered is about.
func (h *history) acknowledged(c crash) func(s *span) bool {
	synced := int64(0)
	for _, sync := range h.syncs {
		if sync.endOp <= c.op {
			synced = max(synced, sync.begin)
		}
	}
	return func(s *span) bool {
		switch {
		case !s.answered || s.failed:
			return false
		case c.power:
			return s.end < synced
		}
		return s.endOp <= c.op
	}
}

// mayBe says whether a block may be found with this content after a crash.
func (h *history) mayBe(block int64, found []byte, c crash, acknowledged func(*span) bool) bool {
	versions := h.versions[block]
	last := int64(-1) // when the latest began that must be there or be written over
	for _, v := range versions {
		if acknowledged(v.span) {
			last = max(last, v.span.begin)
		}
	}
	if last < 0 && bytes.Equal(found, h.below(block)) {
		return true
	}
	if !bytes.Equal(found, bytes.Repeat(found[:8], BlockSize/8)) {
		return false
	}
	for _, v := range versions {
		over := v.span.answered && v.span.end < last
		if !over && v.span.beginOp <= c.op && bytes.Equal(found[:8], content(block, v.id)[:8]) {
			return true
		}
	}
	return false
}

// below is what a block was before anything was written.
func (h *history) below(block int64) []byte {
	if off := block * BlockSize; off+BlockSize <= int64(len(h.base)) {
		return h.base[off : off+BlockSize]
	}
	return zeros[:BlockSize] // bases end with a block
}

// check reads the blocks of some clusters and says which is not as it may be.
func (h *history) check(m mediumOf, clusters []int64, c crash) error {
	buf := make([]byte, clusterSize)
	acknowledged := h.acknowledged(c)
	for _, cluster := range clusters {
		n := min(clusterSize, m.Size()-cluster*clusterSize)
		if _, err := m.ReadAt(buf[:n], cluster*clusterSize); err != nil {
			return err
		}
		for at := int64(0); at < n; at += BlockSize {
			block := (cluster*clusterSize + at) / BlockSize
			if found := buf[at : at+BlockSize]; !h.mayBe(block, found, c, acknowledged) {
				return fmt.Errorf("%+v: block %d of cluster %d has %x...: %s", c, block, cluster, found[:16], h.describe(block, acknowledged))
			}
		}
	}
	return nil
}

func (h *history) describe(block int64, acknowledged func(*span) bool) string {
	var s strings.Builder
	fmt.Fprintf(&s, "below %x...", h.below(block)[:16])
	for _, v := range h.versions[block] {
		fmt.Fprintf(&s, "\n  %x... %+v acknowledged %v", content(block, v.id)[:16], *v.span, acknowledged(v.span))
	}
	return s.String()
}

// hot are the clusters that a random history works on: few, so that it comes back to each, in sectors of two pages of the map.
func hot(size int64) []int64 {
	last := (size - 1) / clusterSize
	var all []int64
	for c := range int64(40) {
		all = append(all, c)
	}
	for _, border := range []int64{perSector, 4 * perSector} {
		for c := border - 4; c < border+4; c++ {
			all = append(all, c)
		}
	}
	return append(all, last-2, last-1, last)
}

// random does something at random with m. What fails with allowed errors is noted as that.
func (h *history) random(m mediumOf, syncs int, allowed ...error) error {
	clusters := hot(m.Size())
	block := clusters[rand.IntN(len(clusters))]*8 + int64(rand.IntN(8))
	n := int64(1 + rand.IntN(1<<rand.IntN(6)))
	if rand.IntN(2) == 0 {
		block, n = block/8*8, roundUp(n, 8)
	}
	if rand.IntN(3) == 0 {
		h.mu.Lock()
		block = h.goesOn
		h.mu.Unlock()
		n = min(n, 8)
	}
	blocks := m.Size() / BlockSize
	block = min(block, blocks-1)
	n = min(n, blocks-block)
	var err error
	switch k := rand.IntN(10 + syncs); {
	case k < 2:
		err = h.zero(m, block, n)
	case k < 10:
		err = h.write(m, block, n)
	default:
		err = h.sync(m)
	}
	for _, a := range allowed {
		if errors.Is(err, a) {
			return nil
		}
	}
	return err
}

// testHeader is that of a delta over base with five sectors in its map, which ends within a cluster.
func testHeader(t *testing.T, base []byte) *header {
	t.Helper()
	size := int64(4*perSector+30)*clusterSize + 3*BlockSize
	h, err := wanted{base: memory(base), size: size}.newHeader()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// memory is a base in memory.
type memory []byte

func (m memory) Size() int64                                              { return int64(len(m)) }
func (m memory) ReadAt(p []byte, off int64) (int, error)                  { return copy(p, m[off:]), nil }
func (m memory) Segments(dst [][]byte, off int64, n int) ([][]byte, bool) { return dst, false }
func (m memory) Unmapped()                                                {}
