package iscsi

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A connection cannot take the place of that of a session that is being dropped.
func TestDroppedSessionIsNotResumed(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	g := newGate()
	open := sync.OnceFunc(func() { close(g.open) })
	t.Cleanup(open)
	f.disk.hook(g.holding("write"))
	i.send(i.command(write10(0, 1), 0, pattern(512, 1)))
	<-g.came
	dropped := make(chan struct{})
	go func() {
		f.srv.Drop(nodeName)
		close(dropped)
	}()
	i.closed()
	again := f.dial()
	if status := again.login(loginOptions{tsih: i.tsih, cmdSN: i.cmdSN}); status != loginNoSession {
		t.Errorf("login status %#04x, want %#04x", status, loginNoSession)
	}
	open()
	<-dropped
	if infos := f.srv.Sessions(); len(infos) != 0 {
		t.Errorf("sessions %v after all were dropped", infos)
	}
}

// A changingDirectory gives its one target with a CHAP that changes, and may do something when it is asked.
type changingDirectory struct {
	directory

	mu    sync.Mutex
	asked int
	then  func(asked int) (*CHAP, error)
}

func (d *changingDirectory) ask() (*CHAP, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked++
	return d.then(d.asked)
}

func (d *changingDirectory) Discover(string) (*CHAP, []string) {
	need, _ := d.ask()
	return need, nil
}

func (d *changingDirectory) Open(_, _ string) (*Target, *CHAP, error) {
	need, err := d.ask()
	if err != nil {
		return nil, nil, err
	}
	return d.target, need, nil
}

// What the Directory no longer grants when a login ends is refused, and leaves no session.
func TestDirectoryChangesDuringALogin(t *testing.T) {
	discovery := []string{"SessionType=Discovery"}
	for _, tt := range []struct {
		name   string
		keys   []string
		at     int // the question that has another answer
		need   *CHAP
		err    error
		status uint16
	}{
		{"forbidden at the end", nil, 2, nil, ErrForbidden, loginForbidden},
		{"forbidden once there is a session", nil, 3, nil, ErrForbidden, loginForbidden},
		{"not ready", nil, 3, nil, ErrNotReady, loginUnavailable},
		{"another secret", nil, 3, &CHAP{User: "u", Secret: "changed"}, nil, loginUnavailable},
		{"another secret for discovery", discovery, 3, &CHAP{User: "u", Secret: "changed"}, nil, loginUnavailable},
		{"nothing", nil, 4, nil, nil, loginOK},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &changingDirectory{}
			d.then = func(asked int) (*CHAP, error) {
				if asked < tt.at {
					return nil, nil
				}
				return tt.need, tt.err
			}
			f := serve(t, func(c *Config) {
				d.directory, _ = c.Directory.(directory)
				c.Directory = d
			})
			i := f.dial()
			if status := i.login(loginOptions{keys: tt.keys}); status != tt.status {
				t.Errorf("login status %#04x, want %#04x", status, tt.status)
			}
			if tt.status == loginOK {
				i.ready()
				return
			}
			i.closed()
			f.awaitChange()
			if n := len(f.srv.sessionList()); n != 0 {
				t.Errorf("%d sessions of a login that failed", n)
			}
		})
	}
}

// A peer that does not take data of a unit loses its connection when the unit is removed, and holds up nobody.
func TestRemoveFromASlowPeer(t *testing.T) {
	f := serve(t, func(c *Config) { c.PingTimeout = time.Hour })
	f.srv.sendGrace = 10 * time.Millisecond
	f.image(1, pattern(1<<20, 1))
	i := f.login()
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	for range 60 { // 60 MiB, more than any socket holds
		i.send(i.on(1, i.command(read10(0, 2048), 1<<20, nil)))
	}
	other := f.other()
	removed := make(chan error, 1)
	for { // until data is on its way
		f.srv.mu.Lock()
		s := f.srv.sessions[i.tsih]
		f.srv.mu.Unlock()
		if s.conn.pending.Load() > 0 {
			break
		}
		other.quiet()
	}
	go func() { removed <- f.target.Remove(1) }()
	select {
	case err := <-removed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("Remove waits for the peer")
		_ = i.nc.Close()
		<-removed
	}
	if r := other.do(other.command(testUnitReady(), 0, nil)); r.sense != "6/3f0e" {
		t.Errorf("sense %s, want REPORTED LUNS DATA HAS CHANGED", r.sense)
	}
}

// A medium that is slow costs nobody a connection, also in a command that was aborted and still runs.
func TestRemoveOfASlowUnit(t *testing.T) {
	for name, aborted := range map[string]bool{"in a command": false, "in an aborted command": true} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, nil)
			f.srv.sendGrace = time.Millisecond
			i, other := f.login(), f.other()
			g := newGate()
			open := sync.OnceFunc(func() { close(g.open) })
			t.Cleanup(open)
			f.disk.hook(g.holding("sync"))
			cmd := i.command(sync10(), 0, nil)
			i.send(cmd)
			<-g.came
			abort := i.manage(taskAbort, cmd)
			if aborted {
				i.send(abort)
				i.quiet()
			}
			removed := make(chan error, 1)
			go func() { removed <- f.target.Remove(0) }()
			for len(f.target.LUNs()) > 0 {
				other.quiet()
			}
			for range 200 { // many times as long as a peer may take
				i.quiet()
			}
			open()
			if aborted {
				i.expectManaged(abort, taskComplete)
			} else {
				i.expectGood(i.outcome(cmd))
			}
			if err := <-removed; err != nil {
				t.Error(err)
			}
		})
	}
}

// A read under way goes no further than the piece at hand when its unit is removed.
func TestRemoveInALongRead(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	c := f.connOf(i)
	g := newGate()
	open := sync.OnceFunc(func() { close(g.open) })
	t.Cleanup(open)
	f.disk.hook(g.holding("read"))
	cmd := i.command(read10(0, diskSize/512), diskSize, nil)
	i.send(cmd)
	<-g.came
	removed := make(chan error, 1)
	go func() { removed <- f.target.Remove(0) }()
	c.until(t, "the session leaves the unit", func() bool { return len(c.s.nexuses) == 0 })
	open()
	r := i.outcome(cmd)
	if r.sense != "5/2500" || len(r.data)+int(r.residual) != diskSize {
		t.Errorf("sense %s, %d bytes and a residual of %d, want LOGICAL UNIT NOT SUPPORTED, and %d together", r.sense, len(r.data), r.residual, diskSize)
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if n := len(g.came); n > 0 {
		t.Errorf("the medium is read %d times more", n)
	}
}

// A peer is slow where data of the unit waits for it and it takes none of anything.
func TestSlowPeer(t *testing.T) {
	f := serve(t, nil)
	f.image(1, pattern(1<<20, 1))
	i := f.login()
	i.attend(1)
	c := f.connOf(i)
	letGo := c.hold(t)
	cmd := i.on(1, i.command(read10(0, 8), 4096, nil))
	i.send(cmd)
	c.until(t, "the read is gathered", func() bool { return c.out != nil && len(c.out.tasks) == 1 })
	c.s.mu.Lock()
	n := c.s.nexuses[1]
	c.s.mu.Unlock()
	first := c.s.heed(n)
	if again := c.s.heed(n); again != first {
		t.Errorf("it has taken %v and then %v, while nothing is written", first, again)
	}
	letGo()
	i.expectGood(i.outcome(cmd))
	c.until(t, "the read is let go of", func() bool { return n.uses == 0 })
	if after := c.s.heed(n); after == first || after.waits {
		t.Errorf("it has taken %v, before and after data was written", after)
	}
}

// A failingListener fails to accept some connections.
type failingListener struct {
	net.Listener
	errs []error
}

func (l *failingListener) Accept() (net.Conn, error) {
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, err
	}
	return l.Listener.Accept()
}

// A connection that cannot be accepted does not end the server.
func TestServeGoesOnAccepting(t *testing.T) {
	f := serve(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	failing := &failingListener{Listener: l}
	for _, errno := range []syscall.Errno{
		syscall.EPROTO, syscall.ENETDOWN, syscall.EHOSTUNREACH, syscall.EPERM, syscall.EMFILE, syscall.ECONNABORTED,
	} {
		failing.errs = append(failing.errs, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", errno)})
	}
	failing.errs = append(failing.errs, errors.New("something else"))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.srv.Serve(ctx, failing) }()
	f.addr = l.Addr().String()
	_ = f.login().nc.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Serve: %v", err)
	}
}
