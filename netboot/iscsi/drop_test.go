package iscsi

import (
	"sync"
	"testing"
)

// A connection cannot take the place of that of a session that is being dropped.
func TestDroppedSessionIsNotResumed(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	g := newGate()
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
	close(g.open)
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
