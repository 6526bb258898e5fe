// Package plan says what each host of a fleet should do and why: a pure function of the fleet and of what was observed,
// without I/O and without a clock. The same input gives the same plan, in the same order.
package plan

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// Observed is what there is: records, by the names that they have in package state. Any of the maps may be nil.
type Observed struct {
	Assignments map[string]state.Assignment // by host
	Bases       map[images.RecipeID]images.Base
	Deltas      map[images.RecipeID]images.Delta
	Disks       map[images.RecipeID]images.Disk
	Apps        map[images.RecipeID]images.App
	Builds      map[images.RecipeID]state.Build
	Machines    map[string]state.Machine // by MAC
	Nodes       map[string]state.Node    // by MAC
}

// A Plan is what a fleet wants of the machines.
type Plan struct {
	Commit string  `json:"commit"`
	Builds []Build `json:"builds,omitempty"` // apps first, then bases, deltas and disks, each by name
	Hosts  []Host  `json:"hosts"`            // by name: all that are declared, and those that leave
	// Unclaimed are the MACs of machines that booted from us and that no host declares.
	Unclaimed []string `json:"unclaimed,omitempty"`
	// Releases are those of the fleet's roles whose images exist, Created left out. They are for the controllers.
	Releases []state.Release `json:"-"`
}

// Kind is what a build makes.
type Kind string

// The kinds of a build.
const (
	KindApp   Kind = "app"
	KindBase  Kind = "base"
	KindDelta Kind = "delta"
	KindDisk  Kind = "disk"
)

// BuildState is how far a build is that the fleet needs.
type BuildState string

// The states of a build. One that is done is not in a plan.
const (
	BuildMissing BuildState = "missing"
	BuildRunning BuildState = "running"
	BuildFailed  BuildState = "failed"
)

// A Build is a recipe that has to be built. Exactly one of Base, Delta, Disk and App is set.
type Build struct {
	Recipe images.RecipeID     `json:"recipe"`
	Kind   Kind                `json:"kind"`
	Name   string              `json:"name"` // of the OS image or the role; the first by name where several need it
	State  BuildState          `json:"state"`
	Error  string              `json:"error,omitempty"` // of the last try, where State is failed
	After  images.RecipeID     `json:"after,omitempty"` // the base that must be built first; "" where it is there
	Hosts  []string            `json:"hosts,omitempty"` // that wait for it, by name
	Parts  map[string]string   `json:"-"`               // what to record with the build: see state.Build
	Base   *images.BaseRecipe  `json:"-"`
	Delta  *images.DeltaRecipe `json:"-"`
	Disk   *images.DiskRecipe  `json:"-"`
	App    *images.AppRecipe   `json:"-"`
	// Dir is the directory of the repo that an App is made of, as Commit has it; "" for an App that is made of something else.
	Dir    string `json:"-"`
	Commit string `json:"-"`
}

// Action is what happens to a host's machine next.
type Action string

// The actions.
const (
	// None: the node runs what it should.
	None Action = "none"
	// Update: the node takes up the new generation as it runs: other checks, or another disk policy.
	Update Action = "update"
	// AwaitBuild: the release is not there yet; what runs goes on.
	AwaitBuild Action = "build"
	// Restart: only apps differ, and the role wants no reboot for that: the node fetches them, mounts them anew and restarts them.
	Restart Action = "restart"
	// StageAndReboot: the node fetches images in the background, then reboots.
	StageAndReboot Action = "stage-and-reboot"
	// Reboot: all images are in the node's cache, or on the server, or the node has no cache yet to fetch them into.
	Reboot Action = "reboot"
	// Boot: the machine is known and runs nothing; it runs the release when it boots next, or goes on booting.
	Boot Action = "boot"
	// Absent: the machine has never been seen.
	Absent Action = "absent"
	// Claim: a machine that no host declared becomes this host.
	Claim Action = "claim"
	// RolledBack: the release did not work on the node, which runs an older one, or waits, until it is told to run another.
	RolledBack Action = "rolled-back"
	// Leave: the host is no longer in the fleet; its machine reboots to discovery.
	Leave Action = "leave"
)

// A Host is what should happen to one host.
type Host struct {
	Name   string `json:"name"`
	MAC    string `json:"mac,omitempty"` // of its machine, else as declared; "" where neither is known
	Action Action `json:"action"`
	// Changed says that the host gets another generation, or loses its assignment. An action without it is the rest of
	// an earlier change that the node has not carried out yet.
	Changed bool `json:"changed,omitempty"`
	// Why are the reasons, for people. Empty only if the action is none.
	Why      []string      `json:"why,omitempty"`
	FromRole string        `json:"fromRole,omitempty"` // "" for a host without an assignment
	ToRole   string        `json:"toRole,omitempty"`   // "" for a host that leaves
	From     digest.Digest `json:"from,omitempty"`     // release assigned now
	To       digest.Digest `json:"to,omitempty"`       // release to be assigned; "" while it is not built
	// FetchBytes are image bytes that the node has to fetch; -1 where that is not known before the build.
	FetchBytes int64 `json:"fetchBytes"`
	Reboot     bool  `json:"reboot,omitempty"` // a node that runs, or waits in discovery, boots again for it
	// Generation is the host's when the plan is carried out.
	Generation uint64 `json:"generation,omitempty"`

	// Spec is what the host's agent is told; nil while the release is not there. It is not sent to operators: it holds
	// the content of files.
	Spec        *agentapi.Assignment `json:"-"`
	Base, Delta images.RecipeID      `json:"-"` // what the release is made of

	apps map[string]images.RecipeID // and its apps, by name

	host  schema.Host
	iscsi *state.ISCSI // nil for a host that runs from a disk of its own
}

// Reasons of today, not of the change.
const (
	neverSeen = "its machine has never been seen"
	noAgent   = "no agent is there to reboot it: it waits for its next boot"
)

// Assignment is the record that carries h out, for a host with a Spec. Since is when.
func (h Host) Assignment(commit string, since time.Time) state.Assignment {
	return state.Assignment{
		Host: h.Name, Generation: h.Generation, Commit: commit, Why: join(slices.DeleteFunc(slices.Clone(h.Why), func(why string) bool { return why == neverSeen || why == noAgent })), Since: since,
		Role: h.ToRole, Release: h.To, Node: h.Spec.Node.Digest, Spec: *h.Spec,
		Address: h.host.Address, BaseRecipe: h.Base, DeltaRecipe: h.Delta, AppRecipes: h.apps, ISCSI: h.iscsi,
	}
}

// Make says what fleet, of a commit, wants in the face of obs. The fleet must be one that schema/load let through.
func Make(fleet *schema.Fleet, commit string, obs Observed) Plan {
	p := &planner{fleet: fleet, commit: commit, obs: obs, names: slices.Sorted(maps.Keys(fleet.Hosts)), roles: map[string]*role{}, diffs: map[diffKey][]string{}}
	p.match()
	out := Plan{Commit: commit, Hosts: make([]Host, 0, len(fleet.Hosts)), Unclaimed: p.unclaimed}
	for _, name := range p.names {
		out.Hosts = append(out.Hosts, p.host(name, fleet.Hosts[name]))
	}
	for name := range obs.Assignments {
		if _, ok := fleet.Hosts[name]; !ok {
			out.Hosts = append(out.Hosts, p.leave(name, obs.Assignments[name]))
		}
	}
	if len(out.Hosts) > len(p.names) {
		slices.SortFunc(out.Hosts, func(a, b Host) int { return cmp.Compare(a.Name, b.Name) })
	}
	out.Builds = p.builds()
	out.Releases = p.releases()
	return out
}

// Empty says whether nothing is left to do: nothing to build, and every host that has been seen runs what it should.
func (p Plan) Empty() bool {
	return len(p.Builds) == 0 && !slices.ContainsFunc(p.Hosts, func(h Host) bool {
		return h.Changed || h.Action != None && h.Action != Absent
	})
}

// A Summary counts a plan's entries.
type Summary struct {
	Builds     int            `json:"builds"`       // to do, failed ones included
	Failed     int            `json:"failedBuilds"` // of those
	Hosts      map[Action]int `json:"hosts"`        // by action; those without any are left out
	Changed    int            `json:"changed"`      // hosts that get another generation or leave
	Reboots    int            `json:"reboots"`
	FetchBytes int64          `json:"fetchBytes"` // by all hosts, as far as known
	Unclaimed  int            `json:"unclaimed"`
}

// Summary counts.
func (p Plan) Summary() Summary {
	s := Summary{Builds: len(p.Builds), Hosts: map[Action]int{}, Unclaimed: len(p.Unclaimed)}
	for _, b := range p.Builds {
		if b.State == BuildFailed {
			s.Failed++
		}
	}
	for _, h := range p.Hosts {
		s.Hosts[h.Action]++
		s.FetchBytes += max(h.FetchBytes, 0)
		if h.Changed {
			s.Changed++
		}
		if h.Reboot {
			s.Reboots++
		}
	}
	return s
}
