package iscsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

func TestSessionReinstatement(t *testing.T) {
	f := serve(t, nil)
	old := f.login()
	old.waiting()
	i := f.dial()
	if status := i.login(loginOptions{cmdSN: 50}); status != loginOK {
		t.Fatalf("login status %#04x", status)
	}
	old.closed()
	if i.tsih == old.tsih {
		t.Errorf("TSIH %d again", i.tsih)
	}
	i.ready() // a new nexus
	if n := len(f.srv.Sessions()); n != 1 {
		t.Errorf("%d sessions, want 1", n)
	}
	// Another ISID is another session.
	j := f.dial()
	if status := j.login(loginOptions{isid: 0x800000000009}); status != loginOK {
		t.Fatalf("login status %#04x", status)
	}
	i.quiet()
}

func TestConnectionReinstatement(t *testing.T) {
	f := serve(t, nil)
	old := f.login("InitialR2T=No", "FirstBurstLength=512")
	old.waiting()
	i := f.dial()
	if status := i.login(loginOptions{tsih: old.tsih, cmdSN: old.cmdSN}); status != loginOK {
		t.Fatalf("login status %#04x", status)
	}
	old.closed()
	if i.tsih != old.tsih {
		t.Errorf("TSIH %d, want that of the session, %d", i.tsih, old.tsih)
	}
	i.expectGood(i.do(i.command(testUnitReady(), 0, nil))) // no unit attention: the nexus goes on
	// And so does what its first login agreed on.
	if r := i.do(i.command(write10(0, 2), 0, make([]byte, 1024))); r.sense != "b/0c0d" {
		t.Errorf("sense %s for more than the session's FirstBurstLength", r.sense)
	}
}

func TestLoginsThatBelongToNoSession(t *testing.T) {
	f := serve(t, nil)
	old := f.login()
	for _, tt := range []struct {
		name   string
		login  loginOptions
		status uint16
	}{
		{"TSIH that is none", loginOptions{tsih: old.tsih + 1}, loginNoSession},
		{"session of another", loginOptions{tsih: old.tsih, name: nodeName + "2"}, loginNoSession},
		{"session of another ISID", loginOptions{tsih: old.tsih, isid: 7}, loginNoSession},
		{"a second connection", loginOptions{tsih: old.tsih, cid: 1}, loginTooMany},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := f.dial()
			if got := i.login(tt.login); got != tt.status {
				t.Errorf("login status %#04x, want %#04x", got, tt.status)
			}
			i.closed()
		})
	}
	old.quiet()
}

func TestLimits(t *testing.T) {
	t.Run("sessions", func(t *testing.T) {
		f := serve(t, func(c *Config) { c.MaxSessions = 1 })
		first := f.login()
		i := f.dial()
		if got := i.login(loginOptions{isid: 2}); got != loginNoResources {
			t.Errorf("login status %#04x, want %#04x", got, loginNoResources)
		}
		first.quiet()
		again := f.dial() // in place of the first
		if got := again.login(loginOptions{}); got != loginOK {
			t.Errorf("login status %#04x, want none", got)
		}
	})
	t.Run("connections", func(t *testing.T) {
		f := serve(t, func(c *Config) { c.MaxSessions, c.MaxConnections = 1, 1 })
		first := f.login()
		f.dial().closed()
		first.quiet()
	})
	t.Run("time for a login", func(t *testing.T) {
		f := serve(t, func(c *Config) { c.LoginTimeout = 10 * time.Millisecond })
		f.dial().closed()
	})
	t.Run("a header of a login", func(t *testing.T) {
		f := serve(t, nil)
		i := f.dial()
		p := &pdu{}
		p.bhs[0] = opLogin | opImmediate
		p.setDataLength(defaultSegment + 1)
		i.send(p)
		i.closed()
	})
}

// More is written at once than there is memory for: all of it is done, some of it later.
func TestMemoryIsBounded(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxMemory = scsi.MaxTransfer })
	i := f.login("InitialR2T=No", "ImmediateData=Yes", "MaxBurstLength=1048576", "MaxOutstandingR2T=8")
	data := pattern(1<<20, 6)
	open := map[uint32]*pdu{}
	for n := range 12 {
		cmd := i.command(write10(uint32(n%2)<<11, 2048), 0, []byte{})
		cmd.setTTT(1 << 20)
		i.send(cmd)
		open[cmd.itt()] = cmd
	}
	for len(open) > 0 {
		p := i.recv()
		cmd := open[p.itt()]
		if cmd == nil {
			t.Fatalf("opcode %#02x of task %d", p.opcode(), p.itt())
		}
		switch p.opcode() {
		case opR2T:
			for sn, off := uint32(0), 0; off < len(data); sn++ {
				i.send(dataOut(cmd, p.ttt(), sn, off, data[off:off+1<<17], off+1<<17 == len(data)))
				off += 1 << 17
			}
		case opResponse:
			if p.bhs[3] != byte(scsi.Good) {
				t.Fatalf("status %#02x", p.bhs[3])
			}
			delete(open, p.itt())
		default:
			t.Fatalf("opcode %#02x", p.opcode())
		}
	}
	if !bytes.Equal(f.disk.bytes(0, 2<<20), append(data, data...)) {
		t.Error("not all that was written is on the disk")
	}
	f.stop()
	if !f.srv.memory.TryAcquire(scsi.MaxTransfer) {
		t.Error("memory was not given back")
	}
}

// Data that nobody asked for, and that there is no memory for, is refused while this connection itself has the memory.
func TestNoMemoryForImmediateData(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxMemory = scsi.MaxTransfer })
	f.add(1, &disk{data: make([]byte, scsi.MaxTransfer)})
	i := f.login("ImmediateData=Yes")
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	cmd := i.on(1, i.command(write10(0, scsi.MaxTransfer/512), 0, []byte{}))
	cmd.setTTT(scsi.MaxTransfer)
	i.send(cmd)
	i.expectOpcode(opR2T)
	if r := i.do(i.on(1, i.command(write10(0, 1), 0, pattern(512, 1)))); r.status != byte(scsi.TaskSetFull) {
		t.Errorf("status %#02x, want TASK SET FULL", r.status)
	}
	if r := i.do(i.command(write10(0, 1), 0, pattern(512, 1))); r.status != byte(scsi.Busy) {
		t.Errorf("status %#02x at a unit without other commands, want BUSY", r.status)
	}
	i.expectGood(i.do(i.command(testUnitReady(), 0, nil)))
}

// An initiator that says nothing is asked for a sign of life, and if it gives none its session ends.
func TestSilentInitiator(t *testing.T) {
	f := serve(t, func(c *Config) { c.IdleTimeout, c.PingTimeout = 20*time.Millisecond, 20*time.Millisecond })
	i := f.login()
	for range 3 { // it answers
		p := i.expectOpcode(opNopIn)
		if p.itt() != noTag || p.ttt() == noTag {
			t.Fatalf("ping with ITT %#x, TTT %#x", p.itt(), p.ttt())
		}
		r := i.immediate(i.request(opNopOut, 0))
		r.setITT(noTag)
		r.setTTT(p.ttt())
		i.send(r)
	}
	i.closed() // it does not
}

func TestStalledInitiator(t *testing.T) {
	quick := func(c *Config) { c.IdleTimeout, c.PingTimeout = 20*time.Millisecond, patience }
	t.Run("in a header", func(t *testing.T) {
		i := serve(t, quick).login()
		if _, err := i.nc.Write(make([]byte, 47)); err != nil {
			t.Fatal(err)
		}
		i.closed()
	})
	t.Run("in data", func(t *testing.T) {
		i := serve(t, quick).login()
		b := i.marshal(i.command(write10(0, 1), 0, pattern(512, 0)))
		if _, err := i.nc.Write(b[:100]); err != nil {
			t.Fatal(err)
		}
		i.closed()
	})
	t.Run("before data-out", func(t *testing.T) {
		i := serve(t, func(c *Config) { c.IdleTimeout, c.PingTimeout = 20*time.Millisecond, 20*time.Millisecond }).login()
		i.waiting()
		for {
			p := i.recvAny()
			if p == nil {
				return
			}
			r := i.immediate(i.request(opNopOut, 0)) // alive, but for that
			r.setITT(noTag)
			r.setTTT(p.ttt())
			_, _ = i.nc.Write(i.marshal(r)) // the connection may be closed by now
		}
	})
	t.Run("in taking bytes", func(t *testing.T) {
		f := serve(t, func(c *Config) { c.PingTimeout = 20 * time.Millisecond })
		i := f.login()
		for range 60 { // 60 MiB, more than any socket holds
			if _, err := i.nc.Write(i.marshal(i.command(read10(0, 2048), 1<<20, nil))); err != nil {
				break
			}
		}
		for len(f.srv.Sessions()) > 0 { // and not a byte is read here
			f.awaitChange()
		}
	})
}

// awaitChange gives the server a moment.
func (f *fixture) awaitChange() {
	f.t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for _, s := range f.srv.sessionList() {
		select {
		case <-s.ended:
		case <-deadline.C:
			f.t.Fatal("the session does not end")
		}
	}
}

func TestShutdown(t *testing.T) {
	f := serve(t, nil)
	i, unready := f.login(), f.dial()
	done := make(chan struct{})
	go func() {
		f.stop()
		close(done)
	}()
	p := i.expectOpcode(opAsync)
	if p.bhs[36] != asyncLogout || binary.BigEndian.Uint16(p.bhs[42:]) == 0 {
		t.Errorf("asynchronous message %x, want a logout request", p.bhs)
	}
	i.expectGood(i.do(i.command(testUnitReady(), 0, nil))) // it still works
	i.send(i.request(opLogout, logoutSession))
	i.expectOpcode(opLogoutResp)
	i.closed()
	unready.closed()
	<-done
	if n := len(f.srv.Sessions()); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}

func TestShutdownWithoutLogout(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	i.waiting()
	f.stop()
	if got := i.closed(); len(got) != 1 || got[0].opcode() != opAsync {
		t.Errorf("%d PDUs before the end, want an asynchronous message", len(got))
	}
}

func TestDropAndChanged(t *testing.T) {
	var changes atomic.Int32
	f := serve(t, func(c *Config) { c.Changed = func() { changes.Add(1) } })
	i := f.login()
	j := f.other()
	if n := changes.Load(); n != 2 {
		t.Errorf("%d changes were told, want 2", n)
	}
	i.waiting()
	f.srv.Drop(nodeName)
	i.closed()
	j.quiet()
	if infos := f.srv.Sessions(); len(infos) != 1 || infos[0].Initiator != nodeName+"2" {
		t.Errorf("sessions %v, want that of the other alone", infos)
	}
	if n := changes.Load(); n != 3 {
		t.Errorf("%d changes were told, want 3", n)
	}
}

func (i *initiator) on(lun LUN, p *pdu) *pdu {
	p.setLUN(formatLUN(lun))
	return p
}

func TestUnitsComeAndGo(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	absent := func(lun LUN) {
		t.Helper()
		if r := i.do(i.on(lun, i.command(testUnitReady(), 0, nil))); r.sense != "5/2500" {
			t.Errorf("LUN %d: sense %s, want LOGICAL UNIT NOT SUPPORTED", lun, r.sense)
		}
	}
	absent(300)
	second := newDisk()
	f.add(300, second)
	if r := i.do(i.command(testUnitReady(), 0, nil)); r.sense != "6/3f0e" {
		t.Errorf("sense %s, want REPORTED LUNS DATA HAS CHANGED", r.sense)
	}
	if r := i.do(i.on(300, i.command(testUnitReady(), 0, nil))); !strings.HasPrefix(r.sense, "6/29") {
		t.Errorf("sense %s, want a unit attention", r.sense)
	}
	// One command waits for data and one runs: the first is ended, the second is waited for.
	waiting := i.on(300, i.command(write10(0, 8), 0, []byte{}))
	waiting.setTTT(8 * 512)
	i.send(waiting)
	i.expectOpcode(opR2T)
	g := newGate()
	second.hook(g.holding("sync"))
	running := i.on(300, i.command(sync10(), 0, nil))
	i.send(running)
	<-g.came
	removed := make(chan error, 1)
	go func() { removed <- f.target.Remove(300) }()
	if r := i.outcome(waiting); r.sense != "5/2500" {
		t.Errorf("sense %s, want LOGICAL UNIT NOT SUPPORTED", r.sense)
	}
	absent(300)
	select {
	case err := <-removed:
		t.Errorf("Remove returns (%v) while a command runs", err)
	default:
	}
	close(g.open)
	i.expectGood(i.outcome(running))
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if err := f.target.Remove(300); err == nil {
		t.Error("a unit is removed twice")
	}
	if err := f.target.Add(maxLUN+1, nil); err == nil {
		t.Error("a LUN is added that has no address")
	}
}

func TestReportLUNs(t *testing.T) {
	f := serve(t, nil)
	f.add(300, newDisk())
	i := f.login()
	cdb := make([]byte, 12)
	cdb[0], cdb[9] = opReportLUNs, 64
	for _, lun := range []LUN{0, 7} {
		r := i.do(i.on(lun, i.command(cdb, 64, nil)))
		if want := []byte{0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x41, 0x2c, 0, 0, 0, 0, 0, 0}; !bytes.Equal(r.data, want) {
			t.Errorf("asked at LUN %d: %x, want %x", lun, r.data, want)
		}
	}
}

func TestReadErrors(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	f.disk.hook(func(method string, _ int64) error { return errors.New(method + " goes wrong") })
	if r := i.do(i.command(read10(5, 1), 512, nil)); !strings.HasPrefix(r.sense, "3/") && !strings.HasPrefix(r.sense, "4/") {
		t.Errorf("sense %s, want MEDIUM or HARDWARE ERROR", r.sense)
	}
	f.disk.hook(nil)
	i.expectGood(i.do(i.command(read10(5, 1), 512, nil)))
}

// image is a file of that many bytes as a LUN of f.
func (f *fixture) image(lunNumber LUN, data []byte) (path string) {
	f.t.Helper()
	path = filepath.Join(f.t.TempDir(), "image")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		f.t.Fatal(err)
	}
	image, err := lun.OpenImage(path)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		f.stop()
		if err := image.Close(); err != nil {
			f.t.Error(err)
		}
	})
	f.add(lunNumber, image)
	return path
}

func TestMappedImage(t *testing.T) {
	for name, keys := range map[string][]string{"no digests": nil, "digests": bothDigests()} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, nil)
			data := pattern(1<<20, 2)
			f.image(1, data)
			i := f.login(append(keys, "MaxRecvDataSegmentLength=100000")...)
			i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
			for _, n := range []int{1, 8, 513, 2047} {
				r := i.do(i.on(1, i.command(read10(1, uint16(n)), n*512, nil)))
				i.expectGood(r)
				if !bytes.Equal(r.data, data[512:][:n*512]) {
					t.Errorf("%d blocks: wrong data", n)
				}
			}
		})
	}
}

// What is not in the page cache is read all the same, beside what is.
func TestColdImage(t *testing.T) {
	f := serve(t, nil)
	data := pattern(1<<20, 2)
	path := f.image(1, data)
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	i := f.login()
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	for range 3 {
		if err := errors.Join(file.Sync(), unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
			t.Fatal(err)
		}
		r := i.do(i.on(1, i.command(read10(100, 1000), 1000*512, nil)))
		i.expectGood(r)
		if !bytes.Equal(r.data, data[100*512:][:1000*512]) {
			t.Error("wrong data")
		}
	}
}

// A file that is cut short below its mapping costs a connection, or a MEDIUM ERROR; then reads of what is gone are MEDIUM
// ERRORs, what is left can be read, and the server lives.
func TestImageIsCutShort(t *testing.T) {
	f := serve(t, nil)
	data := pattern(1<<20, 2)
	path := f.image(1, data)
	i := f.login()
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	i.expectGood(i.do(i.on(1, i.command(read10(0, 2048), 1<<20, nil))))
	if err := os.Truncate(path, 512<<10); err != nil {
		t.Fatal(err)
	}
	cmd := i.on(1, i.command(read10(1024, 1024), 512<<10, nil))
	i.send(cmd)
	if p := i.recvAny(); p != nil && p.opcode() == opDataIn {
		t.Error("data comes of what is gone")
	}
	again := f.login()
	again.do(again.on(1, again.command(testUnitReady(), 0, nil)))
	if r := again.do(again.on(1, again.command(read10(1500, 8), 4096, nil))); !strings.HasPrefix(r.sense, "3/") {
		t.Errorf("sense %s, want MEDIUM ERROR", r.sense)
	}
	r := again.do(again.on(1, again.command(read10(0, 8), 4096, nil)))
	again.expectGood(r)
	if !bytes.Equal(r.data, data[:4096]) {
		t.Error("what is left is read wrong")
	}
}

// A connection that is no socket works as well.
func TestPipe(t *testing.T) {
	_, i := servePipe(t, nil)
	if status := i.login(loginOptions{}); status != loginOK {
		t.Fatalf("login status %#04x", status)
	}
	i.ready()
	data := pattern(64<<10, 1)
	i.expectGood(i.do(i.command(write10(0, 128), 0, data)))
	if r := i.do(i.command(read10(0, 128), len(data), nil)); !bytes.Equal(r.data, data) {
		t.Error("other bytes are read than were written")
	}
	i.send(i.request(opLogout, logoutSession))
	i.expectOpcode(opLogoutResp)
	i.closed()
}

func TestNewServerRefusals(t *testing.T) {
	d := directory{NewTarget(diskTarget)}
	for name, cfg := range map[string]Config{
		"no directory":      {},
		"too many sessions": {Directory: d, MaxSessions: 1 << 16},
		"no connections":    {Directory: d, MaxConnections: -1},
		"too little memory": {Directory: d, MaxMemory: 4096},
		"negative time":     {Directory: d, IdleTimeout: -1},
	} {
		if _, err := NewServer(cfg); err == nil {
			t.Errorf("%s: a server is made", name)
		}
	}
}

// A listener that breaks ends Serve with its error.
func TestBrokenListener(t *testing.T) {
	srv, err := NewServer(Config{Directory: directory{NewTarget(diskTarget)}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := srv.Serve(context.Background(), l); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v, want that the listener is closed", err)
	}
}

// The log says who uses a target, to whom it is asked to say all; and nobody of those who only look for one.
func TestSessionIsLogged(t *testing.T) {
	var out bytes.Buffer
	f := serve(t, func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	i := f.login()
	peer := i.nc.LocalAddr().String()
	f.discover(10)
	f.stop() // nobody writes to out any more
	want := fmt.Sprintf("level=DEBUG msg=\"iSCSI session begins\" initiator=%s target=%s peer=%s\n", nodeName, diskTarget, peer)
	if got := out.String(); strings.Count(got, "session begins") != 1 || !strings.Contains(got, want) {
		t.Errorf("logged:\n%s\nwant once: %s", got, want)
	}
}
