// Package state has the records that the reconciler works on, and the Store that keeps them: etcd, embedded in the
// process by default, through clientv3.Client and nothing else. Records are small; logs and images live elsewhere.
//
// Each kind of record has one writer; anybody may read and watch.
//
//	kind        key                     writer            what
//	source      source/fleet            follow            what Git says, what is in force, what is wrong
//	assignment  assignments/<host>      assign            what each declared host shall run, and its generation
//	release     releases/<release>      assign            what a node runs, by digest
//	build       builds/<recipe>         builds            each recipe that was ever built, or is being built
//	base        bases/<recipe>          builds            what came out of it
//	delta       deltas/<recipe>         builds            what came out of it
//	disk        disks/<recipe>          builds            what came out of it
//	app         apps/<recipe>           builds            what came out of it
//	machine     machines/<mac>          agents            what a machine is made of, when it was first seen
//	node        nodes/<mac>             agents            what it runs and how it is: changes often
//	            (both are deleted by strangers, where no host is that machine)
//	luns        luns/<host>             luns              what a host has on the iSCSI target, with its secrets
//	order       orders/<host>           node deltas       what is to be dropped of what a host wrote
//	boot        boots/<mac>/<boot>      boots             the timeline of one boot; the last few of each machine
//	lease       leases/<mac>            dhcp              an address of the dynamic range
//	event       events/<time>-<n>       the recorder      what happened, for people; the last two thousand
package state

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/schema"
)

// A Commit names one commit of the fleet's repo.
type Commit struct {
	Hash    string    `json:"hash"`
	Subject string    `json:"subject"`
	Author  string    `json:"author"`
	Time    time.Time `json:"time"`
}

// Source is how the fleet's repo is followed.
type Source struct {
	Repo   string `json:"repo"` // without secrets
	Branch string `json:"branch"`
	Path   string `json:"path"`

	Applied   *Commit          `json:"applied,omitempty"`   // in force
	AppliedAt time.Time        `json:"appliedAt,omitzero"`  // when it came into force
	Attempted *Commit          `json:"attempted,omitempty"` // the newest seen; equal to Applied when it is good
	Problems  []schema.Problem `json:"problems,omitempty"`  // why Attempted is not in force
	Retry     time.Time        `json:"retry,omitzero"`      // when Attempted is tried again; zero: not before another commit
	// FetchError says why the repo cannot be followed now: unreachable, branch deleted, …; "" when it can.
	FetchError string    `json:"fetchError,omitempty"`
	Fetched    time.Time `json:"fetched,omitzero"` // the last time that the repo answered
	// Rewritten is when the branch last moved to a commit that does not descend from the one before (a force-push).
	Rewritten time.Time `json:"rewritten,omitzero"`
}

// An Assignment is what one host shall run.
type Assignment struct {
	Host       string        `json:"host"`
	Generation uint64        `json:"generation"` // from 1; goes up only when something changes for this host
	Commit     string        `json:"commit"`     // that last changed it
	Why        string        `json:"why"`        // that change, for people
	Since      time.Time     `json:"since"`
	Role       string        `json:"role"`
	Release    digest.Digest `json:"release"`
	Node       digest.Digest `json:"node"` // of the node files
	// Fleet fields the agent needs, frozen with the generation, so that a bad commit changes nothing.
	Spec agentapi.Assignment `json:"spec"`

	// What the generation was made of, so that a plan can say what is different now.
	Address     netip.Addr      `json:"address,omitzero"`
	BaseRecipe  images.RecipeID `json:"baseRecipe,omitempty"`
	DeltaRecipe images.RecipeID `json:"deltaRecipe,omitempty"`
	// AppRecipes are those of its apps' images, by app.
	AppRecipes map[string]images.RecipeID `json:"appRecipes,omitempty"`

	// ISCSI, where it is set, says that the host runs from LUNs of the server. How it reaches them is not part of the
	// assignment: the luns controller knows, and agents are told when they are open.
	ISCSI *ISCSI `json:"iscsi,omitempty"`
}

// ISCSI is what a host has on the server.
type ISCSI struct {
	Size int64 `json:"size"` // bytes of the disk that it writes to
	// Image, of kind "disk", is what that disk begins as; nil: it is blank, and an agent's.
	Image *images.Blob `json:"image,omitempty"`
}

// An Order is what an operator wants to be dropped of what a host wrote. It stands until there is another one: a node that was off for a
// year follows it, too.
type Order struct {
	Host  string    `json:"host"`
	Since time.Time `json:"since"`
	agentapi.DeltaOrder
}

// LUNs are what one host has on the server's iSCSI target. They hold secrets: no view, plan or log shows them.
type LUNs struct {
	Host string `json:"host"`
	// Images are the numbers of images, 1 to 255, each kept for as long as the host is to run it, or runs it.
	Images map[digest.Digest]uint16 `json:"images,omitempty"`
	// Disks are what the host writes to, in the order in which they were made. Current names the one that is LUN 0; it is
	// "" before there is one.
	Disks   []LUNDisk `json:"disks,omitempty"`
	Current string    `json:"current,omitempty"`
	Before  string    `json:"before,omitempty"` // the disk that was LUN 0 before that, and was used; "" for none
	// Unused is since when no assignment wants any of it; zero while one does.
	Unused time.Time `json:"unused,omitzero"`
	Login  time.Time `json:"login,omitzero"` // when an initiator last logged in to the current disk; zero: none did
	Used   time.Time `json:"used,omitzero"`  // when a session was last seen, to the hour while one is open
	// Next is what the machine was told to boot since Boot, while nothing shows that it does; it has no Disk where that is
	// no image that is booted as it is.
	Next *LUNBoot `json:"next,omitempty"`
	// Boot is the machine's last boot, where that is one of an image that is booted as it is.
	Boot *LUNBoot `json:"boot,omitempty"`
}

// A LUNBoot is a boot of a machine on which no agent runs: all that is known of it is what it asked for, and that it logged
// in to its disk.
type LUNBoot struct {
	MAC        string        `json:"mac"`
	ID         string        `json:"id"`
	Role       string        `json:"role"`
	Generation uint64        `json:"generation"`
	Release    digest.Digest `json:"release"`
	Node       digest.Digest `json:"node"`
	Disk       string        `json:"disk"`            // its id
	Told       time.Time     `json:"told"`            // when its boot loader was told what to boot
	Loader     uint64        `json:"loader,omitzero"` // the ISID that it logged in with
	Login      time.Time     `json:"login,omitzero"`  // when that logged in
	Booted     time.Time     `json:"booted,omitzero"` // when the system on the disk did, or was taken to run
	Seen       time.Time     `json:"seen,omitzero"`   // the last that was heard of it, where no session is open
}

// Node is the machine as a node that runs since it was told to boot; open says whether a session of it is.
func (l *LUNs) Node(open bool, now time.Time) Node {
	b := l.Boot
	n := Node{MAC: b.MAC, BootID: b.ID, Stage: string(netboot.StageScript), LastSeen: b.Told, Booted: b.Login}
	for _, t := range []time.Time{b.Login, b.Booted, b.Seen} {
		if t.After(n.LastSeen) {
			n.LastSeen = t
		}
	}
	if open {
		n.LastSeen = now
	}
	if !b.Login.IsZero() {
		n.Stage = string(netboot.StageDisk)
	}
	switch {
	case !b.Login.IsZero() && b.Disk != l.Current:
		n.Stage, n.Error = string(agentapi.StageFailed), "its disk was reset, or changed, under what it runs: boot it again"
	case !b.Booted.IsZero():
		n.Stage = string(netboot.StageBooted)
		n.Running = &agentapi.Running{Host: l.Host, Role: b.Role, Generation: b.Generation, Release: b.Release, Node: b.Node}
	}
	return n
}

// WithDisks are nodes, and with them the machines that boot an image as it is, in place of what an agent said of them
// before that. open has the hosts of which a session is open. A machine that was several hosts, since one was renamed, is the
// one that it booted as last.
func WithDisks(nodes map[string]Node, sets map[string]LUNs, open map[string]bool, now time.Time) map[string]Node {
	last := map[string]string{} // host by MAC
	for _, host := range slices.Sorted(maps.Keys(sets)) {
		b := sets[host].Boot
		if b == nil || nodes[b.MAC].LastSeen.After(b.Told) {
			continue
		}
		if other, has := last[b.MAC]; !has || b.Told.After(sets[other].Boot.Told) {
			last[b.MAC] = host
		}
	}
	if len(last) == 0 {
		return nodes
	}
	out := make(map[string]Node, len(nodes)+len(last))
	maps.Copy(out, nodes)
	for mac, host := range last {
		l := sets[host]
		out[mac] = l.Node(open[host], now)
	}
	return out
}

// A LUNDisk is a disk that one host writes to.
type LUNDisk struct {
	ID    string       `json:"id"`              // 16 hex digits; its file has this name
	Image *images.Blob `json:"image,omitempty"` // that it is copy-on-write over; nil: it began blank
	Size  int64        `json:"size"`            // bytes
	Made  time.Time    `json:"made"`
	// Opened is when an initiator was first given it; zero while none was.
	Opened time.Time `json:"opened,omitzero"`
	// Ends is when it is taken from whoever uses it then, since it was reset; zero: it was not.
	Ends time.Time `json:"ends,omitzero"`

	// The secrets belong to the disk: a machine that still runs from one that was reset must not reach its successor.
	Secret       string `json:"secret"`
	MutualSecret string `json:"mutualSecret"`
}

// Disk finds a disk by its id.
func (l *LUNs) Disk(id string) (LUNDisk, bool) {
	for _, d := range l.Disks {
		if d.ID == id {
			return d, true
		}
	}
	return LUNDisk{}, false
}

// Wanted is the disk that a host is to write to whose assignment says so: the newest of its kind that was not reset.
func (l *LUNs) Wanted(of *ISCSI) (LUNDisk, bool) {
	for _, d := range slices.Backward(l.Disks) {
		if of != nil && d.Ends.IsZero() && sameBlob(d.Image, of.Image) {
			return d, true
		}
	}
	return LUNDisk{}, false
}

func sameBlob(a, b *images.Blob) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

// BuildPhase is where a build is.
type BuildPhase string

// The phases of a build. BuildQueued is that of a recipe that has no record yet, and of one that an operator asked for.
// A build that was under way when the server died is found Running with no process: it is started again.
const (
	BuildQueued  BuildPhase = "queued"
	BuildRunning BuildPhase = "running"
	BuildDone    BuildPhase = "done"
	BuildFailed  BuildPhase = "failed"
)

// A Build is the building of one recipe.
type Build struct {
	Recipe   images.RecipeID `json:"recipe"`
	Kind     string          `json:"kind"` // "base", "delta" or "disk"
	Name     string          `json:"name"` // of the image or the role that asked first, for people
	Phase    BuildPhase      `json:"phase"`
	Step     string          `json:"step,omitempty"` // under way, or failed
	Error    string          `json:"error,omitempty"`
	Tail     []string        `json:"tail,omitempty"` // the last lines of output of a failed build
	Attempts int             `json:"attempts"`
	Started  time.Time       `json:"started,omitzero"`
	Finished time.Time       `json:"finished,omitzero"`
	Retry    time.Time       `json:"retry,omitzero"` // when a failed build is tried again
	// Asked says that an operator wants it built, whether or not a host needs it; until that build ends.
	Asked  bool          `json:"asked,omitempty"`
	Result digest.Digest `json:"result,omitempty"`
	Size   int64         `json:"size,omitempty"`
	// Parts say what the recipe is made of, for people: "package nginx", "file /etc/motd", each with its value or the
	// short digest of it. Two builds are compared by them. Empty where there are too many.
	Parts map[string]string `json:"parts,omitempty"`
}

// A Release is a release with its name, and the recipes that it came from.
type Release struct {
	ID    digest.Digest   `json:"id"`
	Base  images.RecipeID `json:"baseRecipe"`
	Delta images.RecipeID `json:"deltaRecipe"` // "" for a disk image, whose recipe is Base
	// AppRecipes are those of its apps' images, by app.
	AppRecipes map[string]images.RecipeID `json:"appRecipes,omitempty"`
	images.Release
	Created time.Time `json:"created"`
	Roles   []string  `json:"roles"` // whose release it was when it was made; the first hundred
}

// A Machine is something that booted from us, declared or not.
type Machine struct {
	agentapi.Identity
	Inventory *agentapi.Inventory `json:"inventory,omitempty"` // nil until its agent spoke
	Address   netip.Addr          `json:"address,omitzero"`    // the last one that it had
	Agent     string              `json:"agent,omitempty"`
	FirstSeen time.Time           `json:"firstSeen"`
}

// A Node is how a machine is now.
type Node struct {
	MAC      string             `json:"mac"`
	BootID   string             `json:"bootID"`
	LastSeen time.Time          `json:"lastSeen"`
	Booted   time.Time          `json:"booted,omitzero"` // when its kernel started
	Stage    string             `json:"stage"`           // the last one reached
	Kernel   digest.Digest      `json:"kernel,omitempty"`
	Running  *agentapi.Running  `json:"running,omitempty"`
	Staged   digest.Digest      `json:"staged,omitempty"`
	Fetch    *agentapi.Progress `json:"fetch,omitempty"`
	Cached   []digest.Digest    `json:"cached,omitempty"`
	// Changes is how much the node changed over its release, as it counted last in this boot; nil: not yet.
	Changes *agentapi.DeltaCount `json:"changes,omitempty"`
	Error   string               `json:"error,omitempty"`
	// Bad are the releases that it does not run though it may be told to, newest first; Good is the one that it goes back to.
	Bad      []agentapi.BadRelease `json:"bad,omitempty"`
	Good     digest.Digest         `json:"good,omitempty"`
	Warnings []string              `json:"warnings,omitempty"` // what it noticed in this boot and got past
	Session  *agentapi.Session     `json:"session,omitempty"`  // with its LUNs; nil where it runs from none
}

// BadOf is what the node says against a release that is assigned to it; nil for nothing.
func (n Node) BadOf(a Assignment) *agentapi.BadRelease {
	for _, b := range n.Bad {
		if b.Host == a.Host && b.Release == a.Release && b.Node == a.Node {
			return &b
		}
	}
	return nil
}

// A Boot is the timeline of one boot of one machine.
type Boot struct {
	ID      string    `json:"id"`
	MAC     string    `json:"mac"`
	Host    string    `json:"host,omitempty"`
	Started time.Time `json:"started"`
	Marks   []Mark    `json:"marks"`
	Bytes   int64     `json:"bytes"` // image bytes fetched for this boot: during it, and staged during the one before
	Healthy time.Time `json:"healthy,omitzero"`
	Error   string    `json:"error,omitempty"` // the last thing that went wrong
	// Kernel is when the node's kernel started, on the server's clock: the earliest time that any report of the boot
	// allows, since a report may be late, but never early. Zero until the agent's first report.
	Kernel time.Time `json:"kernel,omitzero"`
	// Loads is what came of the kernels that the machine was given; the next boot takes it over.
	Loads Loads `json:"loads,omitzero"`
}

// Loads say which kernels of a machine did not come as far as an agent, and what it goes back to.
type Loads struct {
	Served digest.Digest `json:"served,omitempty"` // release whose kernel the last script named
	Loaded digest.Digest `json:"loaded,omitempty"` // that of Served, once all files were sent, until an agent comes up
	// Dead is the release with whose kernel no agent came up the last Times in a row.
	Dead  digest.Digest `json:"dead,omitempty"`
	Times int           `json:"times,omitempty"`
	// Good is the release that the node goes back to, and Bad are those that it does not boot, as its agent said last.
	Good digest.Digest   `json:"good,omitempty"`
	Bad  []digest.Digest `json:"bad,omitempty"`
}

// A Mark is one stage of a Boot, on the server's clock.
type Mark struct {
	Stage  string    `json:"stage"`
	Time   time.Time `json:"time"`
	Detail string    `json:"detail,omitempty"`
	Bytes  int64     `json:"bytes,omitempty"`
	Error  string    `json:"error,omitempty"`
	// At is what an agent told: nanoseconds since its kernel started. Zero for what netboot's servers saw.
	At time.Duration `json:"at,omitempty"`
}

// A Lease is an address of the dynamic range, given to a machine.
type Lease struct {
	MAC      string     `json:"mac"`
	Address  netip.Addr `json:"address"`
	Hostname string     `json:"hostname,omitempty"`
	Expires  time.Time  `json:"expires"`
}

// An Event is something that happened, for people.
type Event struct {
	Time    time.Time `json:"time"`
	Kind    string    `json:"kind"`    // "source", "commit", "build", "release", "assignment", "machine", "node" or "disk"
	Subject string    `json:"subject"` // host, MAC, commit or image
	Message string    `json:"message"`
	Warning bool      `json:"warning,omitempty"` // somebody should look
}
