package iscsi

import "context"

// opPersistentReserveOut is PERSISTENT RESERVE OUT, which may wait for tasks of others to end.
const opPersistentReserveOut = 0x5f

// pieceSize is how much of a read is sent at a time, through a buffer or mapped.
const pieceSize = 1 << 20

// work gives a task to a worker, or to the first that is free. Whoever has a worker never waits for memory or for the
// initiator: others wait for workers while they hold memory.
func (c *conn) work(t *task) {
	c.s.mu.Lock()
	c.enqueue(t)
	c.s.mu.Unlock()
}

// enqueue is work for who has s.mu. Until a worker takes the task it is in nobody's hand, so that it can be ended while
// all workers hang.
func (c *conn) enqueue(t *task) {
	if c.stopped(t) {
		c.goOn(c.finish(t))
		return
	}
	t.waits, t.queued = true, true
	c.backlog = append(c.backlog, t)
	if c.workers < connWorkers {
		c.workers++
		c.background.Go(c.worker)
	}
}

// buffer gets memory for the data of a read, and says that it is there, so that the task wants a worker. Where it is not
// yet, the task gets one later.
func (c *conn) buffer(t *task) (work bool) {
	size := bufferSize(t.piece())
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	t.running = false // who ends it must not wait for the memory that it waits for
	if c.stopped(t) {
		return true // for enqueue to end it
	}
	if c.quota.try(size) {
		c.loadInto(t, size)
		return true
	}
	c.background.Go(func() {
		c.bufferLater(t, size)
		c.flush()
	})
	return false
}

// bufferLater waits for memory, but not for long: what has it may be the data of commands that come after an ordered one,
// and wait for this.
func (c *conn) bufferLater(t *task, size int64) {
	ctx, cancel := context.WithTimeout(c.ctx, c.srv.cfg.PingTimeout)
	defer cancel()
	ctx, stop := c.unlessStopped(ctx, t)
	defer stop()
	switch err := c.quota.wait(ctx, size); {
	case err == nil:
		c.s.mu.Lock()
		c.loadInto(t, size)
		c.enqueue(t)
		c.s.mu.Unlock()
	case c.ctx.Err() != nil:
		c.abandon(t)
	default: // stopped, or refused
		c.refuse(t)
		c.complete(t)
	}
}

// unlessStopped is a context for a task that waits for memory, done also when the task is stopped.
func (c *conn) unlessStopped(parent context.Context, t *task) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(parent)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	t.cancel = cancel
	if t.fate != fateOutcome {
		cancel()
	}
	return ctx, cancel
}

// loadInto gives a task a buffer that was taken of the quota. It needs s.mu.
func (c *conn) loadInto(t *task, size int64) {
	t.memory += size
	t.in = c.srv.buffers.get(int(size))
}

// worker works until there is nothing to do. Where it cannot begin before the connection ends, end does the rest.
func (c *conn) worker() {
	for {
		select {
		case c.srv.workers <- struct{}{}:
		case <-c.ctx.Done():
			c.s.mu.Lock()
			c.workers--
			c.s.mu.Unlock()
			return
		}
		t := c.nextWork()
		if t != nil {
			c.execute(t)
		}
		<-c.srv.workers
		if t == nil {
			return
		}
		c.flush()
	}
}

// nextWork is nil where the worker is to end.
func (c *conn) nextWork() *task {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if len(c.backlog) == 0 {
		c.backlog = nil
		c.workers--
		return nil
	}
	t := c.backlog[0]
	c.backlog[0], c.backlog = nil, c.backlog[1:]
	t.waits, t.queued, t.running = false, false, true
	return t
}

// execute does what may wait for a disk: the command, or reading the data of one that is done.
func (c *conn) execute(t *task) {
	if !t.cmd.Done {
		if t.want > 0 {
			t.cmd.Out = t.out.b[:t.want]
			c.s.bytesIn.Add(uint64(t.want))
		}
		t.n.Execute(&t.cmd)
	}
	switch {
	case !c.gather(t):
		c.complete(t)
	case t.in != nil:
		c.loadPiece(t)
	default:
		c.load(t)
	}
}

// load gets the next piece of a read into the page cache where it is mapped, and sends it off to get a buffer where it is
// not. The reader has looked at the first piece (inMemory).
func (c *conn) load(t *task) {
	t.mapped = c.segments(t) && (t.sent > 0 && c.srv.residency.holds(t.parts) || populateAll(t.parts))
	if t.mapped {
		c.complete(t)
		return
	}
	t.parts, t.next = t.parts[:0], 0
	if c.buffer(t) {
		c.work(t)
	}
}

// loadPiece reads the next piece of the data into the buffer, and sends it.
func (c *conn) loadPiece(t *task) {
	b := t.in.b[:t.piece()]
	if _, err := t.n.unit.Medium().ReadAt(b, t.cmd.Read.Off+int64(t.sent)); err != nil {
		c.srv.log.Error("reading a LUN", "lun", t.n.unit.lun, "target", c.s.target.name, "err", err)
		t.n.ReadFailed(&t.cmd, err)
		t.cmd.Read.N, t.sending, t.next = 0, 0, 0
		c.complete(t)
		return
	}
	t.parts, t.next = append(t.parts[:0], b), len(b)
	c.complete(t)
}

// sendPiece sends what is there of a read that is not the last of it. It needs s.mu.
func (c *conn) sendPiece(t *task) {
	out := c.batch()
	before := out.bytes
	c.dataIn(out, t, 0, 0)
	c.pending.Add(out.bytes - before)
	out.loading = append(out.loading, t)
}

func populateAll(parts [][]byte) bool {
	for _, p := range parts {
		if populate(p) != nil {
			return false
		}
	}
	return true
}
