// Package apitest has a fleet in many states at once, as records in a real store behind a real api.Server, for the tests
// of whatever shows a fleet to people.
package apitest

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// A Fleet is a fleet and the records about it. Change it, then Put it.
type Fleet struct {
	Now    time.Time // all times in the records are relative to it
	Schema *schema.Fleet
	Source state.Source

	Assignments map[string]state.Assignment
	Builds      map[string]state.Build
	Bases       map[string]images.Base
	Deltas      map[string]images.Delta
	Disks       map[string]images.Disk
	LUNSets     map[string]state.LUNs
	Targets     []api.Target // of LUNSets, and of hosts with agents
	Releases    map[string]state.Release
	Machines    map[string]state.Machine
	Nodes       map[string]state.Node
	Boots       map[string]state.Boot // by id of record: MAC/boot
	Leases      map[string]state.Lease
	Events      map[string]state.Event
}

// Hash is a commit hash made of c.
func Hash(c string) string { return strings.Repeat(c, 40)[:40] }

// MAC is the MAC of host number n.
func MAC(n int) string { return fmt.Sprintf("52:54:00:77:%02x:%02x", n>>8, n&0xff) }

// New is a fleet with an OS, the roles web, idle and db (whose build failed), and no hosts.
func New(now time.Time) *Fleet {
	f := &Fleet{
		Now: now.UTC().Truncate(time.Second),
		Schema: &schema.Fleet{
			Network: schema.Network{
				Subnet: netip.MustParsePrefix("10.77.0.0/16"), Router: netip.MustParseAddr("10.77.0.1"),
				Dynamic: schema.Range{First: netip.MustParseAddr("10.77.200.0"), Last: netip.MustParseAddr("10.77.200.255")},
			},
			Images: map[string]schema.Image{"debian": {Name: "debian", Kind: "os", From: schema.From{Debian: &schema.Debian{
				Suite: "bookworm", Mirror: "http://deb.debian.org/debian", Components: []string{"main"}, Arch: "amd64",
				Packages: []string{"systemd-sysv", "udev"}, Kernel: "linux-image-cloud-amd64",
			}}}},
			Roles: map[string]schema.Role{},
			Hosts: map[string]schema.Host{},

			Discovery: schema.Discovery{OS: "debian"},
		},
		Assignments: map[string]state.Assignment{}, Builds: map[string]state.Build{}, Bases: map[string]images.Base{},
		Deltas: map[string]images.Delta{}, Releases: map[string]state.Release{}, Machines: map[string]state.Machine{},
		Nodes: map[string]state.Node{}, Boots: map[string]state.Boot{}, Leases: map[string]state.Lease{},
		Events: map[string]state.Event{}, Disks: map[string]images.Disk{}, LUNSets: map[string]state.LUNs{},
	}
	f.Source = state.Source{
		Repo: "https://git.example.com/fleet.git", Branch: "main", Path: ".",
		Applied:   &state.Commit{Hash: Hash("a1"), Subject: "n2: run web", Author: "Ada", Time: f.ago(3*time.Hour + 30*time.Minute)},
		AppliedAt: f.ago(3*time.Hour + 30*time.Minute), Fetched: f.ago(4 * time.Second),
	}
	f.Source.Attempted = f.Source.Applied
	f.base("debian")
	f.Role("web", true)
	f.Role("idle", true)
	f.Role("db", false)
	return f
}

func agentImage(i images.Image) agentapi.Image {
	return agentapi.Image{Blob: agentapi.Blob(i.Blob), Data: i.Data, Root: i.Root}
}

func (f *Fleet) ago(d time.Duration) time.Time { return f.Now.Add(-d) }

func blob(of string, size int64) images.Blob {
	return images.Blob{Digest: digest.Of([]byte(of)), Size: size}
}

func image(of string, size int64) images.Image {
	return images.Image{Blob: blob(of, size), Data: size * 127 / 128, Root: digest.Of([]byte("tree of " + of)).Hex()}
}

func (f *Fleet) base(name string) {
	id := images.BaseRecipeOf(f.Schema.Images[name]).ID()
	b := images.Base{
		Recipe: id, Arch: "amd64", Image: image(name, 243<<20), Kernel: blob("vmlinuz", 8<<20), Modules: blob("modules", 5<<20),
		Version: "6.1.0-40-cloud-amd64", Packages: []string{"systemd=252.38-1~deb12u1", "udev=252.38-1~deb12u1"},
	}
	f.Bases[string(id)] = b
	f.Builds[string(id)] = state.Build{
		Recipe: id, Kind: "base", Name: name, Phase: state.BuildDone, Attempts: 1, Started: f.ago(26 * time.Hour),
		Finished: f.ago(26*time.Hour - 48*time.Second), Result: b.Image.Digest, Size: b.Image.Size,
	}
}

// Role declares a role; its build is done, or failed.
func (f *Fleet) Role(name string, done bool) {
	r := schema.Role{Name: name, OS: "debian", Boot: "disk", Files: map[string]schema.File{"/etc/motd": {Content: name + "\n", Mode: 0o644}}}
	if name == "web" {
		r.Healthy = []schema.Check{{HTTP: &schema.HTTPCheck{Port: 80, Path: "/", Status: 200}}}
	}
	f.Schema.Roles[name] = r
	base := images.BaseRecipeOf(f.Schema.Images[r.OS]).ID()
	id := images.DeltaRecipeOf(base, r).ID()
	build := state.Build{Recipe: id, Kind: "delta", Name: name, Attempts: 1, Started: f.ago(25 * time.Hour), Finished: f.ago(25*time.Hour - 3*time.Second)}
	if !done {
		build.Phase, build.Step, build.Error, build.Attempts = state.BuildFailed, "packages", "apt-get: exit status 100", 3
		build.Tail = []string{"Reading package lists...", "Building dependency tree...", "E: Unable to locate package postgresql-99"}
		build.Started, build.Finished, build.Retry = f.ago(7*time.Minute), f.ago(6*time.Minute+5*time.Second), f.Now.Add(9*time.Minute+30*time.Second)
		f.Builds[string(id)] = build
		return
	}
	delta := images.Delta{Recipe: id, Base: f.Bases[string(base)].Image.Blob, Image: image("delta "+name, 120<<10)}
	build.Phase, build.Result, build.Size = state.BuildDone, delta.Image.Digest, delta.Image.Size
	f.Builds[string(id)], f.Deltas[string(id)] = build, delta
	b := f.Bases[string(base)]
	rel := images.Release{Base: b.Image, Delta: delta.Image, Kernel: b.Kernel, Modules: b.Modules}
	f.Releases[string(rel.ID())] = state.Release{
		ID: rel.ID(), Base: base, Delta: id, Release: rel, Created: f.ago(25*time.Hour - 3*time.Second), Roles: []string{name},
	}
}

// Release is the id of a role's release.
func (f *Fleet) Release(role string) digest.Digest {
	for _, r := range f.Releases {
		if r.Roles[0] == role {
			return r.ID
		}
	}
	return ""
}

// Declare adds host number n, named n<n>, and assigns it its role's release, if there is one.
func (f *Fleet) Declare(n int, role string) string {
	name := fmt.Sprintf("n%d", n)
	f.Schema.Hosts[name] = schema.Host{
		Name: name, MAC: MAC(n), Address: netip.AddrFrom4([4]byte{10, 77, byte(n >> 8), byte(10 + n)}), Role: role, //nolint:gosec // a test has few hosts
	}
	f.Assign(name, role, 1, "new host")
	return name
}

// Assign makes role's release the assignment of a host; it leaves a host alone whose role has none.
func (f *Fleet) Assign(name, role string, generation uint64, why string) {
	rel := f.Release(role)
	if rel == "" {
		return
	}
	r := f.Releases[string(rel)]
	node := digest.Of([]byte("node " + name + role))
	f.Assignments[name] = state.Assignment{
		Host: name, Generation: generation, Commit: Hash("a1"), Why: why, Since: f.ago(3*time.Hour + 30*time.Minute), Role: role,
		Release: rel, Node: node,
		Spec: agentapi.Assignment{
			Version: fmt.Sprint(name, generation), State: agentapi.Assigned, Host: name, Generation: generation, Role: role,
			Release: &agentapi.Release{ID: rel, Base: agentImage(r.Release.Base), Delta: agentImage(r.Release.Delta), Kernel: r.Kernel.Digest},
			Node:    agentapi.Node{Hostname: name, Digest: node},
		},
	}
}

// Run has host number n run what it is assigned, healthily, since 3 hours.
func (f *Fleet) Run(n int) {
	name, mac := fmt.Sprintf("n%d", n), MAC(n)
	a := f.Assignments[name]
	started := f.ago(3*time.Hour + 12*time.Minute + time.Duration(n)*time.Second)
	boot := f.boot(mac, name, started, fullBoot)
	boot.Healthy = boot.Marks[len(boot.Marks)-1].Time
	f.Boots[mac+"/"+boot.ID] = boot
	f.Machines[mac] = state.Machine{
		Identity: agentapi.Identity{MAC: mac, UUID: fmt.Sprintf("4c4c4544-0000-1000-8000-%012x", n)}, Inventory: inventory(n, "blank"),
		Address: f.Schema.Hosts[name].Address, Agent: "v0.1", FirstSeen: f.ago(80 * time.Hour),
	}
	f.Nodes[mac] = state.Node{
		MAC: mac, BootID: boot.ID, LastSeen: f.ago(2 * time.Second), Booted: started.Add(9 * time.Second), Stage: string(agentapi.StageHealthy),
		Running: &agentapi.Running{
			Host: name, Role: a.Role, Generation: a.Generation, Release: a.Release, Base: a.Spec.Release.Base.Digest,
			Delta: a.Spec.Release.Delta.Digest, Node: a.Node, Health: agentapi.Health{Healthy: true},
		},
	}
}

// step is one mark of a boot, after the one before.
type step struct {
	stage  string
	after  time.Duration
	detail string
	bytes  int64
}

var fullBoot = []step{
	{"dhcp-offer", 0, "10.77.0.11, BIOS", 0},
	{"tftp", 400 * time.Millisecond, "undionly.kpxe", 0},
	{"script", 3 * time.Second, "", 0},
	{"kernel", 5200 * time.Millisecond, "vmlinuz, initramfs", 0},
	{"agent-up", 2100 * time.Millisecond, "eth0 10.77.0.11", 0},
	{"cache", 350 * time.Millisecond, "made on /dev/vda", 0},
	{"fetch", 6400 * time.Millisecond, "2 images", 254926848},
	{"mount", 90 * time.Millisecond, "", 0},
	{"switch-root", 40 * time.Millisecond, "", 0},
	{"service", 7800 * time.Millisecond, "", 0},
	{"healthy", 1900 * time.Millisecond, "", 0},
}

func (f *Fleet) boot(mac, host string, started time.Time, steps []step) state.Boot {
	b := state.Boot{ID: started.UTC().Format("20060102T150405") + "-" + mac[12:14] + mac[15:], MAC: mac, Host: host, Started: started}
	at := started
	for _, s := range steps {
		at = at.Add(s.after)
		b.Marks = append(b.Marks, state.Mark{Stage: s.stage, Time: at, Detail: s.detail, Bytes: s.bytes})
		b.Bytes += s.bytes
	}
	return b
}

func inventory(n int, holds string) *agentapi.Inventory {
	return &agentapi.Inventory{
		CPU: agentapi.CPU{Model: "AMD EPYC 7443P 24-Core Processor", Arch: "x86_64", Sockets: 1, Cores: 24, Threads: 48}, Memory: 128 << 30,
		Disks:  []agentapi.Disk{{Name: "nvme0n1", Size: 960197124096, Model: "SAMSUNG MZQL2960HCJR", Holds: holds}},
		NICs:   []agentapi.NIC{{Name: "eth0", MAC: MAC(n), Driver: "ice", Speed: 25000, Up: true}},
		SMBIOS: agentapi.SMBIOS{Vendor: "Supermicro", Product: "AS-1114S", Serial: fmt.Sprintf("SM%06dX", n)}, Firmware: "uefi",
	}
}

// Mixed is a fleet with a host in every state, an unclaimed machine, and a newest commit that is refused.
func Mixed(now time.Time) *Fleet {
	f := New(now)
	f.Source.Attempted = &state.Commit{Hash: Hash("b2"), Subject: "db: add postgres", Author: "Bob", Time: f.ago(90 * time.Second)}
	f.Source.Problems = []schema.Problem{
		{File: "hosts.cue", Line: 7, Column: 12, Message: `hosts.n4: unknown role "dbb"`},
		{File: "roles.cue", Line: 31, Column: 3, Message: `roles.db.pakages: field not allowed`},
	}
	f.Declare(1, "web")
	f.Run(1)
	f.staging(f.Declare(2, "idle"))
	f.Declare(3, "web")
	f.Run(3)
	f.update(3, func(n *state.Node) {
		n.Running.Health = agentapi.Health{Failing: []string{"http port 80 /: connection refused"}}
	})
	f.Declare(4, "db")
	f.booting(4, fullBoot[:5], "wait")
	f.Declare(5, "web")
	f.Declare(6, "idle")
	f.Run(6)
	f.update(6, func(n *state.Node) { n.LastSeen = f.ago(11*time.Minute + 20*time.Second) })
	f.Declare(7, "web")
	boot := f.boot(MAC(7), "", f.ago(13*time.Second), fullBoot[:4])
	f.Boots[MAC(7)+"/"+boot.ID] = boot
	f.Declare(8, "web")
	f.booting(8, fullBoot[:5], "cache")
	f.update(8, func(n *state.Node) {
		n.Stage, n.Error = "failed", "no disk may be taken: vda holds ext4 (set disk: take: true to lose what is on it)"
	})
	f.Declare(9, "idle")
	f.Run(9)
	f.update(9, func(n *state.Node) { n.Stage = "reboot" })
	f.Unclaimed(99)
	f.event(4*time.Hour, "commit", "a1a1a1a1a1", "in force: n2: run web", false)
	f.event(7*time.Minute, "build", "db", "build failed at packages: apt-get: exit status 100", true)
	f.event(90*time.Second, "commit", "b2b2b2b2b2", "refused, 2 problems; the fleet stays as it is", true)
	f.event(40*time.Second, "node", "n3", "no longer healthy: http port 80 /: connection refused", true)
	return f
}

// staging has n2 run idle while it fetches web.
func (f *Fleet) staging(name string) {
	f.Run(2)
	h := f.Schema.Hosts[name]
	h.Role = "web"
	f.Schema.Hosts[name] = h
	f.Assign(name, "web", 2, "role idle -> web")
	f.update(2, func(n *state.Node) {
		n.Stage = "service"
		n.Fetch = &agentapi.Progress{Release: f.Release("web"), Done: 45 << 20, Total: 100 << 20}
	})
}

// update changes the node of host number n.
func (f *Fleet) update(n int, change func(*state.Node)) {
	node := f.Nodes[MAC(n)]
	change(&node)
	f.Nodes[MAC(n)] = node
}

// booting has host number n in a boot that came to stage, after steps.
func (f *Fleet) booting(n int, steps []step, stage string) {
	mac := MAC(n)
	b := f.boot(mac, fmt.Sprintf("n%d", n), f.ago(25*time.Second), steps)
	f.Boots[mac+"/"+b.ID] = b
	f.Machines[mac] = state.Machine{Identity: agentapi.Identity{MAC: mac}, Inventory: inventory(n, "ext4"), FirstSeen: f.ago(time.Minute)}
	f.Nodes[mac] = state.Node{MAC: mac, BootID: b.ID, LastSeen: f.ago(time.Second), Booted: f.ago(16 * time.Second), Stage: stage}
}

// Unclaimed adds a machine that no host declares.
func (f *Fleet) Unclaimed(n int) {
	f.booting(n, fullBoot[:5], "wait")
	mac := MAC(n)
	m := f.Machines[mac]
	m.Serial, m.Address, m.Inventory = fmt.Sprintf("SM%06dX", n), netip.MustParseAddr("10.77.200.7"), inventory(n, "blank")
	f.Machines[mac] = m
	f.Leases[mac] = state.Lease{MAC: mac, Address: m.Address, Expires: f.Now.Add(50 * time.Minute)}
}

func (f *Fleet) event(ago time.Duration, kind, subject, message string, warning bool) {
	e := state.Event{Time: f.ago(ago), Kind: kind, Subject: subject, Message: message, Warning: warning}
	f.Events[fmt.Sprintf("%019d-%06d", e.Time.UnixNano(), len(f.Events))] = e
}

// Diskless has host number n run from the server: an image of kind "disk", which it booted as it is, or with an agent.
func (f *Fleet) Diskless(n int, agent bool) {
	name, mac := fmt.Sprintf("n%d", n), MAC(n)
	img := blob("cloud", 4<<30)
	f.Schema.Images["cloud"] = schema.Image{Name: "cloud", Kind: "disk", From: schema.From{Disk: &schema.DiskFile{URL: "https://example.com/cloud.qcow2", SHA256: strings.Repeat("0", 64)}}}
	f.Schema.Roles["vm"] = schema.Role{Name: "vm", OS: "cloud", Boot: "iscsi"}
	id := images.DiskRecipeOf(f.Schema.Images["cloud"]).ID()
	f.Disks[string(id)] = images.Disk{Recipe: id, Image: img, Format: "qcow2", File: 600 << 20}
	f.Builds[string(id)] = state.Build{
		Recipe: id, Kind: "disk", Name: "cloud", Phase: state.BuildDone, Attempts: 1, Started: f.ago(26 * time.Hour),
		Finished: f.ago(26*time.Hour - 40*time.Second), Result: img.Digest, Size: img.Size,
	}
	rel := images.Release{Disk: img}
	f.Releases[string(rel.ID())] = state.Release{ID: rel.ID(), Base: id, Release: rel, Created: f.ago(25 * time.Hour), Roles: []string{"vm"}}
	t := api.Target{
		Host: name, Name: "iqn.2026-11.dev.troupe:" + name, Initiator: "iqn.2026-11.dev.troupe:" + name + ":initiator", Disk: fmt.Sprintf("%016x", n),
		Made:     f.ago(20 * time.Hour),
		Sessions: []api.Session{{Peer: fmt.Sprintf("10.77.0.%d:40001", 10+n), Since: f.ago(3 * time.Hour), Commands: 1234, BytesIn: 5 << 20, BytesOut: 300 << 20}},
	}
	disk := api.LUN{Host: name, Kind: api.LUNDelta, Image: img.Digest, Size: 16 << 30, Delta: 120 << 20, Sessions: 1}
	if agent {
		f.Declare(n, "web")
		f.Run(n)
		base := f.Assignments[name].Spec.Release.Base
		disk.Kind, disk.Image, disk.Size, disk.Delta = api.LUNDisk, "", 16<<30, 33<<20
		t.LUNs = []api.LUN{disk, {Host: name, LUN: 1, Kind: api.LUNImage, Image: base.Digest, Size: base.Size, Sessions: 1}}
	} else {
		f.Declare(n, "vm")
		a := f.Assignments[name]
		a.ISCSI = &state.ISCSI{Size: disk.Size, Image: &img}
		f.Assignments[name] = a
		t.LUNs = []api.LUN{disk}
		f.LUNSets[name] = state.LUNs{Host: name, Current: t.Disk, Boot: &state.LUNBoot{
			MAC: mac, ID: "b1", Role: "vm", Generation: 1, Release: a.Release, Node: a.Node, Disk: t.Disk,
			Told: f.ago(3*time.Hour + time.Minute), Login: f.ago(3*time.Hour + 50*time.Second), Booted: f.ago(3 * time.Hour),
		}}
	}
	f.Targets = append(f.Targets, t)
}

// Records are what a view is made of, without a store.
func (f *Fleet) Records() *api.Records {
	r := &api.Records{
		Now: f.Now, Version: "test", Planned: f.Source.Applied.Hash, Fleet: f.Schema, Source: f.Source, Assignments: f.Assignments,
		Builds: f.Builds, Bases: f.Bases, Deltas: f.Deltas, Disks: f.Disks, Releases: f.Releases, Machines: f.Machines, Nodes: f.Nodes,
		Boots: map[string]state.Boot{}, Events: f.Events,
	}
	for _, b := range f.Boots {
		if r.Boots[b.MAC].Started.Before(b.Started) {
			r.Boots[b.MAC] = b
		}
	}
	return r
}

// Put writes all records into a store.
func (f *Fleet) Put(ctx context.Context, s *state.Store) error {
	err := state.Sources.Put(ctx, s, state.SourceID, f.Source)
	put(ctx, s, state.Assignments, f.Assignments, &err)
	put(ctx, s, state.Builds, f.Builds, &err)
	put(ctx, s, state.Bases, f.Bases, &err)
	put(ctx, s, state.Deltas, f.Deltas, &err)
	put(ctx, s, state.Disks, f.Disks, &err)
	put(ctx, s, state.LUNSets, f.LUNSets, &err)
	put(ctx, s, state.Releases, f.Releases, &err)
	put(ctx, s, state.Machines, f.Machines, &err)
	put(ctx, s, state.Nodes, f.Nodes, &err)
	put(ctx, s, state.Boots, f.Boots, &err)
	put(ctx, s, state.Leases, f.Leases, &err)
	put(ctx, s, state.Events, f.Events, &err)
	return err
}

func put[T any](ctx context.Context, s *state.Store, kind state.Kind[T], all map[string]T, err *error) {
	for id, v := range all {
		if *err == nil {
			*err = kind.Put(ctx, s, id, v)
		}
	}
}

// Controllers stand in for the reconciler's behind an api.Server, and remember what they were asked.
type Controllers struct {
	Assigned agentapi.Assignment // the answer to every agent
	Planned  plan.Plan           // the answer to every plan
	LogText  string              // of every build

	mu    sync.Mutex
	seen  func() error // what a look at the repo does; nil: nothing
	asked []string
}

// Asked is what was asked so far, in order.
func (c *Controllers) Asked() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.asked...)
}

func (c *Controllers) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, fmt.Sprintf(format, args...))
}

// Poke notes that it was called.
func (c *Controllers) Poke() { c.note("poke") }

// Look notes that it was called, and does what a look does.
func (c *Controllers) Look(context.Context) error {
	c.note("look")
	c.mu.Lock()
	seen := c.seen
	c.mu.Unlock()
	if seen == nil {
		return nil
	}
	return seen()
}

// Push has each look at the repo from now on do what a look does that sees a new commit.
func (c *Controllers) Push(seen func() error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = seen
}

// Hello implements api.Agents.
func (c *Controllers) Hello(_ context.Context, peer netip.Addr, h agentapi.Hello) (agentapi.Assignment, error) {
	c.note("hello %s from %s", h.MAC, peer)
	return c.Assigned, nil
}

// Assignment implements api.Agents.
func (c *Controllers) Assignment(_ context.Context, mac, after string, wait time.Duration) (agentapi.Assignment, error) {
	c.note("assignment %s after %q wait %s", mac, after, wait)
	return c.Assigned, nil
}

// Report implements api.Agents.
func (c *Controllers) Report(_ context.Context, peer netip.Addr, r agentapi.Report) (agentapi.ReportReply, error) {
	c.note("report %s from %s", r.MAC, peer)
	return agentapi.ReportReply{Version: c.Assigned.Version}, nil
}

// Plan implements api.Planner.
func (c *Controllers) Plan(_ context.Context, f *schema.Fleet) (plan.Plan, error) {
	c.note("plan %d hosts", len(f.Hosts))
	return c.Planned, nil
}

// PlanRevision implements api.Planner: the revision "bad" is no valid fleet, and "none" is not in the repo.
func (c *Controllers) PlanRevision(_ context.Context, revision string) (plan.Plan, error) {
	c.note("plan %s", revision)
	switch revision {
	case "bad":
		return plan.Plan{}, schema.Problems{{File: "hosts.cue", Line: 3, Column: 9, Message: `hosts.n1: unknown role "wbe"`}}
	case "none":
		return plan.Plan{}, fmt.Errorf("revision %q: %w", revision, state.ErrNotFound)
	}
	return c.Planned, nil
}

// imagesOf implements api.Images for the fleet.
type imagesOf struct {
	*Controllers
	fleet *Fleet
}

// Build notes that it was called. Nothing is built.
func (i imagesOf) Build(_ context.Context, name string) ([]digest.Digest, error) {
	builds := plan.BuildsOf(i.fleet.Schema, name)
	if len(builds) == 0 {
		return nil, fmt.Errorf("image %q: %w", name, state.ErrNotFound)
	}
	i.note("build %s", name)
	var recipes []digest.Digest
	for _, b := range builds {
		recipes = append(recipes, b.Recipe)
	}
	return recipes, nil
}

// Log reads the same text for every recipe.
func (i imagesOf) Log(_ context.Context, recipe digest.Digest, follow bool) (io.ReadCloser, error) {
	i.note("log %s follow %t", recipe.Short(), follow)
	return io.NopCloser(strings.NewReader(i.LogText)), nil
}

// lunsOf implements api.LUNs for the fleet.
type lunsOf struct {
	*Controllers
	fleet *Fleet
}

// A conflict is an error about how things are.
type conflict string

func (c conflict) Error() string { return string(c) }
func (conflict) Conflict() bool  { return true }

// Targets are the fleet's. A reset is over when it was told once.
func (l lunsOf) Targets() []api.Target {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := slices.Clone(l.fleet.Targets)
	for i := range l.fleet.Targets {
		if t := &l.fleet.Targets[i]; t.Resetting {
			t.Resetting, t.Disk = false, "00000000000000ff"
		}
	}
	return all
}

// InUse implements api.LUNs.
func (l lunsOf) InUse() map[string]bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	open := map[string]bool{}
	for _, t := range l.fleet.Targets {
		open[t.Host] = len(t.Sessions) > 0
	}
	return open
}

// Waiting implements api.LUNs.
func (l lunsOf) Waiting() map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	why := map[string]string{}
	for _, t := range l.fleet.Targets {
		if t.Waiting != "" {
			why[t.Host] = t.Waiting
		}
	}
	return why
}

// Reset notes that it was called. A system without an agent is reset by force alone.
func (l lunsOf) Reset(_ context.Context, host string, force bool) error {
	l.note("reset %s force %t", host, force)
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.fleet.Targets {
		t := &l.fleet.Targets[i]
		switch {
		case t.Host != host:
		case t.LUNs[0].Kind == api.LUNDelta && !force:
			return conflict("host " + host + " is logged in to its disk")
		default:
			t.Resetting = true
			return nil
		}
	}
	return conflict("host " + host + " has no disk on the server")
}

// Server is an api.Server over s that serves f and asks c.
func Server(s *state.Store, f *Fleet, c *Controllers) *api.Server {
	return &api.Server{
		Store: s, Fleet: func() *schema.Fleet { return f.Schema }, Poke: c.Poke, Look: c.Look, Agents: c, Planner: c, Images: imagesOf{c, f}, LUNs: lunsOf{c, f},
		Started: f.ago(time.Hour),
	}
}
