package iscsi

import (
	"errors"
	"time"
)

// Where nothing else is under way on a connection, its reader executes the command in hand itself: to wake somebody for it
// would take a tenth of the time of a write that is made durable (measured; to have somebody else go on to read takes as
// much). Meanwhile nobody reads the connection. A lookout, one goroutine of all connections of a listener, there while
// readers execute, finds those that have not come back after ownLooks looks: then another goroutine goes on to read, and who
// executes has become a worker.
const (
	lookEvery = 10 * time.Millisecond
	ownLooks  = 2
	// lastLooks is how often a lookout looks for nothing before it goes.
	lastLooks = 100
	// ownQuick is how long a command may take that was not worth a worker. After one that took longer, all are left to workers
	// for ownPause times as long, so that a slow disk makes others on its connection wait for little of the time.
	ownQuick = 2 * time.Millisecond
	ownPause = 16
)

// errRelieved is what a reader ends with when another one has taken its place.
var errRelieved = errors.New("another goroutine reads")

// begin is advance for the reader, who may keep for itself what wants a worker. Then it executes it when it is done with
// the PDU at hand.
func (c *conn) begin(t *task) {
	switch {
	case !c.step(t):
	case c.keeps(t):
		c.own = t
	default:
		c.work(t)
	}
}

// keeps says whether the reader is to execute a task that it has in hand. Then it has a place among those that work.
func (c *conn) keeps(t *task) bool {
	if c.wire.buffered() > 0 || !c.ownAfter.IsZero() && time.Now().Before(c.ownAfter) {
		return false
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	// What is held comes next, and may be a logout that waits for this task; what is gathered must not wait for it.
	if c.alive > 1 || len(c.s.held) > 0 || c.out != nil || t.fate != fateOutcome {
		return false
	}
	select {
	case c.srv.workers <- struct{}{}:
	default:
		return false // who waits for a place can be ended, and a reader not
	}
	t.running = true
	return true
}

// executeOwn executes the task that the reader kept. It returns errRelieved where the caller is not the reader any more.
func (c *conn) executeOwn() error {
	t := c.own
	c.own = nil
	began := time.Now()
	token := c.crowd.begin(c)
	c.execute(t)
	<-c.srv.workers
	c.flush()
	if !c.unread.CompareAndSwap(token, 0) {
		c.worker()
		return errRelieved
	}
	c.wire.stay = true
	if took := time.Since(began); took > ownQuick {
		c.ownAfter = time.Now().Add(ownPause * took)
	}
	return nil
}

// relieve has another goroutine read in place of one that executes, unless that has come back.
func (c *conn) relieve(token uint64) {
	if !c.unread.CompareAndSwap(token, 0) {
		return
	}
	c.s.mu.Lock()
	c.workers++
	c.s.mu.Unlock()
	c.background.Go(func() {
		c.ownAfter = time.Now().Add(ownPause * ownLooks * lookEvery)
		if err := c.read(); !errors.Is(err, errRelieved) {
			c.cease(err) // the one that serves may still execute
			c.readEnd <- err
		}
	})
}

// A token names an execution by a reader. Its lowest looksBits bits are how often the lookout had looked; what is above
// says which of the connection's it is, from 1.
const looksBits = 24

// begin notes that a reader is going to execute, and has somebody look out.
func (w *crowd) begin(c *conn) (token uint64) {
	c.owned++
	token = c.owned<<looksBits | w.looks.Load()%(1<<looksBits)
	c.unread.Store(token)
	if !w.active.Load() {
		w.active.Store(true)
	}
	w.lookOut()
	return token
}

// lookOut starts the lookout, where there is none.
func (w *crowd) lookOut() {
	if !w.awake.Load() && w.awake.CompareAndSwap(false, true) {
		w.running.Go(w.look)
	}
}

// look is what a lookout does.
func (w *crowd) look() {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for idle := 0; idle < lastLooks; idle++ {
		select {
		case <-tick.C:
		case <-w.closing:
			return
		}
		w.relieve(w.looks.Add(1))
		if w.active.Swap(false) {
			idle = 0
		}
	}
	w.awake.Store(false)
	if w.active.Load() {
		w.lookOut() // for somebody who found one awake
	}
}

// relieve relieves the readers of which it is time.
func (w *crowd) relieve(looks uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		if token := c.unread.Load(); token != 0 && (looks-token)%(1<<looksBits) > ownLooks {
			c.relieve(token)
		}
	}
}
