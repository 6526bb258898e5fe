package iscsi

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

const (
	// flushSize is how much a connection gathers before it writes, while its input has more to be answered: enough that
	// a system call costs little, and little enough that the initiator has something to do meanwhile.
	flushSize = 128 << 10
	// maxPending is how much may wait for the one that writes before data-in waits for its turn (proceed).
	maxPending = 1 << 20
	// maxUnread is how much may wait before the reader waits with it: more than data-in alone ever makes of it, so that
	// data-out and pings are read while that is on its way. The headers of a piece are less than an eighth of it, as a
	// PDU has 512 bytes of data at least.
	maxUnread = maxPending + pieceSize + pieceSize/8 + 1<<20
	// arenaSize is how much memory for headers a batch gets at a time.
	arenaSize = 4 << 10
	// copySize is up to how many bytes data is copied behind its header, in place of a piece of its own.
	copySize = 512
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A batch is responses in the order of their StatSNs, on their way out.
type batch struct {
	parts   [][]byte
	lent    []span // of parts, what is lent to the kernel
	arena   []byte // of which headers are parts
	open    bool   // the last part is the end of the arena
	bytes   int64
	tasks   []*task // those that ended
	loading []*task // those that go on when this is written
	charge  int64   // of the connection's quota, beside that of the tasks
	iovs    []unix.Iovec
}

// batches are those that nobody uses.
var batches sync.Pool

// grow appends n bytes, zero, to what is to be written.
func (b *batch) grow(n int) []byte {
	if n == 0 {
		return nil // an empty part is one more to write, for which a pipe would wait
	}
	start := len(b.arena)
	if start+n > cap(b.arena) {
		// Parts go on referring to the old one.
		b.arena, start, b.open = make([]byte, 0, max(arenaSize, n)), 0, false
	}
	b.arena = b.arena[:start+n]
	p := b.arena[start:]
	clear(p)
	if last := len(b.parts) - 1; b.open {
		b.parts[last] = b.parts[last][:len(b.parts[last])+n]
	} else {
		b.parts = append(b.parts, p[:n:cap(p)])
		b.open = true
	}
	b.bytes += int64(n)
	return p
}

// header appends a zero header.
func (b *batch) header() *bhs { return (*bhs)(b.grow(bhsLength)) }

// refer appends bytes that stay as they are until the batch is written.
func (b *batch) refer(p []byte) {
	if len(p) <= copySize {
		copy(b.grow(len(p)), p)
		return
	}
	b.attach(p)
}

// attach is refer for mapped memory, however little: whoever copied it would look at it.
func (b *batch) attach(p []byte) {
	b.parts = append(b.parts, p)
	b.open = false
	b.bytes += int64(len(p))
}

// reset makes the batch ready for use again.
func (b *batch) reset() {
	clear(b.parts)
	clear(b.tasks)
	clear(b.loading)
	b.parts, b.tasks, b.loading, b.lent = b.parts[:0], b.tasks[:0], b.loading[:0], b.lent[:0]
	b.arena, b.open, b.bytes, b.charge = b.arena[:0], false, 0, 0
}

// batch is the one that gathers. It needs s.mu.
func (c *conn) batch() *batch {
	if c.out == nil {
		var ok bool
		if c.out, ok = batches.Get().(*batch); !ok {
			c.out = &batch{arena: make([]byte, 0, arenaSize)}
		}
	}
	return c.out
}

// number fills in StatSN, used up or not, and the window. It needs s.mu.
func (c *conn) number(h *bhs, uses bool) {
	h.setStatSN(c.statSN)
	if uses {
		c.statSN++
	}
	c.windowInto(h)
}

func (c *conn) windowInto(h *bhs) {
	h.setExpCmdSN(c.s.expCmdSN)
	h.setMaxCmdSN(c.s.maxCmdSN)
}

// sealHeader appends the header digest, if there is one.
func (c *conn) sealHeader(b *batch, h *bhs) {
	if c.params.headerDigest {
		binary.LittleEndian.PutUint32(b.grow(digestLength), crc32.Checksum(h[:], castagnoli))
	}
}

// sealData appends padding and the data digest, if there is one, to the data segment of n bytes in pieces.
func (c *conn) sealData(b *batch, n int, pieces ...[]byte) {
	if n == 0 {
		return
	}
	pad := b.grow(padded(n) - n)
	if !c.params.dataDigest {
		return
	}
	var sum uint32
	for _, p := range pieces {
		sum = crc32.Update(sum, castagnoli, p)
	}
	sum = crc32.Update(sum, castagnoli, pad)
	binary.LittleEndian.PutUint32(b.grow(digestLength), sum)
}

// put appends a PDU without an AHS, whose StatSN it numbers. It needs s.mu.
func (c *conn) put(p *pdu, usesStatSN bool) {
	b := c.batch()
	before := b.bytes
	h := b.header()
	*h = p.bhs
	h.setDataLength(len(p.data))
	c.number(h, usesStatSN)
	c.sealHeader(b, h)
	b.refer(p.data)
	c.sealData(b, len(p.data), p.data)
	c.pending.Add(b.bytes - before)
}

// send is put for who does not have s.mu.
func (c *conn) send(p *pdu) {
	c.s.mu.Lock()
	c.put(p, true)
	c.s.mu.Unlock()
}

// respond appends the outcome of a task: its data in Data-In PDUs, the last with the status in it where that is GOOD, and
// else a SCSI Response (sections 11.7 and 11.4). It needs s.mu.
func (c *conn) respond(t *task) {
	b := c.batch()
	before := b.bytes
	flags, residual := t.residual()
	if t.sent < t.sending && t.cmd.Status == scsi.Good {
		c.dataIn(b, t, flags, residual)
	} else {
		c.response(b, t, flags, residual)
	}
	c.pending.Add(b.bytes - before)
}

func (c *conn) response(b *batch, t *task, flags byte, residual uint32) {
	h := b.header()
	h[0], h[1] = opResponse, flagFinal|flags
	h[3] = byte(t.cmd.Status)
	h.setITT(t.itt)
	h.setDataSN(t.r2tSN + t.inSN)
	h.setResidual(residual)
	c.number(h, true)
	if t.cmd.Status != scsi.CheckCondition {
		c.sealHeader(b, h)
		return
	}
	sense := t.cmd.Sense.Append(make([]byte, 2, 64))
	binary.BigEndian.PutUint16(sense, uint16((len(sense)-2)&0xffff))
	h.setDataLength(len(sense))
	c.sealHeader(b, h)
	b.refer(sense)
	c.sealData(b, len(sense), sense)
}

// dataIn cuts what is in t.parts into PDUs of the initiator's MaxRecvDataSegmentLength, and into sequences of
// MaxBurstLength, each of which ends with an F bit. The status goes into the last of all.
func (c *conn) dataIn(b *batch, t *task, flags byte, residual uint32) {
	from := cursor{parts: t.parts}
	end := t.sent + t.next
	c.s.bytesOut.Add(uint64(t.next)) //nolint:gosec // parts have no negative length
	t.next = 0
	for t.sent < end {
		burstLeft := c.params.maxBurst - t.sent%c.params.maxBurst
		n := min(c.params.maxSend, burstLeft, end-t.sent)
		h := b.header()
		h[0] = opDataIn
		h.setDataLength(n)
		h.setITT(t.itt)
		h.setTTT(noTag)
		h.setDataSN(t.inSN)
		h.setBufferOff(uint32(t.sent & 0xffffffff))
		t.inSN++
		t.sent += n
		if n == burstLeft || t.sent == t.sending {
			h[1] = flagFinal
		}
		if t.sent == t.sending {
			h[1] |= flagStatus | flags
			h[3] = byte(scsi.Good)
			h.setResidual(residual)
			c.number(h, true)
		} else {
			c.windowInto(h)
		}
		c.sealHeader(b, h)
		c.dataSegment(b, &from, n, t)
	}
}

func (c *conn) dataSegment(b *batch, from *cursor, n int, t *task) {
	var sum uint32
	first := len(b.parts)
	for left := n; left > 0; {
		p := from.take(left)
		left -= len(p)
		if t.mapped {
			b.attach(p)
		} else {
			b.refer(p)
		}
		if c.params.dataDigest {
			sum = crc32.Update(sum, castagnoli, p)
		}
	}
	if t.mapped && n >= lendSize && t.n.lends() {
		b.lent = append(b.lent, span{first, len(b.parts)})
	}
	pad := b.grow(padded(n) - n)
	if c.params.dataDigest {
		sum = crc32.Update(sum, castagnoli, pad)
		binary.LittleEndian.PutUint32(b.grow(digestLength), sum)
	}
}

// A cursor goes through pieces of memory.
type cursor struct {
	parts [][]byte
	off   int // in the first
}

// take is the next piece, of n bytes at most.
func (c *cursor) take(n int) []byte {
	p := c.parts[0][c.off:]
	if n < len(p) {
		c.off += n
		return p[:n]
	}
	c.parts, c.off = c.parts[1:], 0
	return p
}

// flush writes what was gathered, and what comes while it writes. If somebody else writes already, that one takes it
// along.
func (c *conn) flush() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.writing {
		return
	}
	c.writing = true
	for c.out != nil {
		b := c.out
		c.out = nil
		c.s.mu.Unlock()
		c.writeBatch(b)
		c.s.mu.Lock()
		c.releaseBatch(b)
		c.changed.Broadcast()
	}
	c.writing = false
	c.changed.Broadcast()
}

// drain is flush, but returns when all has been written, by whomever.
func (c *conn) drain() {
	c.flush()
	c.s.mu.Lock()
	for c.writing {
		c.changed.Wait()
	}
	c.s.mu.Unlock()
}

func (c *conn) writeBatch(b *batch) {
	if c.broken.Load() {
		return
	}
	var err error
	if b.iovs, err = c.wire.write(b.parts, b.lent, b.iovs); err == nil {
		return
	}
	c.broken.Store(true)
	if errors.Is(err, unix.EFAULT) {
		b.unmap()
	}
	c.closeFor(err)
}

// unmap tells the media of the mapped memory that the kernel cannot look at. Where it is at a loss (a kernel before 5.14,
// or memory that is there again), it tells all that may have been meant.
func (b *batch) unmap() {
	mapped := slices.DeleteFunc(slices.Concat(b.tasks, b.loading), func(t *task) bool { return !t.mapped })
	gone := slices.DeleteFunc(slices.Clone(mapped), func(t *task) bool { return populateAll(t.parts) })
	if len(gone) == 0 {
		gone = mapped
	}
	for _, t := range gone {
		t.n.unit.mapper.Unmapped()
	}
}

// releaseBatch lets go of what a batch that was written, or never will be, referred to. It needs s.mu.
func (c *conn) releaseBatch(b *batch) {
	c.pending.Add(-b.bytes)
	var ready []*task
	for _, t := range b.tasks {
		if t.mapped {
			ready = append(ready, t.leaveQueue()...)
		}
		c.release(t)
	}
	if len(ready) > 0 {
		c.goOn(ready)
	}
	for _, t := range b.loading {
		c.enqueue(t)
	}
	c.quota.release(b.charge)
	b.reset()
	batches.Put(b)
	c.unpark()
}

// unpark goes on with tasks that have data to send, as far as there is room for it. It needs s.mu.
func (c *conn) unpark() {
	var ready []*task
	for len(c.parked) > 0 && c.pending.Load() < maxPending {
		t := c.parked[0]
		c.parked[0], c.parked = nil, c.parked[1:]
		t.waits = false
		ready = append(ready, c.proceed(t)...)
	}
	if len(ready) > 0 {
		c.goOn(ready)
	}
}

// ease is called by the reader between PDUs: it writes when enough has come together, and waits where somebody else
// writes and cannot keep up.
func (c *conn) ease() {
	if c.pending.Load() < flushSize {
		return
	}
	c.flush()
	if c.pending.Load() < maxUnread {
		return
	}
	c.s.mu.Lock()
	for c.writing && c.pending.Load() >= maxUnread {
		c.changed.Wait()
	}
	c.s.mu.Unlock()
}
