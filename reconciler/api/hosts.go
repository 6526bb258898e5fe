package api

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// How long a machine may be silent before it counts as lost. A running agent reports every few seconds; firmware,
// boot loader and kernel say nothing for as long as a download takes on a slow link.
const (
	silentRunning = 30 * time.Second
	silentBooting = 5 * time.Minute
)

// firstChecks is how long a host may take from its OS's init to its first passing checks before it counts as unhealthy.
const firstChecks = 5 * time.Minute

// Hosts are the declared hosts by name, then the machines that no host declares, by MAC.
func (r *Records) Hosts() []Host {
	declared := r.declared()
	seen := r.sightings()
	machines := plan.Match(declared, r.Machines, r.Nodes)
	releases := r.releasesWanted()
	all := make([]Host, 0, len(declared)+len(seen))
	claimed := make(map[string]bool, len(declared))
	for _, name := range slices.Sorted(maps.Keys(declared)) {
		mac := machines.MAC(name)
		claimed[mac] = true
		h := r.host(declared[name], mac)
		if s, ok := seen[mac]; ok {
			h.see(s)
			h.State, h.Detail = r.stateOf(r.Assignments[name], releases[h.Role], s)
		}
		h.Dropping = r.drops(name, mac)
		all = append(all, h)
	}
	first := len(all)
	for _, mac := range slices.Sorted(maps.Keys(seen)) {
		if !claimed[mac] {
			all = append(all, r.unclaimed(mac, seen[mac]))
		}
	}
	r.propose(all[first:])
	return all
}

// drops says whether something of what a host wrote is still to be dropped.
func (r *Records) drops(host, mac string) bool {
	o, ok := r.Orders[host]
	run := r.Nodes[mac].Running
	return ok && (run == nil || run.Host != host || run.Order != o.ID)
}

// declared are the hosts of the fleet in force. Before that is loaded, just after the server started, those that have
// an assignment stand in for them.
func (r *Records) declared() map[string]schema.Host {
	if r.Fleet != nil {
		return r.Fleet.Hosts
	}
	all := make(map[string]schema.Host, len(r.Assignments))
	for name, a := range r.Assignments {
		all[name] = schema.Host{Name: name, Role: a.Role}
	}
	for _, mac := range slices.Sorted(maps.Keys(r.Nodes)) {
		n := r.Nodes[mac]
		if n.Running == nil {
			continue
		}
		if h, ok := all[n.Running.Host]; ok && (h.MAC == "" || n.LastSeen.After(r.Nodes[h.MAC].LastSeen)) {
			h.MAC = mac
			all[h.Name] = h
		}
	}
	return all
}

// host is what the repo and the reconciler say of a declared host, played by the machine mac ("" where none was seen).
func (r *Records) host(spec schema.Host, mac string) Host {
	a, m := r.Assignments[spec.Name], r.Machines[mac]
	h := Host{
		Name: spec.Name, MAC: mac, UUID: cmp.Or(spec.UUID, m.UUID), Serial: cmp.Or(spec.Serial, m.Serial),
		Address: spec.Address, Role: spec.Role, Labels: spec.Labels,
		Generation: a.Generation, Target: a.Release, Why: a.Why, Commit: a.Commit, Since: a.Since,
		State: HostAbsent, Detail: "never seen",
	}
	if !h.Address.IsValid() {
		h.Address = m.Address
	}
	return h
}

// unclaimed is the view of a machine that no host declares.
func (r *Records) unclaimed(mac string, s sighting) Host {
	m := r.Machines[mac]
	h := Host{
		MAC: mac, UUID: m.UUID, Serial: m.Serial, Address: m.Address,
		State: HostUnclaimed, Inventory: m.Inventory,
	}
	h.see(s)
	switch {
	case r.silent(s) > silentBooting:
		h.Detail = "not seen for " + short(r.Now.Sub(s.last))
	case s.err != "":
		h.Detail = s.err
	case h.RunningRole != "":
		h.Detail = "still runs " + h.RunningRole
	case m.Inventory == nil:
		h.Detail = "booting (" + s.stage + ")"
	}
	return h
}

// A sighting is the last that is known of a machine: what its node reported, or, if it is in firmware or in a boot
// loader since, how far that came.
type sighting struct {
	stage   string
	last    time.Time
	err     string
	node    state.Node // what of it still holds
	booting bool       // it has not come to its OS's init
}

// sightings are of all machines that ever asked for something, by MAC.
func (r *Records) sightings() map[string]sighting {
	all := make(map[string]sighting, len(r.Machines))
	for mac, n := range r.Nodes {
		s := sighting{stage: r.reached(n), last: n.LastSeen, err: n.Error, node: n}
		s.booting = isBooting(s.stage) || n.Running == nil
		all[mac] = s
	}
	for mac, b := range r.Boots {
		if len(b.Marks) == 0 || b.ID == r.Nodes[mac].BootID {
			continue
		}
		m := b.Marks[len(b.Marks)-1]
		if m.Time.Before(all[mac].last) {
			continue
		}
		all[mac] = sighting{
			stage: m.Stage, last: m.Time, err: m.Error, booting: true,
			node: state.Node{MAC: mac, BootID: b.ID, Cached: r.Nodes[mac].Cached, Bad: r.Nodes[mac].Bad},
		}
	}
	return all
}

// reached is the last stage that a node came to. A node that failed and has no error any more went on from there: what
// it came to before is as far as it is known to be.
func (r *Records) reached(n state.Node) string {
	const failed = string(agentapi.StageFailed)
	if n.Stage != failed || n.Error != "" {
		return n.Stage
	}
	if b, ok := r.Boots[n.MAC]; ok && b.ID == n.BootID {
		for _, m := range slices.Backward(b.Marks) {
			if m.Stage != failed {
				return m.Stage
			}
		}
	}
	if n.Running != nil {
		return string(agentapi.StageService)
	}
	return string(agentapi.StageAgent)
}

// see takes over what is known of the machine.
func (h *Host) see(s sighting) {
	n := s.node
	h.Stage, h.BootID, h.Booted, h.LastSeen, h.Error = s.stage, n.BootID, n.Booted, s.last, s.err
	h.Staged, h.Fetch, h.Changes = n.Staged, n.Fetch, n.Changes
	if run := n.Running; run != nil && !s.booting {
		h.RunningRole, h.RunningGeneration, h.Running = run.Role, run.Generation, run.Release
		h.Healthy, h.Failing = run.Health.Healthy, run.Health.Failing
	}
}

// isBooting says whether stage is one of a boot that has not come to the OS's init yet.
func isBooting(stage string) bool {
	switch stage {
	case string(netboot.StageOffer), string(netboot.StageTFTP), string(netboot.StageScript), string(netboot.StageKernel), string(netboot.StageDisk),
		string(agentapi.StageAgent), string(agentapi.StageWait), string(agentapi.StageCache),
		string(agentapi.StageFetch), string(agentapi.StageMount), string(agentapi.StageSwitch):
		return true
	}
	return false
}

// silent is for how long a machine has said nothing to a server that was there to hear it.
func (r *Records) silent(s sighting) time.Duration {
	if s.last.Before(r.Started) {
		return r.Now.Sub(r.Started)
	}
	return r.Now.Sub(s.last)
}

// stateOf says how a host is whose machine was seen at least once.
func (r *Records) stateOf(a state.Assignment, want plan.Wanted, s sighting) (HostState, string) {
	leaving := s.booting || s.stage == string(agentapi.StageReboot)
	if silent := r.silent(s); silent > silentBooting || !leaving && silent > silentRunning {
		return HostLost, "not seen for " + short(r.Now.Sub(s.last))
	}
	bad := s.node.BadOf(a)
	switch {
	case bad != nil && !s.runs(a) && want.Missing.What == "" && (want.ID == "" || want.ID == a.Release): // else another one comes
		return HostBad, rolledBack(*bad, s)
	case s.stage == string(agentapi.StageFailed):
		return HostFailed, s.err
	case s.stage == string(agentapi.StageReboot):
		return HostRebooting, ""
	case r.NoLUNs[a.Host] != "" && !s.runs(a):
		return HostWaiting, r.NoLUNs[a.Host]
	case s.booting && s.stage != string(agentapi.StageWait):
		return HostBooting, bootDetail(s)
	case want.Missing.What != "":
		return HostWaiting, want.Missing.String()
	case a.Generation == 0 || a.Spec.State == agentapi.Waiting || want.ID != "" && a.Release != want.ID:
		return HostWaiting, cmp.Or(a.Spec.Reason, "being planned")
	case s.booting: // it was told to wait, and its next question will be answered
		return HostBooting, s.stage
	}
	return r.stateRunning(a, s)
}

// rolledBack is why a host does not run what it shall, and what it does in place of that.
func rolledBack(b agentapi.BadRelease, s sighting) string {
	text := fmt.Sprintf("release %s: %s", b.Release.Short(), b.Why)
	switch run := s.node.Running; {
	case run != nil && !s.booting && run.Health.Healthy:
		return text
	case run != nil && !s.booting:
		return text + "; what runs is not healthy: " + strings.Join(run.Health.Failing, "; ")
	}
	return text + " (" + join(s.stage, s.err) + ")"
}

// stateRunning says how a host is that runs some role while it has an assignment.
func (r *Records) stateRunning(a state.Assignment, s sighting) (HostState, string) {
	n := s.node
	health := n.Running.Health
	current := s.runs(a)
	switch {
	case s.stage == string(netboot.StageBooted) && !current:
		return HostWaiting, fmt.Sprintf("for its next boot, which is into generation %d", a.Generation)
	case s.stage == string(netboot.StageBooted):
		return HostBooted, ""
	case !current:
		if n.Staged != "" && n.Staged == a.Release {
			return HostRebooting, join("staged", s.err)
		}
		return HostStaging, join(percent(n.Fetch), s.err)
	case health.Healthy:
		return HostHealthy, s.err
	case s.stage == string(agentapi.StageService) && len(health.Failing) == 0:
		return HostBooting, s.stage
	case r.starting(n):
		return HostBooting, join("checks", strings.Join(health.Failing, "; "))
	}
	return HostUnhealthy, strings.Join(health.Failing, "; ")
}

// runs says whether a machine runs what a is.
func (s sighting) runs(a state.Assignment) bool {
	run := s.node.Running
	return run != nil && run.Host == a.Host && run.Release == a.Release && run.Node == a.Node
}

// starting says whether a node that is not healthy has not been so in this boot, and its services may still need time.
func (r *Records) starting(n state.Node) bool {
	began := n.Booted
	if b, ok := r.Boots[n.MAC]; ok && b.ID == n.BootID {
		// A report's marks are written before the rest of it: until that is, the node is as it was before it was healthy.
		if !b.Healthy.IsZero() && !n.LastSeen.Before(b.Healthy) {
			return false
		}
		for _, m := range slices.Backward(b.Marks) {
			if m.Stage == string(agentapi.StageService) {
				began = m.Time
				break
			}
		}
	}
	return r.Now.Sub(began) < firstChecks
}

// bootDetail is how far a boot came, and what it is trying to get past.
func bootDetail(s sighting) string {
	if p := percent(s.node.Fetch); p != "" {
		return join(string(agentapi.StageFetch)+" "+p, s.err)
	}
	return join(s.stage, s.err)
}

// join writes what there is of how far something came and what keeps it.
func join(far, why string) string {
	if far == "" || why == "" {
		return far + why
	}
	return far + ": " + why
}

// percent is how far a transfer came, "" where there is none.
func percent(p *agentapi.Progress) string {
	if p == nil || p.Total <= 0 {
		return ""
	}
	return fmt.Sprintf("%d%%", min(100, p.Done*100/p.Total))
}

// short writes d as people say it: its largest unit, and whole.
func short(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
