package reconciler

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// A stranger that is silent goes for another one; a host, and a stranger that still speaks, stay.
func TestSilentStrangersMakeRoom(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	a.strangers.most = 16
	clock := testStart
	a.now = func() time.Time { return clock }
	a.strangers.now = a.now
	a.hello(t, agentapi.Identity{MAC: testMAC}) // a host
	id := func(i int) agentapi.Identity { return agentapi.Identity{MAC: fmt.Sprintf("52:54:00:00:01:%02x", i)} }
	for i := range 16 {
		a.hello(t, id(i))
		ev := seen(netboot.StageOffer, 0)
		ev.MAC[3], ev.MAC[4], ev.MAC[5] = 0, 1, byte(i)
		a.boots.observe(ev)
	}
	a.boots.flush(t.Context())
	late := agentapi.Hello{Identity: id(99)}
	refused := func() {
		t.Helper()
		var unavailable *UnavailableError
		if _, err := a.Hello(t.Context(), testPeer, late); !errors.As(err, &unavailable) {
			t.Fatalf("one too many: %v, want an UnavailableError", err)
		}
	}
	refused()
	if err := a.strangers.forget(t.Context()); err != nil {
		t.Fatal(err)
	}
	refused() // all of the others were heard of just now
	select {
	case <-a.strangers.wake:
	default:
		t.Error("nobody is asked to make room")
	}
	clock = clock.Add(2 * freshStranger)
	if _, err := a.Report(t.Context(), testPeer, agentapi.Report{Identity: id(0), BootID: "b"}); err != nil {
		t.Fatal(err)
	}
	if err := a.strangers.forget(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.hello(t, late.Identity)
	machines, err := state.Machines.List(t.Context(), a.store)
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := state.Nodes.List(t.Context(), a.store)
	if err != nil {
		t.Fatal(err)
	}
	for _, mac := range []string{testMAC, id(0).MAC, late.MAC} {
		if _, ok := machines[mac]; !ok {
			t.Errorf("machine %s is forgotten", mac)
		}
	}
	if len(machines) != 14 || len(nodes) != 14 || len(a.boots.current) != 12 {
		t.Errorf("%d machines, %d nodes, boots of %d machines: want the host, 12 of 16 strangers, and the late one; and boots of those 12",
			len(machines), len(nodes), len(a.boots.current))
	}
}

// What a commit takes the host from counts when it is counted next; what becomes a host makes room.
func TestStrangersAreCountedByTheFleetInForce(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	a.hello(t, agentapi.Identity{MAC: testMAC})
	a.hello(t, agentapi.Identity{MAC: "52:54:00:00:01:01"})
	for _, tt := range []struct {
		mac  string // of n1
		want int
	}{{testMAC, 1}, {"52:54:00:00:01:02", 2}, {"52:54:00:00:01:01", 1}} {
		f := testFleet()
		h := f.Hosts["n1"]
		h.MAC = tt.mac
		f.Hosts["n1"] = h
		a.views.set(newView(f))
		if err := a.strangers.forget(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a.strangers.n != tt.want {
			t.Errorf("n1 is %s: %d strangers are counted, want %d", tt.mac, a.strangers.n, tt.want)
		}
	}
}

// A commit that loses many hosts may be reverted: their machines are kept for a day, though they are switched off.
func TestMachinesOfLostHostsAreKept(t *testing.T) {
	a := testAgents(t)
	a.views.set(newView(testFleet()))
	a.strangers.most = 8
	clock := testStart
	a.now = func() time.Time { return clock }
	a.strangers.now = a.now
	host := agentapi.Identity{MAC: testMAC}
	a.hello(t, host)
	if _, err := a.Report(t.Context(), testPeer, agentapi.Report{Identity: host, BootID: "b", Marks: []agentapi.Mark{{Stage: agentapi.StageHealthy, At: 1}}}); err != nil {
		t.Fatal(err)
	}
	clock = clock.Add(time.Second) // the host is the one that is silent for longest
	for i := range 7 {
		a.hello(t, agentapi.Identity{MAC: fmt.Sprintf("52:54:00:00:01:%02x", i)})
	}
	without := testFleet()
	delete(without.Hosts, "n1")
	a.views.set(newView(without))
	kept := func() bool {
		t.Helper()
		if err := a.strangers.forget(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, err := state.Machines.Get(t.Context(), a.store, testMAC)
		return err == nil
	}
	clock = clock.Add(freshHost - time.Minute)
	if !kept() {
		t.Error("forgotten within a day, though it was silent for no longer than the others")
	}
	if a.strangers.n != 6 {
		t.Errorf("%d strangers are left, want 6: others go for it", a.strangers.n)
	}
	for i := range 2 {
		a.hello(t, agentapi.Identity{MAC: fmt.Sprintf("52:54:00:00:02:%02x", i)})
	}
	clock = clock.Add(2 * time.Minute)
	if kept() {
		t.Error("kept after a day")
	}
}

// A UUID or a serial number may be claimed by anybody; while strangers fill all places, a host declared by one gets in.
func TestHostByUUIDIsNotTurnedAway(t *testing.T) {
	const uuid = "4c4c4544-0042-3510-8052-b4c04f4a3132"
	a := testAgents(t)
	f := testFleet()
	h := f.Hosts["n1"]
	h.MAC, h.UUID = "", uuid
	f.Hosts["n1"] = h
	a.views.set(newView(f))
	a.strangers.most = 1
	a.hello(t, agentapi.Identity{MAC: "52:54:00:00:01:01"})
	got, err := a.Hello(t.Context(), testPeer, agentapi.Hello{Identity: agentapi.Identity{MAC: "52:54:00:00:01:02", UUID: uuid}})
	if err != nil || got.State == agentapi.Unclaimed {
		t.Errorf("the host's first hello: %+v, %v", got, err)
	}
}
