package reconciler

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

var testPeer = netip.MustParseAddr("10.77.0.11")

// testFleet has n1, known by its MAC, and n2, known by its UUID, in one role.
func testFleet() *schema.Fleet {
	return &schema.Fleet{
		Images: map[string]schema.Image{"debian": {Name: "debian", Kind: "os", From: schema.From{Debian: &schema.Debian{Suite: "bookworm", Arch: "amd64", Kernel: "linux-image-cloud-amd64"}}}},
		Roles:  map[string]schema.Role{"web": {Name: "web", OS: "debian", Boot: "disk"}},
		Hosts: map[string]schema.Host{
			"n1": {Name: "n1", MAC: testMAC, Role: "web", Address: testPeer},
			"n2": {Name: "n2", UUID: "1f0c9d3e-0000-4000-8000-000000000002", Role: "web"},
		},
		Discovery: schema.Discovery{OS: "debian"},
	}
}

func testAgents(t *testing.T) *agents {
	t.Helper()
	s := openStore(t)
	log := slog.New(slog.DiscardHandler)
	a := &agents{
		store: s, views: newViews(), boots: newBoots(s, log), events: &recorder{store: s, log: log},
		now: func() time.Time { return testStart }, each: newStriped(), booting: func(string) {},
	}
	a.deltas = newNodeDeltas(s, a.events)
	a.boots.standing = a.views.standing
	a.strangers = newStrangers(a)
	return a
}

// hello has a machine say hello.
func (a *agents) hello(t *testing.T, id agentapi.Identity) {
	t.Helper()
	if _, err := a.Hello(t.Context(), testPeer, agentapi.Hello{Identity: id, BootID: "b"}); err != nil {
		t.Fatal(err)
	}
}

func TestNobodyIsUnclaimedBeforeAFleetIsInForce(t *testing.T) {
	a := testAgents(t)
	id := agentapi.Identity{MAC: testMAC}
	var unavailable *UnavailableError
	if _, err := a.Hello(t.Context(), testPeer, agentapi.Hello{Identity: id}); !errors.As(err, &unavailable) {
		t.Errorf("Hello: %v, want an UnavailableError", err)
	}
	if _, err := a.Report(t.Context(), testPeer, agentapi.Report{Identity: id}); !errors.As(err, &unavailable) {
		t.Errorf("Report: %v, want an UnavailableError", err)
	}
	if _, err := a.Assignment(t.Context(), testMAC, "", 0); !errors.As(err, &unavailable) {
		t.Errorf("Assignment: %v, want an UnavailableError", err)
	}
	if all, err := state.Machines.List(t.Context(), a.store); err != nil || len(all) != 0 {
		t.Errorf("%d machines are on record, %v; want none while nobody can tell a stranger", len(all), err)
	}
}

func TestDeclaredHostWaitsAndSaysForWhat(t *testing.T) {
	v := newView(testFleet())
	id := agentapi.Identity{MAC: testMAC}
	base := images.BaseRecipeOf(v.fleet.Images["debian"]).ID()
	first := v.assignment(id)
	if first.State != agentapi.Waiting || first.Reason != "image debian waits to be built" {
		t.Errorf("got %s, %q", first.State, first.Reason)
	}
	v = newView(v.fleet)
	v.builds = map[images.RecipeID]state.Build{base: {Recipe: base, Phase: state.BuildFailed, Step: "packages"}}
	second := v.assignment(id)
	if want := `the build of image debian failed: packages; see troupe logs ` + base.Short(); second.Reason != want {
		t.Errorf("got %q, want %q", second.Reason, want)
	}
	if first.Version == second.Version {
		t.Error("the reason changed and the version did not: the agent would not hear of it")
	}
	v = newView(v.fleet)
	v.bases = map[images.RecipeID]images.Base{base: {Recipe: base}}
	if got := v.assignment(id); got.Reason != "role web waits to be built" {
		t.Errorf("got %q", got.Reason)
	}
}

func TestHelloAndReportAreWrittenDown(t *testing.T) {
	a := testAgents(t)
	v := newView(testFleet())
	v.assignments = map[string]state.Assignment{"n1": {Host: "n1", Spec: agentapi.Assignment{Version: "7", State: agentapi.Assigned, Host: "n1"}}}
	a.views.set(v)
	id := agentapi.Identity{MAC: "52:54:00:77:00:01", UUID: "ABC"}
	got, err := a.Hello(t.Context(), testPeer, agentapi.Hello{Identity: id, BootID: "b1", Kernel: digest.Of(nil)})
	if err != nil || got.Version != "7" {
		t.Fatalf("Hello: %+v, %v; want assignment 7", got, err)
	}
	report := agentapi.Report{
		Identity: id, BootID: "b1", Uptime: 30 * time.Second,
		Marks:   []agentapi.Mark{{Stage: agentapi.StageHealthy, At: 29 * time.Second}},
		Running: &agentapi.Running{Host: "n1", Role: "web", Generation: 1, Health: agentapi.Health{Healthy: true}},
	}
	reply, err := a.Report(t.Context(), testPeer, report)
	if err != nil || reply.Version != "7" || reply.Hello {
		t.Fatalf("Report: %+v, %v; want version 7 and no hello", reply, err)
	}
	n, err := state.Nodes.Get(t.Context(), a.store, testMAC)
	if err != nil {
		t.Fatal(err)
	}
	if n.Stage != "healthy" || n.Kernel != digest.Of(nil) || !n.Booted.Equal(testStart.Add(-30*time.Second)) {
		t.Errorf("node: %+v", n)
	}
	report.Running.Health = agentapi.Health{Failing: []string{"http :80: refused"}}
	if _, err := a.Report(t.Context(), testPeer, report); err != nil {
		t.Fatal(err)
	}
	events, err := state.Events.List(t.Context(), a.store)
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, ev := range events {
		told = append(told, ev.Message)
	}
	if len(told) != 2 {
		t.Errorf("events: got %q, want one for healthy and one for no longer healthy", told)
	}
}

func TestReportOfAnUnknownMachineAsksForHello(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	reply, err := a.Report(t.Context(), testPeer, agentapi.Report{Identity: agentapi.Identity{MAC: "52:54:00:00:00:77"}, BootID: "b"})
	if err != nil || !reply.Hello || reply.Version != "new" {
		t.Errorf("got %+v, %v; want hello, and nothing that makes it leave what it runs", reply, err)
	}
}

// Whoever makes up a MAC for each report leaves nothing behind, whatever UUID it claims.
func TestReportsOfMadeUpMachinesAreNotWritten(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	for i := range 30 {
		id := agentapi.Identity{MAC: fmt.Sprintf("52:54:00:00:01:%02x", i), UUID: n2UUID}
		reply, err := a.Report(t.Context(), testPeer, agentapi.Report{
			Identity: id, BootID: "b", Error: "x", Marks: []agentapi.Mark{{Stage: agentapi.StageAgent}},
		})
		if err != nil || !reply.Hello {
			t.Fatalf("got %+v, %v; want hello", reply, err)
		}
	}
	nodes, err := state.Nodes.List(t.Context(), a.store)
	if err != nil || len(nodes) != 0 {
		t.Errorf("%d nodes are on record, %v; want none", len(nodes), err)
	}
	boots, err := state.Boots.List(t.Context(), a.store)
	if err != nil || len(boots)+len(a.boots.current) != 0 {
		t.Errorf("%d boots are on record, %d in memory, %v; want none", len(boots), len(a.boots.current), err)
	}
}

func TestHostileIdentityIsRefused(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	for _, mac := range []string{"", "../../x", "52:54:00:77:00:01:02:03", "a/b"} {
		var invalid *InvalidError
		if _, err := a.Hello(t.Context(), testPeer, agentapi.Hello{Identity: agentapi.Identity{MAC: mac}}); !errors.As(err, &invalid) {
			t.Errorf("MAC %q: %v, want an InvalidError", mac, err)
		}
	}
}

func TestAssignmentWaitsForANewerView(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	answered := make(chan agentapi.Assignment, 1)
	first, err := a.Assignment(t.Context(), testMAC, "", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		got, err := a.Assignment(t.Context(), testMAC, first.Version, time.Minute)
		if err != nil {
			t.Error(err)
		}
		answered <- got
	}()
	a.views.set(newView(testFleet())) // nothing changed for this machine: no answer
	v := newView(testFleet())
	v.assignments = map[string]state.Assignment{"n1": {Spec: agentapi.Assignment{Version: "1", State: agentapi.Assigned}}}
	a.views.set(v)
	if got := <-answered; got.Version != "1" {
		t.Errorf("got version %q, want 1", got.Version)
	}
}

func TestAMarkOfTheDiskIsNoStageOfTheBoot(t *testing.T) {
	healthy, bootable := agentapi.Mark{Stage: agentapi.StageHealthy}, agentapi.Mark{Stage: agentapi.StageBootable}
	n := nodeOf(state.Node{}, agentapi.Report{BootID: "b", Marks: []agentapi.Mark{healthy, bootable}}, time.Now())
	if n.Stage != string(agentapi.StageHealthy) {
		t.Errorf("the node came as far as %q", n.Stage)
	}
	if n = nodeOf(n, agentapi.Report{BootID: "b", Marks: []agentapi.Mark{bootable}}, time.Now()); n.Stage != string(agentapi.StageHealthy) {
		t.Errorf("later it came as far as %q", n.Stage)
	}
}

func TestNodeOfALostStoreIsShownAsItRuns(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	report := agentapi.Report{
		Identity: agentapi.Identity{MAC: testMAC}, BootID: "b1", Uptime: time.Hour,
		Running: &agentapi.Running{Host: "n1", Role: "web", Health: agentapi.Health{Healthy: true}},
	}
	if _, err := a.Report(t.Context(), testPeer, report); err != nil { // without marks: another server acknowledged them
		t.Fatal(err)
	}
	n, err := state.Nodes.Get(t.Context(), a.store, testMAC)
	if err != nil || n.Stage != string(agentapi.StageHealthy) {
		t.Errorf("stage %q, %v; want healthy", n.Stage, err)
	}
}

func TestAStrangersWordsAreBounded(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	long := strings.Repeat("\x01", 1<<20) // JSON has six bytes for each
	h := agentapi.Hello{Identity: agentapi.Identity{MAC: "52:54:00:00:00:66"}, Agent: long}
	r := agentapi.Report{Identity: h.Identity, BootID: "../../" + long, Error: long, Running: &agentapi.Running{Host: long, Role: long}}
	for i := range 10_000 {
		h.Inventory.Disks = append(h.Inventory.Disks, agentapi.Disk{Name: "sda", Model: long[:2000]})
		h.Inventory.NICs = append(h.Inventory.NICs, agentapi.NIC{Name: long[:2000]})
		r.Marks = append(r.Marks, agentapi.Mark{Stage: agentapi.Stage(long[:100]), At: time.Duration(i), Detail: fmt.Sprint(i, long[:2000])})
		r.Cached = append(r.Cached, digest.Of(nil))
		r.Bad = append(r.Bad, agentapi.BadRelease{Host: long[:2000], Role: long[:2000], Why: long[:2000]})
		r.Warnings = append(r.Warnings, fmt.Sprint(i, long[:2000]))
		r.Running.Health.Failing = append(r.Running.Health.Failing, long[:2000])
	}
	if _, err := a.Hello(t.Context(), testPeer, h); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Report(t.Context(), testPeer, r); err != nil {
		t.Fatal(err)
	}
	n, err := state.Nodes.Get(t.Context(), a.store, r.MAC)
	if err != nil || n.BootID != "" || !strings.HasPrefix(n.Running.Health.Failing[len(n.Running.Health.Failing)-1], "and 99") {
		t.Errorf("node: boot %q, %v, failing checks %d", n.BootID, err, len(n.Running.Health.Failing))
	}
	wantSize(t, a.store, state.Machines, 52<<10)
	wantSize(t, a.store, state.Nodes, 128<<10)
	wantSize(t, a.store, state.Boots, 64<<10)
	wantSize(t, a.store, state.Events, 96<<10)
}

// wantSize checks that there are records of a kind, and that they have at most so many bytes.
func wantSize[T any](t *testing.T, s *state.Store, kind state.Kind[T], most int) {
	t.Helper()
	all, err := kind.List(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(all)
	if err != nil || len(all) == 0 || len(b) > most {
		t.Errorf("records %s: %d of %d bytes, %v; want at most %d bytes", kind.Prefix(), len(all), len(b), err, most)
	}
}

func TestABadReleaseIsToldOnce(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	id := agentapi.Identity{MAC: "52:54:00:00:00:66"}
	if _, err := a.Hello(t.Context(), testPeer, agentapi.Hello{Identity: id, BootID: "b1"}); err != nil {
		t.Fatal(err)
	}
	bad := agentapi.BadRelease{Host: "n1", Role: "web", Release: digest.Of([]byte("r")), Why: "http :80/: not passed within 10m0s", When: time.Unix(1, 0)}
	good := digest.Of([]byte("good"))
	report := agentapi.Report{Identity: id, BootID: "b1", Bad: []agentapi.BadRelease{bad}, Good: good, Warnings: []string{"cache: a record is broken"}}
	for range 2 {
		if _, err := a.Report(t.Context(), testPeer, report); err != nil {
			t.Fatal(err)
		}
	}
	events, err := state.Events.List(t.Context(), a.store)
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, ev := range events {
		if ev.Warning {
			told = append(told, ev.Message)
		}
	}
	slices.Sort(told)
	want := []string{
		"cache: a record is broken",
		"release " + bad.Release.Short() + " of role web does not work here and is not tried again: http :80/: not passed within 10m0s",
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
	// A boot that has not opened its cache yet does not know, and does not make the server forget.
	next := agentapi.Report{Identity: id, BootID: "b2"}
	if _, err := a.Hello(t.Context(), testPeer, agentapi.Hello{Identity: id, BootID: "b2"}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Report(t.Context(), testPeer, next); err != nil {
		t.Fatal(err)
	}
	if n, err := state.Nodes.Get(t.Context(), a.store, id.MAC); err != nil || len(n.Bad) != 1 || n.Good != good {
		t.Errorf("in its next boot: %+v, %v", n, err)
	}
}
