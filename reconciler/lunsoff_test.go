package reconciler

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/reconciler/state"
)

// A server without a target says which hosts wait for one, in an event and in what it tells of each.
func TestHostsWaitForATargetThatIsOff(t *testing.T) {
	r := newLUNRig(t)
	r.port = 0
	fresh := make(chan struct{}, 1)
	r.refresh = func() { fresh <- struct{}{} }
	if err := state.Assignments.Put(t.Context(), r.store, "n0", state.Assignment{Host: "n0"}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.run(ctx) }()
	a := r.assign(t, "n1", r.delta)
	<-fresh
	targets := r.Targets()
	if len(targets) != 1 || targets[0].Host != "n1" || targets[0].Waiting != targetOff || len(targets[0].LUNs) != 0 {
		t.Errorf("the target of n1 is off, and people are shown %+v", targets)
	}
	if d := cmp.Diff(map[string]string{"n1": targetOff}, r.Waiting()); d != "" {
		t.Error(d)
	}
	if at, why := r.views().iscsi("n1", a); at != nil || why != targetOff {
		t.Errorf("n1 is told %+v, %q", at, why)
	}
	if n := r.warnings(t, "roles of n1 boot from the server, whose iSCSI target is off"); n != 1 {
		t.Errorf("people were warned %d times", n)
	}
	if err := state.Assignments.Delete(t.Context(), r.store, "n1"); err != nil {
		t.Fatal(err)
	}
	<-fresh
	if targets := r.Targets(); len(targets) != 0 {
		t.Errorf("nobody waits, and people are shown %+v", targets)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := named(strings.Fields("a b c d e")); got != "a, b, c and 2 more" {
		t.Errorf("five hosts are %q", got)
	}
}
