package state

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A machine is the host that it booted as last, whatever other host it was, and whoever is first in a map.
func TestMachineIsTheHostThatItBootedAsLast(t *testing.T) {
	const mac = "52:54:00:00:00:01"
	start := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
	sets := map[string]LUNs{}
	for i, host := range []string{"b", "d", "a", "c"} { // in this order
		told := start.Add(time.Duration(i) * time.Minute)
		sets[host] = LUNs{Host: host, Current: host, Boot: &LUNBoot{MAC: mac, ID: host, Disk: host, Told: told, Login: told, Booted: told}}
	}
	sets["agents"] = LUNs{Host: "agents"}
	now := start.Add(time.Hour)
	for range 32 { // maps have no order
		got := WithDisks(map[string]Node{mac: {MAC: mac, LastSeen: start}}, sets, map[string]bool{"b": true}, now)
		want := map[string]Node{mac: {
			MAC: mac, BootID: "c", Stage: "booted", LastSeen: start.Add(3 * time.Minute), Booted: start.Add(3 * time.Minute), Running: got[mac].Running,
		}}
		if d := cmp.Diff(want, got); d != "" || got[mac].Running.Host != "c" {
			t.Fatalf("it is %+v (-want +got):\n%s", got[mac].Running, d)
		}
	}
	agents := map[string]Node{mac: {MAC: mac, LastSeen: now}}
	if d := cmp.Diff(agents, WithDisks(agents, sets, nil, now)); d != "" {
		t.Errorf("an agent spoke since (-want +got):\n%s", d)
	}
}
