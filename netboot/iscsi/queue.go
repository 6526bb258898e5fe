package iscsi

import "slices"

// deliver gives a task its place among those of its unit (SAM-5 8.6): ordered tasks start when all older ones are done,
// and younger ones when they are; head of queue tasks start at once. That holds within a session: to tasks of other
// sessions there is no order. Whether its turn has come is in t.turn. It needs s.mu.
func (c *conn) deliver(t *task) {
	t.delivered = true
	if !t.immediate {
		c.underWay++
	}
	n := t.n
	if n == nil {
		t.turn = true
		return
	}
	if t.attr == attrOrdered && !n.orders {
		n.orders = true
		c.probe(n)
	}
	switch {
	case t.attr == attrHeadOfQueue:
	case len(n.waiting) > 0 || n.ordered != nil || t.attr == attrOrdered && n.started > 0:
		n.waiting = append(n.waiting, t)
		return
	}
	n.start(t)
}

func (n *nexus) start(t *task) {
	t.turn = true
	n.started++
	if t.attr == attrOrdered {
		n.ordered = t
	}
}

// leaveQueue takes a task that ended out of the order, and returns those whose turn has come and that waited for nothing
// else; the caller has them in hand. One that waits for data, too, stays the reader's to take. It needs s.mu.
func (t *task) leaveQueue() (ready []*task) {
	n := t.n
	if n == nil || !t.turn {
		return nil
	}
	n.started--
	if n.ordered == t {
		n.ordered = nil
	}
	return n.turns()
}

// turns returns those whose turn has come, as leaveQueue does. It needs s.mu.
func (n *nexus) turns() (ready []*task) {
	for len(n.waiting) > 0 && n.ordered == nil {
		next := n.waiting[0]
		if next.attr == attrOrdered && n.started > 0 {
			break
		}
		n.waiting = n.waiting[1:]
		n.start(next)
		if next.waits && !next.receiving {
			next.waits = false
			ready = append(ready, next)
		}
	}
	return ready
}

// leaveWaiting is for a task that ends before its turn. It needs s.mu.
func (t *task) leaveWaiting() {
	if n := t.n; n != nil && !t.turn {
		n.waiting = slices.DeleteFunc(n.waiting, func(o *task) bool { return o == t })
	}
}

// lends says whether memory may be lent that is sent from this nexus's unit (lend.go), and notes that it is. Where it may
// change, the data of a read must not show what an ordered task behind it writes: an initiator that gives such tasks, as some
// do now and then, is lent none from the first on. It needs s.mu.
func (n *nexus) lends() bool {
	if n.unit.Medium().ReadOnly() {
		return true
	}
	n.lent = n.lent || !n.orders
	return !n.orders
}

// probe keeps the first ordered task of a nexus from its turn until the initiator has taken the data that was lent before:
// its answer to a ping comes from behind that. It needs s.mu.
func (c *conn) probe(n *nexus) {
	if !n.lent {
		return
	}
	n.probe, n.since = c.putPing(n.unit.lun), c.ticks
	n.started++
}

// unlend is for when the initiator has taken what was lent. It needs s.mu.
func (n *nexus) unlend() {
	n.lent = false
	if n.probe != 0 {
		n.probe = 0
		n.started--
	}
}

// unanswered says whether an ordered task has waited for too long for the answer to its ping. It needs s.mu.
func (c *conn) unanswered() bool {
	for _, n := range c.s.nexuses {
		if n.probe != 0 && c.ticks-n.since > stallTicks {
			return true
		}
	}
	return false
}

// probed takes the answer to a ping, and goes on with the tasks that waited for it or for one before it.
func (c *conn) probed(ttt uint32) {
	var ready []*task
	c.s.mu.Lock()
	for _, n := range c.s.nexuses {
		if n.probe != 0 && ttt != noTag && int32(ttt-n.probe) >= 0 { //nolint:gosec // tags go round
			n.unlend()
			ready = append(ready, n.turns()...)
		}
	}
	c.s.mu.Unlock()
	for _, t := range ready {
		c.advance(t)
	}
}
