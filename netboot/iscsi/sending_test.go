package iscsi

import (
	"bytes"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// believe has the residency table go on saying what it was told once: no time passes for it.
func (f *fixture) believe() {
	f.srv.mu.Lock() // connections take it when they begin
	defer f.srv.mu.Unlock()
	f.srv.residency.start = time.Time{} // time.Since is then the longest there is
}

// attend has the unit attention of a LUN behind it.
func (i *initiator) attend(lun LUN) {
	i.t.Helper()
	i.do(i.on(lun, i.command(testUnitReady(), 0, nil)))
}

// Little data of a file that was cut short costs the connection, as much data does, and not the process.
func TestLittleOfImageThatIsCutShort(t *testing.T) {
	for name, n := range map[string]int{"a block": 1, "a block behind a whole segment": 3} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, nil)
			f.believe()
			path := f.image(1, pattern(1<<20, 2))
			i := f.login("MaxRecvDataSegmentLength=1024")
			i.attend(1)
			i.expectGood(i.do(i.on(1, i.command(read10(2048-3, uint16(n)), n*512, nil))))
			if err := os.Truncate(path, 4096); err != nil {
				t.Fatal(err)
			}
			i.send(i.on(1, i.command(read10(2048-3, uint16(n)), n*512, nil)))
			i.closed()
			again := f.login()
			again.attend(1)
			if r := again.do(again.on(1, again.command(read10(2048-3, uint16(n)), n*512, nil))); r.sense[:2] != "3/" {
				t.Errorf("sense %s, want MEDIUM ERROR", r.sense)
			}
		})
	}
}

// connOf is the server's end of a connection whose login is done.
func (f *fixture) connOf(i *initiator) *conn {
	f.t.Helper()
	f.srv.mu.Lock()
	s := f.srv.sessions[i.tsih]
	f.srv.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn
}

// Long reads into small segments, of an initiator that takes them slowly, are made into PDUs piece by piece, whether the
// file is in the page cache or not.
func TestLongReadsIntoSmallSegments(t *testing.T) {
	const (
		reads = 4
		size  = 8 << 20
		most  = maxPending + pieceSize + pieceSize/8
	)
	data := pattern(size, 3)
	for name, cold := range map[string]bool{"in the page cache": false, "on the disk": true} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, nil)
			path := f.image(1, data)
			i := f.login("MaxRecvDataSegmentLength=512")
			i.attend(1)
			if cold {
				evict(t, path)
			}
			c := f.connOf(i)
			got := map[uint32][]byte{}
			for range reads {
				cmd := i.on(1, i.command(read10(0, size/512), size, nil))
				got[cmd.itt()] = nil
				i.send(cmd)
			}
			for left := reads; left > 0; {
				p := i.recv()
				if n := c.pending.Load(); n > most {
					t.Fatalf("%d bytes are pending, want %d at most", n, most)
				}
				got[p.itt()] = append(got[p.itt()], p.data...)
				if p.flags()&flagStatus != 0 {
					left--
				}
			}
			for tag, b := range got {
				if !bytes.Equal(b, data) {
					t.Errorf("task %d reads wrong data", tag)
				}
			}
		})
	}
}

// evict has a file leave the page cache.
func evict(t *testing.T, path string) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	if err := errors.Join(file.Sync(), unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
}

// A read that waits for the writer can be aborted, and its unit be removed, at once.
func TestParkedReadsEnd(t *testing.T) {
	f := serve(t, nil)
	f.image(1, pattern(4<<20, 3))
	i := f.login()
	i.attend(1)
	c := f.connOf(i)
	c.hold()
	var cmds []*pdu
	for range 4 {
		cmds = append(cmds, i.on(1, i.command(read10(0, 2048), 1<<20, nil)))
		i.send(cmds[len(cmds)-1])
	}
	c.until(t, "three reads are parked", func() bool { return len(c.parked) == 3 })
	c.s.mu.Lock()
	w := c.abort([]*task{c.tasks[cmds[3].itt()]})
	left := len(c.parked)
	c.s.mu.Unlock()
	if left != 2 || len(w) > 0 {
		t.Errorf("%d reads are parked after one was aborted, and %d to be waited for; want 2 and none", left, len(w))
	}
	removed := make(chan error, 1)
	go func() { removed <- f.target.Remove(1) }()
	c.until(t, "none is parked", func() bool { return len(c.parked) == 0 })
	c.letGo()
	i.expectGood(i.outcome(cmds[0]))
	for _, cmd := range cmds[1:3] {
		if r := i.outcome(cmd); r.sense != "5/2500" {
			t.Errorf("sense %s, want LOGICAL UNIT NOT SUPPORTED", r.sense)
		}
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
	i.quiet()
}

// hold keeps a connection from writing, as if somebody else wrote, until letGo.
func (c *conn) hold() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for c.writing {
		c.changed.Wait()
	}
	c.writing = true
}

func (c *conn) letGo() {
	c.s.mu.Lock()
	c.writing = false
	c.s.mu.Unlock()
	c.flush()
}

// until waits for something that s.mu guards.
func (c *conn) until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		c.s.mu.Lock()
		ok := is()
		c.s.mu.Unlock()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not come that %s", what)
		}
	}
}
