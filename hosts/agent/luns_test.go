package agent

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/iscsi"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/digest"
)

// diskless is assigned, from LUNs.
func diskless(s *agentapitest.Server, role string, gen uint64) agentapi.Assignment {
	a := assigned(s, role, gen)
	a.ISCSI = &agentapi.ISCSI{
		Port: 3260, Target: "iqn.2026-11.dev.troupe:n1", Initiator: "iqn.2026-11.dev.troupe:n1:initiator",
		User: "n1", Secret: "secret", MutualUser: "troupe", MutualSecret: "another", Base: 1, Delta: 2, Node: 0, Disk: "d1",
	}
	return a
}

func TestDecideFromLUNs(t *testing.T) {
	testDecide(t, diskless, []change{
		{"the same", func(a *agentapi.Assignment) { a.Version = "3" }, goOn},
		{"only the generation", func(*agentapi.Assignment) {}, adopt},
		{"another secret", func(a *agentapi.Assignment) { a.ISCSI.Secret = "new" }, adopt},
		{"a disk that was reset", func(a *agentapi.Assignment) { a.ISCSI.Disk = "d2" }, moveOn},
		{"another release", func(a *agentapi.Assignment) { a.Release.ID = digest.Of(nil) }, moveOn},
		{"from a disk of its own", func(a *agentapi.Assignment) { a.ISCSI = nil }, moveOn},
		{"waiting", func(a *agentapi.Assignment) { *a = agentapi.Assignment{Version: "4", State: agentapi.Waiting} }, goOn},
	})
}

// A node that runs from LUNs, or shall, fetches nothing before its reboot.
func TestServiceRebootsWithoutFetching(t *testing.T) {
	for _, tt := range []struct {
		name     string
		now, to  func(*agentapitest.Server) agentapi.Assignment
		stages   string
		isStaged bool
		detail   string
	}{
		{
			"to a new release", func(s *agentapitest.Server) agentapi.Assignment { return diskless(s, "web", 1) },
			func(s *agentapitest.Server) agentapi.Assignment { return diskless(s, "idle", 2) },
			"switch-root service healthy stage reboot", true, "generation 2, role idle",
		},
		{
			"to a new disk", func(s *agentapitest.Server) agentapi.Assignment { return diskless(s, "web", 1) },
			func(s *agentapitest.Server) agentapi.Assignment {
				a := diskless(s, "web", 1)
				a.ISCSI.Disk = "d2"
				return a
			},
			"switch-root service healthy stage reboot", true, "generation 1, role web; its disk was reset",
		},
		{
			"to LUNs", func(s *agentapitest.Server) agentapi.Assignment { return assigned(s, "web", 1) },
			func(s *agentapitest.Server) agentapi.Assignment { return diskless(s, "web", 2) },
			"switch-root service healthy stage reboot", true, "generation 2, role web",
		},
		{
			"to a disk of its own", func(s *agentapitest.Server) agentapi.Assignment { return diskless(s, "web", 1) },
			func(s *agentapitest.Server) agentapi.Assignment { return assigned(s, "web", 2) },
			"switch-root service healthy reboot", false, "generation 2, role web",
		},
		{
			"to a disk image", func(s *agentapitest.Server) agentapi.Assignment { return assigned(s, "web", 1) },
			func(s *agentapitest.Server) agentapi.Assignment {
				a := diskless(s, "appliance", 2)
				a.Release = &agentapi.Release{ID: digest.Of([]byte("appliance")), Kernel: digest.Of([]byte("appliance"))}
				a.Node = agentapi.Node{}
				return a
			},
			"switch-root service healthy stage reboot", true, "generation 2, role appliance",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var s agentapitest.Server
			a := tt.now(&s)
			a.Checks = passing
			n := newNode(t, a, &s)
			reboots, _ := n.start()
			n.wait("health", healthy)
			to := tt.to(&s)
			s.Assign(to)
			<-reboots
			n.wait("the last mark", func(r agentapi.Report) bool {
				return strings.HasSuffix(n.stages(), "reboot") && (r.Staged == to.Release.ID) == tt.isStaged
			})
			marks := s.Marks()
			if n.stages() != tt.stages || marks[len(marks)-1].Detail != tt.detail {
				t.Errorf("stages %q, %q, want %q, %q", n.stages(), marks[len(marks)-1].Detail, tt.stages, tt.detail)
			}
			for _, m := range marks {
				if m.Bytes != 0 {
					t.Errorf("stage %s: %d bytes were fetched", m.Stage, m.Bytes)
				}
			}
		})
	}
}

func TestPortal(t *testing.T) {
	for server, want := range map[string]string{
		"http://10.77.0.1:8080": "10.77.0.1:3261", "http://[fd00::1]:8080": "[fd00::1]:3261", "http://localhost:8080": "127.0.0.1:3261",
	} {
		got, err := portal(t.Context(), server, 3261)
		if err != nil || got != netip.MustParseAddrPort(want) && !got.Addr().IsLoopback() {
			t.Errorf("portal of %s: %v, %v, want %s", server, got, err, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := portal(ctx, "http://troupe.invalid:8080", 3260); err == nil {
		t.Error("a name that nobody has is an address")
	}
}

// What a try to log in comes to is told at once, and is a failure only where time does not mend it.
func TestLoginError(t *testing.T) {
	spec := diskless(&agentapitest.Server{}, "web", 1).ISCSI
	at := netip.MustParseAddrPort("10.77.0.1:3260")
	if err := loginError(spec, at, iscsi.Status{}); err != nil {
		t.Errorf("before the first try: %v", err)
	}
	var m mending
	err := loginError(spec, at, iscsi.Status{Error: "connection refused"})
	if want := "logging in to iqn.2026-11.dev.troupe:n1 at 10.77.0.1:3260: connection refused"; !errors.As(err, &m) || err.Error() != want {
		t.Errorf("a server that is away: %v, want %s, mending", err, want)
	}
	if err := loginError(spec, at, iscsi.Status{Error: "x", Refused: true}); err == nil || errors.As(err, &m) {
		t.Errorf("a refusal: %v, want one that needs help", err)
	}
}

func TestWhichSessionIsWhose(t *testing.T) {
	spec := *diskless(&agentapitest.Server{}, "web", 1).ISCSI
	l := &luns{spec: spec}
	same := spec
	same.Secret, same.Port, same.Base, same.Delta = "new", 3261, 5, 6
	if !l.isFor(&same) || l.isFor(nil) {
		t.Error("other secrets, another port and other images are of the same session, none is not")
	}
	for _, change := range []func(*agentapi.ISCSI){
		func(s *agentapi.ISCSI) { s.Target += "0" }, func(s *agentapi.ISCSI) { s.Initiator += "0" },
		func(s *agentapi.ISCSI) { s.Node = 9 }, func(s *agentapi.ISCSI) { s.Disk = "d2" },
	} {
		other := spec
		change(&other)
		if l.isFor(&other) {
			t.Errorf("%s", cmp.Diff(spec, other))
		}
	}
}

// A node disk that was reset while it is mounted does not answer any more: nothing waits for it but the reboot.
func TestBootDoesNotWaitForADiskThatWasReset(t *testing.T) {
	rebooted := errors.New("rebooted")
	for name, leave := range map[string]func(context.Context, *boot) error{
		"another assignment": func(ctx context.Context, b *boot) error {
			return b.openStorage(ctx, diskless(&agentapitest.Server{}, "web", 2))
		},
		"a disk image":    func(ctx context.Context, b *boot) error { return b.makeWay(ctx) },
		"a damaged cache": func(ctx context.Context, b *boot) error { b.closeDamaged(ctx, unix.EUCLEAN); return rebooted },
	} {
		t.Run(name, func(t *testing.T) {
			c, err := cache.Open(t.TempDir(), nothing)
			if err != nil {
				t.Fatal(err)
			}
			client, err := agentapi.NewClient("http://10.77.0.1", status{})
			if err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				answer := make(chan error)
				defer close(answer)
				reboots := 0
				b := &boot{
					log: nothing, client: client, cache: c, rep: newReporter(client, nothing, agentapi.Report{}),
					unmount: func(string, int) error { return <-answer },
					force: func() error {
						reboots++
						return rebooted
					},
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				if err := leave(ctx, b); !errors.Is(err, rebooted) || reboots != 1 {
					t.Errorf("%d reboots, %v", reboots, err)
				}
			})
		})
	}
}

// logged is a boot with a session and a node disk, and says whether the session has ended. It does not log in again. To be
// called outside of a bubble.
func logged(t *testing.T) (b *boot, ended func() bool) {
	t.Helper()
	dir := t.TempDir()
	keeper := filepath.Join(dir, "keeper")
	if err := os.WriteFile(keeper, []byte("#!/bin/sh\nread word <&3\n: >\"$0.ended\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	spec := *diskless(&agentapitest.Server{}, "web", 1).ISCSI
	s, err := iscsi.Start(keeper, filepath.Join(dir, "run"), iscsiConfig(netip.MustParseAddrPort("127.0.0.1:3260"), &spec, nil))
	if err != nil {
		t.Fatal(err)
	}
	c, err := cache.Open(filepath.Join(dir, "cache"), nothing)
	if err != nil {
		t.Fatal(err)
	}
	client, err := agentapi.NewClient("http://10.77.0.1", status{})
	if err != nil {
		t.Fatal(err)
	}
	ended = func() bool {
		_, err := os.Stat(keeper + ".ended")
		return err == nil
	}
	t.Cleanup(func() {
		if !ended() {
			_ = s.Close()
		}
	})
	b = &boot{
		log: nothing, client: client, cache: c, luns: &luns{session: s, spec: spec}, rep: newReporter(client, nothing, agentapi.Report{}),
		copied: make(chan struct{}), fsReady: make(chan struct{}), copyErr: errNoLogin,
		unmount: func(string, int) error {
			if ended() {
				t.Error("the session has ended under a disk that is mounted")
			}
			return nil
		},
	}
	b.lease.Store(&netup.Lease{})
	close(b.copied)
	close(b.fsReady)
	return b, ended
}

var errNoLogin = errors.New("no login in this test")

// pursues has a boot act on assignments while f says which.
func pursues(t *testing.T, b *boot, f func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	b.fol = newFollower(b.client, nothing, nil)
	done := make(chan error, 1)
	go func() {
		_, err := b.pursue(ctx)
		done <- err
	}()
	f()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("pursue: %v", err)
	}
}

func reported(b *boot) string {
	b.rep.mu.Lock()
	defer b.rep.mu.Unlock()
	return b.rep.report.Error
}

func waiting(version, why string) agentapi.Assignment {
	return agentapi.Assignment{Version: version, State: agentapi.Waiting, Host: "n1", Reason: why}
}

// The server can open a disk anew only once nobody has it.
func TestAMachineThatWaitsLeavesItsDisks(t *testing.T) {
	b, ended := logged(t)
	synctest.Test(t, func(t *testing.T) {
		pursues(t, b, func() {
			b.fol.set(waiting("2", "what is written to it fails"))
			time.Sleep(waitWithDisks / 2)
			b.fol.set(waiting("3", "for another reason"))
			time.Sleep(waitWithDisks/2 - time.Second)
			synctest.Wait()
			if ended() {
				t.Error("the session has ended at once")
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if !ended() {
				t.Error("the session goes on")
			}
			a := diskless(&agentapitest.Server{}, "web", 1)
			a.Version = "4"
			b.fol.set(a)
			synctest.Wait()
			if got := reported(b); got != errNoLogin.Error() {
				t.Errorf("it does not log in again: %q", got)
			}
		})
		if b.luns != nil || b.cache != nil {
			t.Errorf("left: session %v, disk %v", b.luns, b.cache)
		}
	})
}

// What lasts a moment, as where the server begins anew, takes nothing from a boot.
func TestAMachineThatWaitsForAMomentKeepsItsDisks(t *testing.T) {
	b, ended := logged(t)
	synctest.Test(t, func(t *testing.T) {
		pursues(t, b, func() {
			a := diskless(&agentapitest.Server{}, "web", 1)
			for _, version := range []string{"2", "4", "6"} {
				b.fol.set(waiting(version, "its disk is being opened"))
				time.Sleep(waitWithDisks / 2)
				a.Version = version + "a"
				b.fol.set(a)
				time.Sleep(waitWithDisks)
			}
		})
	})
	if ended() || b.luns == nil || b.cache == nil {
		t.Errorf("ended: %v, session %v, disk %v", ended(), b.luns, b.cache)
	}
}

// A disk that is in use, as by the shell on the console, is left as soon as it can be.
func TestAMachineThatWaitsTriesAgainToLeaveItsDisks(t *testing.T) {
	b, ended := logged(t)
	busy := 2
	b.unmount = func(string, int) error {
		if busy--; busy >= 0 {
			return unix.EBUSY
		}
		return nil
	}
	synctest.Test(t, func(t *testing.T) {
		pursues(t, b, func() {
			b.fol.set(waiting("2", "what is written to it fails"))
			time.Sleep(2*waitWithDisks + time.Second)
			synctest.Wait()
			if got := reported(b); ended() || !strings.Contains(got, unix.EBUSY.Error()) {
				t.Errorf("ended: %v, reported %q", ended(), got)
			}
			time.Sleep(waitWithDisks)
			synctest.Wait()
			if got := reported(b); !ended() || got != "" {
				t.Errorf("ended: %v, reported %q", ended(), got)
			}
		})
	})
}

func TestHashImageFindsADamagedCopy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lun")
	if err := os.WriteFile(path, []byte("the image, and a tail"), 0o600); err != nil {
		t.Fatal(err)
	}
	blob := agentapi.Blob{Digest: digest.Of([]byte("the image")), Size: 9}
	if err := hashImage(path, blob); err != nil {
		t.Errorf("the right bytes: %v", err)
	}
	blob.Digest = digest.Of([]byte("the imagf"))
	if err := hashImage(path, blob); err == nil || !strings.Contains(err.Error(), "the server's copy is damaged") {
		t.Errorf("other bytes: %v", err)
	}
	blob.Size = 100
	if err := hashImage(path, blob); err == nil {
		t.Error("a LUN that is too small has an image")
	}
}

func TestSerialOfImage(t *testing.T) {
	for s, want := range map[string]bool{"0123456789abcdef0123456789abcdef": true, "beaf11": false, "": false, strings.Repeat("x", 32): false} {
		if got := isSerialOfImage(s); got != want {
			t.Errorf("isSerialOfImage(%q) = %v", s, got)
		}
	}
}
