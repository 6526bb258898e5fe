package reconciler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// tooMuch is more than a record may have.
var tooMuch = strings.Repeat("x", 2<<20)

// planOf is a plan that gives hosts, by name, a release of that name. What is called "huge" cannot be written.
func planOf(commit string, hosts map[string]string) plan.Plan {
	p := plan.Plan{Commit: commit}
	ids := map[string]digest.Digest{}
	for _, name := range slices.Sorted(maps.Values(hosts)) {
		if ids[name] != "" {
			continue
		}
		ids[name] = digest.Of([]byte(name))
		rel := state.Release{ID: ids[name], Roles: []string{name}}
		if strings.Contains(name, "huge") {
			rel.KernelArgs = []string{tooMuch}
		}
		p.Releases = append(p.Releases, rel)
	}
	for _, name := range slices.Sorted(maps.Keys(hosts)) {
		spec := agentapi.Assignment{Version: "1", State: agentapi.Assigned, Host: name}
		if strings.Contains(name, "huge") {
			spec.Node.Files = map[string]agentapi.File{"/etc/x": {Content: tooMuch}}
		}
		p.Hosts = append(p.Hosts, plan.Host{Name: name, Action: plan.Boot, Changed: true, Why: []string{"first"}, To: ids[hosts[name]], Generation: 1, Spec: &spec})
	}
	return p
}

// testAssign carries out what planned returns.
func testAssign(t *testing.T, planned func() (plan.Plan, error)) *assign {
	t.Helper()
	s := openStore(t)
	log := slog.New(slog.DiscardHandler)
	return &assign{
		store: s, events: &recorder{store: s, log: log}, log: log, now: func() time.Time { return testStart }, wake: make(chan struct{}, 1),
		again: time.Millisecond,
		plan: func(context.Context) (plan.Plan, plan.Observed, error) {
			p, err := planned()
			return p, plan.Observed{}, err
		},
	}
}

// warnings are the subjects of all warnings among the events, sorted.
func warnings(t *testing.T, s *state.Store) []string {
	t.Helper()
	all, err := state.Events.List(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	var subjects []string
	for _, ev := range all {
		if ev.Warning {
			subjects = append(subjects, ev.Subject)
		}
	}
	slices.Sort(subjects)
	return subjects
}

func TestWhatCannotBeWrittenKeepsNoOtherHost(t *testing.T) {
	commit := "c1"
	a := testAssign(t, func() (plan.Plan, error) {
		return planOf(commit, map[string]string{"a": "huge", "b-huge": "web", "c": "web"}), nil
	})
	huge := "release " + digest.Of([]byte("huge")).Short()
	want := []string{"b-huge", huge}
	for _, c := range []string{"c1", "c1", "c2"} {
		commit = c
		if err := a.step(t.Context()); err == nil || !strings.Contains(err.Error(), "more than the 1048576") {
			t.Fatalf("step: %v, want why two cannot be written", err)
		}
	}
	want = append(want, want...) // once for each commit
	slices.Sort(want)
	if diff := cmp.Diff(want, warnings(t, a.store)); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
	all, err := state.Assignments.List(t.Context(), a.store)
	if err != nil || len(all) != 1 || all["c"].Host != "c" {
		t.Errorf("assigned: %v, %v; want c alone: the release of a is not on record", slices.Collect(maps.Keys(all)), err)
	}
	if a.planned.Load() != nil {
		t.Error("the commit counts as planned, though two hosts are not assigned")
	}
}

func TestPeopleAreToldOfSomeHostsThatCannotBeWritten(t *testing.T) {
	hosts := map[string]string{}
	for i := range 3 * maxTold {
		hosts[fmt.Sprintf("huge%02d", i)] = "web"
	}
	a := testAssign(t, func() (plan.Plan, error) { return planOf("c1", hosts), nil })
	if err := a.step(t.Context()); err == nil || !strings.HasSuffix(err.Error(), "and 20 more") {
		t.Errorf("step: %v, want the first ten, and how many more", err)
	}
	got := warnings(t, a.store)
	if len(got) != maxTold+1 || got[0] != "assignments" {
		t.Errorf("warnings about %v, want %d hosts, and one about the others", got, maxTold)
	}
}

// What could not be assigned is tried again by itself, and the controller goes on meanwhile.
func TestAssigningIsTriedAgain(t *testing.T) {
	var tries atomic.Int32
	a := testAssign(t, func() (plan.Plan, error) {
		switch tries.Add(1) {
		case 1:
			return plan.Plan{}, errors.New("the disk is busy")
		case 2:
			return planOf("c1", map[string]string{"a": "huge", "b": "web"}), nil
		}
		return planOf("c1", map[string]string{"a": "web", "b": "web"}), nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		defer cancel() // and the wait below is over
		ended <- a.run(ctx)
	}()
	for range a.store.Watch(ctx, state.Assignments.Prefix()) {
		all, err := state.Assignments.List(t.Context(), a.store)
		if err != nil {
			t.Error(err)
		}
		if len(all) == 2 {
			cancel()
		}
	}
	if err := <-ended; err != nil {
		t.Errorf("the controller ended by itself: %v", err)
	}
}
