package plan

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// factory is the UUID that boards have whose vendor wrote none.
const factory = "03000200-0400-0500-0006-000700080009"

func recorded(mac, uuid, serial string) state.Machine {
	return state.Machine{Identity: agentapi.Identity{MAC: mac, UUID: uuid, Serial: serial}}
}

func TestMatchOneMachinePerHost(t *testing.T) {
	board := func(i, minute int) state.Machine {
		m := recorded(mac(i), factory, "To be filled by O.E.M.")
		m.FirstSeen = time.Unix(0, 0).Add(time.Duration(minute) * time.Minute)
		return m
	}
	// The busier a board is, the less may it count.
	nodes := map[string]state.Node{
		mac(2): {LastSeen: time.Unix(999, 0)}, mac(3): {LastSeen: time.Unix(9999, 0), Running: &agentapi.Running{Host: "h"}},
	}
	byMAC := schema.Host{MAC: mac(1), UUID: factory, Serial: "To be filled by O.E.M."}
	byUUID := schema.Host{UUID: factory}
	bySerial := schema.Host{Serial: "To be filled by O.E.M."}
	for _, tt := range []struct {
		name      string
		host      schema.Host
		machines  []state.Machine
		want      string // MAC of the host's machine
		unclaimed []string
	}{
		{"nothing seen", byUUID, nil, "", nil},
		{"a declared MAC that was never seen", byMAC, nil, mac(1), nil},
		{"a declared MAC", byMAC, []state.Machine{board(1, 0)}, mac(1), nil},
		{"a board with the UUID of a host that declares another MAC, never seen", byMAC, []state.Machine{board(3, 0)}, mac(1), []string{mac(3)}},
		{"the same, when that was seen", byMAC, []state.Machine{board(1, 5), board(3, 0)}, mac(1), []string{mac(3)}},
		{"one UUID", byUUID, []state.Machine{board(2, 0)}, mac(2), nil},
		{"two boards share it", byUUID, []state.Machine{board(3, 1), board(2, 0)}, mac(2), []string{mac(3)}},
		{"the same, the higher MAC first", byUUID, []state.Machine{board(3, 0), board(2, 1)}, mac(3), []string{mac(2)}},
		{"the same at one time", byUUID, []state.Machine{board(3, 1), board(2, 1), board(4, 1)}, mac(2), []string{mac(3), mac(4)}},
		{"two boards share a serial number", bySerial, []state.Machine{board(3, 1), board(2, 0)}, mac(2), []string{mac(3)}},
		{"a serial number says nothing of a host with a UUID", schema.Host{UUID: "other", Serial: bySerial.Serial}, []state.Machine{board(2, 0)}, "", []string{mac(2)}},
	} {
		machines := map[string]state.Machine{}
		for _, m := range tt.machines {
			machines[m.MAC] = m
		}
		for range 20 { // maps have another order each time
			m := Match(map[string]schema.Host{"h": tt.host}, machines, nodes)
			if got := m.MAC("h"); got != tt.want {
				t.Fatalf("%s: the host's machine is %q, want %q", tt.name, got, tt.want)
			}
			if d := cmp.Diff(tt.unclaimed, m.Unclaimed()); d != "" {
				t.Fatalf("%s: unclaimed (-want +got):\n%s", tt.name, d)
			}
			for at, rec := range machines {
				want := ""
				if at == tt.want {
					want = "h"
				}
				if got := m.Host(rec.Identity); got != want || !m.Settled(rec.Identity) {
					t.Fatalf("%s: machine %s is host %q (settled: %t), want %q and settled", tt.name, at, got, m.Settled(rec.Identity), want)
				}
			}
		}
	}
}

// A machine that boots from its second interface, its first one's cable being out, is the same host. A board of the same
// UUID is not.
func TestMatchOtherInterface(t *testing.T) {
	machines := map[string]state.Machine{
		mac(1): recorded(mac(1), factory, ""), mac(2): recorded(mac(2), factory, ""), mac(3): recorded(mac(3), factory, ""),
	}
	for at, nics := range map[string][]agentapi.NIC{
		mac(1): {{MAC: mac(1)}, {MAC: mac(2)}},
		mac(2): {{MAC: mac(1)}, {MAC: mac(2)}},
		mac(3): {{MAC: mac(1)}, {MAC: mac(3)}}, // has the first's only by its own word
	} {
		m := machines[at]
		m.Inventory = &agentapi.Inventory{NICs: nics}
		machines[at] = m
	}
	nodes := map[string]state.Node{mac(1): {LastSeen: time.Unix(1, 0)}, mac(2): {LastSeen: time.Unix(2, 0)}, mac(3): {LastSeen: time.Unix(3, 0)}}
	m := Match(map[string]schema.Host{"h": {UUID: factory}}, machines, nodes)
	if got := m.MAC("h"); got != mac(2) {
		t.Errorf("the host's machine is %s, want the interface that it was seen at last", got)
	}
	for at, want := range map[string]string{mac(1): "h", mac(2): "h", mac(3): ""} {
		if got := m.Host(agentapi.Identity{MAC: at}); got != want {
			t.Errorf("machine %s is host %q, want %q", at, got, want)
		}
	}
}

func TestMatchMachineWithoutRecord(t *testing.T) {
	hosts := map[string]schema.Host{
		"mac":    {MAC: mac(1), UUID: factory},
		"free":   {UUID: "4c4c4544-0001"},
		"held":   {UUID: "4c4c4544-0002"},
		"serial": {Serial: "S1"},
	}
	machines := map[string]state.Machine{
		mac(2): recorded(mac(2), "4C4C4544-0002", ""),
		mac(3): recorded(mac(3), "", ""),
	}
	m := Match(hosts, machines, nil)
	for _, tt := range []struct {
		id      agentapi.Identity
		want    string
		settled bool
	}{
		{agentapi.Identity{MAC: mac(1)}, "mac", true},
		{agentapi.Identity{MAC: mac(9), UUID: factory}, "", false},
		{agentapi.Identity{MAC: mac(9), UUID: "4C4C4544-0001"}, "free", false},
		{agentapi.Identity{MAC: mac(9), UUID: "4c4c4544-0002"}, "", false}, // another machine is that host
		{agentapi.Identity{MAC: mac(9), Serial: "S1"}, "serial", false},
		{agentapi.Identity{MAC: mac(9)}, "", false},
		{agentapi.Identity{MAC: mac(2)}, "held", true}, // as its record says
		{agentapi.Identity{MAC: mac(3), UUID: "4c4c4544-0001"}, "", true},
		{agentapi.Identity{}, "", false},
	} {
		if got := m.Host(tt.id); got != tt.want {
			t.Errorf("host of %+v: got %q, want %q", tt.id, got, tt.want)
		}
		if got := m.Settled(tt.id); got != tt.settled {
			t.Errorf("settled for %+v: got %t, want %t", tt.id, got, tt.settled)
		}
	}
}
