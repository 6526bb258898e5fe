package iscsi

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// wired is a wire that lends through ps, and the other end of its connection, which takes little at a time. (Whoever makes
// its buffer smaller later has the kernel wait 200 ms for each 3 KiB.)
func wired(t *testing.T, ps *pipes) (*wire, net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) {
			set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10)
		})
		return errors.Join(err, set)
	}}
	far, err := dialer.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = far.Close() })
	near, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	return newWire(near, &buffers{}, ps, nil, time.Minute), far
}

// What is lent arrives as it is, between what is copied, in whatever way it comes to that.
func TestLend(t *testing.T) {
	memory := alignedPattern(t, 4<<20)
	used := newPipes()
	for range maxPipes {
		used.places <- struct{}{}
	}
	for name, ps := range map[string]*pipes{"lent": newPipes(), "all pipes are in use": used, "no pipes": nil} {
		t.Run(name, func(t *testing.T) {
			w, far := wired(t, ps)
			var parts [][]byte
			var lent []span
			var want []byte
			add := func(list ...[]byte) {
				parts = append(parts, list...)
				for _, p := range list {
					want = append(want, p...)
				}
			}
			lend := func(list ...[]byte) {
				first := len(parts)
				add(list...)
				lent = append(lent, span{first, len(parts)})
			}
			lend(memory[:1])
			add(pattern(48, 1), memory[100:5000])
			lend(memory[3:], memory[4096:8192], nil, memory[1<<20+7:1<<20+8]) // more than a pipe takes
			lend(memory[512 : 512<<10])
			add(pattern(48, 2))
			many := make([][]byte, maxIOV+5)
			for k := range many {
				many[k] = memory[k*3000:][:1000]
			}
			lend(many...)
			add(pattern(100, 3))
			got := make(chan []byte, 1)
			go func() {
				b := make([]byte, len(want))
				n, _ := io.ReadFull(far, b)
				got <- b[:n]
			}()
			for range 2 { // the second time with the pipe of the first
				if _, err := w.write(parts, lent, nil); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(<-got, want) {
					t.Fatal("other bytes arrive than were written")
				}
				go func() {
					b := make([]byte, len(want))
					n, _ := io.ReadFull(far, b)
					got <- b[:n]
				}()
			}
			if err := w.nc.Close(); err != nil {
				t.Fatal(err)
			}
			if b := <-got; len(b) > 0 {
				t.Errorf("%d bytes more arrive than were written", len(b))
			}
		})
	}
}

// Where the kernel takes memory and then does not lend it, that is copied, once, and the pipe is not used again.
func TestLendingStops(t *testing.T) {
	ps := newPipes()
	w, far := wired(t, ps)
	memory := alignedPattern(t, 1<<20)
	w.pipe = ps.get()
	if w.pipe == nil {
		t.Fatal("there is no pipe")
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	out, in := w.pipe.r, w.pipe.w
	var pipe unix.Stat_t
	if err := unix.Fstat(in, &pipe); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(out) })
	w.pipe.r = null // splice takes nothing from what is no pipe to what is none
	read := make(chan []byte, 1)
	go func() {
		b := make([]byte, len(memory))
		_, _ = io.ReadFull(far, b)
		read <- b
	}()
	if _, err := w.write([][]byte{memory[:600<<10], memory[600<<10:]}, []span{{0, 1}, {1, 2}}, nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(<-read, memory) {
		t.Error("other bytes arrive than were written")
	}
	if len(ps.places) > 0 || w.pipe != nil || w.piped != 0 {
		t.Errorf("%d pipes are in use, the wire has %v with %d bytes; want none", len(ps.places), w.pipe, w.piped)
	}
	var now unix.Stat_t
	if err := unix.Fstat(in, &now); err == nil && now.Ino == pipe.Ino {
		t.Error("a pipe with something in it is open still")
	}
}

// What is lent is not copied: the other end sees what becomes of it until it reads. That is what an ordered task must not
// be told by.
func TestLentIsNotCopied(t *testing.T) {
	w, far := wired(t, newPipes())
	memory := alignedPattern(t, 64<<10)
	if _, err := w.write([][]byte{memory}, []span{{0, 1}}, nil); err != nil {
		t.Fatal(err)
	}
	memory[100] ^= 0xff
	got := make([]byte, len(memory))
	if _, err := io.ReadFull(far, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, memory) {
		t.Error("the memory was copied")
	}
}

// lendingDisk is a LUN that changes, whose reads of lendSize are lent, and an initiator of it.
func lendingDisk(t *testing.T) (*fixture, *initiator, []byte) {
	t.Helper()
	f := serve(t, nil)
	data := alignedPattern(t, 1<<20)
	f.add(1, mappedDisk{&disk{data: data}})
	i := f.login("MaxRecvDataSegmentLength=1048576", "InitialR2T=No", "ImmediateData=Yes")
	i.attend(1)
	return f, i, data
}

// expectPing takes a ping.
func (i *initiator) expectPing() *pdu {
	i.t.Helper()
	p := i.expectOpcode(opNopIn)
	if p.itt() != noTag || p.ttt() == noTag {
		i.t.Fatalf("a NOP-In with the tags %#x and %#x, want a ping", p.itt(), p.ttt())
	}
	return p
}

// pong answers a ping.
func (i *initiator) pong(ping *pdu) {
	p := i.immediate(i.request(opNopOut, 0))
	p.setITT(noTag)
	p.setTTT(ping.ttt())
	i.send(p)
}

// The first ordered write waits until the initiator has taken the data of the reads before it.
func TestOrderedBehindLentRead(t *testing.T) {
	f, i, data := lendingDisk(t)
	before := bytes.Clone(data)
	c := f.connOf(i)
	read := i.on(1, i.command(read10(0, lendSize/512), lendSize, nil))
	i.send(read)
	c.until(t, "the read is written", func() bool { return c.alive == 0 && c.out == nil && !c.writing })
	write := i.on(1, i.command(write10(0, 8), 0, make([]byte, 4096)))
	write.bhs[1] = write.bhs[1]&^maskAttr | attrOrdered
	i.send(write)
	behind := i.on(1, i.command(read10(0, 8), 4096, nil))
	i.send(behind)
	c.until(t, "both are received", func() bool { return c.alive == 2 })

	r := i.outcome(read)
	i.expectGood(r)
	if !bytes.Equal(r.data, before[:lendSize]) {
		t.Error("the read has data of the ordered write behind it")
	}
	ping := i.expectPing()
	i.quiet()
	i.pong(ping)
	i.expectGood(i.outcome(write))
	r = i.outcome(behind)
	i.expectGood(r)
	if !bytes.Equal(r.data, make([]byte, 4096)) {
		t.Error("the read behind the ordered write does not see it")
	}

	// From now on nothing is lent, so that no ordered task waits.
	read = i.on(1, i.command(read10(0, lendSize/512), lendSize, nil))
	i.send(read)
	c.until(t, "the second read is written", func() bool { return c.alive == 0 && c.out == nil && !c.writing })
	write = i.on(1, i.command(write10(0, 8), 0, before[:4096]))
	write.bhs[1] = write.bhs[1]&^maskAttr | attrOrdered
	i.send(write)
	c.until(t, "the second write is done", func() bool { return bytes.Equal(data[:4096], before[:4096]) })
	r = i.outcome(read)
	i.expectGood(r)
	if !bytes.Equal(r.data[:4096], make([]byte, 4096)) {
		t.Error("the second read has data of the ordered write behind it")
	}
	i.expectGood(i.outcome(write))
	i.quiet()
}

// An ordered task that waits for the initiator to take data can be aborted, and goes with its connection; the one that
// takes that over waits for nothing.
func TestOrderedBehindLentReadEnds(t *testing.T) {
	f, i, _ := lendingDisk(t)
	i.expectGood(i.do(i.on(1, i.command(read10(0, lendSize/512), lendSize, nil))))
	ordered := func(i *initiator) *pdu {
		p := i.on(1, i.command(testUnitReady(), 0, nil))
		p.bhs[1] = p.bhs[1]&^maskAttr | attrOrdered
		i.send(p)
		return p
	}
	first := ordered(i)
	i.expectPing()
	i.send(i.on(1, i.manage(taskAbort, first)))
	if p := i.expectOpcode(opTaskResp); p.bhs[2] != taskComplete {
		t.Errorf("aborting an ordered task that waits: %d", p.bhs[2])
	}
	ordered(i)
	i.quiet()

	again := f.dial()
	if status := again.login(loginOptions{tsih: i.tsih, cmdSN: i.cmdSN}); status != loginOK {
		t.Fatalf("login status %#04x", status)
	}
	again.expectGood(again.outcome(ordered(again)))
}

// An initiator that answers a later ping has taken what was lent, too; one that answers none is left.
func TestOrderedBehindLentReadUnanswered(t *testing.T) {
	f := serve(t, func(c *Config) { c.PingTimeout, c.IdleTimeout = 300*time.Millisecond, 300*time.Millisecond })
	f.add(1, mappedDisk{&disk{data: alignedPattern(t, 1<<20)}})
	for name, answers := range map[string]bool{"a later one": true, "none": false} {
		t.Run(name, func(t *testing.T) {
			i := f.login("MaxRecvDataSegmentLength=1048576")
			i.attend(1)
			i.expectGood(i.do(i.on(1, i.command(read10(0, lendSize/512), lendSize, nil))))
			ordered := i.on(1, i.command(testUnitReady(), 0, nil))
			ordered.bhs[1] = ordered.bhs[1]&^maskAttr | attrOrdered
			i.send(ordered)
			if ping := i.expectPing(); ping.lun() != ordered.lun() {
				t.Errorf("the ping has LUN %#x, want %#x", ping.lun(), ordered.lun())
			}
			if answers {
				i.pong(i.expectPing())
				i.expectGood(i.outcome(ordered))
				return
			}
			for {
				p := i.recvAny()
				if p == nil {
					return
				}
				// It is there, but does not answer.
				i.send(i.immediate(i.request(opNopOut, 0)))
				if p.opcode() == opResponse {
					t.Fatal("the ordered task begins before the data was taken")
				}
			}
		})
	}
}

// An ordered task behind a read of an image waits for nobody.
func TestOrderedBehindLentImage(t *testing.T) {
	f := serve(t, nil)
	f.image(1, pattern(1<<20, 2))
	i := f.login("MaxRecvDataSegmentLength=1048576")
	i.attend(1)
	i.expectGood(i.do(i.on(1, i.command(read10(0, 2048), 1<<20, nil))))
	ordered := i.on(1, i.command(testUnitReady(), 0, nil))
	ordered.bhs[1] = ordered.bhs[1]&^maskAttr | attrOrdered
	i.expectGood(i.do(ordered))
}

// A peer that takes nothing of what is lent is not waited for for ever.
func TestLendPatience(t *testing.T) {
	ps := newPipes()
	w, _ := wired(t, ps)
	w.patience = 100 * time.Millisecond
	memory := alignedPattern(t, 16<<20)
	if _, err := w.write([][]byte{memory}, []span{{0, 1}}, nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want %v", err, os.ErrDeadlineExceeded)
	}
	if len(ps.places) > 0 || w.pipe != nil || w.piped != 0 {
		t.Errorf("%d pipes are in use, the wire has %v with %d bytes; want none", len(ps.places), w.pipe, w.piped)
	}
}

// The end of what is lent is not kept back for something behind it.
func TestLentIsNotKeptBack(t *testing.T) {
	w, far := wired(t, newPipes())
	memory := alignedPattern(t, 1<<20)
	got := make([]byte, 12<<10)
	for round := range 20 {
		parts := [][]byte{pattern(48, 1), memory[:4096], memory[8192:][:4096]}
		if _, err := w.write(parts, []span{{1, 3}}, nil); err != nil {
			t.Fatal(err)
		}
		if waiting := w.notSent(t); waiting > 0 {
			t.Fatalf("round %d: %d bytes are kept back", round, waiting)
		}
		if _, err := io.ReadFull(far, got[:48+2*4096]); err != nil {
			t.Fatal(err)
		}
	}
}

// notSent is how many bytes the kernel has that it did not send.
func (w *wire) notSent(t *testing.T) (n int) {
	t.Helper()
	var got error
	err := w.raw.Control(func(fd uintptr) { n, got = unix.IoctlGetInt(int(fd), unix.SIOCOUTQNSD) })
	if err := errors.Join(err, got); err != nil {
		t.Fatal(err)
	}
	return n
}

// Of an image that is cut short nothing is lent that is not there.
func TestLentImageThatIsCutShort(t *testing.T) {
	f := serve(t, nil)
	f.believe()
	path := f.image(1, pattern(1<<20, 2))
	i := f.login("MaxRecvDataSegmentLength=1048576")
	i.attend(1)
	i.expectGood(i.do(i.on(1, i.command(read10(0, 2048), 1<<20, nil))))
	if err := os.Truncate(path, 192<<10); err != nil {
		t.Fatal(err)
	}
	i.send(i.on(1, i.command(read10(0, 2048), 1<<20, nil)))
	if _, err := io.Copy(io.Discard, i.nc); err != nil { // the beginning of the answer, and the end of the connection
		t.Fatal(err)
	}
	again := f.login("MaxRecvDataSegmentLength=1048576")
	again.attend(1)
	if r := again.do(again.on(1, again.command(read10(0, 2048), 1<<20, nil))); r.status != byte(scsi.CheckCondition) || r.sense[:2] != "3/" {
		t.Errorf("status %#02x, sense %s, want MEDIUM ERROR", r.status, r.sense)
	}
}
