package reconciler

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// testTarget is the sessions of a target that does not listen.
type testTarget struct {
	mu       sync.Mutex
	sessions []iscsi.SessionInfo
	dropped  []string
	has      map[string]string // by host: the secret that its machine logs in with; none: that of LUN 0 as it is then
	stuck    chan struct{}     // where it is set, Drop waits for it
}

func (t *testTarget) Sessions() []iscsi.SessionInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]iscsi.SessionInfo(nil), t.sessions...)
}

func (t *testTarget) Drop(initiator string) {
	if t.stuck != nil {
		<-t.stuck
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var kept []iscsi.SessionInfo
	for _, s := range t.sessions {
		if s.Initiator == initiator {
			t.dropped = append(t.dropped, initiator)
		} else {
			kept = append(kept, s)
		}
	}
	t.sessions = kept
}

// login has a host log in, as package iscsi would: if the directory lets it.
func (t *testTarget) login(l *luns, host string, isid uint64) error {
	target, chap, err := l.Open(initiatorName(host), targetName(host))
	if err != nil {
		return err
	}
	if secret := t.has[host]; secret != "" && secret != chap.Secret {
		if chap.Next == nil {
			return errors.New("authentication failed")
		}
		if next, _ := chap.Next.Secrets(); next == secret {
			chap.Next.Proven()
		}
		return iscsi.ErrNotReady
	}
	if again, _, err := l.Open(initiatorName(host), targetName(host)); err != nil || again != target {
		return errors.Join(iscsi.ErrNotReady, err)
	}
	t.mu.Lock()
	t.sessions = append(t.sessions, iscsi.SessionInfo{Initiator: initiatorName(host), Target: targetName(host), ISID: isid, Since: l.now()})
	t.mu.Unlock()
	l.poke()
	return nil
}

// A lunRig is a luns controller with real stores and files.
type lunRig struct {
	*luns
	target      *testTarget
	blobs       *store.Store
	dir         string
	base, delta images.Blob
}

func newLUNRig(t testing.TB) *lunRig {
	t.Helper()
	dir := t.TempDir()
	blobs, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = blobs.Close() })
	r := &lunRig{blobs: blobs, dir: filepath.Join(dir, "luns"), target: &testTarget{has: map[string]string{}}}
	r.base, r.delta = r.put(t, "base"), r.put(t, "delta")
	r.again(openStore(t))
	return r
}

// again makes the controller anew, as a server that starts does.
func (r *lunRig) again(s *state.Store) {
	log := slog.New(slog.DiscardHandler)
	r.luns = newLUNs(s, lunMedia{blobs: r.blobs, dir: r.dir}, 3260, &recorder{store: s, log: log}, log)
	r.luns.target = r.target
}

func (r *lunRig) put(t testing.TB, text string) images.Blob {
	t.Helper()
	b, err := r.blobs.Put(t.Context(), bytes.NewReader(bytes.Repeat([]byte(text+"\n"), 4096)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// start runs the controller until stop is called.
func (r *lunRig) start(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.run(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, r.close()); err != nil {
			t.Error(err)
		}
	})
}

// assign gives a host a role that runs from the server.
func (r *lunRig) assign(t testing.TB, host string, delta images.Blob) state.Assignment {
	t.Helper()
	a := state.Assignment{
		Host: host, ISCSI: &state.ISCSI{Size: 1 << 20},
		Spec: agentapi.Assignment{State: agentapi.Assigned, Version: "1", Release: &agentapi.Release{Base: agentapi.Image{Blob: agentapi.Blob(r.base)}, Delta: agentapi.Image{Blob: agentapi.Blob(delta)}}},
	}
	if err := state.Assignments.Put(t.Context(), r.store, host, a); err != nil {
		t.Fatal(err)
	}
	return a
}

// loggedIn assigns a host a role that runs from the server, and has its machine log in, with that on record.
func (r *lunRig) loggedIn(t *testing.T, host string) state.Assignment {
	t.Helper()
	a := r.assign(t, host, r.delta)
	r.look(t, func() bool { return ready(host, a)(r.views()) })
	if err := r.target.login(r.luns, host, 1); err != nil {
		t.Fatal(err)
	}
	r.look(t, func() bool { return !r.record(t, host).Login.IsZero() })
	return a
}

// until has the controller work until cond holds. A reset of nobody is answered between two looks, or amid one.
func (r *lunRig) until(t *testing.T, cond func() bool) {
	t.Helper()
	for !cond() {
		r.poke()
		if err := r.Reset(t.Context(), "nobody", false); err == nil || t.Context().Err() != nil {
			t.Fatalf("the LUNs never came to be as wanted: %+v (%v)", r.Targets(), err)
		}
	}
}

// await waits until what is open of the hosts is as wanted.
func (r *lunRig) await(t *testing.T, want func(lunViews) bool) {
	t.Helper()
	r.until(t, func() bool { return want(r.views()) })
}

func (r *lunRig) record(t *testing.T, host string) state.LUNs {
	t.Helper()
	rec, err := state.LUNSets.Get(t.Context(), r.store, host)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

// files are the names of what hosts wrote.
func (r *lunRig) files(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(r.dir, "*", "*.disk"))
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range names {
		names[i] = strings.TrimPrefix(n, r.dir+"/")
	}
	return names
}

func ready(host string, a state.Assignment) func(lunViews) bool {
	return func(v lunViews) bool {
		at, _ := v.iscsi(host, a)
		return at != nil
	}
}

func TestLUNsAreOpenedForAnAssignment(t *testing.T) {
	r := newLUNRig(t)
	a := r.assign(t, "n1", r.delta)
	if _, _, err := r.Open(initiatorName("n1"), targetName("n1")); !errors.Is(err, iscsi.ErrNotReady) {
		t.Errorf("a login before the records are read: got %v, want %v", err, iscsi.ErrNotReady)
	}
	stop := r.start(t)
	defer stop()
	r.await(t, ready("n1", a))
	rec := r.record(t, "n1")
	got, _ := r.views().iscsi("n1", a)
	disk := rec.Disks[0]
	want := &agentapi.ISCSI{
		Port: 3260, Target: "iqn.2026-11.dev.troupe:n1", Initiator: "iqn.2026-11.dev.troupe:n1:initiator",
		User: "n1", Secret: disk.Secret, MutualUser: "troupe", MutualSecret: disk.MutualSecret, Base: 1, Delta: 2, Disk: disk.ID,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	target, chap, err := r.Open(initiatorName("n1"), targetName("n1"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]iscsi.LUN{0, 1, 2}, target.LUNs()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(&iscsi.CHAP{User: "n1", Secret: disk.Secret, MutualUser: "troupe", MutualSecret: disk.MutualSecret}, chap); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"n1/" + disk.ID + ".disk"}, r.files(t)); d != "" {
		t.Error(d)
	}
	for _, tt := range []struct {
		initiator, target string
		want              error
	}{
		{initiatorName("n2"), targetName("n1"), iscsi.ErrForbidden},
		{"iqn.1993-08.org.debian:01:1", targetName("n1"), iscsi.ErrForbidden},
		{initiatorName("n2"), targetName("n2"), iscsi.ErrNoTarget},
		{initiatorName("n1"), "iqn.2001-04.com.example:n1", iscsi.ErrNoTarget},
	} {
		if _, _, err := r.Open(tt.initiator, tt.target); !errors.Is(err, tt.want) {
			t.Errorf("%s at %s: got %v, want %v", tt.initiator, tt.target, err, tt.want)
		}
	}
	if _, names := r.Discover(initiatorName("n1")); !cmp.Equal(names, []string{targetName("n1")}) {
		t.Errorf("n1 discovers %q", names)
	}
	if _, names := r.Discover(initiatorName("n2")); names != nil {
		t.Errorf("n2 discovers %q", names)
	}
}

func TestLUNsAreTheSameAfterARestart(t *testing.T) {
	r := newLUNRig(t)
	a := r.assign(t, "n1", r.delta)
	stop := r.start(t)
	r.await(t, ready("n1", a))
	before, _ := r.views().iscsi("n1", a)
	stop()
	r.again(r.store)
	stop = r.start(t)
	defer stop()
	r.await(t, ready("n1", a))
	after, _ := r.views().iscsi("n1", a)
	if d := cmp.Diff(before, after); d != "" {
		t.Errorf("after a restart its LUNs are others:\n%s", d)
	}
}

// Two hosts read one image, and a host's new image comes to the target that is in use.
func TestLUNsComeWhileSessionsRun(t *testing.T) {
	r := newLUNRig(t)
	a1, a2 := r.assign(t, "n1", r.delta), r.assign(t, "n2", r.delta)
	stop := r.start(t)
	defer stop()
	r.await(t, ready("n1", a1))
	r.await(t, ready("n2", a2))
	if err := r.target.login(r.luns, "n1", 1); err != nil {
		t.Fatal(err)
	}
	target, _, err := r.Open(initiatorName("n1"), targetName("n1"))
	if err != nil {
		t.Fatal(err)
	}
	a1 = r.assign(t, "n1", r.put(t, "another"))
	r.await(t, ready("n1", a1))
	if d := cmp.Diff([]iscsi.LUN{0, 1, 2, 3}, target.LUNs()); d != "" {
		t.Errorf("in the target that is open:\n%s", d)
	}
	if len(r.target.dropped) > 0 {
		t.Errorf("sessions were ended: %q", r.target.dropped)
	}
}

// vm gives a host an image that is booted as it is.
func (r *lunRig) vm(t *testing.T, host string, generation uint64, image images.Blob) state.Assignment {
	t.Helper()
	a := state.Assignment{
		Host: host, Role: "vm", Generation: generation, ISCSI: &state.ISCSI{Size: 1 << 20, Image: &image}, Release: image.Digest,
		Spec: agentapi.Assignment{State: agentapi.Assigned, Release: &agentapi.Release{ID: image.Digest}},
	}
	if err := state.Assignments.Put(t.Context(), r.store, host, a); err != nil {
		t.Fatal(err)
	}
	return a
}

// boot asks the director what a host's machine shall boot, as netboot does for its boot loader.
func (r *lunRig) boot(t *testing.T, a state.Assignment) netboot.Boot {
	t.Helper()
	v := newView(&schema.Fleet{Hosts: map[string]schema.Host{a.Host: {Name: a.Host, MAC: testMAC, Role: a.Role}}})
	v.assignments, v.luns = map[string]state.Assignment{a.Host: a}, r.views()
	vs := newViews()
	vs.set(v)
	mac, err := net.ParseMAC(testMAC)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := (&director{views: vs, boots: newBoots(r.store, r.log), booting: r.booting}).Boot(t.Context(), netboot.Machine{MAC: mac})
	if err != nil {
		t.Fatal(err)
	}
	return boot
}

// An image that is booted as it is: the script has the secrets of its disk, a new image waits for the next boot, and each of
// a host's images has a disk of its own.
func TestImageThatIsBootedAsItIs(t *testing.T) {
	r := newLUNRig(t)
	one, two := r.put(t, "one"), r.put(t, "two")
	var marks []string
	r.observe = func(ev netboot.Event) { marks = append(marks, string(ev.Stage)) }
	a := r.vm(t, "n1", 1, one)
	if b := r.boot(t, a); b.Disk != nil || b.Kernel != "" || b.Title != "n1: its disk on the server is being opened" {
		t.Errorf("before its disk is open: %+v", b)
	}
	stop := r.start(t)
	defer stop()
	r.await(t, ready("n1", a))
	disk := r.record(t, "n1").Disks[0]
	want := &netboot.Disk{
		Port: 3260, Target: targetName("n1"), Initiator: initiatorName("n1"), User: "n1", Secret: disk.Secret, MutualUser: "troupe", MutualSecret: disk.MutualSecret,
	}
	if d := cmp.Diff(want, r.boot(t, a).Disk); d != "" {
		t.Error(d)
	}
	r.login(t, "n1", 1)
	r.login(t, "n1", 2)
	r.running(t, "n1", 1)

	b := r.vm(t, "n1", 2, two)
	r.await(t, ready("n1", b))
	target, _, err := r.Open(initiatorName("n1"), targetName("n1"))
	if err != nil {
		t.Fatalf("the system that runs cannot log in again: %v", err)
	}
	if r.record(t, "n1").Current != disk.ID || len(r.target.dropped) > 0 {
		t.Error("the disk was changed under a running system")
	}
	var conflict *ConflictError
	if err := r.Reset(t.Context(), "n1", false); !errors.As(err, &conflict) || !strings.Contains(err.Error(), disk.ID) {
		t.Errorf("a reset while the disk before is in use: %v", err)
	}
	told := r.boot(t, b) // by anybody
	r.until(t, func() bool { return r.record(t, "n1").Next != nil })
	if rec := r.record(t, "n1"); rec.Current != disk.ID || rec.Boot.Generation != 1 || len(r.target.dropped) > 0 {
		t.Errorf("who asks for a boot script takes the disk from a running system: %+v", rec)
	}
	r.target.has["n1"] = told.Disk.Secret
	if err := r.target.login(r.luns, "n1", 3); !errors.Is(err, iscsi.ErrNotReady) {
		t.Errorf("the first login to the disk that comes next: %v", err)
	}
	r.until(t, func() bool { return len(target.LUNs()) == 0 }) // of the system before
	r.login(t, "n1", 3)
	r.login(t, "n1", 4)
	r.running(t, "n1", 2)
	if err := r.Reset(t.Context(), "n1", false); !errors.As(err, &conflict) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("a reset under a running system: %v", err)
	}
	if err := r.Reset(t.Context(), "n1", true); err != nil {
		t.Error(err)
	}
	r.until(t, func() bool {
		got := r.Targets()[0]
		return !got.Resetting && len(got.Sessions) == 0 && len(got.LUNs) == 1 && got.LUNs[0].Kind == "cow" && got.LUNs[0].Image == two.Digest
	})
	rec := r.record(t, "n1")
	if n := rec.Node(false, r.now()); n.Running != nil || n.Stage != string(agentapi.StageFailed) {
		t.Errorf("after a reset that was forced it still runs: %+v", n)
	}
	stop()
	if d := cmp.Diff([]string{"disk", "booted", "disk", "booted"}, marks); d != "" {
		t.Errorf("stages:\n%s", d)
	}
}

// login has a machine log in, as often as it takes.
func (r *lunRig) login(t *testing.T, host string, isid uint64) {
	t.Helper()
	r.until(t, func() bool { return r.target.login(r.luns, host, isid) == nil })
}

// running waits until a host's machine is on record to run a generation.
func (r *lunRig) running(t *testing.T, host string, generation uint64) {
	t.Helper()
	r.until(t, func() bool {
		rec := r.record(t, host)
		if rec.Boot == nil {
			return false
		}
		n := rec.Node(true, r.now())
		return n.Running != nil && n.Running.Generation == generation
	})
}

func TestResetEndsTheSession(t *testing.T) {
	r := newLUNRig(t)
	a := r.assign(t, "n1", r.delta)
	stop := r.start(t)
	defer stop()
	r.await(t, ready("n1", a))
	before, _ := r.views().iscsi("n1", a)
	old, _, err := r.Open(initiatorName("n1"), targetName("n1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.target.login(r.luns, "n1", 1); err != nil {
		t.Fatal(err)
	}
	if err := r.Reset(t.Context(), "n1", false); err != nil {
		t.Fatal(err)
	}
	another := func(v lunViews) bool {
		at, _ := v.iscsi("n1", a)
		return at != nil && at.Disk != before.Disk
	}
	r.await(t, another) // its agent hears of that, and reboots
	if len(r.files(t)) != 2 || len(r.target.dropped) != 0 {
		t.Fatalf("the disk that it runs from is taken from it: %q, dropped %q", r.files(t), r.target.dropped)
	}
	r.booting("n1", nil)
	r.poke()
	_ = r.Reset(t.Context(), "nobody", false)
	if len(r.target.dropped) != 0 {
		t.Error("who says that it boots takes the disk from what runs")
	}
	now, _ := r.views().iscsi("n1", a)
	r.target.has["n1"] = now.Secret
	r.login(t, "n1", 2)
	r.until(t, func() bool { return len(r.files(t)) == 1 })
	after, _ := r.views().iscsi("n1", a)
	rec := r.record(t, "n1")
	if len(rec.Disks) != 1 || rec.Current != after.Disk || after.Secret == before.Secret {
		t.Errorf("after its boot: %+v", rec)
	}
	if d := cmp.Diff([]string{initiatorName("n1")}, r.target.dropped); d != "" {
		t.Error(d)
	}
	if luns := old.LUNs(); len(luns) != 0 {
		t.Errorf("a login that began before finds LUNs %v", luns)
	}
}

func TestResetOfAHostThatHasNothingHere(t *testing.T) {
	r := newLUNRig(t)
	if err := state.Assignments.Put(t.Context(), r.store, "n1", state.Assignment{Host: "n1"}); err != nil {
		t.Fatal(err)
	}
	stop := r.start(t)
	defer stop()
	err := r.Reset(t.Context(), "n1", true)
	var conflict *ConflictError
	if !errors.As(err, &conflict) {
		t.Errorf("got %v, want a conflict", err)
	}
}

// A host that left the fleet may go on for a while, then it is cut off; its disk is there when it comes back. What is not
// there is not made anew as if nothing were.
func TestDiskOfAHostThatLeft(t *testing.T) {
	r := newLUNRig(t)
	var now atomic.Int64
	clock := func() time.Time { return testStart.Add(time.Duration(now.Load())) }
	r.now = clock
	a := r.assign(t, "n1", r.delta)
	stop := r.start(t)
	r.await(t, ready("n1", a))
	r.login(t, "n1", 1)
	r.until(t, func() bool { return !r.record(t, "n1").Disks[0].Opened.IsZero() })
	disk := r.record(t, "n1").Current
	if err := state.Assignments.Delete(t.Context(), r.store, "n1"); err != nil {
		t.Fatal(err)
	}
	r.until(t, func() bool { return !r.record(t, "n1").Unused.IsZero() })
	now.Store(int64(leaveGrace - time.Second))
	r.poke()
	_ = r.Reset(t.Context(), "nobody", false)
	if len(r.target.Sessions()) != 1 {
		t.Error("it was cut off at once")
	}
	now.Store(int64(leaveGrace))
	r.until(t, func() bool { return len(r.target.Sessions()) == 0 })
	if err := r.target.login(r.luns, "n1", 2); !errors.Is(err, iscsi.ErrNoTarget) {
		t.Errorf("a login after that: %v", err)
	}
	a = r.assign(t, "n1", r.delta)
	r.await(t, ready("n1", a))
	if got := r.record(t, "n1").Current; got != disk || len(r.files(t)) != 1 {
		t.Errorf("it came back, and has disk %s of %v, not %s", got, r.files(t), disk)
	}
	stop()

	if err := os.RemoveAll(filepath.Join(r.dir, "n1")); err != nil {
		t.Fatal(err)
	}
	r.again(r.store)
	r.now = clock
	stop = r.start(t)
	defer stop()
	r.await(t, func(v lunViews) bool {
		at, why := v.iscsi("n1", a)
		return at == nil && strings.Contains(why, "what the host wrote is not there (troupe reset n1")
	})
	if err := r.Reset(t.Context(), "n1", false); err != nil {
		t.Fatal(err)
	}
	now.Add(int64(resetGrace)) // before that its machine may come back: the server has just begun
	r.await(t, ready("n1", a))
}

// Nobody is cut off from a disk by a reset that comes before its machine has logged in to a server that began anew.
func TestResetBeforeMachinesAreBack(t *testing.T) {
	r := newLUNRig(t)
	vm, node := r.vm(t, "n1", 1, r.put(t, "one")), r.assign(t, "n2", r.delta)
	stop := r.start(t)
	for host, a := range map[string]state.Assignment{"n1": vm, "n2": node} {
		r.await(t, ready(host, a))
		r.login(t, host, 1)
		r.until(t, func() bool { return !r.record(t, host).Login.IsZero() })
	}
	stop()
	r.target.sessions = nil
	r.again(r.store)
	stop = r.start(t)
	defer stop()
	before := map[string]state.LUNs{"n1": r.record(t, "n1"), "n2": r.record(t, "n2")}
	var conflict *ConflictError
	if err := r.Reset(t.Context(), "n1", false); !errors.As(err, &conflict) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("a reset of what may run as it is: %v", err)
	}
	if err := r.Reset(t.Context(), "n2", false); err != nil {
		t.Error(err)
	}
	for host, rec := range before {
		r.target.has[host] = rec.Disks[0].Secret
		r.login(t, host, 2)
		if got := r.record(t, host).Current; got != rec.Current {
			t.Errorf("%s: its disk %s is gone, it has %s", host, rec.Current, got)
		}
	}
}

// An image that the store has lost keeps a host waiting, with the reason, and no other one.
func TestLUNsOfALostImage(t *testing.T) {
	r := newLUNRig(t)
	lost := r.put(t, "lost")
	if err := r.blobs.Delete(t.Context(), lost.Digest); err != nil {
		t.Fatal(err)
	}
	bad, good := r.assign(t, "n1", lost), r.assign(t, "n2", r.delta)
	stop := r.start(t)
	defer stop()
	r.await(t, ready("n2", good))
	r.await(t, func(v lunViews) bool {
		at, why := v.iscsi("n1", bad)
		return at == nil && strings.Contains(why, "no such blob")
	})
}

// What a view tells an agent changes with what is open, and shows no secret in its version.
func TestAssignmentOfADisklessHost(t *testing.T) {
	v := newView(testFleet())
	a := state.Assignment{
		Host: "n1", ISCSI: &state.ISCSI{Size: 1 << 30},
		Spec: agentapi.Assignment{State: agentapi.Assigned, Version: "1-abc", Host: "n1", Release: &agentapi.Release{
			Base: agentapi.Image{Blob: agentapi.Blob{Digest: "sha256:b"}}, Delta: agentapi.Image{Blob: agentapi.Blob{Digest: "sha256:d"}},
		}},
	}
	v.assignments = map[string]state.Assignment{"n1": a}
	v.machines = map[string]state.Machine{testMAC: {Identity: agentapi.Identity{MAC: testMAC}, FirstSeen: time.Unix(1, 0)}}
	id := agentapi.Identity{MAC: testMAC}
	steps := []struct {
		luns lunViews
		want string
	}{
		{lunViews{}, "waiting: its role boots from LUNs of the server, whose iSCSI target is off (serve --iscsi-listen)"},
		{lunViews{port: 3260}, "waiting: its disk on the server is being opened"},
		{lunViews{port: 3260, of: map[string]lunView{"n1": {why: "disk full"}}}, "waiting: disk full"},
		{lunViews{port: 3260, of: map[string]lunView{"n1": {disk: state.LUNDisk{ID: "d1", Secret: "hidden"}}}}, "waiting: its disk on the server is being opened"},
		{lunViews{port: 3260, of: map[string]lunView{"n1": {
			disk: state.LUNDisk{ID: "d1", Secret: "hidden"}, images: map[digest.Digest]uint16{"sha256:b": 1, "sha256:d": 2},
		}}}, "assigned: "},
	}
	versions := map[string]bool{}
	for _, s := range steps {
		v.luns = s.luns
		got := v.assignment(id)
		if text := fmt.Sprintf("%s: %s", got.State, got.Reason); text != s.want {
			t.Errorf("got %q, want %q", text, s.want)
		}
		if strings.Contains(got.Version, "hidden") {
			t.Errorf("version %q shows a secret", got.Version)
		}
		versions[got.Version] = true
	}
	if len(versions) != len(steps)-1 { // two reasons are the same
		t.Errorf("an agent is not told of each change: versions %v", versions)
	}
	if a := v.assignments["n1"]; a.Spec.ISCSI != nil {
		t.Error("the secrets are in the record")
	}
}

// A machine that runs from an image waits for that to be open again where that may be, and for none that it does not need.
func TestLoginWithoutTheImageThatRuns(t *testing.T) {
	r := newLUNRig(t)
	runs := r.put(t, "runs")
	a := r.assign(t, "n1", runs)
	stop := r.start(t)
	r.await(t, ready("n1", a))
	r.login(t, "n1", 1)
	r.until(t, func() bool { return !r.record(t, "n1").Login.IsZero() })
	stop()
	r.target.sessions = nil
	node := state.Node{MAC: testMAC, LastSeen: time.Now().Add(time.Minute), Running: &agentapi.Running{Host: "n1", Base: r.base.Digest, Delta: runs.Digest}}
	if err := state.Nodes.Put(t.Context(), r.store, testMAC, node); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		wanted images.Blob
		gone   images.Blob
		luns   int // that are open: its disk, the base, and what runs
		want   error
	}{
		{"that is wanted only", r.delta, r.delta, 3, nil},
		{"that runs, and that nobody builds any more", r.delta, runs, 2, nil},
		{"that runs, and is wanted: it may be built again", runs, runs, 2, iscsi.ErrNotReady},
	} {
		r.assign(t, "n1", tt.wanted)
		if err := r.blobs.Delete(t.Context(), tt.gone.Digest); err != nil && !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
		r.again(r.store)
		stop := r.start(t)
		r.until(t, func() bool { // the image that is lost was looked for
			all := r.Targets()
			return len(all) == 1 && len(all[0].LUNs) == tt.luns && strings.Count(all[0].Waiting, "no such blob") == 1 &&
				r.warnings(t, tt.gone.Digest.Short()) > 0
		})
		if _, _, err := r.Open(initiatorName("n1"), targetName("n1")); !errors.Is(err, tt.want) {
			t.Errorf("without an image %s: got %v, want %v", tt.name, err, tt.want)
		}
		stop()
	}
}

// A host goes on to what it is to run, whatever became of what it ran before.
func TestLostImageOfTheDiskBefore(t *testing.T) {
	r := newLUNRig(t)
	one, two := r.put(t, "one"), r.put(t, "two")
	a := r.vm(t, "n1", 1, one)
	stop := r.start(t)
	r.await(t, ready("n1", a))
	r.login(t, "n1", 1)
	r.until(t, func() bool { return !r.record(t, "n1").Login.IsZero() })
	b := r.vm(t, "n1", 2, two)
	r.await(t, ready("n1", b))
	stop()
	r.target.sessions = nil
	before := r.record(t, "n1")
	if err := r.blobs.Delete(t.Context(), one.Digest); err != nil {
		t.Fatal(err)
	}
	r.again(r.store)
	stop = r.start(t)
	defer stop()
	r.await(t, ready("n1", b))
	told := r.boot(t, b)
	if told.Disk == nil {
		t.Fatalf("its boot loader is told %q", told.Title)
	}
	if err := r.target.login(r.luns, "n1", 2); !errors.Is(err, iscsi.ErrNotReady) {
		t.Errorf("a login of what runs from the disk before: %v", err)
	}
	r.until(t, func() bool { return r.warnings(t, "no such blob") > 0 }) // people are told of the image
	r.target.has["n1"] = told.Disk.Secret
	r.login(t, "n1", 3)
	if rec := r.record(t, "n1"); rec.Current == before.Current || rec.Before != before.Current || len(rec.Disks) != 2 {
		t.Errorf("after its boot: %+v", rec)
	}
}

// A machine that takes nothing keeps its own disk from being changed, and no other host.
func TestOneStuckMachine(t *testing.T) {
	r := newLUNRig(t)
	r.target.stuck = make(chan struct{})
	a := r.assign(t, "n1", r.delta)
	stop := r.start(t)
	defer stop()
	r.await(t, ready("n1", a))
	r.login(t, "n1", 1)
	before := r.record(t, "n1").Current
	if err := r.Reset(t.Context(), "n1", true); err != nil {
		t.Fatal(err)
	}
	other := r.assign(t, "n2", r.delta)
	r.await(t, ready("n2", other))
	if err := r.target.login(r.luns, "n1", 2); !errors.Is(err, iscsi.ErrNotReady) {
		t.Errorf("a login while its sessions end: %v", err)
	}
	if len(r.files(t)) != 3 {
		t.Errorf("a disk that may be in use is deleted: %q", r.files(t))
	}
	rec := r.record(t, "n1")
	if d, ok := rec.Disk(rec.Current); !ok || d.ID == before || !d.Opened.IsZero() || !rec.Login.IsZero() {
		t.Errorf("a disk that nobody had yet is taken to be used, by sessions of the one before: %+v", rec)
	}
	close(r.target.stuck)
	r.login(t, "n1", 3)
	r.until(t, func() bool { return len(r.files(t)) == 2 })
	if rec := r.record(t, "n1"); rec.Current == before {
		t.Errorf("after a reset: %+v", rec)
	}
}

// People are told once of an image that is lost, however often it is tried again.
func TestTroubleIsToldOnce(t *testing.T) {
	r := newLUNRig(t)
	var now atomic.Int64
	r.now = func() time.Time { return testStart.Add(time.Duration(now.Load())) }
	one, two := r.put(t, "one"), r.put(t, "two")
	a := r.assign(t, "n1", one)
	a.Spec.Release.Base.Blob = agentapi.Blob(two)
	if err := state.Assignments.Put(t.Context(), r.store, "n1", a); err != nil {
		t.Fatal(err)
	}
	for _, b := range []images.Blob{one, two} {
		if err := r.blobs.Delete(t.Context(), b.Digest); err != nil {
			t.Fatal(err)
		}
	}
	stop := r.start(t)
	defer stop()
	both := func() bool {
		all := r.Targets()
		return len(all) == 1 && strings.Count(all[0].Waiting, "no such blob") == 2
	}
	r.until(t, both)
	told := r.told(t)
	for range 5 {
		now.Add(int64(assignAgain))
		r.poke()
		_ = r.Reset(t.Context(), "nobody", false)
		r.until(t, both)
	}
	if got := r.told(t); got != told {
		t.Errorf("told %d times, then %d", told, got)
	}
}

// told is how often people were told of a host's disk.
func (r *lunRig) told(t *testing.T) int {
	t.Helper()
	events, err := state.Events.List(t.Context(), r.store)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range events {
		if e.Kind == "disk" {
			n++
		}
	}
	return n
}

// All that is being opened when the controller ends is waited for, and what waits for that is not begun. Two are at a time.
func TestSettleWaitsForAllOpenings(t *testing.T) {
	r := newLUNRig(t)
	const many = 32
	for i := range many {
		b := r.put(t, fmt.Sprint("image", i))
		if img := r.image(t.Context(), b.Digest); !img.opening {
			t.Errorf("image %d is not being opened", i)
		}
	}
	if r.opening != openings {
		t.Errorf("%d images are being opened, want %d", r.opening, openings)
	}
	r.settle()
	for d, img := range r.images {
		if img.opening || img.medium == nil {
			t.Errorf("image %s: %+v", d, img)
		}
	}
	if len(r.images) != openings {
		t.Errorf("%d images are known, want %d", len(r.images), openings)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// A machine whose host's record cannot be written is told to try again: other initiators take "no such target" for final.
func TestLoginWhileTheRecordCannotBeWritten(t *testing.T) {
	r := newLUNRig(t)
	full := state.LUNs{Host: "n1", Boot: &state.LUNBoot{Role: strings.Repeat("x", 1<<20-300)}} // a disk more, and it is too large
	if err := state.LUNSets.Put(t.Context(), r.store, "n1", full); err != nil {
		t.Fatal(err)
	}
	r.assign(t, "n1", r.delta)
	stop := r.start(t)
	defer stop()
	r.until(t, func() bool {
		_, _, err := r.Open(initiatorName("n9"), targetName("n9"))
		return errors.Is(err, iscsi.ErrNoTarget) // all were looked at
	})
	if _, _, err := r.Open(initiatorName("n1"), targetName("n1")); !errors.Is(err, iscsi.ErrNotReady) {
		t.Errorf("a login gets %v, want %v", err, iscsi.ErrNotReady)
	}
	if chap, names := r.Discover(initiatorName("n1")); chap != nil || names != nil {
		t.Errorf("without secrets there is %+v for whoever discovers %q", chap, names)
	}
	if why := r.Waiting()["n1"]; !strings.Contains(why, "writing record luns/n1") {
		t.Errorf("people are told that it waits for %q", why)
	}
}

// A release that takes the place of another one before the machine booted that comes to the target without trouble.
func TestImageInPlaceOfAnother(t *testing.T) {
	r := newLUNRig(t)
	one, two := r.put(t, "one"), r.put(t, "two")
	node := state.Node{MAC: testMAC, LastSeen: time.Now().Add(time.Minute), Running: &agentapi.Running{Host: "n1", Base: r.base.Digest, Delta: r.delta.Digest}}
	if err := state.Nodes.Put(t.Context(), r.store, testMAC, node); err != nil {
		t.Fatal(err)
	}
	a, other := r.assign(t, "n1", r.delta), r.assign(t, "n2", two)
	stop := r.start(t)
	defer stop()
	r.await(t, ready("n1", a))
	r.await(t, ready("n2", other)) // so that two comes at once
	r.login(t, "n1", 1)
	r.until(t, func() bool { return !r.record(t, "n1").Login.IsZero() })
	for _, delta := range []images.Blob{one, two} {
		a = r.assign(t, "n1", delta)
		r.await(t, ready("n1", a))
	}
	r.until(t, func() bool { return len(r.views().of["n1"].images) == 3 })
	if n := r.warnings(t, ""); n != 0 {
		t.Errorf("people are told of trouble %d times", n)
	}
}

// An image whose number another one has still waits for that to go.
func TestNumberThatIsStillInUse(t *testing.T) {
	r := newLUNRig(t)
	h := &openHost{target: iscsi.NewTarget(targetName("n1")), images: map[digest.Digest]uint16{}}
	for _, b := range []images.Blob{r.base, r.delta} {
		m, err := r.media.image(t.Context(), b.Digest)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
		if err := h.addImage(&openImage{digest: b.Digest, medium: m}, 1); err != nil {
			t.Error(err)
		}
	}
	if d := cmp.Diff(map[digest.Digest]uint16{r.base.Digest: 1}, h.images); d != "" {
		t.Error(d)
	}
}

// A disk that was reset goes also where its host leaves before it is closed, and nobody is told of a disk that no record knows.
func TestResetDiskOfAHostThatLeaves(t *testing.T) {
	r := newLUNRig(t)
	var now atomic.Int64
	r.now = func() time.Time { return testStart.Add(time.Duration(now.Load())) }
	r.target.stuck = make(chan struct{})
	a := r.assign(t, "n1", r.delta)
	stop := r.start(t)
	defer stop()
	r.await(t, ready("n1", a))
	r.login(t, "n1", 1)
	if err := r.Reset(t.Context(), "n1", true); err != nil {
		t.Fatal(err)
	}
	if err := state.Assignments.Delete(t.Context(), r.store, "n1"); err != nil {
		t.Fatal(err)
	}
	r.until(t, func() bool { return !r.record(t, "n1").Unused.IsZero() })
	now.Store(int64(leaveGrace + sweepEvery))
	for range 2 { // looks, in which it is cut off, and files are looked for that no record knows
		r.poke()
		_ = r.Reset(t.Context(), "nobody", false)
	}
	close(r.target.stuck)
	r.until(t, func() bool { return len(r.files(t)) < 2 })
	if d := cmp.Diff([]string{"n1/" + r.record(t, "n1").Current + ".disk"}, r.files(t)); d != "" {
		t.Error(d)
	}
	if n := r.warnings(t, "no record knows"); n != 0 {
		t.Errorf("people are told of a disk that no record knows %d times", n)
	}
}

// A slowMedium is a disk whose end takes until it is let go.
type slowMedium struct {
	medium
	ends chan struct{}
}

func (m slowMedium) Close() error   { <-m.ends; return m.medium.Close() }
func (m slowMedium) Discard() error { <-m.ends; return m.medium.Discard() }

// look has the controller, which does not run, look until cond holds. What goes wrong in it people are told.
func (r *lunRig) look(t testing.TB, cond func() bool) {
	t.Helper()
	for !cond() {
		r.assigned, r.nodes = nil, nil
		_, _ = r.step(t.Context())
		if t.Context().Err() != nil {
			t.Fatalf("the LUNs never came to be as wanted: %+v", r.Targets())
		}
		select {
		case img := <-r.opened:
			r.took(img)
		default:
		}
	}
}

// A disk that takes long to close or to delete keeps no other host waiting, and its own only where it is to have that again.
func TestDiskThatTakesLongToClose(t *testing.T) {
	r := newLUNRig(t)
	now := testStart
	r.now = func() time.Time { return now }
	ends := make(chan struct{})
	a, gone := r.assign(t, "n1", r.delta), r.assign(t, "n2", r.delta)
	r.look(t, func() bool { return ready("n1", a)(r.views()) && ready("n2", gone)(r.views()) })
	first := r.record(t, "n1").Current
	for host, h := range r.hosts {
		id := r.record(t, host).Current
		h.disks[id] = slowMedium{medium: h.disks[id], ends: ends}
	}
	if err := r.reset(t.Context(), "n1", true); err != nil {
		t.Fatal(err)
	}
	r.look(t, func() bool {
		at, _ := r.views().iscsi("n1", a)
		_, _, err := r.Open(initiatorName("n1"), targetName("n1"))
		return at != nil && at.Disk != first && err == nil
	})

	if err := state.Assignments.Delete(t.Context(), r.store, "n2"); err != nil {
		t.Fatal(err)
	}
	r.look(t, func() bool { return !r.record(t, "n2").Unused.IsZero() })
	now = now.Add(leaveGrace)
	r.look(t, func() bool { return r.hosts["n2"].closing() })
	gone = r.assign(t, "n2", r.delta) // it comes back while its disk is being written
	other := r.assign(t, "n3", r.delta)
	r.look(t, func() bool { return ready("n3", other)(r.views()) })
	if ready("n2", gone)(r.views()) || len(r.files(t)) != 4 {
		t.Errorf("while disks are being closed: files %q, targets %+v", r.files(t), r.Targets())
	}
	close(ends)
	r.look(t, func() bool { return ready("n2", gone)(r.views()) && len(r.files(t)) == 3 })
	if n := r.warnings(t, ""); n != 0 {
		t.Errorf("people are told of trouble %d times", n)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// heldBlobs has one image be opened only when it is let go.
type heldBlobs struct {
	*store.Store
	held digest.Digest
	let  chan struct{}
}

func (b *heldBlobs) Stat(ctx context.Context, d digest.Digest) (images.Blob, error) {
	if d == b.held {
		<-b.let
	}
	return b.Store.Stat(ctx, d)
}

// A server that starts opens the images first that machines run from, and lets those machines in before it has the others.
func TestImagesThatRunComeFirst(t *testing.T) {
	r := newLUNRig(t)
	next := r.put(t, "next")
	blobs := &heldBlobs{Store: r.blobs, held: next.Digest, let: make(chan struct{})}
	r.media.blobs = blobs
	const hosts = 8
	for i := range hosts {
		host, mac, disk := fmt.Sprint("n", i), fmt.Sprintf("52:54:00:00:00:%02x", i), fmt.Sprintf("%016x", i)
		runs := r.put(t, "runs "+host)
		rec := state.LUNs{
			Host: host, Images: map[digest.Digest]uint16{r.base.Digest: 1, runs.Digest: 2, next.Digest: 3}, Login: testStart,
			Disks: []state.LUNDisk{{ID: disk, Size: 1 << 20}}, Current: disk,
		}
		node := state.Node{MAC: mac, LastSeen: testStart.Add(time.Hour), Running: &agentapi.Running{Host: host, Base: r.base.Digest, Delta: runs.Digest}}
		if err := errors.Join(state.LUNSets.Put(t.Context(), r.store, host, rec), state.Nodes.Put(t.Context(), r.store, mac, node)); err != nil {
			t.Fatal(err)
		}
		r.assign(t, host, next)
	}
	r.opening = openings                               // so that all wait
	if err := r.readRecords(t.Context()); err != nil { // in a look that then failed
		t.Fatal(err)
	}
	if _, err := r.step(t.Context()); err != nil {
		t.Fatal(err)
	}
	if i := slices.Index(r.queue, next.Digest); i != hosts+1 || len(r.queue) != hosts+2 {
		t.Errorf("the image that no machine runs from comes at place %d of %d, want the last, %d", i, len(r.queue), hosts+1)
	}
	r.opening = 0
	r.look(t, func() bool {
		for i := range hosts {
			host := fmt.Sprint("n", i)
			if _, _, err := r.Open(initiatorName(host), targetName(host)); err != nil {
				return false
			}
		}
		return true
	})
	close(blobs.let)
	r.settle()
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// A look reads no record again that did not change, and tells those who answer machines of what it opened no oftener than
// every moment.
func TestLookReadsNoRecordTwice(t *testing.T) {
	r := newLUNRig(t)
	now, shown := testStart, 0
	r.now, r.refresh = func() time.Time { return now }, func() { shown++ }
	for i := range 8 {
		r.assign(t, fmt.Sprint("n", i), r.delta)
	}
	r.look(t, func() bool { return len(r.views().of) == 8 && r.opening == 0 && len(r.views().of["n7"].images) == 2 })
	r.assign(t, "n8", r.delta)
	for range 2 {
		if _, err := r.step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(r.views().of) != 8 {
		t.Error("a look read all assignments, which nobody told it to")
	}
	if err := r.reset(t.Context(), "n8", false); err != nil {
		t.Errorf("a reset of a host that was assigned a moment ago: %v", err)
	}
	before := shown
	for range 3 {
		r.publish("n9", portal{lunView: lunView{why: "news"}}, nil)
		r.meanwhile(t.Context())
	}
	now = now.Add(showEvery)
	r.meanwhile(t.Context())
	if shown != before+1 {
		t.Errorf("told %d times amid a look, want once", shown-before)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// A lostMedium is a disk that has lost something.
type lostMedium struct{ medium }

func (lostMedium) Lost() error { return errors.New("an earlier sync failed") }

// A disk whose storage failed is opened anew when its machine is gone that has heard of it; people hear of it at once.
func TestDiskWhoseStorageFailed(t *testing.T) {
	for _, tt := range []struct {
		name  string
		heard bool          // a session is open a minute later
		after time.Duration // that is gone, until the disk is opened anew
	}{{"its machine heard of it", true, 0}, {"its machine is gone at once", false, leaveGrace}} {
		t.Run(tt.name, func(t *testing.T) {
			r := newLUNRig(t)
			now := testStart
			r.now = func() time.Time { return now }
			a := r.loggedIn(t, "n1")
			h, id := r.hosts["n1"], r.record(t, "n1").Current
			target := h.target
			h.disks[id] = lostMedium{h.disks[id]}
			r.look(t, func() bool { return r.warnings(t, "an earlier sync failed") == 1 })
			if _, why := r.views().iscsi("n1", a); !strings.Contains(why, "an earlier sync failed") {
				t.Errorf("its next boot is told %q", why)
			}
			if tt.heard {
				now = now.Add(resetGrace)
				r.look(t, func() bool { return h.heard })
			}
			r.target.sessions = nil
			if now = now.Add(tt.after); tt.after > 0 {
				now = now.Add(-1)
				r.look(t, func() bool { return !h.failed.IsZero() })
				if h.target != target {
					t.Error("the disk is opened anew before its machine may be taken to be gone")
				}
				now = now.Add(1)
			}
			r.look(t, func() bool { return h.target != nil && h.target != target && ready("n1", a)(r.views()) })
			if got := r.record(t, "n1").Current; got != id || len(r.files(t)) != 1 || h.disks[id].Lost() != nil {
				t.Errorf("it has disk %s of %q, before %s", got, r.files(t), id)
			}
			if len(r.target.dropped) > 0 {
				t.Errorf("sessions were ended: %q", r.target.dropped)
			}
			if err := r.close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A first disk that cannot be made keeps no other host from its own, and is the same when it can.
func TestDiskThatCannotBeMade(t *testing.T) {
	r := newLUNRig(t)
	var assigned []state.Assignment
	for i := range 3 {
		assigned = append(assigned, r.assign(t, fmt.Sprint("n", i), r.delta))
	}
	if err := errors.Join(os.MkdirAll(r.dir, 0o700), os.WriteFile(filepath.Join(r.dir, "n1"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	r.look(t, func() bool { return ready("n0", assigned[0])(r.views()) && ready("n2", assigned[2])(r.views()) })
	if why := r.Waiting()["n1"]; !strings.Contains(why, "making the directory of a host's disks") {
		t.Errorf("n1 waits for %q", why)
	}
	disk := r.record(t, "n1").Current
	if err := os.Remove(filepath.Join(r.dir, "n1")); err != nil {
		t.Fatal(err)
	}
	r.look(t, func() bool { return ready("n1", assigned[1])(r.views()) })
	if got := r.record(t, "n1").Current; got != disk || len(r.files(t)) != 3 {
		t.Errorf("its disk is %s, was %s; files %q", got, disk, r.files(t))
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// A write that failed may have been made all the same, or be made yet: the record is then written as it is believed to be.
func TestWriteWhoseOutcomeIsNotKnown(t *testing.T) {
	r := newLUNRig(t)
	now := testStart
	r.now = func() time.Time { return now }
	r.loggedIn(t, "n1")
	want := r.record(t, "n1")
	failing, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name        string
		fails, made func() error
	}{{
		"a reset",
		func() error { return r.write(failing, r.recs["n1"], resetAt(r.recs["n1"], now)) },
		func() error { return state.LUNSets.Put(t.Context(), r.store, "n1", resetAt(want, now)) },
	}, {
		"an end",
		func() error { return r.remove(failing, "n1") },
		func() error { return state.LUNSets.Delete(t.Context(), r.store, "n1") },
	}} {
		if err := tt.fails(); err == nil {
			t.Errorf("%s: no error", tt.name)
		}
		if err := tt.made(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.step(t.Context()); err != nil {
			t.Error(err)
		}
		recs, err := state.LUNSets.List(t.Context(), r.store)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(map[string]state.LUNs{"n1": want}, recs); d != "" {
			t.Errorf("%s that failed, and was made: on record is\n%s", tt.name, d)
		}
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// resetAt is a record whose disks a reset takes.
func resetAt(rec state.LUNs, at time.Time) state.LUNs {
	rec.Disks = slices.Clone(rec.Disks)
	for i := range rec.Disks {
		rec.Disks[i].Ends = at
	}
	return rec
}
