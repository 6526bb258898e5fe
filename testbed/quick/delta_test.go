package quick_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed/quick"
)

// TestDeltas is what a node writes over its release: shown, dropped in part, and dropped as a whole, with no byte downloaded.
func TestDeltas(t *testing.T) {
	lab := quick.Start(t, quick.Config{})
	lab.On("n1")
	lab.AwaitHealthy("n1")
	lab.Run(n1, "sh", "-c", "mkdir /srv/data && echo 12345 > /srv/data/one && echo two > /srv/data/two && echo mine > /etc/role && rm /etc/os-release && echo other > /etc/hostname && sync")

	want := []string{"removed /etc/os-release", "changed /etc/hostname", "changed /etc/role", "added /srv/data", "added /srv/data/one", "added /srv/data/two"}
	wantChanges(t, lab, want)
	s := lab.Await("the count is shown", func(s *api.Snapshot) bool { h := quick.Find(s, "n1"); return h.Changes != nil })
	if got := quick.Find(s, "n1").Changes.Changes; got != len(want) {
		t.Errorf("the server counts %d changes, want %d", got, len(want))
	}

	boot := lab.Host("n1").Boots[0].ID
	if out, status := lab.Troupe("delta", "drop", "n1", "/srv/data/two", "/etc/role", "/etc/hostname"); status != 0 {
		t.Fatalf("delta drop: status %d: %s", status, out)
	}
	lab.Cycle("n1")
	lab.AwaitBoot("n1", boot)
	wantChanges(t, lab, []string{"removed /etc/os-release", "added /srv/data", "added /srv/data/one"})
	if got := lab.Run(n1, "cat", "/etc/role", "/etc/hostname"); got != "a\nn1\n" {
		t.Errorf("after the drop: role and hostname are %q", got)
	}

	boot = lab.Host("n1").Boots[0].ID
	if out, status := lab.Troupe("reset", "n1", "--wait"); status != 0 {
		t.Fatalf("reset: status %d: %s", status, out)
	}
	lab.AwaitBoot("n1", boot)
	wantChanges(t, lab, nil)
	if n := lab.Host("n1").Boots[0].Bytes; n != 0 {
		t.Errorf("the reset fetched %d bytes, want 0", n)
	}
	boot = lab.Host("n1").Boots[0].ID
	lab.Run(n1, "sh", "-c", "echo kept > /srv/kept && sync")
	lab.Cycle("n1")
	lab.AwaitBoot("n1", boot)
	wantChanges(t, lab, []string{"added /srv/kept"}) // a reset is done once
}

// wantChanges checks what troupe delta diff lists, in any order.
func wantChanges(t *testing.T, lab *quick.Lab, want []string) {
	t.Helper()
	out, status := lab.Troupe("delta", "diff", "n1", "-o", "json")
	var d agentapi.DeltaDiff
	if err := json.Unmarshal([]byte(out), &d); err != nil || status != 0 {
		t.Fatalf("delta diff: status %d, %v: %s", status, err, out)
	}
	got := map[string]bool{}
	for _, c := range d.List {
		got[string(c.Kind)+" "+c.Path] = true
	}
	wanted := map[string]bool{}
	for _, w := range want {
		wanted[w] = true
	}
	if diff := cmp.Diff(wanted, got); diff != "" {
		t.Errorf("troupe delta diff (-want +got):\n%s\n%s", diff, strings.TrimSpace(out))
	}
}
