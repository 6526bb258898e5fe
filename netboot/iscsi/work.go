package iscsi

import "github.com/troupe-dev/troupe/netboot/iscsi/scsi"

// opPersistentReserveOut is PERSISTENT RESERVE OUT, which may wait for tasks of others to end.
const opPersistentReserveOut = 0x5f

// work gives a task to a worker, or to the first that is free.
func (c *conn) work(t *task) {
	c.s.mu.Lock()
	if t.fate != fateOutcome || c.ending {
		c.s.mu.Unlock()
		c.complete(t)
		return
	}
	if c.workers < connWorkers {
		c.workers++
		c.background.Go(func() { c.worker(t) })
	} else {
		c.backlog = append(c.backlog, t)
	}
	c.s.mu.Unlock()
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
	if c.gather(t) {
		c.fetch(t)
	}
	c.complete(t)
}

func (c *conn) mayExecute(t *task) bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	t.running = t.fate == fateOutcome && !c.ending
	return t.running
}

// fetch gets the data of a read into memory: into the page cache where it is mapped, and else into a buffer.
func (c *conn) fetch(t *task) {
	if c.segments(t) && populateAll(t.parts) {
		t.mapped = true
		return
	}
	t.parts = t.parts[:0]
	size := bufferSize(t.sending)
	if c.quota.wait(c.ctx, size) != nil {
		t.cmd.Status, t.sending = scsi.Busy, 0 // not that anybody hears of it: the connection ends
		return
	}
	t.memory += size
	t.in = c.srv.buffers.get(t.sending)
	b := t.in.b[:t.sending]
	if _, err := t.n.unit.Medium().ReadAt(b, t.cmd.Read.Off); err != nil {
		c.srv.log.Error("reading a LUN", "lun", t.n.unit.lun, "target", c.s.target.name, "err", err)
		t.n.ReadFailed(&t.cmd, err)
		t.cmd.Read.N, t.sending = 0, 0
		return
	}
	t.parts = append(t.parts, b)
}

func populateAll(parts [][]byte) bool {
	for _, p := range parts {
		if populate(p) != nil {
			return false
		}
	}
	return true
}
