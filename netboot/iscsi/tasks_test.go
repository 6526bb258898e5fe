package iscsi

import (
	"bytes"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// A slowMap is a disk that is mapped nowhere, and takes its time to say so.
type slowMap struct {
	*disk
	gate *gate
}

func (m slowMap) Segments([][]byte, int64, int) ([][]byte, bool) {
	m.gate.came <- 0
	<-m.gate.open
	return nil, false
}

func (slowMap) Unmapped() {}

// together sends PDUs in one segment, so that the target finds them all there when it reads.
func (i *initiator) together(list ...*pdu) {
	i.t.Helper()
	var b []byte
	for _, p := range list {
		b = append(b, i.marshal(p)...)
	}
	if _, err := i.nc.Write(b); err != nil {
		i.t.Fatal(err)
	}
}

// A write whose turn has come while its data was on its way is the reader's alone: here its data comes while the one that
// gave it its turn is still busy with another task.
func TestTurnBeforeData(t *testing.T) {
	f := serve(t, nil)
	medium := slowMap{newDisk(), newGate()}
	syncs := newGate()
	medium.hook(syncs.holding("sync"))
	f.add(1, medium)
	i := f.login("InitialR2T=No", "ImmediateData=Yes")
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))

	ordered := i.on(1, i.command(sync10(), 0, nil))
	ordered.bhs[1] = ordered.bhs[1]&^maskAttr | attrOrdered
	i.send(ordered)
	<-syncs.came
	read := i.on(1, i.command(read10(0, 8), 8*512, nil))
	write := i.on(1, i.command(write10(8, 1), 0, []byte{}))
	write.setTTT(512)
	write.bhs[1] &^= flagFinal
	i.together(read, write)
	i.quiet()
	close(syncs.open)
	<-medium.gate.came // the ordered one is done, and the read in hand

	data := pattern(512, 1)
	i.send(dataOut(write, noTag, 0, 0, data, true))
	for done := false; !done; {
		p := i.expectOpcode(opResponse)
		if p.bhs[3] != byte(scsi.Good) {
			t.Fatalf("status %#02x of task %d", p.bhs[3], p.itt())
		}
		done = p.itt() == write.itt()
	}
	close(medium.gate.open)
	r := i.outcome(read)
	i.expectGood(r)
	if !bytes.Equal(r.data, diskContent()[:8*512]) {
		t.Error("wrong data is read")
	}
	if !bytes.Equal(medium.bytes(8*512, 512), data) {
		t.Error("the disk has other bytes than were written")
	}
	i.quiet()
}

// Who ends a read that waits for memory does not wait for that memory.
func TestAbortTaskThatWaitsForMemory(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxMemory = scsi.MaxTransfer })
	f.add(1, &disk{data: make([]byte, scsi.MaxTransfer)})
	syncs := newGate()
	f.disk.hook(syncs.holding("sync"))
	i := f.login()
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	fua := read10(0, 1)
	fua[1] = 1 << 3
	read := i.command(fua, 512, nil)
	i.send(read)
	<-syncs.came
	write := i.on(1, i.command(write10(0, scsi.MaxTransfer/512), 0, []byte{}))
	write.setTTT(scsi.MaxTransfer)
	i.send(write)
	i.expectOpcode(opR2T) // and all memory is its
	close(syncs.open)
	next := i.command(sync10(), 0, nil)
	i.expectGood(i.do(next)) // by the same worker

	p := i.manage(taskAbort, read)
	i.send(p)
	i.expectManaged(p, taskComplete)
}

// A logout waits for what a worker has in hand, but not with answers in its own.
func TestLogoutSendsWhatThereIs(t *testing.T) {
	f := serve(t, nil)
	syncs := newGate()
	f.disk.hook(syncs.holding("sync"))
	i := f.login()
	i.send(i.command(sync10(), 0, nil))
	<-syncs.came
	ping := i.immediate(i.request(opNopOut, 0))
	ping.setTTT(noTag)
	i.together(ping, i.immediate(i.request(opLogout, 0)))
	i.expectOpcode(opNopIn)
	close(syncs.open)
	i.expectOpcode(opLogoutResp)
	i.closed()
}

// hang has so many commands of a unit be in the hands of workers that do not come back.
func (i *initiator) hang(lun LUN, syncs *gate, n int) {
	for range n {
		i.send(i.on(lun, i.command(sync10(), 0, nil)))
		<-syncs.came
	}
}

// What no worker has begun is ended at once, though all workers hang.
func TestEndOfTasksThatWaitForAWorker(t *testing.T) {
	f := serve(t, nil)
	syncs := newGate()
	f.disk.hook(syncs.holding("sync"))
	defer close(syncs.open)
	f.add(1, newDisk())
	i := f.login()
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	i.hang(0, syncs, connWorkers)

	aborted := i.on(1, i.command(sync10(), 0, nil))
	i.send(aborted)
	abort := i.manage(taskAbort, aborted)
	abort.setLUN(aborted.lun())
	i.send(abort)
	i.expectManaged(abort, taskComplete)

	removed := i.on(1, i.command(sync10(), 0, nil))
	i.send(removed)
	i.quiet()
	if err := f.target.Remove(1); err != nil {
		t.Error(err)
	}
	if r := i.outcome(removed); r.sense != "5/2500" {
		t.Errorf("sense %s, want LOGICAL UNIT NOT SUPPORTED", r.sense)
	}
}

// A command that waits for one of the places that all connections share can be aborted, and its connection ends, though
// all that have places hang.
func TestEndOfTasksThatWaitForAPlace(t *testing.T) {
	f := serve(t, nil)
	f.srv.workers = make(chan struct{}, 1)
	syncs := newGate()
	f.disk.hook(syncs.holding("sync"))
	defer close(syncs.open)
	f.add(1, newDisk())
	f.login().hang(0, syncs, 1)
	i := f.dial()
	if status := i.login(loginOptions{isid: 2}); status != loginOK {
		t.Fatalf("login status %#04x", status)
	}
	i.ready()
	i.attend(1)
	c := f.srv.sessionList()[1].conn
	cmd := i.on(1, i.command(sync10(), 0, nil))
	i.send(cmd)
	c.until(t, "it waits for a place", func() bool { return len(c.backlog) == 1 })
	abort := i.manage(taskAbort, cmd)
	abort.setLUN(cmd.lun())
	i.send(abort)
	i.expectManaged(abort, taskComplete)

	i.send(i.on(1, i.command(sync10(), 0, nil)))
	c.until(t, "another one waits", func() bool { return len(c.backlog) == 1 })
	_ = i.nc.Close()
	<-c.s.ended
}

// A read that gets no memory for long is refused: what has the memory may be waiting for it.
func TestReadWithoutMemoryIsRefused(t *testing.T) {
	f := serve(t, func(c *Config) {
		c.MaxMemory = scsi.MaxTransfer
		c.PingTimeout = 50 * time.Millisecond
	})
	f.add(1, &disk{data: make([]byte, scsi.MaxTransfer)})
	i := f.login()
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	write := i.on(1, i.command(write10(0, scsi.MaxTransfer/512), 0, []byte{}))
	write.setTTT(scsi.MaxTransfer)
	i.send(write)
	i.expectOpcode(opR2T) // and all memory is its
	if r := i.do(i.command(read10(0, 1), 512, nil)); r.status != byte(scsi.Busy) {
		t.Errorf("status %#02x, want BUSY", r.status)
	}
}
