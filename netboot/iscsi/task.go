package iscsi

import (
	"maps"
	"slices"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// A task is a SCSI command on its way. Its life, and where the functions are:
//
//	           command (reader)
//	              |  immediate data is read
//	              v
//	+------> waits for its turn: CmdSN in order, and no ordered task before it
//	|             | advance: Prepare
//	|             +----------------> the outcome is known, or mapped data is in memory --+
//	|             |                                                                      |
//	|             +--> waits for memory, for data-out (dataOut, reader) --+              |
//	|             v                                                       |              |
//	|          worker: Execute, or reads what is not in memory <----------+              |
//	|             |                                                                      |
//	|             v                                                                      |
//	+--------- finish: respond, and let the next ones have their turn <------------------+
//	              |
//	              v
//	           release, when the batch with its response is written
//
// It is in the hand of one goroutine at a time, or of none (waits). Who wants to end it from outside ends it at once if
// it waits, and else says so with fate to whoever has it in hand. All fields that stop and finish look at are guarded by
// session.mu; the others belong to whoever has the task in hand.
type task struct {
	n         *nexus // nil: there is no such unit
	cmd       scsi.Command
	cdb       [16]byte
	itt       uint32
	cmdSN     uint32
	edtl      int
	lun       uint64
	attr      byte
	immediate bool
	read      bool // the initiator expects data-in, of edtl bytes at most
	write     bool // it has data-out, of edtl bytes

	// Guarded by session.mu.
	waits     bool          // in nobody's hand
	queued    bool          // waits, for a worker
	delivered bool          // its CmdSN was in order
	turn      bool          // it may be given to the unit
	running   bool          // in the hand of somebody who executes it
	receiving bool          // waits, for data-out
	fate      fate          // how it is to end
	ended     chan struct{} // closed when it has ended; nil until somebody waits for that
	touched   uint32        // conn.ticks when data-out came last
	cancel    func()        // ends the wait for memory; nil where there never was one
	since     uint32        // conn.ticks when it was first seen to wait for data-out, or found to come along with it; 0: never
	data      uint64        // watch.data then

	prepared bool

	// Data-out.
	want        int     // how much of it the unit gets
	got         int     // how much of edtl has come, in order
	asked       int     // up to where it was asked for, or comes unsolicited
	unsolicited bool    // more comes without being asked for
	dataSN      uint32  // of the next Data-Out of the sequence
	r2ts        []r2t   // outstanding, in order
	r2tSN       uint32  // of the next R2T
	out         *buffer // of want bytes; nil while there is none

	// Data-in.
	sending int      // how much is sent in all
	sent    int      // how much of it went out before
	inSN    uint32   // of the next Data-In
	parts   [][]byte // what goes out next
	next    int      // how many bytes those are
	mapped  bool     // it is memory of a scsi.Mapper
	in      *buffer

	memory int64 // of the connection's quota
}

// An r2t is data that was asked for.
type r2t struct {
	ttt      uint32
	off, end int
}

// A fate is how a task ends.
type fate byte

const (
	fateOutcome fate = iota // with the outcome that the unit gives it
	fateAborted             // without a word
	fateNoUnit              // its unit was removed
)

// Sense data of the transport (RFC 7143 section 11.4.7.2, SPC-4 table 43). The sense key of the first four is ABORTED
// COMMAND.
var (
	senseUnexpectedData = scsi.Sense{Key: 0x0b, ASC: 0x0c, ASCQ: 0x0c}
	senseIncorrectData  = scsi.Sense{Key: 0x0b, ASC: 0x0c, ASCQ: 0x0d}
	senseServiceCRC     = scsi.Sense{Key: 0x0b, ASC: 0x47, ASCQ: 0x05}
	senseNoUnit         = scsi.Sense{Key: 0x05, ASC: 0x25, ASCQ: 0x00}
	senseInvalidUnit    = scsi.Sense{Key: 0x05, ASC: 0x0e, ASCQ: 0x03} // INVALID FIELD IN COMMAND INFORMATION UNIT
	senseInvalidMessage = scsi.Sense{Key: 0x05, ASC: 0x49, ASCQ: 0x00}
)

// fail gives the task an outcome before the unit has seen it.
func (t *task) fail(s scsi.Sense) {
	t.cmd.Done, t.cmd.Status, t.cmd.Sense = true, scsi.CheckCondition, s
	t.cmd.Read.N, t.cmd.In = 0, nil
	t.prepared, t.want = true, 0
}

// residual compares what the initiator expected to be moved with what the command moves (section 11.4.5).
func (t *task) residual() (flags byte, count uint32) {
	expected, moved := 0, 0
	if t.read || t.write {
		expected = t.edtl
	}
	switch in := t.dataIn(); {
	case t.cmd.Status != scsi.Good && t.read:
		moved = t.sent
	case t.cmd.Status != scsi.Good:
		moved = min(t.got, t.want, expected)
	case in > 0:
		moved = in
		if !t.read {
			expected = 0
		}
	case t.cmd.OutLength > 0:
		moved = t.cmd.OutLength
		if !t.write {
			expected = 0
		}
	}
	switch {
	case moved > expected:
		return flagOverflow, uint32(moved - expected)
	case moved < expected:
		return flagUnderflow, uint32(expected - moved)
	}
	return 0, 0
}

// dataIn is how many bytes of data-in the command has.
func (t *task) dataIn() int {
	if n := t.cmd.Read.N; n > 0 {
		return int(n)
	}
	return len(t.cmd.In)
}

// prepare gives the command to its unit for the first time.
func (c *conn) prepare(t *task) {
	t.prepared = true
	switch {
	case t.cmd.CDB[0] == opReportLUNs:
		c.reportLUNs(t)
	case t.n == nil:
		scsi.Absent(&t.cmd)
	default:
		if t.write {
			t.cmd.Expected = int64(t.edtl)
		}
		t.n.Prepare(&t.cmd)
	}
	if t.cmd.Done {
		t.want = 0
		return
	}
	t.want = 0
	if t.write {
		t.want = min(t.edtl, t.cmd.OutLength)
	}
}

// reportLUNs answers REPORT LUNS, for all nexuses of the session.
func (c *conn) reportLUNs(t *task) {
	scsi.ReportLUNs(&t.cmd, c.s.target.LUNs())
	c.s.mu.Lock()
	nexuses := slices.Collect(maps.Values(c.s.nexuses))
	c.s.mu.Unlock()
	for _, n := range nexuses {
		n.LUNsReported()
	}
}

// opReportLUNs is REPORT LUNS, which is the target's to answer.
const opReportLUNs = 0xa0

// advance brings a task whose turn has come, and which the caller has in hand, as far as it goes.
func (c *conn) advance(t *task) {
	if c.step(t) {
		c.work(t)
	}
}

// step is advance, but for what wants a worker: it says so, and leaves the task in the caller's hand.
func (c *conn) step(t *task) (work bool) {
	if !t.prepared {
		c.prepare(t)
	}
	switch {
	case t.unsolicited || t.cmd.Done && len(t.r2ts) > 0:
		c.await(t) // an outcome has to wait for all data that is on its way (section 7.8)
	case t.cmd.Done:
		return c.answer(t)
	case t.got < t.want:
		c.solicit(t)
	default:
		return true
	}
	return false
}

// await lets a task wait for data-out.
func (c *conn) await(t *task) {
	c.s.mu.Lock()
	if t.fate == fateOutcome {
		t.waits, t.receiving, t.touched = true, true, c.ticks
		c.s.mu.Unlock()
		return
	}
	c.s.mu.Unlock()
	c.complete(t)
}

// answer is step for a task that the unit is done with. Data that has to be waited for wants a worker.
func (c *conn) answer(t *task) (work bool) {
	switch {
	case !c.gather(t) || c.inMemory(t):
		c.complete(t)
		return false
	case t.mapped:
		return true
	}
	return c.buffer(t)
}

// gather finds out how much data-in is sent, and says whether that has yet to be read.
func (c *conn) gather(t *task) (fromMedium bool) {
	if t.cmd.Status != scsi.Good || !t.read {
		return false
	}
	t.sending = min(t.dataIn(), t.edtl)
	if t.sending == 0 || t.cmd.Read.N > 0 {
		return t.sending > 0
	}
	t.parts, t.next = append(t.parts[:0], t.cmd.In[:t.sending]), t.sending
	return false
}

// piece is how much of a read is next.
func (t *task) piece() int { return min(t.sending-t.sent, pieceSize) }

// inMemory finds the mapped memory of the first piece of a read (then t.mapped), and says whether all of it is in the page
// cache, so that sending it waits for no disk.
func (c *conn) inMemory(t *task) bool {
	t.mapped = c.segments(t)
	return t.mapped && c.srv.residency.holds(t.parts)
}

// segments finds the mapped memory of the next piece of a read. With data digests there is none: they would have to look at it.
func (c *conn) segments(t *task) bool {
	u := t.n.unit
	if u.mapper == nil || c.params.dataDigest || c.wire.raw == nil {
		return false
	}
	n := t.piece()
	parts, ok := u.mapper.Segments(t.parts[:0], t.cmd.Read.Off+int64(t.sent), n)
	if ok {
		t.parts, t.next = parts, n
	}
	return ok
}

// abandon ends a task that the caller has in hand, and that nobody hears of any more: the connection ends.
func (c *conn) abandon(t *task) {
	c.s.mu.Lock()
	t.fate = fateAborted
	c.s.mu.Unlock()
	c.complete(t)
}

// complete goes on with a task that the caller has in hand, and that has an outcome or a piece of its data, and with those
// whose turn that makes it.
func (c *conn) complete(t *task) {
	c.s.mu.Lock()
	ready := c.proceed(t)
	c.s.mu.Unlock()
	for _, next := range ready {
		c.advance(next)
	}
}

// proceed ends a task, or sends a piece of its data if there is more behind it; a worker gets that when the piece is
// written (releaseBatch). While much is pending the task waits before it sends data: so headers and what is copied behind
// them take little memory, however small the initiator has its PDUs and however slowly it reads. It needs s.mu, and
// returns what finish does.
func (c *conn) proceed(t *task) (ready []*task) {
	full, more := c.pending.Load() >= maxPending, t.sent+t.next < t.sending
	switch {
	case t.next == 0 || (!full && !more) || c.stopped(t):
		return c.finish(t)
	case full:
		t.waits, t.running = true, false
		c.parked = append(c.parked, t)
	default:
		t.running = false
		c.sendPiece(t)
	}
	return nil
}

// stopped says that a task which is to wait for something, or to be executed, is to end in place of that: it was ended
// from outside, the connection ends, or its unit was removed while it was being executed. It needs s.mu.
func (c *conn) stopped(t *task) bool {
	if t.fate == fateOutcome && t.n != nil && t.n.removed {
		t.fate = fateNoUnit
	}
	return t.fate != fateOutcome || c.ending
}

// finish ends a task and returns those whose turn has come with that; the caller has them in hand. It needs s.mu.
func (c *conn) finish(t *task) (ready []*task) {
	c.alive--
	if c.tasks[t.itt] == t {
		delete(c.tasks, t.itt)
	}
	switch same := func(o *task) bool { return o == t }; {
	case t.fate == fateAborted && !t.waits:
		c.aborted = slices.DeleteFunc(c.aborted, same)
	case t.queued:
		c.backlog = slices.DeleteFunc(c.backlog, same)
	case t.waits && t.next > 0:
		c.parked = slices.DeleteFunc(c.parked, same)
	}
	t.waits, t.queued, t.receiving = false, false, false
	switch {
	case t.immediate:
		c.immediate--
	case t.delivered:
		c.underWay--
	default:
		c.s.held[t.cmdSN] = held{} // its number is used up all the same
	}
	t.leaveWaiting()
	c.s.openWindow(c.underWay)
	if t.fate == fateNoUnit {
		t.fail(senseNoUnit)
		t.sending, t.next = 0, 0
	}
	if t.fate != fateAborted && !c.ending {
		c.respond(t)
	}
	if t.ended != nil {
		close(t.ended)
		t.ended = nil
	}
	if c.ending {
		c.changed.Broadcast()
	}
	if c.out == nil {
		ready = t.leaveQueue()
		c.release(t)
		return ready
	}
	c.out.tasks = append(c.out.tasks, t)
	if t.mapped {
		return nil // what is in the mapping is read when it is written: see releaseBatch
	}
	return t.leaveQueue()
}

// release gives back what the task has. Nothing refers to its memory any more. It needs s.mu.
func (c *conn) release(t *task) {
	if t.n != nil {
		t.n.unuse()
	}
	for _, b := range []*buffer{t.out, t.in} {
		if b != nil {
			c.srv.buffers.put(b)
		}
	}
	c.quota.release(t.memory)
	parts, r2ts := t.parts, t.r2ts
	clear(parts)
	*t = task{parts: parts[:0], r2ts: r2ts[:0]}
	tasks.Put(t)
}

// tasksOf are the tasks of a nexus; nil: all. It needs s.mu.
func (c *conn) tasksOf(n *nexus) []*task {
	var list []*task
	for _, t := range c.tasks {
		if n == nil || t.n == n {
			list = append(list, t)
		}
	}
	return list
}

// stop ends a task from outside: now, if it waits. It needs s.mu. Those whose turn that makes it go on by themselves.
func (c *conn) stop(t *task, how fate) {
	if t.fate == fateOutcome {
		t.fate = how
	}
	if t.fate == fateAborted && c.tasks[t.itt] == t {
		delete(c.tasks, t.itt) // the initiator may use the tag again
		if t.running {
			c.aborted = append(c.aborted, t)
		}
	}
	if t.cancel != nil {
		t.cancel()
	}
	if !t.waits {
		return
	}
	if ready := c.finish(t); len(ready) > 0 {
		c.goOn(ready)
	}
}

// goOn advances tasks, and writes what there is to write, in a goroutine of its own. It needs s.mu.
func (c *conn) goOn(ready []*task) {
	if c.finished || len(ready) == 0 && c.ending {
		return
	}
	c.background.Go(func() {
		for _, t := range ready {
			c.advance(t)
		}
		c.flush()
	})
}

// abort ends tasks without a word. What it returns waits for those that a worker has in hand, but for PERSISTENT RESERVE
// OUT: that may be the one that wants the others to end, and changes no blocks. It needs s.mu.
func (c *conn) abort(list []*task) waits {
	var w waits
	for _, t := range list {
		if t.running && t.cmd.CDB[0] != opPersistentReserveOut {
			if t.ended == nil {
				t.ended = make(chan struct{})
			}
			w = append(w, t.ended)
		}
		c.stop(t, fateAborted)
	}
	return w
}

// waits are tasks to be waited for.
type waits []<-chan struct{}

func (w waits) wait() {
	for _, ended := range w {
		<-ended
	}
}
