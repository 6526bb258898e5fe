package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/signing"
)

var nothing = slog.New(slog.DiscardHandler)

func TestParseCmdline(t *testing.T) {
	kernel := digest.Of([]byte("k"))
	c, err := ParseCmdline("BOOT_IMAGE=x quiet troupe.server=http://10.77.0.1:8080/ troupe.mac=52:54:00:77:00:0A troupe.boot=b7 troupe.kernel=" +
		string(kernel) + " foo=\"a b\" console=ttyS0\n")
	if err != nil {
		t.Fatal(err)
	}
	want := Cmdline{
		Server: "http://10.77.0.1:8080", MAC: "52:54:00:77:00:0a", Boot: "b7", Kernel: kernel,
		Args: []string{
			"BOOT_IMAGE=x", "quiet", "troupe.server=http://10.77.0.1:8080/", "troupe.mac=52:54:00:77:00:0A", "troupe.boot=b7",
			"troupe.kernel=" + string(kernel), "foo=a b", "console=ttyS0",
		},
	}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("command line (-want +got):\n%s", diff)
	}
	dead := digest.Of([]byte("r"))
	c, err = ParseCmdline("troupe.watchdog=15 troupe.alone=5 troupe.dead=" + dead.String())
	if err != nil || c.Watchdog != 15*time.Second || c.Alone != 5*time.Second || c.Dead != dead {
		t.Errorf("watchdog and dead: %+v, %v", c, err)
	}
	if c, err := ParseCmdline("troupe.watchdog=off"); err != nil || c.Watchdog >= 0 {
		t.Errorf("no watchdog: %+v, %v", c, err)
	}
	if c, err := ParseCmdline("troupe.watchdog=0"); err == nil || c.Watchdog != 0 {
		t.Errorf("a watchdog of no time: %+v, %v", c, err)
	}
	c, err = ParseCmdline("troupe.server=http://s troupe.mac=52:54 troupe.kernel=md5:1")
	if err == nil || !strings.Contains(err.Error(), "troupe.mac=52:54, troupe.kernel=md5:1") || c.Server != "http://s" || c.MAC != "" {
		t.Errorf("malformed: %+v, %v", c, err)
	}
	if c, err := ParseCmdline(""); err != nil || c.Server != "" {
		t.Errorf("empty: %+v, %v", c, err)
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add(`troupe.server=http://s troupe.mac=52:54:00:77:00:01 a="b c`)
	f.Add(`"" " " troupe.kernel=`)
	f.Fuzz(func(t *testing.T, s string) {
		c, _ := ParseCmdline(s)
		if missing := c.lacks(c.Args); len(missing) > 0 && !strings.ContainsAny(s, "\" \t\n") {
			t.Errorf("lacks what it has: %q", missing)
		}
	})
}

func TestLacksCountsRepeats(t *testing.T) {
	c := Cmdline{Args: []string{"a=1", "console=tty0", "console=ttyS0", "quiet"}}
	for _, tt := range []struct{ want, missing []string }{
		{nil, nil},
		{[]string{"quiet", "console=ttyS0"}, nil},
		{[]string{"quiet", "quiet"}, []string{"quiet"}},
		{[]string{"a=2", "a=1 quiet"}, []string{"a=2"}},
	} {
		if diff := cmp.Diff(tt.missing, c.lacks(tt.want)); diff != "" {
			t.Errorf("lacks(%q) (-want +got):\n%s", tt.want, diff)
		}
	}
}

func TestMachineIDIsStableAndUnique(t *testing.T) {
	id := agentapi.Identity{MAC: "52:54:00:77:00:01", UUID: "u"}
	a := machineID(id, "n1")
	if len(a) != 32 || a[12] != '4' || strings.Trim(a, "0123456789abcdef") != "" {
		t.Errorf("machine-id %q", a)
	}
	if machineID(id, "n1") != a {
		t.Error("it changes")
	}
	id2 := id
	id2.MAC = "52:54:00:77:00:02"
	if machineID(id2, "n1") == a || machineID(id, "n2") == a {
		t.Error("two machines, or two hosts, have one id")
	}
}

func assigned(s *agentapitest.Server, role string, gen uint64) agentapi.Assignment {
	return agentapi.Assignment{
		State: agentapi.Assigned, Host: "n1", Generation: gen, Role: role,
		Release: &agentapi.Release{ID: digest.Of([]byte(role)), Base: s.AddImage([]byte("base")), Delta: s.AddImage([]byte("delta of " + role))},
		Node:    agentapi.Node{Hostname: "n1", Digest: digest.Of([]byte("node"))},
	}
}

func TestSeedFiles(t *testing.T) {
	a := assigned(&agentapitest.Server{}, "web", 1)
	a.Node.Domain = "lab.test"
	a.Node.Files = map[string]agentapi.File{"/etc/hosts": {Content: "mine\n", Mode: 0o600, UID: 1, GID: 2}, "/a": {Content: "a", Mode: 0o644}}
	id := agentapi.Identity{MAC: "52:54:00:77:00:01"}
	lease := &netup.Lease{DNS: []netip.Addr{netip.MustParseAddr("10.77.0.1")}, Domain: "lab.test"}
	want := []rootfs.File{
		{Path: "/etc/hostname", Content: "n1\n", Mode: 0o644},
		{Path: "/etc/hosts", Content: "127.0.0.1\tlocalhost\n127.0.1.1\tn1.lab.test n1\n::1\tlocalhost ip6-localhost ip6-loopback\n", Mode: 0o644},
		{Path: "/etc/machine-id", Content: machineID(id, "n1") + "\n", Mode: 0o444},
		{Path: "/etc/resolv.conf", Content: netup.ResolvConfMark + "search lab.test\nnameserver 10.77.0.1\n", Mode: 0o644, KeepLink: true},
		{Path: "/a", Content: "a", Mode: 0o644},
		{Path: "/etc/hosts", Content: "mine\n", Mode: 0o600, UID: 1, GID: 2},
	}
	if diff := cmp.Diff(want, seedFiles(a, id, lease)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// A change makes an assignment that comes after another out of one like that.
type change struct {
	name string
	to   func(*agentapi.Assignment)
	want decision
}

func testDecide(t *testing.T, like func(*agentapitest.Server, string, uint64) agentapi.Assignment, changes []change) {
	t.Helper()
	var s agentapitest.Server
	now := like(&s, "web", 3)
	now.Version = "3"
	for _, tt := range changes {
		a := like(&s, "web", 4)
		a.Version = "4"
		tt.to(&a)
		if got := decide(now, a); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestDecide(t *testing.T) {
	testDecide(t, assigned, []change{
		{"the same", func(a *agentapi.Assignment) { a.Version = "3" }, goOn},
		{"waiting", func(a *agentapi.Assignment) { *a = agentapi.Assignment{Version: "4", State: agentapi.Waiting} }, goOn},
		{"unclaimed", func(a *agentapi.Assignment) { *a = agentapi.Assignment{Version: "4", State: agentapi.Unclaimed} }, discover},
		{"only the generation", func(*agentapi.Assignment) {}, adopt},
		{"other checks", func(a *agentapi.Assignment) { a.Checks = []agentapi.Check{{Unit: "x"}} }, adopt},
		{"another name for the role", func(a *agentapi.Assignment) { a.Role = "www" }, adopt},
		{"another release", func(a *agentapi.Assignment) { a.Release.ID = digest.Of(nil) }, moveOn},
		{"other apps", func(a *agentapi.Assignment) { onlyOtherApps(a, "") }, moveOn},
		{"other apps, without a reboot", func(a *agentapi.Assignment) { onlyOtherApps(a, agentapi.Restart) }, restart},
		{"other apps and files", func(a *agentapi.Assignment) {
			onlyOtherApps(a, agentapi.Restart)
			a.Node.Digest = digest.Of(nil)
		}, moveOn},
		{"other files, apps without a reboot", func(a *agentapi.Assignment) { a.Activate, a.Node.Digest = agentapi.Restart, digest.Of(nil) }, moveOn},
		{"an app that cannot be", func(a *agentapi.Assignment) {
			onlyOtherApps(a, agentapi.Restart)
			a.Release.Apps[0].Name = "../x"
		}, moveOn},
		{"other files", func(a *agentapi.Assignment) { a.Node.Digest = digest.Of(nil) }, moveOn},
		{"another host", func(a *agentapi.Assignment) { a.Host = "n2" }, moveOn},
		{"from LUNs", func(a *agentapi.Assignment) { a.ISCSI = &agentapi.ISCSI{} }, moveOn},
		{"a disk image", func(a *agentapi.Assignment) {
			a.ISCSI, a.Release = &agentapi.ISCSI{}, &agentapi.Release{ID: digest.Of(nil)}
		}, moveOn},
		{"malformed", func(a *agentapi.Assignment) { a.Release = nil }, moveOn},
	})
}

// node is a service as a boot would have left it, with everything in temporary directories.
type node struct {
	t      *testing.T
	server *agentapitest.Server
	http   *httptest.Server
	dir    string
	apps   appPlace // nil: as in a node
}

func newNode(t *testing.T, a agentapi.Assignment, s *agentapitest.Server) *node {
	t.Helper()
	n := &node{t: t, server: s, dir: t.TempDir()}
	n.http = httptest.NewServer(s)
	t.Cleanup(n.http.Close)
	s.Assign(a)
	a.Version = "1"
	k := stateKeeper{path: filepath.Join(n.dir, "run", stateFile)}
	err := k.change(func(st *RunState) {
		*st = RunState{
			Server: n.http.URL, Identity: agentapi.Identity{MAC: "52:54:00:77:00:01"}, BootID: "b1", Assignment: a, Keys: s.Keys().String(), CacheDir: filepath.Join(n.dir, "cache"),
			Marks: []agentapi.Mark{{Stage: agentapi.StageSwitch, At: 5, Detail: "/sbin/init"}}, Marked: []agentapi.Stage{agentapi.StageAgent, agentapi.StageSwitch},
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// start runs the service until stop is called, which returns its error. Reboots are sent to the channel.
func (n *node) start() (reboots <-chan string, stop func() error) {
	n.t.Helper()
	s, err := newService(filepath.Join(n.dir, "run", stateFile), nothing)
	if err != nil {
		n.t.Fatal(err)
	}
	ch := make(chan string, 10)
	s.trim = func(string) error { return nil }
	if n.apps != nil {
		s.apps = func(string) appPlace { return n.apps }
	}
	s.reboot = func(ctx context.Context, _ *slog.Logger) error {
		ch <- "reboot"
		<-ctx.Done() // as a machine does that goes down
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	stopped := false
	stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}
	n.t.Cleanup(func() { _ = stop() })
	return ch, stop
}

func (n *node) wait(what string, cond func(agentapi.Report) bool) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	err := n.server.Wait(ctx, func() bool {
		r := n.server.Reports()
		return len(r) > 0 && cond(r[len(r)-1])
	})
	if err != nil {
		n.t.Fatalf("waiting for %s: %v", what, err)
	}
}

func (n *node) stages() string {
	var out []string
	for _, m := range n.server.Marks() {
		out = append(out, string(m.Stage))
	}
	return strings.Join(out, " ")
}

func healthy(r agentapi.Report) bool { return r.Running != nil && r.Running.Health.Healthy }

var passing = []agentapi.Check{{Exec: []string{"true"}}}

func TestServiceBecomesHealthyAndStagesTheNextRelease(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	reboots, stop := n.start()
	n.wait("health", healthy)

	next := assigned(&s, "idle", 2)
	s.Assign(next)
	n.wait("staging", func(r agentapi.Report) bool { return r.Staged == next.Release.ID })
	<-reboots
	n.wait("the last mark", func(agentapi.Report) bool { return strings.HasSuffix(n.stages(), "reboot") })
	if got, want := n.stages(), "switch-root service healthy stage reboot"; got != want {
		t.Errorf("stages %q, want %q", got, want)
	}
	for _, m := range s.Marks() {
		want := int64(0)
		if m.Stage == agentapi.StageStage {
			want = next.Release.Base.Size + next.Release.Delta.Size // the cache was empty
		}
		if m.Bytes != want {
			t.Errorf("stage %s: %d bytes, want %d", m.Stage, m.Bytes, want)
		}
	}
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Errorf("run: %v", err)
	}
	for _, b := range []agentapi.Blob{next.Release.Base.Blob, next.Release.Delta.Blob} {
		if _, err := os.Stat(filepath.Join(n.dir, "cache/images/sha256", b.Digest.Hex())); err != nil {
			t.Error(err)
		}
	}
}

func TestServiceAdoptsNewChecksWithoutAReboot(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	reboots, stop := n.start()
	n.wait("health", healthy)
	b := assigned(&s, "web", 2)
	b.Checks = []agentapi.Check{{Exec: []string{"false"}}}
	s.Assign(b)
	n.wait("the new check", func(r agentapi.Report) bool {
		return r.Running.Generation == 2 && !r.Running.Health.Healthy && len(r.Running.Health.Failing) == 1
	})
	_ = stop()
	if len(reboots) > 0 {
		t.Error("it rebooted")
	}
	// What was adopted is what a restarted service goes on with.
	n.server.Assign(b)
	if _, err := newService(filepath.Join(n.dir, "run", stateFile), nothing); err != nil {
		t.Fatal(err)
	}
	k, err := loadState(filepath.Join(n.dir, "run", stateFile))
	if err != nil || k.get().Assignment.Generation != 2 {
		t.Errorf("kept assignment: %+v, %v", k.get().Assignment, err)
	}
}

func TestServiceGoesOnWhileItsHostWaits(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	reboots, _ := n.start()
	n.wait("health", healthy)
	s.Assign(agentapi.Assignment{State: agentapi.Waiting, Host: "n1", Reason: "being built"})
	before := len(s.Reports())
	s.Forget()
	n.wait("a hello and more reports", func(r agentapi.Report) bool { return len(s.Hellos()) == 1 && len(s.Reports()) > before+1 && healthy(r) })
	if len(reboots) > 0 {
		t.Error("it rebooted")
	}
}

func TestServiceLosesNoMarkWhileTheServerIsAway(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	n.http.Close() // away: every report fails
	_, stop := n.start()
	// The mark "healthy" is on the disk of the run directory once it was made.
	deadline := time.After(time.Minute)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		b, err := os.ReadFile(filepath.Join(n.dir, "run", stateFile))
		if err == nil && bytes.Contains(b, []byte(`"stage":"healthy"`)) {
			break
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("not healthy")
		}
	}
	_ = stop() // killed, and started again
	back := httptest.NewServer(&s)
	t.Cleanup(back.Close)
	k, err := loadState(filepath.Join(n.dir, "run", stateFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.change(func(st *RunState) { st.Server = back.URL }); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.wait("the marks", func(agentapi.Report) bool { return n.stages() == "switch-root service healthy" })
}

func TestServiceRebootsWhenItsHostIsGoneForSure(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	reboots, _ := n.start()
	n.wait("health", healthy)
	s.Assign(agentapi.Assignment{State: agentapi.Unclaimed})
	<-reboots
	n.wait("the reason", func(agentapi.Report) bool {
		m := s.Marks()
		return m[len(m)-1].Stage == agentapi.StageReboot && strings.Contains(m[len(m)-1].Detail, "no host of the fleet")
	})
}

func TestServiceReportsWhyItCannotMoveOn(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	reboots, _ := n.start()
	n.wait("health", healthy)
	b := assigned(&s, "idle", 2)
	b.Release.Delta.Blob = agentapi.Blob{Digest: digest.Of([]byte("nobody has it")), Size: 3}
	s.Assign(b)
	n.wait("the error", func(r agentapi.Report) bool { return strings.Contains(r.Error, "no such blob") && healthy(r) })
	c := assigned(&s, "web", 3) // back to what runs: by another generation
	c.Checks = passing
	s.Assign(c)
	n.wait("recovery", func(r agentapi.Report) bool { return r.Error == "" && r.Running.Generation == 3 && r.Staged == "" })
	if len(reboots) > 0 {
		t.Error("it rebooted")
	}
	if strings.Contains(n.stages(), "failed") {
		t.Errorf("stages %q: an image that is not there yet is no failure", n.stages())
	}
}

// TestServiceDoesNotRebootForEver has a server that tells a boot another assignment than the system that it boots.
func TestServiceDoesNotRebootForEver(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	reboots, stop := n.start()
	n.wait("health", healthy)
	b := assigned(&s, "web", 2)
	b.Node.Digest = digest.Of([]byte("other files"))
	b.Checks = passing
	s.Assign(b)
	<-reboots
	_ = stop()

	reboots, stop = n.start() // still with a: that is what the boot was told
	n.wait("word of it", func(r agentapi.Report) bool {
		return strings.Contains(r.Error, "generation 2, role web: not reached, reboots in a row: 1; rebooting again in 1m0s")
	})
	n.wait("the stage", func(agentapi.Report) bool { return strings.HasSuffix(n.stages(), "stage failed") })
	if len(reboots) > 0 {
		t.Error("it rebooted at once")
	}
	c := assigned(&s, "web", 3)
	c.Checks = passing
	s.Assign(c) // back to what runs
	n.wait("recovery", func(r agentapi.Report) bool { return r.Error == "" && r.Running.Generation == 3 })
	_ = stop()
	if got := n.goal(); got != 1 {
		t.Errorf("%d reboots are in a row, want 1: it did not run for long", got)
	}

	s.Assign(b)
	k, err := loadState(filepath.Join(n.dir, "run", stateFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.change(func(st *RunState) { st.Assignment = b }); err != nil { // the boot was told b at last
		t.Fatal(err)
	}
	_, stop = n.start()
	n.wait("the goal", func(r agentapi.Report) bool { return healthy(r) && r.Running.Generation == 2 })
	_ = stop()
	if got := n.goal(); got != 0 {
		t.Errorf("%d reboots are in a row after they led to the goal", got)
	}
}

// goal is how many reboots in a row the node remembers.
func (n *node) goal() int {
	n.t.Helper()
	c, err := cache.Open(filepath.Join(n.dir, "cache"), nothing)
	if err != nil {
		n.t.Fatal(err)
	}
	return c.State().GoalTries
}

func TestServiceForgetsRebootsOnceItSettled(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	n := newNode(t, a, &s)
	svc, err := newService(filepath.Join(n.dir, "run", stateFile), nothing)
	if err != nil {
		t.Fatal(err)
	}
	if err := svc.cache.SetState(func(st *cache.State) { st.Goal, st.GoalTries = "elsewhere", 3 }); err != nil {
		t.Fatal(err)
	}
	svc.settle = time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- svc.run(ctx) }()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for svc.cache.State().GoalTries != 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("it never forgets them")
		}
	}
	cancel()
	<-done
}

func TestServiceTellsARetryAndNoFailure(t *testing.T) {
	var s agentapitest.Server
	var healed atomic.Bool
	s.Blob = func(w http.ResponseWriter, _ *http.Request, _ digest.Digest, content []byte) bool {
		if healed.Load() {
			return false
		}
		_, _ = w.Write(content[:2])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler) // as a server that is killed
	}
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	reboots, _ := n.start()
	n.wait("health", healthy)
	next := assigned(&s, "idle", 2)
	s.Assign(next)
	n.wait("word of the retry", func(r agentapi.Report) bool {
		return strings.Contains(r.Error, "fetching image "+next.Release.Base.Digest.Short()) && strings.HasSuffix(r.Error, "; trying again") &&
			r.Fetch != nil && r.Fetch.Done > 0
	})
	healed.Store(true)
	n.wait("staging", func(r agentapi.Report) bool { return r.Staged == next.Release.ID && r.Error == "" && r.Fetch == nil })
	<-reboots
	n.wait("the last mark", func(agentapi.Report) bool { return strings.HasSuffix(n.stages(), "reboot") })
	if got, want := n.stages(), "switch-root service healthy stage reboot"; got != want {
		t.Errorf("stages %q, want %q", got, want)
	}
}

func TestServiceStopsMovingWhenARevertComes(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	reboots, _ := n.start()
	n.wait("health", healthy)
	s.Assign(agentapi.Assignment{State: agentapi.Unclaimed})
	back := assigned(&s, "web", 2)
	back.Checks = passing
	s.Assign(back) // before the second question
	n.wait("the revert", func(r agentapi.Report) bool { return r.Running.Generation == 2 })
	if len(reboots) > 0 {
		t.Error("it rebooted")
	}
}

func TestReporterSendsAMarkOnce(t *testing.T) {
	var s agentapitest.Server
	h := httptest.NewServer(&s)
	defer h.Close()
	c, err := agentapi.NewClient(h.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := newReporter(c, nothing, agentapi.Report{BootID: "b"})
	r.mark(agentapi.Mark{Stage: agentapi.StageAgent})
	r.mark(agentapi.Mark{Stage: agentapi.StageAgent})
	r.fail(errors.New("no disk"))
	r.fail(errors.New("no disk"))
	done := make(chan error, 4)
	for range 4 { // several at a time, as the heartbeat and the last report before a reboot
		go func() { done <- r.send(t.Context()) }()
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if len(r.pending()) != 0 {
		t.Errorf("still pending: %+v", r.pending())
	}
	var got []string
	for _, rep := range s.Reports() {
		for _, m := range rep.Marks {
			got = append(got, string(m.Stage)+m.Detail)
		}
		if rep.Uptime <= 0 || rep.Error != "no disk" {
			t.Errorf("report %+v", rep)
		}
	}
	if strings.Join(got, " ") != "agent-up failedno disk" {
		t.Errorf("marks %q", got)
	}
}

// replies is a server of which each answer to a report is the next of these, and a record of the marks that came.
type replies struct {
	next []agentapi.ReportReply
	got  [][]agentapi.Stage
}

func (s *replies) RoundTrip(r *http.Request) (*http.Response, error) {
	var rep agentapi.Report
	if err := json.NewDecoder(r.Body).Decode(&rep); err != nil {
		return nil, err
	}
	var stages []agentapi.Stage
	for _, m := range rep.Marks {
		stages = append(stages, m.Stage)
	}
	s.got = append(s.got, stages)
	reply := s.next[0]
	s.next = s.next[1:]
	return answer(r, http.StatusOK, reply)
}

// TestReporterKeepsMarksThatNobodyWroteDown has a server that lost its record of the machine.
func TestReporterKeepsMarksThatNobodyWroteDown(t *testing.T) {
	s := replies{next: []agentapi.ReportReply{{Hello: true}, {Hello: true}, {}, {}}}
	c, err := agentapi.NewClient("http://10.77.0.1", &s)
	if err != nil {
		t.Fatal(err)
	}
	var saved []agentapi.Mark
	r := newReporter(c, nothing, agentapi.Report{})
	r.save = func(m []agentapi.Mark) { saved = m }
	hellos := 0
	r.onReply = func(reply agentapi.ReportReply) {
		if reply.Hello {
			hellos++
		}
	}
	send := func(pending int) {
		t.Helper()
		if err := r.send(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(r.pending()) != pending || len(saved) != pending {
			t.Errorf("pending %+v, saved %+v, want %d", r.pending(), saved, pending)
		}
	}
	r.mark(agentapi.Mark{Stage: agentapi.StageService})
	send(1)
	r.mark(agentapi.Mark{Stage: agentapi.StageHealthy})
	send(2)
	send(0)
	send(0)
	both := []agentapi.Stage{agentapi.StageService, agentapi.StageHealthy}
	if diff := cmp.Diff([][]agentapi.Stage{both[:1], both, both, nil}, s.got); diff != "" {
		t.Errorf("marks in each report (-want +got):\n%s", diff)
	}
	if hellos != 2 {
		t.Errorf("a hello was asked for %d times, want 2", hellos)
	}
}

func TestRightKernelBacksOff(t *testing.T) {
	var s agentapitest.Server
	h := httptest.NewServer(&s)
	defer h.Close()
	client, err := agentapi.NewClient(h.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := cache.Open(t.TempDir(), nothing)
	if err != nil {
		t.Fatal(err)
	}
	k1, k2 := digest.Of([]byte("1")), digest.Of([]byte("2"))
	// What the server gives every machine, and a role does not ask for, is no reason to boot again; nor is its lack.
	args := []string{"console=tty0", "console=ttyS0,115200", "panic=10", "no_timer_check", "troupe.kernel=" + k1.String(), "quiet"}
	b := &boot{log: nothing, cache: c, client: client, cmd: Cmdline{Kernel: k1, Args: args}, rep: newReporter(client, nothing, agentapi.Report{})}
	var reboots []string
	b.force = func() error {
		reboots = append(reboots, "reboot")
		return errors.New("rebooted")
	}
	try := func(r agentapi.Release) string {
		ctx, cancel := context.WithCancel(t.Context())
		b.rep.save = func([]agentapi.Mark) { // a failure is reported before the wait: that is when to stop waiting
			if b.rep.report.Error != "" {
				cancel()
			}
		}
		defer cancel()
		before := len(reboots)
		err := b.rightKernel(ctx, &r)
		switch {
		case len(reboots) > before:
			return "reboot"
		case errors.Is(err, context.Canceled):
			return "wait"
		case err != nil:
			return err.Error()
		}
		return "go on"
	}
	for i, step := range []struct {
		r    agentapi.Release
		want string
	}{
		{agentapi.Release{Kernel: k1, KernelArgs: []string{"quiet"}}, "go on"},
		{agentapi.Release{Kernel: k2}, "reboot"},
		{agentapi.Release{Kernel: k2}, "wait"}, // the server sent the old one again
		{agentapi.Release{Kernel: k1}, "go on"},
		{agentapi.Release{Kernel: k1, KernelArgs: []string{"debug"}}, "reboot"},
		{agentapi.Release{Kernel: k1, KernelArgs: []string{"debug"}}, "wait"},
		{agentapi.Release{}, "go on"},
		{agentapi.Release{Kernel: k1, KernelArgs: []string{"panic=10"}}, "go on"},          // the role's own, given once
		{agentapi.Release{Kernel: k1, KernelArgs: []string{"console=ttyS0"}}, "reboot"},    // another one
		{agentapi.Release{Kernel: k1, KernelArgs: []string{"quiet", "panic=10"}}, "go on"}, // in another order
	} {
		if got := try(step.r); got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
		b.rep.fail(nil)
	}
}

// TestServiceTakesAnAnnouncedRebootBack has a node whose reboot was called off by a newer assignment in the last moment:
// without a word of it the server would show it as rebooting until its next boot.
func TestServiceTakesAnAnnouncedRebootBack(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	svc, err := newService(filepath.Join(n.dir, "run", stateFile), nothing)
	if err != nil {
		t.Fatal(err)
	}
	svc.rep.mark(agentapi.Mark{Stage: agentapi.StageReboot})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- svc.run(ctx) }()
	n.wait("the word that it stays", func(agentapi.Report) bool {
		return strings.Contains(n.stages(), "reboot") && strings.Contains(n.stages(), "stay")
	})
	if svc.rep.has(agentapi.StageReboot) {
		t.Error("its next reboot would not be announced")
	}
	cancel()
	<-done
}

// TestBoundedDoesNotWaitForTheKernel has a call that never comes back, as sync(2) on a disk that does not answer.
func TestBoundedDoesNotWaitForTheKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answer := make(chan error)
		began := time.Now()
		err := bounded(syncLimit, func() error { return <-answer })
		if !errors.Is(err, errPatience) || time.Since(began) != 10*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		answer <- nil // it comes back after all, and holds nobody up
	})
	want := errors.New("no")
	if err := bounded(time.Hour, func() error { return want }); !errors.Is(err, want) {
		t.Errorf("what came back: %v", err)
	}
}

func TestBootMarksEachReasonToWait(t *testing.T) {
	client, err := agentapi.NewClient("http://10.77.0.1", nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &boot{log: nothing, client: client}
	b.speak()
	b.lease.Store(&netup.Lease{Address: netip.MustParsePrefix("10.77.0.11/24")})
	building := agentapi.Assignment{State: agentapi.Waiting, Host: "n1", Reason: "the base is being built"}
	for _, a := range []agentapi.Assignment{{State: agentapi.Unclaimed}, {State: agentapi.Unclaimed, Version: "2"}, building, building, {State: agentapi.Unclaimed}} {
		b.show(a)
	}
	var got []string
	for _, m := range b.rep.pending() {
		got = append(got, string(m.Stage)+": "+m.Detail)
	}
	if diff := cmp.Diff([]string{"wait: unclaimed", "wait: waiting the base is being built", "wait: unclaimed"}, got); diff != "" {
		t.Errorf("marks (-want +got):\n%s", diff)
	}
}

// TestServiceRebootsFromAReadOnlyCache has a cache that the kernel made read-only for damage, which the next boot repairs.
func TestServiceRebootsFromAReadOnlyCache(t *testing.T) {
	for name, tt := range map[string]struct {
		full   bool // with no image to evict, but a node delta that cannot be removed
		assign func(*agentapitest.Server)
		why    string
	}{
		"to discovery": {
			assign: func(s *agentapitest.Server) { s.Assign(agentapi.Assignment{State: agentapi.Unclaimed}) },
			why:    "no host of the fleet is this machine any more",
		},
		"to a release that is not there": {
			assign: func(s *agentapitest.Server) { s.Assign(assigned(s, "idle", 2)) },
			why:    "generation 2, role idle; the cache is damaged: fetched after that",
		},
		"to one for which there is no room": {
			full:   true,
			assign: func(s *agentapitest.Server) { s.Assign(assigned(s, "idle", 2)) },
			why:    "generation 2, role idle; the cache is damaged: fetched after that",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var s agentapitest.Server
			a := assigned(&s, "web", 1)
			a.Checks = passing
			n := newNode(t, a, &s)
			dir := filepath.Join(n.dir, "cache")
			size := "128m"
			if tt.full {
				size = "4m"
			}
			mountTmpfs(t, dir, size)
			reboots, _ := n.start()
			n.wait("health", healthy)
			if tt.full {
				if err := os.MkdirAll(filepath.Join(dir, "deltas/old/upper"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := unix.Mount("none", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
			tt.assign(&s)
			<-reboots
			n.wait("the mark", func(agentapi.Report) bool { return strings.HasSuffix(n.stages(), " healthy reboot") })
			if m := s.Marks(); m[len(m)-1].Detail != tt.why {
				t.Errorf("it reboots for %q, want %q", m[len(m)-1].Detail, tt.why)
			}
		})
	}
}

func mountTmpfs(t *testing.T, dir, size string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// A node whose server's key is not the one that it booted with goes on as it runs, and says why.
func TestAnotherKeyIsRefused(t *testing.T) {
	var s agentapitest.Server
	n := newNode(t, assigned(&s, "web", 1), &s)
	_, stop := n.start()
	defer stop()
	other, err := signing.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	own := s.Keys()
	s.SignWith(other)
	s.Assign(assigned(&s, "idle", 2))
	var refused agentapi.Report
	n.wait("a refusal", func(r agentapi.Report) bool {
		refused = r
		return strings.Contains(r.Error, agentapi.ErrManifest.Error())
	})
	if !strings.Contains(refused.Error, other.Fingerprint()) || !strings.Contains(refused.Error, own.Fingerprints()) {
		t.Errorf("error %q names not both keys", refused.Error)
	}
	if refused.Running.Role != "web" || refused.Staged != "" {
		t.Errorf("runs %s, staged %q", refused.Running.Role, refused.Staged)
	}
}

func TestStagingKeepsToItsRate(t *testing.T) {
	var s agentapitest.Server
	now, next := assigned(&s, "web", 1), assigned(&s, "idle", 2)
	n := newNode(t, now, &s)
	n.booted(now)
	svc, err := newService(filepath.Join(n.dir, "run", stateFile), nothing)
	if err != nil {
		t.Fatal(err)
	}
	next.Cache.Rate = 1 << 20
	if got := svc.transfer(next).Rate; got != 1<<20 {
		t.Errorf("staged with %d bytes a second, the host has %d", got, 1<<20)
	}
}
