package iscsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	testSecret = "initiator secret"
	testMutual = "the target's own"
)

func testConfig(portal netip.AddrPort) Config {
	return Config{
		Portal: portal, Target: "iqn.2026-11.dev.troupe:n1", Initiator: "iqn.2026-11.dev.troupe:n1:initiator",
		User: "n1", Secret: testSecret, MutualUser: "troupe", MutualSecret: testMutual,
	}
}

// A run is a keeper at work.
type run struct {
	t      *testing.T
	driver *fakeDriver
	mu     sync.Mutex
	cfg    Config
	told   chan Status
	log    bytes.Buffer
	done   chan error
	stop   context.CancelFunc
	k      *keeper
}

// keep runs a keeper until the test ends.
func keep(t *testing.T, cfg Config) *run {
	t.Helper()
	return keepAfter(t, cfg, func(*keeper, *fakeDriver) {})
}

// keepAfter is keep, after something was done to the keeper and the kernel.
func keepAfter(t *testing.T, cfg Config, first func(*keeper, *fakeDriver)) *run {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &run{t: t, driver: newFakeDriver(), cfg: cfg, told: make(chan Status, 1000), done: make(chan error, 1), stop: cancel}
	r.k = &keeper{
		log: slog.New(slog.NewTextHandler(&r.log, nil)), driver: r.driver, limit: 10 * time.Millisecond, login: 300 * time.Millisecond,
		load: func() (Config, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.cfg, r.cfg.check()
		},
		tell: func(st Status) { r.told <- st }, online: func(Status) {},
		patience: func() time.Duration { return 0 }, gone: func(time.Duration) {},
	}
	first(r.k, r.driver)
	go func() { r.done <- r.k.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-r.done
		if err := r.k.closeSession(); err != nil {
			t.Error(err)
		}
		r.driver.close()
		if t.Failed() {
			t.Log(r.log.String())
		}
	})
	return r
}

// until waits for a status.
func (r *run) until(what string, is func(Status) bool) Status {
	r.t.Helper()
	for {
		select {
		case st := <-r.told:
			if is(st) {
				return st
			}
		case err := <-r.done:
			r.done <- err
			r.t.Fatalf("waiting until %s: the keeper ended: %v", what, err)
		}
	}
}

func up(n int) func(Status) bool { return func(st Status) bool { return st.Up && st.Logins == n } }

func TestKeeperLogsIn(t *testing.T) {
	for name, f := range map[string]*fakeTarget{
		"chap of the best kind":      {secret: testSecret, mutual: testMutual},
		"chap with md5":              {algorithm: "5", secret: testSecret, mutual: testMutual},
		"in pieces":                  {secret: testSecret, mutual: testMutual, pieces: true},
		"a target that takes longer": {secret: testSecret, mutual: testMutual, later: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := keep(t, testConfig(f.start(t, "127.0.0.1:0")))
			if st := r.until("it is up", up(1)); st.Session != 1 || st.Host != 2 || st.Error != "" || st.Refused {
				t.Errorf("status %+v", st)
			}
			r.driver.mu.Lock()
			defer r.driver.mu.Unlock()
			want := map[param]string{
				paramHeaderDigest: "1", paramDataDigest: "1", paramMaxXmit: "131072", paramMaxRecv: "262144", paramMaxBurst: "524288",
				paramFirstBurst: "65536", paramInitialR2T: "0", paramImmediate: "1", paramRecovery: "-1", paramTPGT: "1",
				paramTarget: "iqn.2026-11.dev.troupe:n1", paramAddress: "127.0.0.1",
			}
			got := map[param]string{}
			for p := range want {
				got[p] = r.driver.params[p]
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("the kernel was told (-want +got):\n%s", diff)
			}
		})
	}
}

func TestKeeperWithoutCHAP(t *testing.T) {
	f := &fakeTarget{}
	cfg := testConfig(f.start(t, "127.0.0.1:0"))
	cfg.User, cfg.Secret, cfg.MutualUser, cfg.MutualSecret = "", "", "", ""
	keep(t, cfg).until("it is up", up(1))
}

// What the disks are on goes on as the same session: with the same name, and with the numbers that the kernel has.
func TestKeeperRecovers(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	portal := f.start(t, "127.0.0.1:0")
	r := keep(t, testConfig(portal))
	r.until("it is up", up(1))
	for n := 2; n < 5; n++ {
		f.kill()
		r.until("it is known to be down", func(st Status) bool { return !st.Up && strings.Contains(st.Error, "refused") })
		f.start(t, portal.String())
		if st := r.until("it is up again", up(n)); st.Session != 1 {
			t.Errorf("session %d after login %d, want 1 as before", st.Session, n)
		}
	}
	seen := f.seen()
	if len(seen) != 4 {
		t.Fatalf("%d logins reached the target, want 4", len(seen))
	}
	for i, h := range seen {
		if [6]byte(h[8:14]) != isid(r.cfg.Initiator) || binary.BigEndian.Uint16(h[14:]) != 0 {
			t.Errorf("login %d has ISID and TSIH %x", i, h[8:16])
		}
		if got, want := binary.BigEndian.Uint32(h[24:]), 1000+17*uint32(i); got != want {
			t.Errorf("login %d has CmdSN %d, want %d", i, got, want)
		}
	}
	r.driver.mu.Lock()
	defer r.driver.mu.Unlock()
	if slices.ContainsFunc(r.driver.stops, func(f uint32) bool { return f != stopRecover }) || !r.driver.live {
		t.Errorf("the kernel was told to stop with %v, want %d only", r.driver.stops, stopRecover)
	}
}

// What brings disks back may wait for one of them, and so for the next login.
func TestKeeperLogsInWhileADiskIsBroughtBack(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	portal := f.start(t, "127.0.0.1:0")
	second := make(chan struct{})
	r := keepAfter(t, testConfig(portal), func(k *keeper, _ *fakeDriver) {
		k.online = func(st Status) {
			if st.Logins == 2 {
				close(second)
			}
			<-second
		}
	})
	r.until("it is up", up(1))
	f.kill()
	f.start(t, portal.String())
	r.until("it is up again", up(2))
}

func TestKeeperObeysALogout(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	r := keep(t, testConfig(f.start(t, "127.0.0.1:0")))
	r.until("it is up", up(1))
	f.say(asyncLogout)
	r.until("it is up again", up(2))
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.logouts != 1 {
		t.Errorf("the target saw %d logouts, want 1", f.logouts)
	}
}

func TestKeeperHearsTheTargetLeave(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	r := keep(t, testConfig(f.start(t, "127.0.0.1:0")))
	for i, event := range []byte{asyncDropsOne, asyncDropsAll} {
		r.until("it is up", up(i+1))
		f.say(event)
	}
	r.until("it is up again", up(3))
}

func TestKeeperIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name    string
		target  *fakeTarget
		change  func(*Config)
		want    string
		refused bool
	}{
		{
			"wrong secret", &fakeTarget{secret: testSecret, mutual: testMutual}, func(c *Config) { c.Secret = "another one" },
			"the target refuses the login with status 0201h authentication failed", true,
		},
		{"wrong target", &fakeTarget{secret: testSecret, mutual: "not the secret"}, func(*Config) {}, ErrImpostor.Error(), true},
		{"other target", &fakeTarget{secret: testSecret, mutual: testMutual}, func(c *Config) { c.MutualUser = "somebody" }, ErrImpostor.Error(), true},
		{"no proof", &fakeTarget{}, func(*Config) {}, `login: the target wants AuthMethod "None", CHAP was offered`, false},
		{"no digests", &fakeTarget{secret: testSecret, mutual: testMutual, noDigests: true}, func(*Config) {}, errDigests.Error(), true},
		{
			"not ready", &fakeTarget{status: [2]byte{3, 1}}, func(*Config) {},
			"the target refuses the login with status 0301h service unavailable", false,
		},
		{
			"no target", &fakeTarget{status: [2]byte{2, 3}}, func(*Config) {},
			"the target refuses the login with status 0203h no such target", true,
		},
		{"silence", &fakeTarget{silent: true}, func(*Config) {}, "waiting for the target's answer: context deadline exceeded", false},
		{
			"moved to a name", &fakeTarget{status: [2]byte{1, 1}, address: "storage.example:3260,1"}, func(*Config) {},
			`login: the target sends its initiators to "storage.example:3260", which is no address`, false,
		},
		{"bad config", &fakeTarget{}, func(c *Config) { c.MutualSecret = c.Secret }, "iSCSI: both sides have the same secret", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := testConfig(tt.target.start(t, "127.0.0.1:0"))
			tt.change(&cfg)
			r := keep(t, cfg)
			st := r.until("it fails", func(st Status) bool { return st.Error != "" })
			if st.Error != tt.want || st.Refused != tt.refused || st.Up || st.Logins != 0 {
				t.Errorf("status %+v, want %q, refused %v", st, tt.want, tt.refused)
			}
			// A second failure comes after the first one's session was taken away.
			r.until("it fails again", func(st Status) bool { return st.Error != "" })
			r.driver.mu.Lock()
			defer r.driver.mu.Unlock()
			if slices.Contains(r.driver.stops, stopRecover) || r.driver.starts > 0 {
				t.Errorf("stops %v, starts %d: a session that never was is to be gone", r.driver.stops, r.driver.starts)
			}
		})
	}
}

// New secrets are read before the next try.
func TestKeeperReadsItsConfigAgain(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	cfg := testConfig(f.start(t, "127.0.0.1:0"))
	cfg.Secret = "an old secret"
	r := keep(t, cfg)
	r.until("it is refused", func(st Status) bool { return st.Refused })
	r.mu.Lock()
	r.cfg.Secret = testSecret
	r.mu.Unlock()
	r.until("it is up", up(1))
}

func TestKeeperFollowsARedirection(t *testing.T) {
	to := &fakeTarget{secret: testSecret, mutual: testMutual}
	from := &fakeTarget{status: [2]byte{1, 1}, address: to.start(t, "127.0.0.1:0").String() + ",1"}
	r := keep(t, testConfig(from.start(t, "127.0.0.1:0")))
	r.until("it is up", up(1))
	to.say(asyncDropsOne)
	r.until("it is up again", up(2))
	if n := len(from.seen()); n != 2 { // the next login begins where the config says (RFC 7143 section 13.8)
		t.Errorf("the first target saw %d logins, want 2", n)
	}
}

func TestKeeperGivesUpRedirectionsInARing(t *testing.T) {
	f := &fakeTarget{status: [2]byte{1, 2}}
	portal := f.start(t, "127.0.0.1:0")
	f.mu.Lock()
	f.address = portal.String()
	f.mu.Unlock()
	r := keep(t, testConfig(portal))
	st := r.until("it fails", func(st Status) bool { return st.Error != "" })
	if want := "login: sent on more than 4 times, last to " + portal.String(); st.Error != want {
		t.Errorf("error %q, want %q", st.Error, want)
	}
}

func TestKeeperEndsWithItsSession(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	r := keep(t, testConfig(f.start(t, "127.0.0.1:0")))
	r.until("it is up", up(1))
	r.driver.incoming <- tells(sessionDestroyed, 2, 77) // another one's
	r.driver.incoming <- tells(connFailed, 77, 0, 1020)
	r.driver.incoming <- tells(sessionDestroyed, 2, 1)
	if err := <-r.done; err != errDestroyed { //nolint:errorlint // the very one
		t.Errorf("it ends with %v, want %v", err, errDestroyed)
	}
	r.done <- nil
	if n := len(f.seen()); n != 1 {
		t.Errorf("%d logins, want 1: what happens to another session is nothing to this one", n)
	}
}

// Events that were lost may have been the end of the connection.
func TestKeeperLogsInAgainAfterLostEvents(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	r := keep(t, testConfig(f.start(t, "127.0.0.1:0")))
	r.until("it is up", up(1))
	r.driver.incoming <- event{}
	r.until("it is up again", up(2))
}

// A keeper that was killed has left a session whose connection may be as it was, or not.
func TestKeeperAdoptsASession(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	r := keepAfter(t, testConfig(f.start(t, "127.0.0.1:0")), func(k *keeper, d *fakeDriver) {
		d.live, d.sessions = true, 7
		if err := k.adopt(Status{Up: true, Logins: 3, Session: 7, Host: 2}); err != nil {
			t.Fatal(err)
		}
	})
	r.until("it is known to be down", func(st Status) bool { return !st.Up && st.Error == "its keeper was gone" })
	if st := r.until("it is up again", up(4)); st.Session != 7 {
		t.Errorf("status %+v, want session 7", st)
	}
	r.driver.mu.Lock()
	defer r.driver.mu.Unlock()
	if diff := cmp.Diff([]uint32{stopRecover}, r.driver.stops); diff != "" || r.driver.sessions != 7 {
		t.Errorf("%d sessions, stops (-want +got):\n%s", r.driver.sessions, diff)
	}
}
