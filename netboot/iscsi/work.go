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

// enqueue is work for who has s.mu.
func (c *conn) enqueue(t *task) {
	switch {
	case t.fate != fateOutcome || c.ending:
		c.goOn(c.finish(t))
	case c.workers < connWorkers:
		c.workers++
		c.background.Go(func() { c.worker(t) })
	default:
		c.backlog = append(c.backlog, t)
	}
}

// buffer gets memory for the data of a read, when there is some, and then a worker.
func (c *conn) buffer(t *task) {
	size := bufferSize(t.piece())
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	t.running = false // who ends it must not wait for the memory that it waits for
	if t.fate != fateOutcome || c.ending {
		c.enqueue(t)
		return
	}
	if c.quota.try(size) {
		c.loadInto(t, size)
		return
	}
	c.background.Go(func() {
		ctx, cancel := c.unlessStopped(c.ctx, t)
		defer cancel()
		if c.quota.wait(ctx, size) != nil {
			if c.ctx.Err() != nil {
				c.abandon(t)
			} else {
				c.complete(t) // it was stopped
				c.flush()
			}
			return
		}
		c.s.mu.Lock()
		c.loadInto(t, size)
		c.s.mu.Unlock()
	})
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

// loadInto gives a task a buffer that was taken of the quota, and a worker. It needs s.mu.
func (c *conn) loadInto(t *task, size int64) {
	t.memory += size
	t.in = c.srv.buffers.get(int(size))
	c.enqueue(t)
}

// worker works until there is nothing to do.
func (c *conn) worker(t *task) {
	for t != nil {
		c.srv.workers <- struct{}{}
		c.execute(t)
		<-c.srv.workers
		c.flush()
		t = c.nextWork()
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
	c.backlog = c.backlog[1:]
	return t
}

// execute does what may wait for a disk: the command, or reading the data of one that is done.
func (c *conn) execute(t *task) {
	if !c.mayExecute(t) {
		c.complete(t)
		return
	}
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

func (c *conn) mayExecute(t *task) bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	t.running = t.fate == fateOutcome && !c.ending
	return t.running
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
	c.buffer(t)
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
