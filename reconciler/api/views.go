package api

import (
	"net/netip"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// A Status says whether the fleet is what its repo says, and what is in the way.
type Status struct {
	Version string    `json:"version"` // of the server
	Time    time.Time `json:"time"`    // the server's now

	Repo   string `json:"repo"`
	Branch string `json:"branch"`
	Path   string `json:"path,omitempty"`

	Applied   *state.Commit `json:"applied,omitempty"` // in force
	AppliedAt time.Time     `json:"appliedAt,omitzero"`
	// Attempted is the newest commit seen, where that is not Applied; Problems say why it is not in force.
	Attempted  *state.Commit    `json:"attempted,omitempty"`
	Problems   []schema.Problem `json:"problems,omitempty"`
	FetchError string           `json:"fetchError,omitempty"` // why the repo cannot be followed now
	Fetched    time.Time        `json:"fetched,omitzero"`     // when the repo last answered
	Rewritten  time.Time        `json:"rewritten,omitzero"`   // when the branch was last force-pushed

	Hosts  HostCounts  `json:"hosts"`
	Builds BuildCounts `json:"builds"`

	// Converged: every declared host runs, healthily, what the newest commit says. Otherwise Waiting says what is missing.
	Converged bool     `json:"converged"`
	Waiting   []string `json:"waiting,omitempty"`
}

// HostCounts sums up the hosts.
type HostCounts struct {
	Total     int               `json:"total"`     // declared
	Serving   int               `json:"serving"`   // of them, those that run some release, if an older one, and pass its checks
	Healthy   int               `json:"healthy"`   // of them, in state healthy or booted: those that run what they shall run, and pass its checks
	Unclaimed int               `json:"unclaimed"` // machines that no host declares
	ByState   map[HostState]int `json:"byState"`   // declared and unclaimed
}

// BuildCounts sums up the builds that are not done.
type BuildCounts struct {
	Queued  int `json:"queued"`
	Running int `json:"running"`
	Failed  int `json:"failed"`

	Failures []Failure `json:"failures,omitempty"` // the failed ones, the newest first; 10 at most
}

// A Failure is a build that failed and is tried again.
type Failure struct {
	Name     string          `json:"name"` // of the image or role
	Recipe   images.RecipeID `json:"recipe"`
	Step     string          `json:"step,omitempty"` // that failed
	Error    string          `json:"error,omitempty"`
	Attempts int             `json:"attempts"`
	Retry    time.Time       `json:"retry,omitzero"` // when it is tried again
}

// HostState is how a host is, in one word for people.
type HostState string

// The states of a host.
const (
	HostHealthy   HostState = "healthy"     // runs what it shall run, and every check passes
	HostUnhealthy HostState = "unhealthy"   // runs what it shall run, and a check fails that passed in this boot, or does not come to pass
	HostBooting   HostState = "booting"     // Detail: how far it came
	HostWaiting   HostState = "waiting"     // its release, or its disk on the server, is not there yet; Detail: for what
	HostStaging   HostState = "staging"     // runs something older and fetches what it shall run
	HostRebooting HostState = "rebooting"   // into what it staged
	HostUnclaimed HostState = "unclaimed"   // a machine that no host declares
	HostAbsent    HostState = "absent"      // was never seen
	HostLost      HostState = "lost"        // was seen, and is silent for longer than it should be
	HostBad       HostState = "rolled-back" // runs an older release, or none, since what it shall run did not work; Detail: why
	HostFailed    HostState = "failed"      // cannot go on; Detail: why
	// HostBooted says that an image which is booted as it is runs, of the release that it shall run: no agent is there to say
	// more. It counts as healthy.
	HostBooted HostState = "booted"
)

var hostStates = []HostState{
	HostHealthy, HostUnhealthy, HostBooting, HostWaiting, HostStaging, HostRebooting, HostUnclaimed, HostAbsent, HostLost,
	HostFailed, HostBad, HostBooted,
}

// Fine says whether there is nothing to do for a host in that state.
func (s HostState) Fine() bool { return s == HostHealthy || s == HostBooted }

// A Host is a declared host with the machine that plays it, or a machine that no host declares.
type Host struct {
	Name    string            `json:"name,omitempty"` // "" where State is unclaimed
	MAC     string            `json:"mac,omitempty"`
	UUID    string            `json:"uuid,omitempty"`
	Serial  string            `json:"serial,omitempty"`
	Address netip.Addr        `json:"address,omitzero"`
	Role    string            `json:"role,omitempty"` // that it shall play
	Labels  map[string]string `json:"labels,omitempty"`

	State  HostState `json:"state"`
	Detail string    `json:"detail,omitempty"` // of State, for people
	Stage  string    `json:"stage,omitempty"`  // the last one that its boot reached

	Generation uint64        `json:"generation,omitempty"` // that it shall run
	Target     digest.Digest `json:"target,omitempty"`     // the release that it shall run; "" while that is not built
	Why        string        `json:"why,omitempty"`        // what last changed its assignment
	Commit     string        `json:"commit,omitempty"`     // that changed it
	Since      time.Time     `json:"since,omitzero"`       // when it did

	RunningRole       string             `json:"runningRole,omitempty"`
	RunningGeneration uint64             `json:"runningGeneration,omitempty"`
	Running           digest.Digest      `json:"running,omitempty"` // the release that it runs; "" for none
	Staged            digest.Digest      `json:"staged,omitempty"`
	Fetch             *agentapi.Progress `json:"fetch,omitempty"`
	Healthy           bool               `json:"healthy"` // of what it runs
	Failing           []string           `json:"failing,omitempty"`
	Error             string             `json:"error,omitempty"`

	// Changes is how much the node changed over its release; absent where it did not count that yet.
	Changes *agentapi.DeltaCount `json:"changes,omitempty"`
	// Dropping says that something of what it wrote is dropped at its next boot.
	Dropping bool `json:"dropping,omitempty"`

	BootID   string    `json:"bootID,omitempty"`
	Booted   time.Time `json:"booted,omitzero"` // when its kernel started
	LastSeen time.Time `json:"lastSeen,omitzero"`

	// Inventory and Entry are of unclaimed machines only. Entry is CUE to paste into the fleet's repo; its role is
	// still to be chosen (RoleToChoose).
	Inventory *agentapi.Inventory `json:"inventory,omitempty"`
	Propose   *Proposal           `json:"propose,omitempty"`
	Entry     string              `json:"entry,omitempty"`
}

// Serves says whether the host runs some release, if an older one than it shall, and passes its checks.
func (h Host) Serves() bool {
	return h.Running != "" && (h.Healthy || h.Stage == string(netboot.StageBooted)) && h.State != HostLost && h.Stage != string(agentapi.StageReboot)
}

// Key is what the host is listed and asked for under: its name, or for an unclaimed machine its MAC.
func (h Host) Key() string {
	if h.Name != "" {
		return h.Name
	}
	return h.MAC
}

// A Proposal is what an unclaimed machine could be called.
type Proposal struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address,omitzero"` // free in the subnet, outside the dynamic range
}

// HostDetail is everything about one host.
type HostDetail struct {
	Host
	Spec       *schema.Host      `json:"spec,omitempty"` // as declared; nil for an unclaimed machine
	Assignment *state.Assignment `json:"assignment,omitempty"`
	Machine    *state.Machine    `json:"machine,omitempty"`
	Node       *state.Node       `json:"node,omitempty"`
	Lease      *state.Lease      `json:"lease,omitempty"`
	// ISCSI is what the host has on the server's iSCSI target; nil for nothing.
	ISCSI *Target `json:"iscsi,omitempty"`
	Boots []Boot  `json:"boots"` // newest first
}

// A Boot is the timeline of one boot.
type Boot struct {
	ID      string        `json:"id"`
	MAC     string        `json:"mac"`
	Host    string        `json:"host,omitempty"`
	Started time.Time     `json:"started"`
	Healthy bool          `json:"healthy"` // it got that far
	Took    time.Duration `json:"took"`    // nanoseconds from Started to healthy, else to the last mark
	Bytes   int64         `json:"bytes"`   // image bytes fetched for it
	Error   string        `json:"error,omitempty"`
	Marks   []Mark        `json:"marks"` // in order of time
}

// A Mark is one stage reached in a Boot.
type Mark struct {
	Stage  string        `json:"stage"`
	Time   time.Time     `json:"time"`
	At     time.Duration `json:"at"`              // nanoseconds since the boot started
	Took   time.Duration `json:"took"`            // nanoseconds since the mark before; 0 with Later
	Later  bool          `json:"later,omitempty"` // it came after the boot was healthy, and is no part of its duration
	Detail string        `json:"detail,omitempty"`
	Bytes  int64         `json:"bytes,omitempty"`
	Error  string        `json:"error,omitempty"`
}

// A Role is a declared role with what came of it.
type Role struct {
	Name        string          `json:"name"`
	OS          string          `json:"os"`
	Boot        string          `json:"boot"`
	Release     digest.Digest   `json:"release,omitempty"` // that its hosts shall run; "" while it is not built
	Waiting     string          `json:"waiting,omitempty"` // what of Release is not built
	BaseRecipe  images.RecipeID `json:"baseRecipe"`
	DeltaRecipe images.RecipeID `json:"deltaRecipe"` // "" where the image is booted as it is
	Hosts       []string        `json:"hosts"`       // that shall play it, sorted
	Healthy     int             `json:"healthy"`     // of them
	// Spec is the role as declared.
	Spec schema.Role `json:"spec"`
}

// An Image is a recipe that was built, is being built, or shall be.
type Image struct {
	Name     string           `json:"name"` // of the image or role that asked first
	Kind     string           `json:"kind"` // "base", "delta" or "disk"
	Recipe   images.RecipeID  `json:"recipe"`
	Phase    state.BuildPhase `json:"phase"`
	Step     string           `json:"step,omitempty"` // under way, or failed
	Error    string           `json:"error,omitempty"`
	Tail     []string         `json:"tail,omitempty"` // the last lines of output of a failed build
	Attempts int              `json:"attempts"`
	Started  time.Time        `json:"started,omitzero"`
	Finished time.Time        `json:"finished,omitzero"`
	Retry    time.Time        `json:"retry,omitzero"`
	Digest   digest.Digest    `json:"digest,omitempty"` // of what came out
	Size     int64            `json:"size,omitempty"`   // bytes
	Used     bool             `json:"used"`             // by a release that a host shall run or runs
	Declared bool             `json:"declared"`         // by the fleet in force, for some host or for discovery
}

// ImageDetail is everything about one image; one of Base, Delta and Disk is set where it was built.
type ImageDetail struct {
	Image
	Base     *images.Base    `json:"base,omitempty"`
	Delta    *images.Delta   `json:"delta,omitempty"`
	Disk     *images.Disk    `json:"disk,omitempty"`
	App      *images.App     `json:"app,omitempty"`
	Releases []digest.Digest `json:"releases,omitempty"` // that it is part of, newest first
}

// A Noted says what the server builds for an operator who asked for an image or a role.
type Noted struct {
	Recipes []digest.Digest `json:"recipes"` // in the order in which they are built: of a role its image's and then its own
}

// A Release is what a node of some role runs.
type Release struct {
	ID      digest.Digest  `json:"id"`
	Roles   []string       `json:"roles"` // whose it was when it was made
	Created time.Time      `json:"created"`
	Size    int64          `json:"size"` // bytes of base and delta, or of the disk
	Content images.Release `json:"content"`
	// Recipes that it was made from.
	BaseRecipe  images.RecipeID `json:"baseRecipe"`
	DeltaRecipe images.RecipeID `json:"deltaRecipe"`
	Assigned    []string        `json:"assigned"` // hosts that shall run it, sorted
	Running     []string        `json:"running"`  // hosts that run it, sorted
}

// A Snapshot is the fleet at one moment: what the web page shows.
type Snapshot struct {
	Status Status        `json:"status"`
	Hosts  []Host        `json:"hosts"`  // declared by name, then unclaimed by MAC
	Images []Image       `json:"images"` // newest first
	Events []state.Event `json:"events"` // the last ones, newest first
}

// A Change is what Watch tells; exactly one field is set. The first is always a Snapshot.
type Change struct {
	Snapshot  *Snapshot    `json:"snapshot,omitempty"`
	Status    *Status      `json:"status,omitempty"`
	Host      *Host        `json:"host,omitempty"`      // new or changed
	Gone      string       `json:"gone,omitempty"`      // key of a host that is no longer there
	Image     *Image       `json:"image,omitempty"`     // new or changed
	GoneImage string       `json:"goneImage,omitempty"` // recipe of an image that is no longer there
	Event     *state.Event `json:"event,omitempty"`
}

// Apply makes s what it was after the change.
func (s *Snapshot) Apply(c Change) {
	switch {
	case c.Snapshot != nil:
		*s = *c.Snapshot
	case c.Status != nil:
		s.Status = *c.Status
	case c.Host != nil:
		s.Hosts = put(s.Hosts, *c.Host, Host.Key)
	case c.Gone != "":
		s.Hosts = remove(s.Hosts, c.Gone, Host.Key)
	case c.Image != nil:
		s.Images = put(s.Images, *c.Image, func(i Image) string { return string(i.Recipe) })
	case c.GoneImage != "":
		s.Images = remove(s.Images, c.GoneImage, func(i Image) string { return string(i.Recipe) })
	case c.Event != nil:
		s.Events = append([]state.Event{*c.Event}, s.Events...)
		s.Events = s.Events[:min(len(s.Events), snapshotEvents)]
	}
}

// Host finds a host by its key.
func (s *Snapshot) Host(key string) (Host, bool) {
	for _, h := range s.Hosts {
		if h.Key() == key {
			return h, true
		}
	}
	return Host{}, false
}

// put replaces the element of all with v's key, or appends v.
func put[T any](all []T, v T, key func(T) string) []T {
	for i := range all {
		if key(all[i]) == key(v) {
			all[i] = v
			return all
		}
	}
	return append(all, v)
}

func remove[T any](all []T, k string, key func(T) string) []T {
	kept := all[:0:0]
	for _, v := range all {
		if key(v) != k {
			kept = append(kept, v)
		}
	}
	return kept
}

// snapshotEvents is how many events a Snapshot has at most.
const snapshotEvents = 100
