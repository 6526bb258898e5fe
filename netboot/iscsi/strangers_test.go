package iscsi

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// A text negotiation that never comes to an end is given up, however little of it comes at a time.
func TestTextNegotiationsAreBounded(t *testing.T) {
	for name, value := range map[string]string{"rows": "", "bytes": strings.Repeat("v", maxValue)} {
		t.Run(name, func(t *testing.T) {
			text := textAfter(t, testDirectory{}, testInitiator, true)
			ttt, n := uint32(noTag), 0
			for ; ; n++ {
				pairs := make([]string, 4)
				for i := range pairs {
					pairs[i] = fmt.Sprintf("X-com.example.%d.%d=%s", n, i, value)
				}
				resp, rejected := text.step(textRequest(0, ttt, pairs...))
				if rejected {
					break
				}
				if n > maxTextRows {
					t.Fatalf("row %d is taken", n)
				}
				for _, kept := range text.keys.said {
					if kept != "" {
						t.Fatalf("%d bytes of a value are kept", len(kept))
					}
				}
				ttt = resp.ttt()
			}
			if value == "" && n != maxTextRows || value != "" && n != maxTextBytes/(4*maxValue) {
				t.Errorf("%d rows are taken", n)
			}
			if text.keys != nil || text.in != nil || text.size != 0 {
				t.Error("what was given up is kept")
			}
			if _, rejected := text.step(textRequest(flagFinal, noTag, "SendTargets=All")); rejected {
				t.Error("the next negotiation is rejected")
			}
		})
	}
}

// Who is in login makes place for others, so that silent connections keep nobody out, and costs no session its connection.
func TestSilentConnectionsMakePlace(t *testing.T) {
	for name, change := range map[string]func(*Server){
		"of logins":      func(srv *Server) { srv.logins.room = 4 },
		"of connections": func(srv *Server) { srv.cfg.MaxConnections = 5 },
	} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, func(c *Config) { c.LoginTimeout = time.Hour })
			f.srv.mu.Lock()
			change(f.srv)
			f.srv.mu.Unlock()
			first := f.login()
			silent := make([]*initiator, 4)
			for n := range silent {
				silent[n] = f.dial()
			}
			second := f.dial()
			if status := second.login(loginOptions{isid: 2}); status != loginOK {
				t.Fatalf("login status %#04x", status)
			}
			silent[0].closed() // the oldest, and no other
			first.quiet()
			second.ready()
			f.srv.mu.Lock()
			defer f.srv.mu.Unlock()
			if len(f.srv.conns) != 5 || len(f.srv.logins.conns) != 3 {
				t.Errorf("%d connections, %d of them in login, want 5 and 3", len(f.srv.conns), len(f.srv.logins.conns))
			}
		})
	}
}

// A host that waits in its login for the end of its last session does not make place for silent connections.
func TestKnownHostsDoNotMakePlace(t *testing.T) {
	f := serve(t, func(c *Config) { c.LoginTimeout = time.Hour })
	f.srv.mu.Lock()
	f.srv.logins.room = 2
	f.srv.mu.Unlock()
	old := f.login()
	g := newGate()
	open := sync.OnceFunc(func() { close(g.open) })
	t.Cleanup(open)
	f.disk.hook(g.holding("write"))
	old.send(old.command(write10(0, 1), 0, pattern(512, 1)))
	<-g.came
	again := f.dial()
	status := make(chan uint16, 1)
	go func() { status <- again.login(loginOptions{}) }()
	old.closed()
	silent := f.dial()
	f.dial()
	silent.closed()
	open()
	if got := <-status; got != loginOK {
		t.Errorf("login status %#04x", got)
	}
}

func TestWhoMakesPlace(t *testing.T) {
	from := func(addr string) *conn {
		return &conn{from: networkOf(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr)))}
	}
	known := from("192.0.2.1:1")
	proven := func(addr string) *conn {
		c := from(addr)
		c.proven = true
		return c
	}
	for _, tt := range []struct {
		name  string
		conns []*conn
		next  *conn
		want  int
	}{
		{"the oldest of all", []*conn{known, from("192.0.2.2:1"), from("192.0.2.3:1")}, from("192.0.2.4:1"), 0},
		{"the oldest of the busiest", []*conn{known, from("192.0.2.2:1"), from("192.0.2.2:2")}, from("192.0.2.3:1"), 1},
		{"the one of who comes again", []*conn{known, from("192.0.2.3:1"), from("192.0.2.2:1")}, from("192.0.2.2:2"), 2},
		{"a network of IPv6", []*conn{known, from("[2001:db8::1]:1"), from("[2001:db8::2]:1")}, from("192.0.2.3:1"), 1},
		{"IPv4 as IPv6", []*conn{known, from("[2001:db8::1]:1"), from("[::ffff:192.0.2.3]:1")}, from("192.0.2.3:1"), 2},
		{"not who is known", []*conn{proven("192.0.2.2:1"), proven("192.0.2.2:2"), known}, from("192.0.2.3:1"), 2},
		{"one of who are known", []*conn{proven("192.0.2.3:1"), proven("192.0.2.2:1"), proven("192.0.2.2:2")}, known, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := strangers{room: 3}
			for _, c := range tt.conns {
				if victim := s.add(c); victim != nil {
					t.Fatal("there was room")
				}
			}
			if victim := s.add(tt.next); victim != tt.conns[tt.want] {
				t.Errorf("connection %v makes place, want %d", victim.from, tt.want)
			}
			if len(s.conns) != 3 || s.conns[2] != tt.next {
				t.Errorf("%d connections", len(s.conns))
			}
		})
	}
}

// discover opens a discovery session.
func (f *fixture) discover(isid uint64) *initiator {
	f.t.Helper()
	i := f.dial()
	if status := i.login(loginOptions{isid: isid, keys: []string{"SessionType=Discovery"}}); status != loginOK {
		f.t.Fatalf("login status %#04x", status)
	}
	return i
}

// Discovery sessions take no room of others, and make place for each other.
func TestDiscoverySessionsAreBounded(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxSessions = 1 })
	f.srv.mu.Lock()
	f.srv.discoveries.room = 3
	f.srv.mu.Unlock()
	first := f.discover(10)
	for n := range uint64(2) {
		f.discover(11 + n).quiet()
	}
	first.quiet()
	i := f.login()
	last := f.discover(20)
	first.closed()
	last.quiet()
	i.quiet()
	if status := f.dial().login(loginOptions{isid: 2}); status != loginNoResources {
		t.Errorf("login status %#04x, want %#04x", status, loginNoResources)
	}
}

func TestDiscoverySessionsEnd(t *testing.T) {
	f := serve(t, nil)
	f.srv.mu.Lock()
	f.srv.discoveryLife = time.Millisecond
	f.srv.mu.Unlock()
	i := f.login()
	f.discover(10).closed()
	i.quiet()
}

// One initiator does not take the sessions of all.
func TestSessionsOfAnInitiator(t *testing.T) {
	const few = 8
	f := serve(t, func(c *Config) { c.InitiatorSessions = few })
	for n := range uint64(few) {
		if status := f.dial().login(loginOptions{isid: 100 + n}); status != loginOK {
			t.Fatalf("session %d: login status %#04x", n, status)
		}
	}
	if status := f.dial().login(loginOptions{isid: 99}); status != loginNoResources {
		t.Errorf("login status %#04x, want %#04x", status, loginNoResources)
	}
	if status := f.dial().login(loginOptions{isid: 100}); status != loginOK {
		t.Errorf("in place of its own: login status %#04x", status)
	}
	f.other().quiet()
	f.discover(98).quiet()
}
