package iscsi

import (
	"encoding/binary"
	"fmt"
)

const (
	// maxControl is how much text one request may bring, and maxHeld how much data a request that comes before its turn: so
	// little that it is not counted.
	maxControl = 16 << 10
	maxHeld    = copySize
	// maxManaging is how many task management functions of a connection may wait for tasks to end.
	maxManaging = 16
)

// handle answers the PDU whose header is at hand. An error ends the connection.
func (c *conn) handle() error {
	h := &c.header
	if n := h.dataLength(); n > c.params.maxRecv {
		c.reject(rejectProtocol)
		return fmt.Errorf("%w: data segment of %d bytes, of %d at most", errProtocol, n, c.params.maxRecv)
	}
	switch h.opcode() {
	case opCommand:
		return c.command()
	case opDataOut:
		return c.dataOut()
	case opNopOut:
		return c.nopOut()
	case opTask:
		return c.control(0, c.taskManagement)
	case opText:
		return c.control(maxControl, c.textRequest)
	case opLogout:
		return c.control(0, c.logout)
	case opSNACK:
		return c.skipAndReject(rejectSNACK)
	case opLogin:
		c.reject(rejectProtocol)
		return fmt.Errorf("%w: login request in full feature phase", errProtocol)
	}
	return c.skipAndReject(rejectUnsupported)
}

// control reads a request with most bytes of data at most, and does it in its turn.
func (c *conn) control(most int, do func(p *pdu) error) error {
	return c.request(most, most, do)
}

// request is control that keeps only so much of the data.
func (c *conn) request(most, keep int, do func(p *pdu) error) error {
	data, bad, err := c.readSmall(keep)
	switch {
	case err != nil:
		return err
	case bad:
		c.reject(rejectDataDigest)
		return nil
	case c.header.dataLength() > most:
		c.reject(rejectInvalidField)
		return nil
	case c.header.itt() == noTag && (c.header.opcode() != opNopOut || !c.header.immediate()):
		c.reject(rejectProtocol) // the answer to a ping uses up no CmdSN (section 11.18)
		return nil
	}
	p := &pdu{bhs: c.header, data: data}
	if p.immediate() {
		return do(p)
	}
	s := c.s
	s.mu.Lock()
	switch cmdSN := p.cmdSN(); {
	case !s.inWindow(cmdSN) || s.holds(cmdSN):
		s.mu.Unlock()
		return nil
	case cmdSN != s.expCmdSN && p.dataLength() > maxHeld:
		s.mu.Unlock()
		return fmt.Errorf("%w: %d bytes of data in a request before its turn", errProtocol, p.dataLength())
	case cmdSN != s.expCmdSN:
		s.held[cmdSN] = held{do: func() error { return do(p) }}
		s.mu.Unlock()
		return nil
	}
	s.expCmdSN++
	s.openWindow(c.underWay)
	s.mu.Unlock()
	if err := do(p); err != nil {
		return err
	}
	return c.deliverHeld()
}

// nopOut answers a ping, or takes the answer to ours (section 11.18). It gives back as much of the data as the initiator
// takes in one PDU, and as there is memory for.
func (c *conn) nopOut() error {
	if c.header.itt() == noTag {
		return c.request(c.params.maxRecv, 0, func(p *pdu) error {
			c.probed(p.ttt())
			return nil
		})
	}
	keep, memory := min(c.header.dataLength(), c.params.maxSend), int64(0)
	if keep > copySize {
		if memory = int64(keep); !c.quota.try(memory) {
			keep, memory = 0, 0
		}
	}
	err := c.request(c.params.maxRecv, keep, func(p *pdu) error {
		c.answerPing(p, memory)
		memory = 0
		return nil
	})
	c.quota.release(memory) // of one that was refused: those that are held have none
	return err
}

// answerPing takes over the memory that the data was given.
func (c *conn) answerPing(p *pdu, memory int64) {
	r := &pdu{data: p.data}
	r.bhs[0], r.bhs[1] = opNopIn, flagFinal
	r.setLUN(p.lun())
	r.setITT(p.itt())
	r.setTTT(noTag)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.batch().charge += memory
	c.put(r, true)
}

// textRequest answers a Text Request (section 11.10).
func (c *conn) textRequest(p *pdu) error {
	r, reject := c.text.step(p)
	if reject {
		c.header = p.bhs
		c.reject(rejectProtocol)
		return nil
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.params.maxSend = c.text.maxSend
	c.put(r, true)
	return nil
}

// logout ends the connection, and with it the session (section 11.14).
func (c *conn) logout(p *pdu) error {
	r := &pdu{}
	r.bhs[0], r.bhs[1] = opLogoutResp, flagFinal
	r.setITT(p.itt())
	binary.BigEndian.PutUint16(r.bhs[40:], uint16(c.params.time2Wait&0xffff))
	binary.BigEndian.PutUint16(r.bhs[42:], uint16(c.params.time2Retain&0xffff))
	switch reason := p.function(); {
	case reason == logoutRecovery:
		r.bhs[2] = logoutNoRecovery
	case reason == logoutConnection && p.cid() != c.cid:
		r.bhs[2] = logoutNoCID
	case reason > logoutRecovery:
		c.header = p.bhs
		c.reject(rejectInvalidField)
		return nil
	}
	if r.bhs[2] != logoutDone {
		c.send(r)
		return nil
	}
	c.s.mu.Lock()
	waits := c.abort(c.tasksOf(nil))
	c.s.mu.Unlock()
	c.flush() // what those that ended had may be what the others need to end
	waits.wait()
	c.send(r)
	return errLogout
}
