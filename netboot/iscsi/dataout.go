package iscsi

import (
	"context"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// solicit asks for data-out, once there is memory for it.
func (c *conn) solicit(t *task) {
	if c.obtain(t) {
		c.ask(t)
		return
	}
	c.s.mu.Lock()
	if t.fate != fateOutcome || c.ending {
		c.s.mu.Unlock()
		c.complete(t)
		return
	}
	c.background.Go(func() {
		c.solicitLater(t)
		c.flush()
	})
	c.s.mu.Unlock()
}

// solicitLater waits for memory. A task that has some, of data that came unasked, may be what others wait for, and they what
// it waits for: it is soon refused. One without may be what those wait for that come after it.
func (c *conn) solicitLater(t *task) {
	patience := c.srv.cfg.PingTimeout
	if t.out != nil {
		patience = min(patience, memoryPatience)
	}
	ctx, cancel := context.WithTimeout(c.ctx, patience)
	defer cancel()
	ctx, stop := c.unlessStopped(ctx, t)
	defer stop()
	size := t.lacks()
	switch err := c.quota.wait(ctx, size); {
	case err == nil:
		c.allot(t, size)
		c.ask(t)
	case c.ctx.Err() != nil:
		c.abandon(t)
	default:
		c.refuse(t)
		c.complete(t)
	}
}

// ask sends as many R2Ts as may be outstanding (section 11.8), and lets the task wait for the data.
func (c *conn) ask(t *task) {
	c.s.mu.Lock()
	if t.fate != fateOutcome {
		c.s.mu.Unlock()
		c.complete(t)
		return
	}
	for t.asked = max(t.asked, t.got); t.asked < t.want && len(t.r2ts) < c.params.maxOutstandingR2T; {
		r := r2t{ttt: c.newTTT(), off: t.asked, end: min(t.want, t.asked+c.params.maxBurst)}
		t.r2ts = append(t.r2ts, r)
		t.asked = r.end
		c.putR2T(t, r)
	}
	t.waits, t.receiving, t.touched = true, true, c.ticks
	c.s.mu.Unlock()
}

// putR2T needs s.mu.
func (c *conn) putR2T(t *task, r r2t) {
	p := pdu{}
	p.bhs[0], p.bhs[1] = opR2T, flagFinal
	p.setLUN(t.lun)
	p.setITT(t.itt)
	p.setTTT(r.ttt)
	p.setDataSN(t.r2tSN)
	p.setBufferOff(uint32(r.off & 0xffffffff))
	p.setResidual(uint32((r.end - r.off) & 0xffffffff))
	t.r2tSN++
	c.put(&p, false)
}

// dataOut takes a SCSI Data-Out (section 11.7). One that belongs to no task, or to one that needs no data, is of a task
// that was ended before all of its data came, and is ignored.
func (c *conn) dataOut() error {
	h := &c.header
	c.s.mu.Lock()
	t := c.tasks[h.itt()]
	if t == nil || !t.receiving {
		c.s.mu.Unlock()
		return c.skip()
	}
	t.waits, t.receiving = false, false
	c.s.mu.Unlock()
	if s, ok := t.misplaced(h, &c.params); ok {
		t.fail(s)
	}
	var dst []byte
	if t.got < t.want {
		dst = t.out.b[t.got:min(t.want, len(t.out.b))]
	}
	bad, err := c.readData(dst)
	if err != nil {
		c.abandon(t)
		return err
	}
	if bad {
		c.reject(rejectDataDigest)
		t.fail(senseServiceCRC)
	}
	t.received(h)
	c.handOver(t)
	return nil
}

// handOver lets go of a task whose data-out has been read: to its turn, if that has come.
func (c *conn) handOver(t *task) {
	c.s.mu.Lock()
	if !t.turn && t.fate == fateOutcome {
		t.waits, t.receiving, t.touched = true, t.unsolicited, c.ticks
		c.s.mu.Unlock()
		return
	}
	ended := t.fate != fateOutcome
	c.s.mu.Unlock()
	if ended {
		c.complete(t)
		return
	}
	c.begin(t)
}

// misplaced holds a Data-Out against what is expected. All data comes in order here (DataPDUInOrder and
// DataSequenceInOrder are Yes), and nothing is sent a second time at error recovery level 0.
func (t *task) misplaced(h *bhs, p *params) (scsi.Sense, bool) {
	end := t.got + h.dataLength()
	switch {
	case t.cmd.Done:
		return scsi.Sense{}, false // and is thrown away
	case t.unsolicited != (h.ttt() == noTag):
		return senseUnexpectedData, true
	case !t.unsolicited && h.ttt() != t.r2ts[0].ttt, h.dataSN() != t.dataSN, int(h.bufferOff()) != t.got:
		return senseServiceCRC, true
	case t.unsolicited && end > min(p.firstBurst, t.edtl):
		return senseIncorrectData, true
	case !t.unsolicited && (end > t.r2ts[0].end || h.final() != (end == t.r2ts[0].end)):
		return senseIncorrectData, true
	}
	return scsi.Sense{}, false
}

// received counts a Data-Out that has been read.
func (t *task) received(h *bhs) {
	t.got += h.dataLength()
	t.dataSN++
	if !h.final() {
		return
	}
	t.dataSN = 0
	if t.unsolicited {
		t.unsolicited = false
	} else if len(t.r2ts) > 0 {
		t.r2ts = t.r2ts[:copy(t.r2ts, t.r2ts[1:])]
	}
}
