package agent

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/digest"
)

var failing = []agentapi.Check{{Exec: []string{"false"}}}

// booted writes what a boot into a leaves in the cache, after one in which before was good.
func (n *node) booted(a agentapi.Assignment, before ...agentapi.Assignment) *cache.Cache {
	n.t.Helper()
	c, err := cache.Open(filepath.Join(n.dir, "cache"), nothing)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, x := range before {
		x = n.signed(x)
		err = errors.Join(err, c.Remember(x), c.Begin(deltaID(x)),
			c.Change(deltaID(x), func(r *cache.Record) { r.Healthy, r.Attempts, r.Good = r.Used, 0, time.Now() }))
	}
	if err := errors.Join(err, c.Remember(n.signed(a)), c.Begin(deltaID(a))); err != nil {
		n.t.Fatal(err)
	}
	return c
}

// signed is a with the manifest that the server makes of it.
func (n *node) signed(a agentapi.Assignment) agentapi.Assignment {
	n.t.Helper()
	sealed, err := agentapi.Sign(a, n.server.Signer())
	if err != nil {
		n.t.Fatal(err)
	}
	a.Manifest = sealed.Manifest
	return a
}

// record is what the cache remembers of a release.
func (n *node) record(a agentapi.Assignment) cache.Record {
	n.t.Helper()
	c, err := cache.Open(filepath.Join(n.dir, "cache"), nothing)
	if err != nil {
		n.t.Fatal(err)
	}
	r, _ := c.Record(deltaID(a))
	return r
}

// fetched brings a release into the cache.
func (n *node) fetched(c *cache.Cache, a agentapi.Assignment) {
	n.t.Helper()
	client, err := agentapi.NewClient(n.http.URL, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	defer client.CloseIdle()
	if _, err := c.Fetch(n.t.Context(), cache.Fetch{Source: client, Blobs: []agentapi.Blob{a.Release.Base.Blob, a.Release.Delta.Blob}}); err != nil {
		n.t.Fatal(err)
	}
}

func TestAHealthyReleaseIsGood(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks = passing
	n := newNode(t, a, &s)
	n.booted(a)
	_, stop := n.start()
	n.wait("word that it is good", func(r agentapi.Report) bool { return healthy(r) && r.Good == a.Release.ID })
	_ = stop()
	if r := n.record(a); r.Attempts != 0 || r.Healthy != r.Used || !r.IsGood() || r.Good.IsZero() {
		t.Errorf("record %+v", r)
	}
}

func TestAReleaseThatNeverBecomesHealthyIsLeft(t *testing.T) {
	var s agentapitest.Server
	before, a := assigned(&s, "web", 1), assigned(&s, "idle", 2)
	a.Checks, a.HealthyWithin = failing, 50*time.Millisecond
	n := newNode(t, a, &s)
	n.fetched(n.booted(a, before), before)
	reboots, stop := n.start()
	<-reboots
	n.wait("the verdict", func(r agentapi.Report) bool {
		return len(r.Bad) == 1 && r.Bad[0].Release == a.Release.ID && r.Good == before.Release.ID &&
			strings.Contains(r.Bad[0].Why, "exec false: exit status 1: not passed within 50ms") && !r.Bad[0].Again
	})
	n.wait("the marks", func(agentapi.Report) bool { return n.stages() == "switch-root service bad reboot" })
	if m := s.Marks(); !strings.HasPrefix(m[len(m)-1].Detail, "back to release "+before.Release.ID.Short()+", role web: exec false") {
		t.Errorf("it reboots for %q", m[len(m)-1].Detail)
	}
	_ = stop()
	if r := n.record(a); r.Bad == nil || r.Bad.When.IsZero() {
		t.Errorf("record %+v", r)
	}

	// In the release before it goes on, and does not try the bad one again, but what comes after it.
	before.Checks = passing
	n.boots(before)
	n.booted(before)
	s.Assign(a)
	reboots, stop = n.start()
	n.wait("health", func(r agentapi.Report) bool { return healthy(r) && len(r.Bad) == 1 && r.Error == "" && r.Staged == "" })
	if len(reboots) > 0 {
		t.Error("it goes to the bad one again")
	}
	next := assigned(&s, "db", 3)
	s.Assign(next)
	<-reboots
	n.wait("staging", func(r agentapi.Report) bool { return r.Staged == next.Release.ID })
	_ = stop()
	if r := n.record(next); r.Used != 0 || r.Assignment.Release.ID != next.Release.ID {
		t.Errorf("what is tried next has the record %+v", r)
	}
}

// boots leaves for the service what the next boot of the node does, into a.
func (n *node) boots(a agentapi.Assignment) {
	n.t.Helper()
	k := stateKeeper{path: filepath.Join(n.dir, "run", stateFile)}
	err := k.change(func(st *RunState) {
		*st = RunState{
			Server: n.http.URL, Identity: agentapi.Identity{MAC: "52:54:00:77:00:01"}, BootID: "b2", Assignment: a, Keys: n.server.Keys().String(), CacheDir: filepath.Join(n.dir, "cache"),
		}
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

func TestABadReleaseStaysWhereThereIsNoGoodOne(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	a.Checks, a.HealthyWithin = failing, 50*time.Millisecond
	n := newNode(t, a, &s)
	gone := assigned(&s, "idle", 1) // was good, but its images are no longer there
	n.booted(a, gone)
	reboots, _ := n.start()
	n.wait("the verdict", func(r agentapi.Report) bool { return len(r.Bad) == 1 })
	// With checks that pass, the same bytes are good.
	b := a
	b.Checks, b.HealthyWithin = passing, 0
	s.Assign(b)
	n.wait("health", func(r agentapi.Report) bool { return healthy(r) && len(r.Bad) == 0 && r.Good == a.Release.ID })
	if len(reboots) > 0 {
		t.Error("it rebooted")
	}
}

func TestAGoodReleaseThatMissesItsDeadlineStays(t *testing.T) {
	var s agentapitest.Server
	a, other := assigned(&s, "web", 1), assigned(&s, "idle", 1)
	a.Checks, a.HealthyWithin = failing, time.Millisecond
	n := newNode(t, a, &s)
	n.fetched(n.booted(a, other, a), other)
	svc, err := newService(filepath.Join(n.dir, "run", stateFile), nothing)
	if err != nil {
		t.Fatal(err)
	}
	svc.expire(a, time.Millisecond)
	if good, goes := svc.fallback(); goes {
		t.Errorf("it goes back to %+v", good)
	}
	if r := n.record(a); r.Attempts != 1 || r.Bad != nil || !r.IsGood() {
		t.Errorf("record %+v: this boot counts, and no more", r)
	}
}

func TestAShutdownIsNoFailedBoot(t *testing.T) {
	for _, goesDown := range []bool{true, false} {
		var s agentapitest.Server
		a := assigned(&s, "web", 1)
		a.Checks = failing
		n := newNode(t, a, &s)
		n.booted(a)
		svc, err := newService(filepath.Join(n.dir, "run", stateFile), nothing)
		if err != nil {
			t.Fatal(err)
		}
		svc.trim = func(string) error { return nil }
		svc.goesDown = func() bool { return goesDown }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- svc.run(ctx) }()
		n.wait("the checks", func(r agentapi.Report) bool { return r.Running != nil && len(r.Running.Health.Failing) == 1 })
		cancel()
		<-done
		want := map[bool]int{true: 0, false: 1}[goesDown]
		if r := n.record(a); r.Attempts != want || r.Ended != 1-want {
			t.Errorf("going down: %v: record %+v", goesDown, r)
		}
	}
}

// TestALeftReleaseIsTriedAgainAfterARest has a good release that used up its boots, as by cuts of the power.
func TestALeftReleaseIsTriedAgainAfterARest(t *testing.T) {
	var s agentapitest.Server
	a, wanted := assigned(&s, "web", 1), assigned(&s, "idle", 2)
	n := newNode(t, a, &s)
	c := n.booted(a, wanted)
	if err := c.Change(deltaID(wanted), func(r *cache.Record) { r.Left, r.Attempts = &cache.Left{Why: "3 boots", When: time.Now()}, 3 }); err != nil {
		t.Fatal(err)
	}
	svc, err := newService(filepath.Join(n.dir, "run", stateFile), nothing)
	if err != nil {
		t.Fatal(err)
	}
	if why, wait := svc.against(wanted); why != "3 boots" || wait <= 0 {
		t.Errorf("before what runs is healthy: %q, %v", why, wait)
	}
	svc.noteHealth(agentapi.Health{Healthy: true})
	if why, wait := svc.against(wanted); why != "3 boots" || wait < 50*time.Minute {
		t.Errorf("just after: %q, %v", why, wait)
	}
	svc.proof.since = time.Now().Add(-2 * time.Hour)
	if why, _ := svc.against(wanted); why != "" {
		t.Errorf("after a rest: %q", why)
	}
	if r := n.record(wanted); r.Left != nil || !r.Again || r.Attempts != 0 {
		t.Errorf("record %+v", r)
	}
}

// TestTheServersWordOfADeadKernel has a release of which no agent could count the boots.
func TestTheServersWordOfADeadKernel(t *testing.T) {
	var s agentapitest.Server
	good, wanted := assigned(&s, "web", 1), assigned(&s, "idle", 2)
	n := newNode(t, good, &s)
	b := &boot{log: nothing, keys: s.Keys(), cache: n.booted(good, good), cmd: Cmdline{Dead: wanted.Release.ID}, rep: newReporter(nil, nothing, agentapi.Report{})}
	for range 2 {
		c, err := b.choose(t.Context(), &wanted)
		if err != nil || c.Key != deltaID(good) {
			t.Fatalf("it boots %+v, %v", c, err)
		}
	}
	if bad := b.rep.report.Bad; len(bad) != 1 || bad[0].Release != wanted.Release.ID || !strings.Contains(bad[0].Why, "kernel") {
		t.Errorf("reported: %+v", bad)
	}
	// The word is about one release. What was good before is only left.
	b.cmd.Dead = digest.Of([]byte("another"))
	third := assigned(&s, "db", 3)
	if c, err := b.choose(t.Context(), &third); err != nil || c.Key != deltaID(third) {
		t.Errorf("a third one: %+v, %v", c, err)
	}
	b.cmd.Dead = good.Release.ID
	if c, err := b.choose(t.Context(), &good); err != nil || c.Key != deltaID(good) {
		t.Errorf("the only good one: %+v, %v", c, err)
	}
	if r := n.record(good); r.Bad != nil || r.Left == nil {
		t.Errorf("record %+v", r)
	}
}
