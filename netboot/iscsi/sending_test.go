package iscsi

import (
	"bytes"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
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
	letGo := c.hold(t)
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
	written := make(chan struct{})
	go func() {
		letGo() // writes more than the kernel holds
		close(written)
	}()
	i.expectGood(i.outcome(cmds[0]))
	<-written
	waiting := map[uint32]bool{cmds[1].itt(): true, cmds[2].itt(): true}
	for range 2 { // they are ended by two goroutines, in either order
		p := i.recv()
		if p.opcode() != opResponse || !waiting[p.itt()] || senseOf(p.data) != "5/2500" {
			t.Errorf("opcode %#02x of task %d with sense %s, want LOGICAL UNIT NOT SUPPORTED for one of %v", p.opcode(), p.itt(), senseOf(p.data), waiting)
		}
		delete(waiting, p.itt())
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
	i.quiet()
}

// hold keeps a connection from writing, as if somebody else wrote, until what it returns is called.
func (c *conn) hold(t *testing.T) (letGo func()) {
	t.Helper()
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for c.writing {
		c.changed.Wait()
	}
	c.writing = true
	letGo = sync.OnceFunc(func() {
		c.s.mu.Lock()
		c.writing = false
		c.s.mu.Unlock()
		c.flush()
	})
	t.Cleanup(letGo) // the server could not end
	return letGo
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

// A mappedDisk is a disk in memory that is sent as it lies there.
type mappedDisk struct{ *disk }

func (d mappedDisk) Segments(dst [][]byte, off int64, n int) ([][]byte, bool) {
	return append(dst, d.data[off:][:n]), true
}

func (d mappedDisk) Unmapped() {}

// An ordered write waits until the data of the reads before it is written: that is looked at only then.
func TestOrderedBehindMappedRead(t *testing.T) {
	f := serve(t, nil)
	f.add(1, mappedDisk{&disk{data: alignedPattern(t, 1<<20)}})
	i := f.login()
	i.attend(1)
	c := f.connOf(i)
	letGo := c.hold(t)
	read := i.on(1, i.command(read10(0, 8), 4096, nil))
	i.send(read)
	c.until(t, "the read is gathered", func() bool { return c.out != nil && len(c.out.tasks) == 1 })
	write := i.on(1, i.command(write10(0, 8), 0, make([]byte, 4096)))
	write.bhs[1] = write.bhs[1]&^maskAttr | attrOrdered
	i.send(write)
	c.until(t, "the write is received", func() bool { return c.s.commands.Load() == 4 })
	c.s.mu.Lock()
	if w := c.tasks[write.itt()]; w == nil || w.turn {
		t.Error("the ordered write begins before the read's data is out")
	}
	c.s.mu.Unlock()
	letGo()
	r := i.outcome(read)
	i.expectGood(r)
	if !bytes.Equal(r.data, pattern(4096, 4)) {
		t.Error("the read has data of the write behind it")
	}
	i.expectGood(i.outcome(write))
}

// alignedPattern is a pattern in pages of its own, which mincore knows.
func alignedPattern(t *testing.T, n int) []byte {
	t.Helper()
	m, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(m) })
	copy(m, pattern(n, 4))
	return m
}

// A file that was cut short does not cost another its mapping.
func TestOnlyWhatIsGoneIsUnmapped(t *testing.T) {
	f := serve(t, nil)
	f.believe()
	path := f.image(1, pattern(1<<20, 2))
	f.image(2, pattern(1<<20, 3))
	i := f.login()
	c := f.connOf(i)
	for _, lun := range []LUN{1, 2} {
		i.attend(lun)
		i.expectGood(i.do(i.on(lun, i.command(read10(1024, 8), 4096, nil))))
	}
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	letGo := c.hold(t)
	for _, lun := range []LUN{2, 1, 2} {
		i.send(i.on(lun, i.command(read10(1024, 8), 4096, nil)))
	}
	c.until(t, "three reads are gathered", func() bool { return c.out != nil && len(c.out.tasks) == 3 })
	letGo()
	i.closed()
	for lun, want := range map[LUN]bool{1: false, 2: true} {
		f.target.mu.RLock()
		_, ok := f.target.units[lun].mapper.Segments(nil, 0, 512)
		f.target.mu.RUnlock()
		if ok != want {
			t.Errorf("LUN %d is mapped: %v, want %v", lun, ok, want)
		}
	}
}

// What of a read went out before it failed is no residual.
func TestResidualOfReadThatFails(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	f.disk.hook(func(_ string, off int64) error {
		if off > 0 {
			return errors.New("it goes wrong")
		}
		return nil
	})
	r := i.do(i.command(read10(0, 4096), 4096*512, nil))
	if want := uint32(4096*512 - pieceSize); r.status == 0 || r.flags != flagUnderflow || r.residual != want {
		t.Errorf("status %#02x, residual %d (flags %#02x), want a failure and an underflow of %d", r.status, r.residual, r.flags, want)
	}
}

// A unit can be removed though its commands wait for memory that others have.
func TestRemoveWhileWaitingForMemory(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxMemory = scsi.MaxTransfer })
	f.add(1, &disk{data: make([]byte, scsi.MaxTransfer)})
	f.add(2, newDisk())
	other := f.other()
	other.attend(1)
	all := other.on(1, other.command(write10(0, scsi.MaxTransfer/512), 0, []byte{}))
	all.setTTT(scsi.MaxTransfer)
	other.send(all)
	other.expectOpcode(opR2T)
	i := f.login()
	i.attend(2)
	c := f.connOf(i)
	read := i.on(2, i.command(read10(0, 8), 4096, nil))
	i.send(read)
	c.until(t, "the read waits for memory", func() bool { t := c.tasks[read.itt()]; return t != nil && t.cancel != nil })
	removed := make(chan error, 1)
	go func() { removed <- f.target.Remove(2) }()
	if r := i.outcome(read); r.sense != "5/2500" {
		t.Errorf("sense %s, want LOGICAL UNIT NOT SUPPORTED", r.sense)
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
}

// The kernel holds little of what is written to a near peer.
func TestNearPeer(t *testing.T) {
	f := serve(t, nil)
	f.login()
	var held int
	var got error
	err := f.srv.sessionList()[0].conn.wire.raw.Control(func(fd uintptr) {
		held, got = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
	})
	if err := errors.Join(err, got); err != nil {
		t.Fatal(err)
	}
	if held > nearHeld {
		t.Errorf("the kernel holds %d bytes, want %d at most", held, nearHeld)
	}
}

// Connections do not begin with BBR, also where it is what the system has; those of peers that are not near get it back.
func TestUnpaced(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	have := congestion(t, l.(*net.TCPListener))
	f := serveOn(t, l, nil)
	f.login() // now the server has seen to the listener; this one may have come before
	f.srv.Drop(nodeName)
	f.login()
	near := f.srv.sessionList()[0].conn
	got := congestion(t, near.wire.nc.(*net.TCPConn))
	switch bbr := strings.HasPrefix(have, "bbr"); {
	case bbr && (near.crowd.usual != have || strings.HasPrefix(got, "bbr")):
		t.Errorf("the system has %q, the connection %q, and those of others are to get %q", have, got, near.crowd.usual)
	case !bbr && (near.crowd.usual != "" || got != have):
		t.Errorf("the system has %q, the connection %q, and those of others are to get %q; want it left alone", have, got, near.crowd.usual)
	}
	near.wire.keepNear(0, "reno") // which everybody may have
	if got := congestion(t, near.wire.nc.(*net.TCPConn)); got != "reno" {
		t.Errorf("a connection that is not near has %q, want what it is given back", got)
	}
}

// congestion is the congestion control of a socket.
func congestion(t *testing.T, s syscall.Conn) string {
	t.Helper()
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var name string
	var got error
	if err := raw.Control(func(fd uintptr) {
		name, got = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	}); err != nil || got != nil {
		t.Fatal(errors.Join(err, got))
	}
	return name
}
