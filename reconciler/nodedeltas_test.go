package reconciler

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// withNode has n1 run on the machine testMAC, brought up to an order.
func withNode(t *testing.T, a *agents, order string) {
	t.Helper()
	n := state.Node{MAC: testMAC, LastSeen: testStart, Running: &agentapi.Running{Host: "n1", Order: order}}
	if err := state.Nodes.Put(t.Context(), a.store, testMAC, n); err != nil {
		t.Fatal(err)
	}
}

func orderOf(t *testing.T, a *agents) state.Order {
	t.Helper()
	o, err := state.Orders.Get(t.Context(), a.store, "n1")
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// TestDropsAddUp wants an order to have in it what one before it wanted and no node did yet.
func TestDropsAddUp(t *testing.T) {
	a := testAgents(t)
	drop := func(reboot bool, paths ...string) state.Order {
		t.Helper()
		if err := a.deltas.Drop(t.Context(), "n1", paths, reboot); err != nil {
			t.Fatal(err)
		}
		return orderOf(t, a)
	}
	drop(false, "/b") // also while no node runs
	withNode(t, a, "")
	if o := drop(false, "/a", "/b"); !slices.Equal(o.Paths, []string{"/a", "/b"}) || o.Reboot {
		t.Errorf("two orders: %+v", o)
	}
	o := drop(true)
	if len(o.Paths) != 0 || !o.Reboot {
		t.Errorf("a reset: %+v", o)
	}
	if o = drop(false, "/c"); len(o.Paths) != 0 || !o.Reboot {
		t.Errorf("an order after a reset that was not done: %+v, want the reset", o)
	}
	withNode(t, a, o.ID)
	if o := drop(false, "/d"); !slices.Equal(o.Paths, []string{"/d"}) || o.Reboot {
		t.Errorf("an order after one that was done: %+v", o)
	}
	for _, bad := range []string{"", "a", "/", "/a/", "/../a", "/a\x00"} {
		if err := a.deltas.Drop(t.Context(), "n1", []string{bad}, false); !errors.As(err, new(*InvalidError)) {
			t.Errorf("dropping %q: %v, want an InvalidError", bad, err)
		}
	}
}

// TestOrdersReachTheHost wants an order in the assignment of its host, under another version.
func TestOrdersReachTheHost(t *testing.T) {
	v := newView(testFleet())
	v.machines = map[string]state.Machine{testMAC: {Identity: agentapi.Identity{MAC: testMAC}}}
	v.assignments = map[string]state.Assignment{"n1": {Host: "n1", Spec: agentapi.Assignment{Version: "1", State: agentapi.Assigned, Host: "n1"}}}
	before := v.assignment(agentapi.Identity{MAC: testMAC})
	order := agentapi.DeltaOrder{ID: "x", Paths: []string{"/a"}}
	v.orders = map[string]state.Order{"n1": {Host: "n1", DeltaOrder: order}, "n2": {Host: "n2"}}
	after := v.assignment(agentapi.Identity{MAC: testMAC})
	if before.Delta != nil || after.Version == before.Version {
		t.Errorf("versions %q and %q, before there was an order: %v", before.Version, after.Version, before.Delta)
	}
	if d := cmp.Diff(&order, after.Delta); d != "" {
		t.Errorf("order (-want +got):\n%s", d)
	}
}

// TestDiffIsAskedFor has two who ask wait for one answer of the node, which hears of it in the reply to its report.
func TestDiffIsAskedFor(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	withNode(t, a, "")
	if _, err := a.deltas.Diff(t.Context(), "n2"); !errors.As(err, new(*ConflictError)) {
		t.Errorf("of a host that nothing runs as: %v, want a ConflictError", err)
	}
	got := make(chan agentapi.DeltaDiff, 2)
	for range 2 {
		go func() {
			d, err := a.deltas.Diff(t.Context(), "n1")
			if err != nil {
				t.Error(err)
			}
			got <- d
		}()
	}
	id := agentapi.Identity{MAC: testMAC}
	var reply agentapi.ReportReply
	for reply.Diff == "" {
		var err error
		if reply, err = a.Report(t.Context(), testPeer, agentapi.Report{Identity: id}); err != nil {
			t.Fatal(err)
		}
		if a.deltas.waiting(testMAC) < 2 {
			reply.Diff = ""
		}
	}
	if err := a.deltas.Answer(t.Context(), agentapi.DeltaAnswer{Identity: id, ID: "another"}); err != nil {
		t.Fatal(err)
	}
	diff := agentapi.DeltaDiff{Host: "n1", List: []agentapi.DeltaChange{{Path: "/a", Kind: agentapi.DeltaAdded}}}
	if err := a.deltas.Answer(t.Context(), agentapi.DeltaAnswer{Identity: id, ID: reply.Diff, Diff: diff}); err != nil {
		t.Fatal(err)
	}
	diff.Changes = 1
	for range 2 {
		if d := cmp.Diff(diff, <-got); d != "" {
			t.Errorf("answer (-want +got):\n%s", d)
		}
	}
	if reply, err := a.Report(t.Context(), testPeer, agentapi.Report{Identity: id}); err != nil || reply.Diff != "" {
		t.Errorf("after the answer: %+v, %v; want no question", reply, err)
	}
}

// waiting is how many wait for an answer of a machine.
func (n *nodeDeltas) waiting(mac string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a := n.asks[mac]; a != nil {
		return a.waiting
	}
	return 0
}

// TestLateDiff wants who asks a node that does not answer to be told so.
func TestLateDiff(t *testing.T) {
	n := newNodeDeltas(nil, nil)
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		_, err := n.await(t.Context(), "n1", testMAC)
		if !errors.As(err, new(*ConflictError)) || time.Since(began) != diffWait {
			t.Errorf("after %v: %v, want a ConflictError after %v", time.Since(began), err, diffWait)
		}
	})
	if n.asked(testMAC) != "" {
		t.Error("the question stands after nobody waits for it")
	}
}

// TestHostileDiff bounds what a node tells.
func TestHostileDiff(t *testing.T) {
	d := agentapi.DeltaDiff{DeltaCount: agentapi.DeltaCount{Changes: -5}, More: -1}
	for range agentapi.MaxDeltaChanges + 1 {
		d.List = append(d.List, agentapi.DeltaChange{Path: "/x"})
	}
	d = cleanDiff(d)
	if len(d.List) != agentapi.MaxDeltaChanges || d.Changes != len(d.List) || d.More != 0 {
		t.Errorf("%d listed, %d in all, %d more", len(d.List), d.Changes, d.More)
	}
}
