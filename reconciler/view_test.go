package reconciler

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// n2UUID is that of testFleet's n2, which declares no MAC.
const n2UUID = "1f0c9d3e-0000-4000-8000-000000000002"

func TestHostIsFoundByMACThenUUIDThenSerial(t *testing.T) {
	v := newView(testFleet())
	v.fleet.Hosts["n3"] = schema.Host{Name: "n3", Serial: "S3", Role: "web"}
	v.machines = map[string]state.Machine{
		"52:54:00:00:00:99": {Identity: agentapi.Identity{MAC: "52:54:00:00:00:99", Serial: "S3"}},
	}
	for _, tt := range []struct {
		id   agentapi.Identity
		want string
	}{
		{agentapi.Identity{MAC: testMAC}, "n1"},
		{agentapi.Identity{MAC: testMAC, UUID: n2UUID}, "n1"},
		{agentapi.Identity{MAC: "52:54:00:00:00:01", UUID: strings.ToUpper(n2UUID)}, "n2"},
		{agentapi.Identity{MAC: "52:54:00:00:00:99"}, "n3"}, // its agent told the serial number before
		{agentapi.Identity{MAC: "52:54:00:00:00:01"}, ""},
		{agentapi.Identity{}, ""},
	} {
		if got := v.host(tt.id); got != tt.want {
			t.Errorf("host of %+v: got %q, want %q", tt.id, got, tt.want)
		}
	}
}

// Two boards have the UUID of n2: DHCP, boot loader and agent of each must be told the same, before and after there is
// a record of it, and only one may be told that it is n2.
func TestBoardsThatShareAUUID(t *testing.T) {
	first, second := "52:54:00:00:00:98", "52:54:00:00:00:99"
	fleet := testFleet()
	release := digest.Of([]byte("release"))
	viewsOf := func(recorded ...string) *views {
		v := newView(fleet)
		v.assignments = map[string]state.Assignment{"n2": {Host: "n2", Role: "web", Release: release, Spec: agentapi.Assignment{Version: "7", State: agentapi.Assigned, Host: "n2"}}}
		v.releases = map[digest.Digest]state.Release{release: {ID: release}}
		v.machines = map[string]state.Machine{}
		for i, mac := range recorded {
			v.machines[mac] = state.Machine{
				Identity: agentapi.Identity{MAC: mac, UUID: n2UUID}, FirstSeen: testStart.Add(time.Duration(i) * time.Minute),
			}
		}
		vs := newViews()
		vs.set(v)
		return vs
	}
	for _, tt := range []struct {
		name     string
		recorded []string
		mac      string
		host     string
		version  string
	}{
		{"no record: it may be n2, and is not told so for good", nil, first, "n2", "new"},
		{"the first on record", []string{first}, first, "n2", "7"},
		{"the second, when the first is n2", []string{first}, second, "", "unclaimed"},
		{"the second on record", []string{first, second}, second, "", "unclaimed"},
		{"the first beside it", []string{first, second}, first, "n2", "7"},
	} {
		vs := viewsOf(tt.recorded...)
		id := agentapi.Identity{MAC: tt.mac, UUID: n2UUID}
		v, _ := vs.get()
		if got := v.assignment(id); got.Version != tt.version || got.Host != tt.host {
			t.Errorf("%s: the agent is told %q of host %q, want %q of %q", tt.name, got.Version, got.Host, tt.version, tt.host)
		}
		mac, err := net.ParseMAC(tt.mac)
		if err != nil {
			t.Fatal(err)
		}
		lease, ok := addresses{vs}.Lookup(mac, n2UUID)
		if lease.Name != tt.host || ok != (tt.host != "") {
			t.Errorf("%s: DHCP takes it for %q, want %q", tt.name, lease.Name, tt.host)
		}
		d := &director{views: vs, boots: newBoots(nil, nil), booting: func(string, *state.LUNBoot) {}}
		boot, err := d.Boot(context.Background(), netboot.Machine{MAC: mac, UUID: strings.ToUpper(n2UUID)})
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.HasPrefix(boot.Title, "n2: role web"); got != (tt.host != "") {
			t.Errorf("%s: it boots %q", tt.name, boot.Title)
		}
	}
}

// An agent that just said hello asks for its assignment by its MAC: until its record is in the view that is no reason to
// send it away.
func TestNobodyIsUnclaimedForWantOfARecord(t *testing.T) {
	v := newView(testFleet())
	id := agentapi.Identity{MAC: "52:54:00:00:00:99", UUID: n2UUID}
	if got := v.assignment(agentapi.Identity{MAC: id.MAC}); got.State != agentapi.Waiting {
		t.Errorf("without a record: got %s, want waiting", got.State)
	}
	v = newView(v.fleet)
	v.machines = map[string]state.Machine{id.MAC: {Identity: id}}
	if got := v.assignment(agentapi.Identity{MAC: id.MAC}); got.Host != "n2" {
		t.Errorf("with a record: got %+v, want one of n2", got)
	}
	v = newView(v.fleet)
	v.machines = map[string]state.Machine{id.MAC: {Identity: agentapi.Identity{MAC: id.MAC}}}
	if got := v.assignment(agentapi.Identity{MAC: id.MAC}); got.State != agentapi.Unclaimed {
		t.Errorf("with the record of a stranger: got %s, want unclaimed", got.State)
	}
}

// A board whose UUID is that of a host with another MAC is nobody, though that host's machine was never seen.
func TestDeclaredMACKeepsOthersOut(t *testing.T) {
	v := newView(testFleet())
	h := v.fleet.Hosts["n1"]
	h.UUID = "03000200-0400-0500-0006-000700080009"
	v.fleet.Hosts["n1"] = h
	id := agentapi.Identity{MAC: "52:54:00:00:00:99", UUID: h.UUID}
	if got := v.assignment(id); got.State != agentapi.Unclaimed {
		t.Errorf("without a record: got %s of host %q, want unclaimed", got.State, got.Host)
	}
	v = newView(v.fleet)
	v.machines = map[string]state.Machine{id.MAC: {Identity: id}}
	if got := v.assignment(id); got.State != agentapi.Unclaimed {
		t.Errorf("with a record: got %s of host %q, want unclaimed", got.State, got.Host)
	}
}

// A role's recipe is computed once in a view, not for each machine that waits for it: that hashes all of its files.
func TestWaitingCostsOneHashOfTheRole(t *testing.T) {
	v := newView(testFleet())
	id := agentapi.Identity{MAC: testMAC}
	first := v.assignment(id)
	base := images.BaseRecipeOf(v.fleet.Images["debian"]).ID()
	v.bases = map[images.RecipeID]images.Base{base: {Recipe: base}} // views never change; one that did shows who looks again
	if got := v.assignment(id); got.State != agentapi.Waiting || got.Version != first.Version {
		t.Errorf("asked again the same view says %q, and said %q before", got.Reason, first.Reason)
	}
}
