package iscsi

// stallTicks is how many read deadlines may pass while something waits for the initiator.
const stallTicks = 2

// stalled is called when a read deadline has passed, and says whether the initiator keeps something here waiting, and the
// memory that it has.
func (c *conn) stalled() bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.ticks++
	for _, t := range c.tasks {
		if t.receiving && (c.ticks-t.touched > stallTicks || c.crawls(t)) {
			return true
		}
	}
	return c.unanswered() || c.keepsHole()
}

// crawls says whether a task has waited for the end of its data for so long that the initiator, which may have others to
// serve before, would have sent some on the whole. It needs s.mu.
func (c *conn) crawls(t *task) bool {
	if t.since > 0 && c.ticks-t.since <= stallTicks {
		return false
	}
	slow := t.since > 0 && c.watch.data-t.data < c.leastData()
	t.since, t.data = c.ticks, c.watch.data
	return slow
}

// leastData is how many bytes an initiator sends at least while stallTicks deadlines pass.
func (c *conn) leastData() uint64 {
	shortest := min(c.srv.cfg.IdleTimeout, c.srv.cfg.PingTimeout)
	return uint64(slowest * (stallTicks * shortest).Seconds())
}

// keepsHole says whether requests have waited for the same CmdSN for too long. It comes before them on the connection, so
// that it is on its way only where it was rejected. It needs s.mu.
func (c *conn) keepsHole() bool {
	w := &c.watch
	switch {
	case len(c.s.held) == 0:
		w.since = 0
	case w.since == 0 || w.hole != c.s.expCmdSN:
		w.hole, w.since = c.s.expCmdSN, c.ticks
	default:
		return c.ticks-w.since > stallTicks
	}
	return false
}
