package reconciler

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	blobstore "github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/source"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
	"github.com/troupe-dev/troupe/schema/load"
)

// TestMain lets this program be the evaluating child of its own loader.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "eval" {
		if err := load.Evaluate(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const (
	benchHosts = 10_000
	benchShard = 100 // hosts in a directory
	benchRoles = 10
)

// BenchmarkPushToPlan changes one of 10,000 hosts that all run what they should, and measures what comes between the
// commit and the plan for it.
func BenchmarkPushToPlan(b *testing.B) {
	b.Run(fmt.Sprint(benchHosts), func(b *testing.B) {
		f := newBenchFleet(b)
		parts := map[string][]time.Duration{}
		for b.Loop() {
			b.StopTimer()
			f.change()
			f.move()
			b.StartTimer()
			f.step(parts)
		}
		f.reportParts(parts, []string{"fetch", "load", "list records", "plan"})
	})
}

// BenchmarkPushToAssignment is the same with all controllers at work, from the moment that the branch moves to the written
// assignment: beside the plan for it there are the views that machines are answered from, and the look for builds.
func BenchmarkPushToAssignment(b *testing.B) {
	b.Run(fmt.Sprint(benchHosts), func(b *testing.B) {
		f := newBenchFleet(b)
		ctx, cancel := context.WithCancel(b.Context())
		ended := make(chan error, 1)
		go func() { ended <- f.rec.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-ended; err != nil {
				b.Error(err)
			}
		}()
		var took []time.Duration
		f.change()
		f.assigned(f.move()) // this one waits for the controllers to start
		for b.Loop() {
			b.StopTimer()
			f.change()
			b.StartTimer()
			start := time.Now()
			f.assigned(f.move())
			took = append(took, time.Since(start))
		}
		fmt.Printf("│   %-44s %8.3f\n", "push to assignment, the whole server at work", median(took).Seconds())
	})
}

// A benchFleet is a big repo, and a store whose records say that all of its hosts run what they should.
type benchFleet struct {
	b      *testing.B
	dir    string // working tree and repo
	loader *load.Loader
	rec    *Reconciler
	round  int
}

func newBenchFleet(b *testing.B) *benchFleet {
	b.Helper()
	dir := b.TempDir()
	f := &benchFleet{b: b, dir: filepath.Join(dir, "fleet"), loader: &load.Loader{}}
	f.write("fleet.cue", benchFleetCUE())
	for s := range benchHosts / benchShard {
		f.write(shardFile(s), shardCUE(s, ""))
	}
	f.git("init", "-q", "-b", "main")
	f.git("add", "-A")
	f.git("commit", "-q", "-m", "ten thousand hosts")
	f.git("checkout", "-q", "-b", "next")
	store, err := state.Open(b.Context(), filepath.Join(dir, "state"), nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := store.Close(); err != nil {
			b.Error(err)
		}
	})
	repo, err := source.Open(source.Config{Repo: f.dir, Dir: filepath.Join(dir, "mirror")})
	if err != nil {
		b.Fatal(err)
	}
	blobs, err := blobstore.Open(filepath.Join(dir, "store"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := blobs.Close(); err != nil {
			b.Error(err)
		}
	})
	f.rec, err = New(Config{Repo: repo, Branch: "main", Path: ".", Loader: f.loader, Store: store, Blobs: blobs, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	f.rec.follow.gap = 0 // commits come as fast as they are carried out
	f.settle()
	return f
}

// settle brings the first commit into force and writes what all machines say once they run it.
func (f *benchFleet) settle() {
	f.b.Helper()
	ctx := f.b.Context()
	rev, err := f.rec.cfg.Repo.Fetch(ctx)
	if err != nil {
		f.b.Fatal(err)
	}
	fleet, err := f.loader.Load(ctx, rev.Tree)
	if err != nil {
		f.b.Fatal(err)
	}
	f.built(fleet)
	f.rec.follow.fleet.Store(&inForce{fleet: fleet, commit: rev.Commit})
	p, _, err := f.rec.plan(ctx)
	if err != nil {
		f.b.Fatal(err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(64) // etcd writes what comes together with one fsync
	for _, h := range p.Hosts {
		if h.Spec == nil {
			f.b.Fatalf("host %s has no release, though all images are there", h.Name)
		}
		g.Go(func() error { return f.runs(ctx, h, fleet.Hosts[h.Name], rev.Commit.Hash) })
	}
	if err := g.Wait(); err != nil {
		f.b.Fatal(err)
	}
	p, _, err = f.rec.plan(f.b.Context())
	if err != nil || !p.Empty() {
		f.b.Fatalf("the plan for a fleet that runs what it should is not empty (error %v): %+v", err, p.Summary())
	}
}

// built writes what builds of all images leave. What is in an image matters to nobody here.
func (f *benchFleet) built(fleet *schema.Fleet) {
	f.b.Helper()
	ctx, store := f.b.Context(), f.rec.cfg.Store
	blob := func(content string) images.Blob {
		f.b.Helper()
		got, err := f.rec.cfg.Blobs.Put(ctx, strings.NewReader(content))
		if err != nil {
			f.b.Fatal(err)
		}
		return got
	}
	recipe := images.BaseRecipeOf(fleet.Images["debian"]).ID()
	base := images.Base{
		Recipe: recipe, Arch: "amd64", Image: images.Image{Blob: blob("base")}, Kernel: blob("kernel"), Modules: blob("modules"), Version: "6.1.0",
	}
	if err := state.Bases.Put(ctx, store, recipe.String(), base); err != nil {
		f.b.Fatal(err)
	}
	for name, role := range fleet.Roles {
		id := images.DeltaRecipeOf(recipe, role).ID()
		if err := state.Deltas.Put(ctx, store, id.String(), images.Delta{Recipe: id, Base: base.Image.Blob, Image: images.Image{Blob: blob(name)}}); err != nil {
			f.b.Fatal(err)
		}
	}
}

// runs writes the three records of a host whose machine runs what it should: they are as big as those of a real one.
func (f *benchFleet) runs(ctx context.Context, h plan.Host, host schema.Host, commit string) error {
	store, now := f.rec.cfg.Store, time.Now()
	a := h.Assignment(commit, now)
	if err := state.Assignments.Put(ctx, store, h.Name, a); err != nil {
		return err
	}
	id := agentapi.Identity{MAC: host.MAC, UUID: fmt.Sprintf("00000000-0000-8000-8000-%012s", h.Name[1:]), Serial: "S-" + h.Name}
	inv := agentapi.Inventory{
		CPU: agentapi.CPU{Model: "a processor of some maker", Arch: "x86_64", Sockets: 1, Cores: 8, Threads: 16}, Memory: 64 << 30,
		Disks:    []agentapi.Disk{{Name: "nvme0n1", Size: 1 << 40, Model: "a disk", Serial: "D-" + h.Name, Holds: "troupe"}},
		NICs:     []agentapi.NIC{{Name: "eth0", MAC: host.MAC, Driver: "ixgbe", Speed: 10000, Up: true}, {Name: "eth1", Driver: "ixgbe"}},
		SMBIOS:   agentapi.SMBIOS{Vendor: "some maker", Product: "a server", Serial: id.Serial, UUID: id.UUID, Board: "a board", BIOS: "1.0"},
		Firmware: "uefi",
	}
	m := state.Machine{Identity: id, Inventory: &inv, Address: host.Address, Agent: "v1", FirstSeen: now}
	if err := state.Machines.Put(ctx, store, host.MAC, m); err != nil {
		return err
	}
	return state.Nodes.Put(ctx, store, host.MAC, state.Node{
		MAC: host.MAC, BootID: "20261123T120000-abcdef", LastSeen: now, Booted: now, Stage: string(agentapi.StageHealthy), Kernel: h.Spec.Release.Kernel,
		Running: &agentapi.Running{
			Host: h.Name, Role: a.Role, Generation: a.Generation, Release: a.Release, Base: h.Spec.Release.Base.Digest,
			Delta: h.Spec.Release.Delta.Digest, Node: a.Node, Health: agentapi.Health{Healthy: true},
		},
		Cached: []digest.Digest{h.Spec.Release.Base.Digest, h.Spec.Release.Delta.Digest},
	})
}

const (
	changedShard = 42
	changedHost  = "n04201"
)

// change commits another label of one host, to a branch that nobody follows. A label is part of its node files.
func (f *benchFleet) change() {
	f.b.Helper()
	f.round++
	f.write(shardFile(changedShard), shardCUE(changedShard, fmt.Sprint("-", f.round)))
	f.git("commit", "-q", "-a", "-m", fmt.Sprint("change ", f.round))
}

// move has the followed branch be where the last commit is, and returns that.
func (f *benchFleet) move() string {
	f.b.Helper()
	f.git("update-ref", "refs/heads/main", "HEAD")
	return f.git("rev-parse", "HEAD")
}

// assigned waits until the changed host has an assignment that a commit changed.
func (f *benchFleet) assigned(commit string) {
	f.b.Helper()
	ctx, cancel := context.WithTimeout(f.b.Context(), time.Minute)
	defer cancel()
	for range f.rec.cfg.Store.Watch(ctx, state.Assignments.Prefix()) {
		a, err := state.Assignments.Get(ctx, f.rec.cfg.Store, changedHost)
		if err != nil {
			f.b.Fatal(err)
		}
		if a.Commit == commit {
			return
		}
	}
	f.b.Fatalf("host %s has no assignment of commit %s", changedHost, commit)
}

// step is what the controllers do between a commit and the plan for it, part by part.
func (f *benchFleet) step(parts map[string][]time.Duration) {
	f.b.Helper()
	ctx := f.b.Context()
	last := time.Now()
	part := func(name string, err error) {
		f.b.Helper()
		if err != nil {
			f.b.Fatalf("%s: %v", name, err)
		}
		now := time.Now()
		parts[name] = append(parts[name], now.Sub(last))
		last = now
	}
	rev, err := f.rec.cfg.Repo.Fetch(ctx)
	part("fetch", err)
	fleet, err := f.loader.Load(ctx, rev.Tree)
	part("load", err)
	obs, err := f.rec.observed(ctx)
	part("list records", err)
	p := plan.Make(fleet, rev.Commit.Hash, obs)
	part("plan", nil)
	if s := p.Summary(); s.Changed != 1 {
		f.b.Fatalf("the plan changes %d hosts, want 1", s.Changed)
	}
}

// reportParts prints the medians of the parts, and makes them metrics.
func (f *benchFleet) reportParts(parts map[string][]time.Duration, names []string) {
	var b strings.Builder
	fmt.Fprintf(&b, "│\n│ one changed host out of %d, from its commit to the plan (median of %d; seconds)\n", benchHosts, len(parts[names[0]]))
	var sum time.Duration
	for _, name := range names {
		m := median(parts[name])
		sum += m
		fmt.Fprintf(&b, "│   %-44s %8.3f\n", name, m.Seconds())
		f.b.ReportMetric(m.Seconds(), strings.ReplaceAll(name, " ", "-")+"-s")
	}
	fmt.Fprintf(&b, "│   %-44s %8.3f   goal < 1\n", "commit to plan", sum.Seconds())
	fmt.Print(b.String())
}

func median(all []time.Duration) time.Duration {
	s := slices.SortedFunc(slices.Values(all), cmp.Compare[time.Duration])
	return s[len(s)/2]
}

func benchFleetCUE() string {
	var b strings.Builder
	b.WriteString(`package fleet

network: {subnet: "10.0.0.0/8", router: "10.0.0.1", dynamic: "10.255.0.1-10.255.255.254"}
images: debian: {kind: "os", from: debian: {suite: "bookworm", kernel: "linux-image-cloud-amd64"}}
`)
	for i := range benchRoles {
		fmt.Fprintf(&b, `roles: r%d: {
	os: "debian"
	files: "/etc/motd": "role %d\n"
	#host: _
	node: files: "/etc/issue": "\(#host.name) at \(#host.address) in \(#host.labels.rack)\n"
	healthy: [{http: {port: 80}}]
}
`, i, i)
	}
	return b.String()
}

func shardFile(s int) string { return fmt.Sprintf("hosts/s%03d/hosts.cue", s) }

// shardCUE is one directory of hosts. Salt changes one of them.
func shardCUE(s int, salt string) string {
	var b strings.Builder
	b.WriteString("package fleet\n\nhosts: {\n")
	for i := s*benchShard + 1; i <= (s+1)*benchShard; i++ {
		rack := fmt.Sprintf("k%d", i/40)
		if i == s*benchShard+1 {
			rack += salt
		}
		fmt.Fprintf(&b, "\tn%05d: {mac: \"52:54:00:%02x:%02x:%02x\", address: \"10.1.%d.%d\", role: \"r%d\", labels: rack: %q}\n",
			i, i>>16&255, i>>8&255, i&255, i>>8, i&255, i%benchRoles, rack)
	}
	b.WriteString("}\n")
	return b.String()
}

func (f *benchFleet) write(name, content string) {
	f.b.Helper()
	name = filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		f.b.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		f.b.Fatal(err)
	}
}

func (f *benchFleet) git(args ...string) string {
	f.b.Helper()
	cmd := exec.CommandContext(f.b.Context(), "git", args...)
	cmd.Dir = f.dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=b", "GIT_AUTHOR_EMAIL=b@example.com",
		"GIT_COMMITTER_NAME=b", "GIT_COMMITTER_EMAIL=b@example.com")
	out, err := cmd.CombinedOutput()
	if err != nil {
		f.b.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}
