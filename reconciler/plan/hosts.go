package plan

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// A planner is one call of Make.
type planner struct {
	fleet  *schema.Fleet
	commit string
	obs    Observed

	names     []string         // of the declared hosts, sorted
	buf       canonical        // is used again for each node
	roles     map[string]*role // those that hosts have
	diffs     map[diffKey][]string
	machines  *Matching
	runs      map[string]string // MAC of the node that runs as a host
	unclaimed []string
}

// match finds each host's machine.
func (p *planner) match() {
	p.machines = Match(p.fleet.Hosts, p.obs.Machines, p.obs.Nodes)
	p.unclaimed = p.machines.Unclaimed()
	p.runs = map[string]string{}
	for mac, n := range p.obs.Nodes {
		if n.Running == nil {
			continue
		}
		if old, ok := p.runs[n.Running.Host]; !ok || newer(p.obs.Nodes, mac, old) {
			p.runs[n.Running.Host] = mac
		}
	}
}

// seen says whether a machine was ever there. A node that never said hello to this server may still be known by what
// it reports.
func (p *planner) seen(mac string) bool {
	_, recorded := p.obs.Machines[mac]
	_, reported := p.obs.Nodes[mac]
	return recorded || reported
}

// host plans one declared host.
func (p *planner) host(name string, h schema.Host) Host {
	r := p.role(h.Role)
	old, had := p.obs.Assignments[name]
	mac := p.machines.MAC(name)
	out := Host{
		Name: name, MAC: mac, ToRole: h.Role, Generation: 1, FetchBytes: -1,
		Base: r.base, Delta: r.delta, apps: r.apps, host: h,
	}
	if had {
		out.FromRole, out.From, out.Generation = old.Role, old.Release, old.Generation
	}
	want := wanted{Host: h, node: p.node(h), domain: p.fleet.Network.Domain, role: r}
	if had {
		out.Why = p.changes(&old, want)
		out.Changed = len(out.Why) > 0
	} else {
		out.Why, out.Changed = []string{"first assignment: role " + h.Role}, true
	}
	if out.Changed && had {
		out.Generation++
	}
	node := p.obs.Nodes[mac]
	if r.release == nil {
		r.waiting = append(r.waiting, name)
		out.Action = AwaitBuild
		out.Reboot = out.Changed && node.Running != nil
		out.Why = append(out.Why, r.wait)
		return out
	}
	out.To = r.id
	if out.Spec = &old.Spec; out.Changed {
		out.Spec = spec(&out, want)
	}
	out.iscsi = r.iscsi
	remounts := had && !slices.Equal(old.Spec.Persist, out.Spec.Persist)
	p.act(&out, old.Why, had, remounts, p.seen(mac), node)
	return out
}

// act finds what the machine has to do to follow out.Spec; why is what its assignment was made for.
// remounts says that other directories outlive the release: the same one is booted again.
func (p *planner) act(out *Host, why string, had, remounts, seen bool, node state.Node) {
	run, rel := node.Running, out.Spec.Release
	current := run != nil && run.Release == rel.ID && run.Node == out.Spec.Node.Digest
	out.FetchBytes = 0
	switch {
	case current || out.iscsi != nil:
	case out.Spec.RAM: // what is in memory now is gone with the reboot
		out.FetchBytes = missing(nil, rel.Blobs()...)
	default:
		out.FetchBytes = missing(node.Cached, rel.Blobs()...)
	}
	bad := node.BadOf(state.Assignment{Host: out.Name, Release: rel.ID, Node: out.Spec.Node.Digest})
	switch {
	case !seen:
		out.Action = Absent
	case current && !out.Changed:
		out.Action = None
		return
	case current && !remounts:
		out.Action = Update
		return
	case bad != nil && !out.Changed: // with other checks it may be tried again
		out.Action, out.FetchBytes = RolledBack, 0
		out.Why = []string{fmt.Sprintf("release %s does not work on it: %s", rel.ID.Short(), bad.Why)}
		return
	case run == nil && !had:
		out.Action = Claim
		out.Reboot = node.Kernel != "" && node.Kernel != rel.Kernel
	case run == nil:
		out.Action = Boot
	case restarts(out, node) && !remounts && !out.Spec.RAM:
		out.Action = Restart
	case out.FetchBytes > 0 && stages(node) && !out.Spec.RAM:
		out.Action, out.Reboot = StageAndReboot, true
	default:
		out.Action, out.Reboot = Reboot, true
	}
	if len(out.Why) == 0 {
		out.Why = []string{fmt.Sprintf("generation %d is not active yet: %s", out.Generation, why)}
	}
	switch {
	case !seen:
		out.Why = append(out.Why, neverSeen)
	case node.Stage == string(netboot.StageBooted):
		out.Why = append(out.Why, noAgent)
	}
}

// restarts says whether a node goes to a release without a reboot: it runs all of that but for apps, from the same place.
func restarts(out *Host, n state.Node) bool {
	return out.Spec.Activate == agentapi.Restart && n.Running.System == out.Spec.Release.System() && n.Running.Node == out.Spec.Node.Digest &&
		(n.Session != nil) == (out.iscsi != nil)
}

// stages says whether a node can fetch images while it runs. One that runs from the server has no cache to put them in: it
// fetches them when it has booted.
func stages(n state.Node) bool {
	return n.Session == nil && n.Stage != string(netboot.StageBooted)
}

// missing is the size of those blobs that are not in cached. What comes twice is fetched once.
func missing(cached []digest.Digest, blobs ...agentapi.Blob) int64 {
	var n int64
	for i, b := range blobs {
		if !slices.Contains(cached, b.Digest) && !slices.Contains(blobs[:i], b) {
			n += b.Size
		}
	}
	return n
}

// leave plans a host that is assigned and no longer declared.
func (p *planner) leave(name string, a state.Assignment) Host {
	out := Host{
		Name: name, Action: Leave, Changed: true, Why: []string{"host removed from the fleet"},
		FromRole: a.Role, From: a.Release, Generation: a.Generation,
	}
	mac, ok := p.runs[name]
	if !ok {
		return out
	}
	out.MAC = mac
	// A machine that another host takes over reboots for that one.
	_, out.Reboot = slices.BinarySearch(p.unclaimed, mac)
	return out
}

// agentImage is an image in the words that agents know.
func agentImage(i images.Image) agentapi.Image {
	return agentapi.Image{Blob: agentapi.Blob(i.Blob), Data: i.Data, Root: i.Root, Chunks: agentapi.Blob(i.Chunks)}
}

// spec is what the agent of a host is told that changes. One for which nothing changes is told the same as before.
func spec(out *Host, want wanted) *agentapi.Assignment {
	rel := want.role.release
	kernel := rel.Kernel.Digest
	if want.role.disk != nil {
		kernel = want.role.id // none that an agent runs on: whoever is told of this boots again, and finds the disk
	}
	s := &agentapi.Assignment{
		State: agentapi.Assigned, Host: out.Name, Generation: out.Generation, Role: out.ToRole,
		Release: &agentapi.Release{
			ID: want.role.id, Base: agentImage(rel.Base), Delta: agentImage(rel.Delta),
			Kernel: kernel, KernelArgs: rel.KernelArgs, Apps: appsOf(rel.Apps),
		},
		Node: agentapi.Node{Hostname: want.Name, Domain: want.domain, Digest: want.node},
		RAM:  want.role.Boot == bootRAM, Fresh: want.role.Role.Delta == deltaFresh, Persist: want.role.Persist,
		Disk: agentapi.Disks(want.Disk), Cache: agentapi.Cache(want.Cache), Checks: want.role.checks, HealthyWithin: healthyWithin(want.role), Activate: activateOf(want.role.Activate),
	}
	if len(want.Node.Files) > 0 {
		s.Node.Files = make(map[string]agentapi.File, len(want.Node.Files))
	}
	for path, f := range want.Node.Files {
		s.Node.Files[path] = agentapi.File(f)
	}
	if want.role.disk == nil {
		s.Release.KernelBlob, s.Release.Modules = agentapi.Blob(rel.Kernel), agentapi.Blob(rel.Modules)
	}
	if len(rel.Apps) > 0 {
		s.Release.OS = rel.OS()
	}
	s.Version = version(s)
	return s
}

// version names the content of an assignment. The generation alone would not do: a host that left and came back starts
// again at 1.
func version(s *agentapi.Assignment) string {
	e := encoder("troupe assignment 1").str(s.Host).num(s.Generation).str(s.Role).str(string(s.Release.ID)).str(string(s.Node.Digest))
	e = e.flag(s.Disk.Take).str(s.Disk.Device).num(uint64(len(s.Checks)))
	for _, c := range s.Checks {
		e = e.check(c)
	}
	if s.Activate != "" {
		e = e.str(s.Activate)
	}
	if s.RAM {
		e = e.str(bootRAM)
	}
	if s.Fresh {
		e = e.str(deltaFresh)
	}
	if len(s.Persist) > 0 {
		e = e.str("persist").num(uint64(len(s.Persist)))
	}
	for _, p := range s.Persist {
		e = e.str(p)
	}
	if s.Cache.Rate != 0 {
		e = e.str("rate").num(uint64(s.Cache.Rate)) //nolint:gosec // another number has other bytes either way
	}
	if s.HealthyWithin != 0 && s.HealthyWithin != agentapi.DefaultHealthyWithin {
		e = e.num(uint64(s.HealthyWithin))
	}
	return fmt.Sprintf("%d-%s", s.Generation, digest.Of(e).Short())
}

// activateOf is a role's way to another release as the agent gets it: "" is a reboot.
func activateOf(word string) string {
	if word == agentapi.Kexec || word == agentapi.Restart {
		return word
	}
	return ""
}

// node names what only this host has: its files, and its name and address with them. The node delta of one identity, with
// whatever programs derived from that identity, is not taken over by another. So a host with a new address reboots, gets
// the address from DHCP as its firmware starts, and begins with a fresh node delta.
func (p *planner) node(h schema.Host) digest.Digest {
	e := p.buf[:0].str("troupe node 1").str(h.Name).str(p.fleet.Network.Domain).str(addr(h.Address)).num(uint64(len(h.Node.Files)))
	if boot := p.fleet.Roles[h.Role].Boot; boot == bootISCSI || boot == bootRAM {
		e = e.str(boot) // the same files over the same release, but elsewhere
	}
	for _, path := range slices.Sorted(maps.Keys(h.Node.Files)) {
		f := h.Node.Files[path]
		e = e.str(path).str(f.Content).num(uint64(f.Mode)).num(uint64(f.UID)).num(uint64(f.GID))
	}
	p.buf = e
	return digest.Of(e)
}

// healthyWithin is the deadline of a role's hosts as the agent gets it; 0 for an image in which no agent runs.
func healthyWithin(r *role) time.Duration {
	if r.disk != nil {
		return 0
	}
	return cmp.Or(time.Duration(r.HealthyWithin), agentapi.DefaultHealthyWithin)
}

// Defaults of a check, for fleets that did not come through schema/load.
const (
	defaultEvery   = 10 * time.Second
	defaultTimeout = 5 * time.Second
)

// checksOf are a role's checks as the agent gets them.
func checksOf(list []schema.Check) []agentapi.Check {
	if len(list) == 0 {
		return nil
	}
	out := make([]agentapi.Check, len(list))
	for i, c := range list {
		out[i] = agentapi.Check{
			Unit: c.Unit, Exec: c.Exec,
			Every:   cmp.Or(time.Duration(c.Every), defaultEvery),
			Timeout: cmp.Or(time.Duration(c.Timeout), defaultTimeout),
		}
		if c.HTTP != nil {
			out[i].HTTP = &agentapi.HTTPCheck{Port: c.HTTP.Port, Path: cmp.Or(c.HTTP.Path, "/"), Status: cmp.Or(c.HTTP.Status, 200)}
		}
		if c.TCP != nil {
			out[i].TCP = &agentapi.TCPCheck{Port: c.TCP.Port}
		}
	}
	return out
}

// wanted is what a host is to be.
type wanted struct {
	schema.Host
	node   digest.Digest
	domain string
	role   *role
}

// A role is what its hosts have in common.
type role struct {
	schema.Role
	base, delta images.RecipeID // delta is "" where disk is set
	baseRecipe  images.BaseRecipe
	recipe      images.DeltaRecipe
	disk        *images.DiskRecipe         // of an image that is booted as it is, in place of the other two; its id is base
	apps        map[string]images.RecipeID // by app
	checks      []agentapi.Check
	iscsi       *state.ISCSI    // nil: its hosts run from disks of their own
	release     *images.Release // nil until it is built
	id          digest.Digest
	unfit       bool     // what is built cannot be used for it
	wait        string   // why there is no release, for people
	waiting     []string // hosts
}
