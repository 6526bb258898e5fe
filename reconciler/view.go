package reconciler

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// A view is all that a machine's question needs, in memory and never changed: to know what a machine is waits for no record. The
// views controller makes a new one when a record changed.
type view struct {
	fleet       *schema.Fleet // nil before the first good commit
	assignments map[string]state.Assignment
	releases    map[digest.Digest]state.Release
	bases       map[images.RecipeID]images.Base
	disks       map[images.RecipeID]images.Disk
	apps        map[images.RecipeID]images.App
	builds      map[images.RecipeID]state.Build
	machines    map[string]state.Machine // by MAC
	orders      map[string]state.Order   // by host
	luns        lunViews
	local       localBoot

	addresses map[netip.Addr]string // host names
	match     func() *plan.Matching // made once, of the machines that the view was given by the first question
	// waits says for people why a role has no release yet, by role; each made once, like match: it needs the recipe's id,
	// for which all files of the role are hashed, and each machine that waits asks for it.
	waits map[string]func() string
}

func newView(f *schema.Fleet) *view {
	v := &view{fleet: f, addresses: map[netip.Addr]string{}, waits: map[string]func() string{}}
	v.match = sync.OnceValue(func() *plan.Matching {
		if f == nil {
			return plan.Match(nil, v.machines, nil)
		}
		return plan.Match(f.Hosts, v.machines, nil)
	})
	if f == nil {
		return v
	}
	for name, h := range f.Hosts {
		if h.Address.IsValid() {
			v.addresses[h.Address] = name
		}
		if v.waits[h.Role] == nil {
			v.waits[h.Role] = sync.OnceValue(func() string { return v.waitsFor(h.Role) })
		}
	}
	return v
}

// host finds the declared host that a machine is; "" for none.
func (v *view) host(id agentapi.Identity) string { return v.match().Host(id) }

// declares says whether a host declares this MAC.
func (v *view) declares(mac string) bool { return v.match().Declares(mac) }

// standing is what a machine is to the fleet.
func (v *view) standing(mac string) standing {
	if v.host(agentapi.Identity{MAC: mac}) != "" {
		return declared
	}
	if _, spoke := v.machines[mac]; spoke {
		return unclaimed
	}
	return stranger
}

// assignment is what a machine shall run.
func (v *view) assignment(id agentapi.Identity) agentapi.Assignment {
	name := v.host(id)
	if !v.match().Settled(id) && (name != "" || id.UUID == "" && id.Serial == "") {
		// Nobody formats a disk as a host before it is on record that no other machine says the same of itself, and
		// nobody leaves what he runs because all that is known of him yet is a MAC.
		return agentapi.Assignment{
			Version: "new", State: agentapi.Waiting, Reason: "the machine is being taken up", Host: name, Role: v.roleOf(name),
		}
	}
	if name == "" {
		return agentapi.Assignment{Version: "unclaimed", State: agentapi.Unclaimed, Reason: "no host of the fleet is this machine"}
	}
	a, ok := v.assignments[name]
	switch {
	case !ok:
		return v.waiting(name, v.waits[v.fleet.Hosts[name].Role]())
	case a.ISCSI != nil:
		return v.ordered(name, v.diskless(name, a))
	}
	return v.ordered(name, v.local.in(a.Spec))
}

// localBoot is what machines that boot from their own disks get from this server, whatever they run.
type localBoot struct {
	agent   agentapi.Blob
	loaders *agentapi.Loaders
}

// in is an assignment with that. It is part of what its version names: a node hears of a new agent, and takes it up as it runs.
func (l localBoot) in(spec agentapi.Assignment) agentapi.Assignment {
	if l.agent.Digest == "" {
		return spec
	}
	spec.Agent, spec.Loaders = l.agent, l.loaders
	text := string(l.agent.Digest)
	if l.loaders != nil {
		text += fmt.Sprint(*l.loaders)
	}
	spec.Version += "-" + digest.Of([]byte(text)).Short()
	return spec
}

// ordered is an assignment with what an operator wants to be dropped of what the host wrote.
func (v *view) ordered(name string, spec agentapi.Assignment) agentapi.Assignment {
	o, ok := v.orders[name]
	if !ok || spec.State != agentapi.Assigned {
		return spec
	}
	spec.Delta = &o.DeltaOrder
	spec.Version += "-" + o.ID
	return spec
}

// waiting is what a host is told that has to wait, and why.
func (v *view) waiting(name, why string) agentapi.Assignment {
	return agentapi.Assignment{
		Version: "waiting:" + digest.Of([]byte(name+"\x00"+why)).Short(),
		State:   agentapi.Waiting, Reason: why, Host: name, Role: v.fleet.Hosts[name].Role,
	}
}

// diskless is the assignment of a host that runs from LUNs of the server, once they are open.
func (v *view) diskless(name string, a state.Assignment) agentapi.Assignment {
	at, why := v.luns.iscsi(name, a)
	if at == nil {
		return v.waiting(name, why)
	}
	spec := a.Spec
	spec.ISCSI = at
	// Whoever hears of the version cannot tell the secrets from it: that of the disk stands for them.
	spec.Version += fmt.Sprintf("-%s-%d-%d-%d", at.Disk, at.Base, at.Delta, at.Port)
	return spec
}

// roleOf is the role of a host; "" where there is no such host.
func (v *view) roleOf(host string) string {
	if v.fleet == nil {
		return ""
	}
	return v.fleet.Hosts[host].Role
}

// waitsFor computes what waits has. It leaves out the step of a build that is under way: each is
// news to all machines that wait.
func (v *view) waitsFor(role string) string {
	built := plan.Artifacts[images.RecipeID]{Bases: v.bases, Disks: v.disks, Apps: v.apps, Builds: v.builds}
	m := built.Release(v.fleet, v.fleet.Roles[role]).Missing
	switch m.Build.Phase {
	case state.BuildRunning:
		m.Build.Step = ""
	case state.BuildDone: // and the host's assignment comes next
		m.Build.Phase, m.Build.Step = state.BuildRunning, ""
	}
	return m.String()
}

// discovery is the OS base that a machine boots into which has nothing to run: the one of its role, else the fleet's
// choice, else any that was ever built, so that a machine is seen even while the fleet's image is not there.
func (v *view) discovery(host string) (images.Base, bool) {
	var wanted []string
	if host != "" {
		wanted = append(wanted, v.fleet.Roles[v.fleet.Hosts[host].Role].OS)
	}
	if v.fleet != nil {
		wanted = append(wanted, v.fleet.Discovery.OS)
	}
	for _, os := range wanted {
		img, ok := v.fleet.Images[os]
		if !ok || img.From.Debian == nil {
			continue
		}
		if b, ok := v.bases[images.BaseRecipeOf(img).ID()]; ok {
			return b, true
		}
	}
	ids := make([]images.RecipeID, 0, len(v.bases))
	for id := range v.bases {
		ids = append(ids, id)
	}
	if len(ids) == 0 {
		return images.Base{}, false
	}
	return v.bases[slices.Min(ids)], true
}

// views holds the newest view and wakes who waits for a newer one.
type views struct {
	mu      sync.Mutex
	current *view
	changed chan struct{} // closed when current is replaced
}

func newViews() *views {
	return &views{current: newView(nil), changed: make(chan struct{})}
}

// get returns the newest view and a channel that is closed when there is a newer one.
func (vs *views) get() (*view, <-chan struct{}) {
	vs.mu.Lock()
	defer vs.mu.Unlock()
	return vs.current, vs.changed
}

// standing is that of each machine in the newest view; nil before a fleet is in force.
func (vs *views) standing() func(mac string) standing {
	v, _ := vs.get()
	if v.fleet == nil {
		return nil
	}
	return v.standing
}

func (vs *views) set(v *view) {
	v.match() // so that no question waits for it
	vs.mu.Lock()
	defer vs.mu.Unlock()
	vs.current = v
	close(vs.changed)
	vs.changed = make(chan struct{})
}
