package iscsi

import (
	"testing"
	"testing/synctest"
	"time"
)

// A reader that executes a command itself and does not come back holds up nothing of its connection.
func TestReaderIsRelieved(t *testing.T) {
	f := serve(t, nil)
	syncs := newGate()
	f.disk.hook(syncs.holding("sync"))
	f.add(1, newDisk())
	i := f.login()
	c := f.srv.sessionList()[0].conn
	hangs := i.command(sync10(), 0, nil)
	i.send(hangs)
	<-syncs.came
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	i.expectGood(i.do(i.on(1, i.command(sync10(), 0, nil))))
	ping := i.immediate(i.request(opNopOut, 0))
	ping.setTTT(noTag)
	i.send(ping)
	i.expectOpcode(opNopIn)
	close(syncs.open)
	i.expectGood(i.outcome(hangs))
	i.expectGood(i.do(i.command(sync10(), 0, nil)))
	_ = i.nc.Close()
	<-c.done
	if c.owned == 0 {
		t.Error("the reader executed nothing itself")
	}
}

// A peer sees its connection closed while the reader hangs in a command, and the session ends when that ends.
func TestCloseWhileTheReaderExecutes(t *testing.T) {
	f := serve(t, nil)
	syncs := newGate()
	f.disk.hook(syncs.holding("sync"))
	i := f.login()
	s := f.srv.sessionList()[0]
	i.send(i.command(sync10(), 0, nil))
	<-syncs.came
	s.kick()
	i.closed()
	select {
	case <-s.ended:
		t.Error("the session has ended, and its command has not")
	default:
	}
	close(syncs.open)
	<-s.ended
}

// When a connection is lost whose reader hangs in a command, all else of it ends.
func TestLossWhileTheReaderExecutes(t *testing.T) {
	f := serve(t, nil)
	syncs := newGate()
	f.disk.hook(syncs.holding("sync"))
	defer close(syncs.open)
	f.add(1, newDisk())
	i := f.login()
	i.attend(1)
	c := f.connOf(i)
	i.send(i.command(sync10(), 0, nil))
	<-syncs.came
	write := i.on(1, i.command(write10(0, 8), 0, []byte{}))
	write.setTTT(8 * 512)
	i.send(write)
	i.expectOpcode(opR2T) // and it has memory
	_ = i.nc.Close()
	c.until(t, "only the command that hangs is left", func() bool { return c.alive == 1 })
}

// A reader does not execute with answers in hand.
func TestAnswersBeforeTheReaderExecutes(t *testing.T) {
	f := serve(t, nil)
	f.image(1, pattern(4096, 1))
	syncs := newGate()
	f.disk.hook(syncs.holding("sync"))
	f.believe()
	i := f.login()
	i.attend(1)
	i.expectGood(i.do(i.on(1, i.command(read10(0, 8), 4096, nil))))
	f.connOf(i).crowd.awake.Store(true) // so that nobody looks out
	read := i.on(1, i.command(read10(0, 8), 4096, nil))
	hangs := i.command(sync10(), 0, nil)
	i.together(read, hangs)
	<-syncs.came
	i.expectGood(i.outcome(read))
	close(syncs.open)
	i.expectGood(i.outcome(hangs))
}

// A lookout goes when there is nothing to look out for, and comes again when there is.
func TestLookout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		closing := make(chan struct{})
		w := &crowd{closing: closing}
		c := &conn{}
		for range 2 {
			if token := w.begin(c); token == 0 || c.unread.Load() != token {
				t.Errorf("token %d, and the connection has %d", token, c.unread.Load())
			}
			c.unread.Store(0)
			if !w.awake.Load() {
				t.Error("there is no lookout while a reader executes")
			}
			time.Sleep((lastLooks + 2) * lookEvery)
			synctest.Wait()
			if w.awake.Load() {
				t.Error("there is a lookout though no reader executes")
			}
		}
		w.begin(c)
		close(closing)
		w.running.Wait()
	})
}

// A reader that may wait in the kernel for the next command hears of it, and gives its place back. It needs none.
func TestReaderStays(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	c := f.connOf(i)
	for range 100 {
		i.expectGood(i.do(i.command(sync10(), 0, nil)))
	}
	for range cap(f.srv.stays) {
		f.srv.stays <- struct{}{} // as all readers give theirs back
	}
	for range 100 {
		i.expectGood(i.do(i.command(sync10(), 0, nil)))
	}
	_ = i.nc.Close()
	<-c.done
	if c.owned == 0 {
		t.Error("the reader executed nothing itself")
	}
}
