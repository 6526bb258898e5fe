package iscsi

import (
	"context"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// maxImmediate is how many immediate commands may be under way: no window bounds them.
const maxImmediate = 16

// memoryPatience is how long a command that holds up others, or memory, waits for memory before it is refused.
const memoryPatience = time.Second

// tasks are those that nobody uses.
var tasks sync.Pool

// command takes a SCSI Command (section 11.3), whose data is not read yet. It counts as received when its data has come,
// too.
func (c *conn) command() error {
	h := &c.header
	if !h.immediate() && !c.expects(h.cmdSN()) {
		return c.skip()
	}
	t, reason := c.newTask(h)
	if reason != 0 {
		return c.skipAndReject(reason)
	}
	c.checkCommand(t, h)
	bad, err := c.immediateData(t)
	if bad || err != nil {
		c.discard(t)
		if bad {
			c.reject(rejectDataDigest)
		}
		return err
	}
	mine, inTurn := c.register(t)
	if mine {
		c.begin(t)
	}
	if inTurn {
		return c.deliverHeld()
	}
	return nil
}

// expects says whether a CmdSN is in the window and new. What is not is ignored (section 4.2.2.1).
func (c *conn) expects(cmdSN uint32) bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return c.s.inWindow(cmdSN) && !c.s.holds(cmdSN)
}

// newTask makes a task of the header at hand, or gives the reason to reject it.
func (c *conn) newTask(h *bhs) (t *task, reason byte) {
	if c.s.target == nil || h.itt() == noTag || h.flags()&maskAttr > attrACA {
		return nil, rejectProtocol
	}
	cdb, bidi := h.cdb(), false
	if len(c.ahs) > 0 {
		p := pdu{bhs: *h, ahs: c.ahs}
		var err error
		if cdb, bidi, err = p.commandCDB(); err != nil {
			return nil, rejectInvalidField
		}
	}
	if reason := c.full(h); reason != 0 {
		return nil, reason
	}
	t, ok := tasks.Get().(*task)
	if !ok {
		t = &task{}
	}
	t.cmd.CDB = append(t.cdb[:0], cdb...)
	t.itt, t.cmdSN, t.lun = h.itt(), h.cmdSN(), h.lun()
	t.attr, t.immediate = h.flags()&maskAttr, h.immediate()
	t.read, t.write = h.flags()&flagRead != 0, h.flags()&flagWrite != 0
	t.edtl = int(h.edtl())
	t.unsolicited = t.write && !h.final()
	if number, ok := parseLUN(t.lun); ok {
		t.n = c.s.nexus(number)
	}
	if bidi || t.read && t.write {
		t.fail(senseInvalidUnit) // no command here moves data both ways
	}
	return t, 0
}

// full gives the reason to reject a command for what is under way already.
func (c *conn) full(h *bhs) byte {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	switch {
	case c.tasks[h.itt()] != nil:
		return rejectInProgress
	case h.immediate() && c.immediate >= maxImmediate:
		return rejectTooMany
	}
	return 0
}

// discard forgets a task that is not registered.
func (c *conn) discard(t *task) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	t.n = nil
	c.release(t)
}

// register makes a task known. It goes on at once if its CmdSN is the next one (inTurn) and nothing is before it at its
// unit (mine: it is in the caller's hand).
func (c *conn) register(t *task) (mine, inTurn bool) {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.n != nil && s.nexuses[t.n.unit.lun] != t.n {
		t.n = nil // its unit was removed meanwhile
	}
	c.alive++
	c.tasks[t.itt] = t
	if t.n != nil {
		t.n.use()
	}
	s.commands.Add(1)
	inTurn = t.immediate || t.cmdSN == s.expCmdSN
	switch {
	case t.immediate:
		c.immediate++
	case inTurn:
		s.expCmdSN++
	default:
		s.held[t.cmdSN] = held{task: t}
	}
	if inTurn {
		c.deliver(t)
	}
	if !t.turn {
		t.waits, t.receiving, t.touched = true, t.unsolicited, c.ticks
	}
	return t.turn, inTurn
}

// checkCommand holds a command against what was agreed on at login.
func (c *conn) checkCommand(t *task, h *bhs) {
	n := h.dataLength()
	switch {
	case t.prepared:
	case n > 0 && (!t.write || !c.params.immediateData),
		t.unsolicited && c.params.initialR2T:
		t.fail(senseUnexpectedData)
	case n > c.params.firstBurst || n > t.edtl && n > 0:
		t.fail(senseIncorrectData)
	case t.attr == attrACA:
		t.fail(senseInvalidMessage) // there is never an ACA condition
	case t.unsolicited:
		t.want = min(t.edtl, c.params.firstBurst) // until its turn comes, and the unit says how much it takes
	default:
		t.want = n
	}
}

// immediateData reads the data segment of a command into the task's memory.
func (c *conn) immediateData(t *task) (bad bool, err error) {
	n := c.header.dataLength()
	if n == 0 && !t.unsolicited {
		return false, nil
	}
	if t.want > 0 && !c.obtainNow(t) {
		c.refuse(t)
	}
	var dst []byte
	if t.want > 0 {
		dst = t.out.b[:t.want]
	}
	t.got = n
	return c.readData(dst)
}

// deliverHeld does what was waiting for the CmdSNs before it.
func (c *conn) deliverHeld() error {
	for {
		h, ok := c.nextHeld()
		switch {
		case !ok:
			return nil
		case h.task != nil:
			c.advance(h.task)
		case h.do != nil:
			if err := h.do(); err != nil {
				return err
			}
		}
	}
}

// nextHeld takes the request whose turn has come. It gives a task its place at once, so that whoever ends it finds it there;
// the caller has the task in hand, unless it waits for more than its CmdSN.
func (c *conn) nextHeld() (h held, ok bool) {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if h, ok = s.held[s.expCmdSN]; !ok {
		return h, false
	}
	delete(s.held, s.expCmdSN)
	s.expCmdSN++
	if t := h.task; t != nil {
		c.deliver(t)
		if t.turn && !t.receiving {
			t.waits = false
		} else {
			h.task = nil
		}
	}
	s.openWindow(c.underWay)
	return h, true
}

// obtain takes memory for the data-out of a task, if it is there.
func (c *conn) obtain(t *task) bool {
	size := t.lacks()
	if size > 0 {
		if !c.quota.try(size) {
			return false
		}
		c.allot(t, size)
	}
	return true
}

// lacks is how much of the quota the task needs beside what it has.
func (t *task) lacks() int64 {
	switch {
	case t.out == nil:
		return bufferSize(t.want)
	case len(t.out.b) < t.want:
		return bufferSize(t.want) - int64(len(t.out.b))
	}
	return 0
}

// allot gives a task memory that was taken of the quota, and puts into it what has come.
func (c *conn) allot(t *task, size int64) {
	t.memory += size
	had := t.out
	t.out = c.srv.buffers.get(t.want)
	if had != nil {
		copy(t.out.b, had.b[:t.got])
		c.srv.buffers.put(had)
	}
}

// obtainNow is obtain for data that comes without being asked for. The reader waits a moment for memory, once until there
// is some again; but not while a task of this connection needs the reader to give its memory back.
func (c *conn) obtainNow(t *task) bool {
	if c.obtain(t) {
		c.short = false
		return true
	}
	if c.short || c.receiving() {
		return false
	}
	c.flush()
	ctx, cancel := context.WithTimeout(c.ctx, memoryPatience)
	defer cancel()
	size := t.lacks()
	if c.short = c.quota.wait(ctx, size) != nil; c.short {
		return false
	}
	c.allot(t, size)
	return true
}

// refuse gives a command that there is no memory for its status (SAM-5 5.3.1): TASK SET FULL where the initiator has others
// under way at the unit, and else BUSY.
func (c *conn) refuse(t *task) {
	t.prepared, t.want = true, 0
	t.cmd.Done, t.cmd.Status = true, scsi.Busy
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for _, o := range c.tasks {
		if o != t && o.n == t.n {
			t.cmd.Status = scsi.TaskSetFull
		}
	}
}

// receiving says whether a task with memory waits for the reader.
func (c *conn) receiving() bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for _, t := range c.tasks {
		if t.waits && !t.queued && t.out != nil {
			return true
		}
	}
	return false
}

// skip throws the data segment of the PDU at hand away.
func (c *conn) skip() error {
	_, err := c.readData(nil)
	return err
}

func (c *conn) skipAndReject(reason byte) error {
	if err := c.skip(); err != nil {
		return err
	}
	c.reject(reason)
	return nil
}

// reject answers the PDU at hand with a Reject that carries its header (section 11.17). Its CmdSN counts as not
// received.
func (c *conn) reject(reason byte) {
	p := &pdu{data: c.header[:]}
	p.bhs[0], p.bhs[1], p.bhs[2] = opReject, flagFinal, reason
	p.setITT(noTag)
	c.send(p)
}
