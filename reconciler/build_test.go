package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/build"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// A testBuilder makes small blobs in a real store. Its errors, and a gate that builds wait at, are set by tests.
type testBuilder struct {
	blobs *store.Store

	fleet *atomic.Pointer[inForce] // what the controller builds for

	mu    sync.Mutex
	err   error
	built []string
	gate  chan struct{} // nil: builds wait for nothing
}

func (b *testBuilder) begin(ctx context.Context, what string, p build.Progress) error {
	p.Step("packages")
	fmt.Fprintln(p, "unpacking", what)
	b.mu.Lock()
	b.built = append(b.built, what)
	err, gate := b.err, b.gate
	b.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

func (b *testBuilder) put(ctx context.Context, text string) images.Blob {
	blob, err := b.blobs.Put(ctx, strings.NewReader(text))
	if err != nil {
		panic(err)
	}
	return blob
}

func (b *testBuilder) Base(ctx context.Context, r images.BaseRecipe, p build.Progress) (images.Base, error) {
	if err := b.begin(ctx, "base", p); err != nil {
		return images.Base{}, err
	}
	return images.Base{Recipe: r.ID(), Arch: r.Arch, Image: images.Image{Blob: b.put(ctx, "image")}, Kernel: b.put(ctx, "kernel"), Modules: b.put(ctx, "modules")}, nil
}

func (b *testBuilder) Delta(ctx context.Context, r images.DeltaRecipe, base images.Base, p build.Progress) (images.Delta, error) {
	what := strings.TrimSpace("delta " + strings.Join(r.Run, ""))
	if err := b.begin(ctx, what, p); err != nil {
		return images.Delta{}, err
	}
	return images.Delta{Recipe: r.ID(), Base: base.Image.Blob, Image: images.Image{Blob: b.put(ctx, what)}}, nil
}

func (b *testBuilder) Disk(ctx context.Context, r images.DiskRecipe, p build.Progress) (images.Disk, error) {
	if err := b.begin(ctx, "disk", p); err != nil {
		return images.Disk{}, err
	}
	return images.Disk{Recipe: r.ID(), Image: b.put(ctx, "disk"), Format: "raw"}, nil
}

func (b *testBuilder) App(ctx context.Context, r images.AppRecipe, src build.AppSource, p build.Progress) (images.App, error) {
	if err := b.begin(ctx, "app", p); err != nil {
		return images.App{}, err
	}
	page, err := fs.ReadFile(src.Tree, "index.html")
	if err != nil {
		return images.App{}, err
	}
	return images.App{Recipe: r.ID(), Image: images.Image{Blob: b.put(ctx, string(page)), Data: 4096, Root: strings.Repeat("0", 64)}}, nil
}

func (b *testBuilder) set(err error, gate chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err, b.gate = err, gate
}

func (b *testBuilder) log() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.built, ", ")
}

// newTestBuilds is the builds controller over testFleet, with real stores.
func newTestBuilds(t *testing.T) (*builds, *testBuilder) {
	t.Helper()
	blobs, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = blobs.Close() })
	s := openStore(t)
	log := slog.New(slog.DiscardHandler)
	builder := &testBuilder{blobs: blobs}
	r := &Reconciler{cfg: Config{Store: s}, follow: &follow{}, luns: &luns{target: &testTarget{}}}
	r.follow.fleet.Store(&inForce{fleet: testFleet(), commit: state.Commit{Hash: "c1"}})
	builder.fleet = &r.follow.fleet
	return &builds{
		builder: builder, arch: "amd64", blobs: blobs, damage: blobs, store: s, plan: r.plan, events: &recorder{store: s, log: log}, logs: logs{t.TempDir()},
		log: log, now: time.Now, limit: 2, wake: make(chan struct{}, 1), asks: make(chan ask), alone: make(chan func(context.Context)),
	}, builder
}

// start runs the controller until stop is called.
func start(t *testing.T, b *builds) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// awaitBuilds waits until the records of builds are as wanted.
func awaitBuilds(t *testing.T, b *builds, want func(map[string]state.Build) bool) map[string]state.Build {
	t.Helper()
	for range b.store.Watch(t.Context(), state.Builds.Prefix(), state.Bases.Prefix(), state.Deltas.Prefix()) {
		all, err := state.Builds.List(t.Context(), b.store)
		if err != nil {
			t.Fatal(err)
		}
		if want(all) {
			return all
		}
	}
	t.Fatal("the builds never came to be as wanted")
	return nil
}

func phases(want ...state.BuildPhase) func(map[string]state.Build) bool {
	return func(all map[string]state.Build) bool {
		if len(all) != len(want) {
			return false
		}
		for _, phase := range want {
			n := 0
			for _, b := range all {
				if b.Phase == phase {
					n++
				}
			}
			if n == 0 {
				return false
			}
		}
		return true
	}
}

func allDone(all map[string]state.Build) bool {
	for _, b := range all {
		if b.Phase != state.BuildDone {
			return false
		}
	}
	return len(all) == 2
}

func TestEachRecipeIsBuiltOnceBaseFirst(t *testing.T) {
	b, builder := newTestBuilds(t)
	stop := start(t, b)
	all := awaitBuilds(t, b, allDone)
	for range 3 {
		b.poke()
	}
	stop()
	if got := builder.log(); got != "base, delta" {
		t.Errorf("built %q, want the base and then the delta, once each", got)
	}
	for id, rec := range all {
		if rec.Attempts != 1 || rec.Result == "" || len(rec.Parts) == 0 {
			t.Errorf("build %s: %+v", id, rec)
		}
		r, err := b.logs.follow(t.Context(), rec.Recipe, nil)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		_ = r.Close()
		if err != nil || !strings.Contains(string(text), "==> packages\nunpacking "+rec.Kind) {
			t.Errorf("log of the %s: %q, %v", rec.Kind, text, err)
		}
	}
}

func TestFailedBuildSaysWhyAndIsTriedAgain(t *testing.T) {
	b, builder := newTestBuilds(t)
	builder.set(&build.StepError{Step: "packages", Tail: []string{"E: Unable to locate package nginxx"}, Err: errors.New("exit status 100")}, nil)
	stop := start(t, b)
	defer stop()
	all := awaitBuilds(t, b, phases(state.BuildFailed))
	var rec state.Build
	for _, rec = range all {
		if rec.Step != "packages" || len(rec.Tail) != 1 || rec.Retry.Sub(rec.Finished) != firstRetry {
			t.Errorf("record of the failed build: %+v", rec)
		}
	}
	builder.set(nil, nil)
	if err := b.ask(t.Context(), plan.BuildsOf(testFleet(), "debian")); err != nil {
		t.Fatal(err)
	}
	all = awaitBuilds(t, b, allDone)
	if got := all[rec.Recipe.String()].Attempts; got != 2 {
		t.Errorf("%d attempts, want 2", got)
	}
}

func TestImageOfAnotherArchitectureIsNotBuilt(t *testing.T) {
	b, builder := newTestBuilds(t)
	b.arch = "arm64"
	stop := start(t, b)
	defer stop()
	for _, rec := range awaitBuilds(t, b, phases(state.BuildFailed)) {
		if !strings.Contains(rec.Error, "is for amd64 machines, and this server's agent for arm64") {
			t.Errorf("error: %s", rec.Error)
		}
	}
	if got := builder.log(); got != "" {
		t.Errorf("built: %s", got)
	}
}

func TestBuildUnderWayWhenTheServerEndsIsStartedAgain(t *testing.T) {
	b, builder := newTestBuilds(t)
	builder.set(nil, make(chan struct{})) // which nobody opens
	stop := start(t, b)
	awaitBuilds(t, b, phases(state.BuildRunning))
	stop()
	builder.set(nil, nil)
	stop = start(t, b)
	defer stop()
	awaitBuilds(t, b, allDone)
	if got := builder.log(); got != "base, base, delta" {
		t.Errorf("built %q, want the base twice", got)
	}
}

func TestManyRecipesAreEachBuiltOnce(t *testing.T) {
	b, builder := newTestBuilds(t)
	fleet := testFleet()
	var want []string
	for i := range 12 {
		name := fmt.Sprintf("r%02d", i)
		fleet.Roles[name] = schema.Role{Name: name, OS: "debian", Boot: "disk", Run: []string{name}}
		fleet.Hosts[name] = schema.Host{Name: name, MAC: fmt.Sprintf("52:54:00:00:01:%02x", i), Role: name}
		want = append(want, "delta "+name)
	}
	want = append(want, "base", "delta")
	builder.fleet.Store(&inForce{fleet: fleet, commit: state.Commit{Hash: "c2"}})
	stop := start(t, b)
	awaitBuilds(t, b, func(all map[string]state.Build) bool {
		for _, rec := range all {
			if rec.Phase != state.BuildDone {
				return false
			}
		}
		return len(all) == len(want)
	})
	stop()
	got := strings.Split(builder.log(), ", ")
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("built %q, want each once: %q", got, want)
	}
}

func TestBuildThatNobodyNeedsIsStopped(t *testing.T) {
	b, builder := newTestBuilds(t)
	builder.set(nil, make(chan struct{})) // which nobody opens
	stop := start(t, b)
	defer stop()
	awaitBuilds(t, b, phases(state.BuildRunning))
	builder.fleet.Store(&inForce{fleet: &schema.Fleet{}, commit: state.Commit{Hash: "c2"}})
	b.poke()
	for _, rec := range awaitBuilds(t, b, phases(state.BuildFailed)) {
		if rec.Error != errUnwanted.Error() || !rec.Retry.IsZero() {
			t.Errorf("record of the stopped build: %+v", rec)
		}
	}
	builder.set(nil, nil)
	builder.fleet.Store(&inForce{fleet: testFleet(), commit: state.Commit{Hash: "c3"}})
	b.poke()
	awaitBuilds(t, b, allDone)
}

func TestRecordsOfBuildsThatDiedAreSettled(t *testing.T) {
	b, _ := newTestBuilds(t)
	done, dead := digest.Of([]byte("done")), digest.Of([]byte("dead"))
	blob := images.Blob{Digest: digest.Of([]byte("x")), Size: 1}
	if err := state.Bases.Put(t.Context(), b.store, done.String(), images.Base{Recipe: done, Image: images.Image{Blob: blob}}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []images.RecipeID{done, dead} {
		rec := state.Build{Recipe: id, Kind: "base", Phase: state.BuildRunning, Step: "image"}
		if err := state.Builds.Put(t.Context(), b.store, id.String(), rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	all, err := state.Builds.List(t.Context(), b.store)
	if err != nil {
		t.Fatal(err)
	}
	if rec := all[done.String()]; rec.Phase != state.BuildDone || rec.Result != blob.Digest {
		t.Errorf("a build whose artifact has a record: %+v, want it done", rec)
	}
	if rec := all[dead.String()]; rec.Phase != state.BuildFailed || !rec.Retry.IsZero() {
		t.Errorf("a build that died: %+v, want it failed, to be tried at once", rec)
	}
}

func TestRottenBlobIsBuiltAgain(t *testing.T) {
	b, builder := newTestBuilds(t)
	stop := start(t, b)
	awaitBuilds(t, b, allDone)
	stop()
	_, obs, err := b.plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, base := range obs.Bases {
		name := builder.blobs.Path(base.Kernel.Digest)
		if err := os.Chmod(name, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte("kernex"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	stop = start(t, b)
	defer stop()
	awaitBuilds(t, b, func(all map[string]state.Build) bool {
		for _, rec := range all {
			if rec.Kind == string(plan.KindBase) && rec.Attempts == 2 && rec.Phase == state.BuildDone {
				return true
			}
		}
		return false
	})
}

func TestLostBlobIsBuiltAgain(t *testing.T) {
	b, builder := newTestBuilds(t)
	stop := start(t, b)
	awaitBuilds(t, b, allDone)
	stop()
	p, obs, err := b.plan(t.Context())
	if err != nil || len(p.Builds) != 0 {
		t.Fatalf("after the builds: %d left, %v", len(p.Builds), err)
	}
	for _, d := range obs.Deltas {
		if err := os.Remove(builder.blobs.Path(d.Image.Digest)); err != nil {
			t.Fatal(err)
		}
	}
	stop = start(t, b)
	defer stop()
	awaitBuilds(t, b, func(all map[string]state.Build) bool {
		for _, rec := range all {
			if rec.Kind == string(plan.KindDelta) && rec.Attempts == 2 && rec.Phase == state.BuildDone {
				return true
			}
		}
		return false
	})
	if got := builder.log(); got != "base, delta, delta" {
		t.Errorf("built %q, want the delta twice: its blob was gone", got)
	}
}

// unusedFleet is testFleet with an image and a role that no host has.
func unusedFleet() *schema.Fleet {
	f := testFleet()
	img := f.Images["debian"]
	from := *img.From.Debian
	from.Packages = []string{"vim"}
	img.Name, img.From.Debian = "spare", &from
	f.Images["spare"] = img
	f.Roles["spare-role"] = schema.Role{Name: "spare-role", OS: "spare", Boot: "disk", Run: []string{"spare"}}
	return f
}

// What no host needs is built when somebody asks for it, and its build is not stopped for want of hosts.
func TestWhatNoHostNeedsIsBuiltWhenAskedFor(t *testing.T) {
	b, builder := newTestBuilds(t)
	builder.fleet.Store(&inForce{fleet: unusedFleet(), commit: state.Commit{Hash: "c2"}})
	stop := start(t, b)
	defer stop()
	awaitBuilds(t, b, allDone)
	gate := make(chan struct{})
	builder.set(nil, gate)
	asked := plan.BuildsOf(unusedFleet(), "spare-role")
	if err := b.ask(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	awaitBuilds(t, b, phases(state.BuildDone, state.BuildDone, state.BuildRunning, state.BuildQueued))
	for range 3 {
		b.poke()
	}
	close(gate)
	for _, want := range asked {
		awaitBuilds(t, b, func(all map[string]state.Build) bool {
			rec := all[want.Recipe.String()]
			return rec.Phase == state.BuildDone && !rec.Asked && rec.Attempts == 1
		})
	}
	if err := b.ask(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	if got := builder.log(); got != "base, delta, base, delta spare" {
		t.Errorf("built %q, want each once", got)
	}
}

// What was asked for is on record: a server that is killed goes on with it, unless the fleet has it no longer.
func TestWhatWasAskedForSurvivesTheServer(t *testing.T) {
	b, builder := newTestBuilds(t)
	builder.fleet.Store(&inForce{fleet: unusedFleet(), commit: state.Commit{Hash: "c2"}})
	asked := plan.BuildsOf(unusedFleet(), "spare")
	if len(asked) != 1 {
		t.Fatalf("an image has %d builds, want 1", len(asked))
	}
	_, obs, err := b.plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.reset()
	if taken, err := b.take(t.Context(), asked[0], obs); err != nil || !taken {
		t.Fatalf("taken %t, %v", taken, err)
	}
	gone := state.Build{Recipe: digest.Of([]byte("gone")), Kind: "base", Phase: state.BuildQueued, Asked: true}
	if err := state.Builds.Put(t.Context(), b.store, gone.Recipe.String(), gone); err != nil {
		t.Fatal(err)
	}
	stop := start(t, b)
	defer stop()
	id := asked[0].Recipe.String()
	awaitBuilds(t, b, func(all map[string]state.Build) bool {
		rec := all[gone.Recipe.String()]
		return all[id].Phase == state.BuildDone && rec.Phase == state.BuildFailed && !rec.Asked
	})
}

// One that failed and was asked for is tried now; when it fails again, and no host needs it, that is the end of it.
func TestAskedForAndFailed(t *testing.T) {
	b, builder := newTestBuilds(t)
	builder.fleet.Store(&inForce{fleet: unusedFleet(), commit: state.Commit{Hash: "c2"}})
	stop := start(t, b)
	defer stop()
	awaitBuilds(t, b, allDone)
	builder.set(errors.New("no such package"), nil)
	asked := plan.BuildsOf(unusedFleet(), "spare")
	id := asked[0].Recipe.String()
	for attempt := 1; attempt <= 2; attempt++ {
		if err := b.ask(t.Context(), asked); err != nil {
			t.Fatal(err)
		}
		awaitBuilds(t, b, func(all map[string]state.Build) bool {
			return all[id].Phase == state.BuildFailed && all[id].Attempts == attempt && !all[id].Asked
		})
	}
	p, _, err := b.plan(t.Context())
	if err != nil || len(p.Builds) != 0 {
		t.Errorf("%d builds are wanted, %v; want none", len(p.Builds), err)
	}
}

// stepped readies b for a test that does itself what run does, one thing after the other. What is under way at the
// test's end is stopped.
func stepped(t *testing.T, b *builds) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	b.reset()
	t.Cleanup(func() {
		cancel()
		for range b.running {
			<-b.ended
		}
	})
	return ctx
}

// mustStep has b start and stop what is due, and wants so many builds to be under way then.
func mustStep(ctx context.Context, t *testing.T, b *builds, running int) {
	t.Helper()
	if _, err := b.step(ctx); err != nil || len(b.running) != running {
		t.Fatalf("%d builds are under way, %v; want %d", len(b.running), err, running)
	}
}

// asks has b serve an ask, and returns where the answer comes.
func asks(ctx, caller context.Context, b *builds, builds []plan.Build) <-chan error {
	done := make(chan error, 1)
	b.serve(ctx, ask{builds: builds, done: done, gone: caller.Done()})
	return done
}

// wantNoted wants an ask to have been answered already.
func wantNoted(t *testing.T, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	default:
		t.Fatal("what was asked for is not noted yet")
	}
}

// record is the record of a build, the zero one where there is none.
func record(t *testing.T, b *builds, id images.RecipeID) state.Build {
	t.Helper()
	all, err := state.Builds.List(t.Context(), b.store)
	if err != nil {
		t.Fatal(err)
	}
	return all[id.String()]
}

// hostless is testFleet without its hosts: nobody needs its images.
func hostless() *schema.Fleet {
	f := testFleet()
	f.Hosts, f.Discovery = nil, schema.Discovery{}
	return f
}

// Who asks for a build that just began need not wait for its end to hear that it is noted; and noted it is: the build
// goes on though the fleet needs it no longer.
func TestAskedForJustAfterItBegan(t *testing.T) {
	b, builder := newTestBuilds(t)
	gate := make(chan struct{})
	builder.set(nil, gate)
	ctx := stepped(t, b)
	mustStep(ctx, t, b, 1)
	asked := plan.BuildsOf(testFleet(), "debian")
	wantNoted(t, asks(ctx, t.Context(), b, asked))
	if rec := record(t, b, asked[0].Recipe); rec.Phase != state.BuildRunning || !rec.Asked {
		t.Errorf("record of a build that was asked for while it ran: %+v", rec)
	}
	builder.fleet.Store(&inForce{fleet: hostless(), commit: state.Commit{Hash: "c2"}})
	mustStep(ctx, t, b, 1)
	close(gate)
	b.over(ctx, <-b.ended)
	if rec := record(t, b, asked[0].Recipe); rec.Phase != state.BuildDone || rec.Asked || rec.Attempts != 1 {
		t.Errorf("record of what was asked for: %+v, want it done", rec)
	}
	mustStep(ctx, t, b, 0)
}

// What is asked for while its build is being stopped is built after that.
func TestAskedForWhileItIsStopped(t *testing.T) {
	b, builder := newTestBuilds(t)
	builder.set(nil, make(chan struct{})) // which nobody opens
	ctx := stepped(t, b)
	mustStep(ctx, t, b, 1)
	builder.fleet.Store(&inForce{fleet: hostless(), commit: state.Commit{Hash: "c2"}})
	mustStep(ctx, t, b, 1)
	asked := plan.BuildsOf(testFleet(), "debian")
	done := asks(ctx, t.Context(), b, asked)
	b.over(ctx, <-b.ended)
	wantNoted(t, done)
	builder.set(nil, nil)
	if rec := record(t, b, asked[0].Recipe); rec.Phase != state.BuildQueued || !rec.Asked {
		t.Errorf("record of what was asked for: %+v, want it queued", rec)
	}
	mustStep(ctx, t, b, 1)
	b.over(ctx, <-b.ended)
	if rec := record(t, b, asked[0].Recipe); rec.Phase != state.BuildDone || rec.Attempts != 2 {
		t.Errorf("record of what was asked for: %+v, want it done", rec)
	}
}

// What somebody asked for who gave up waiting is not built for him.
func TestAskedForByOneWhoLeft(t *testing.T) {
	b, builder := newTestBuilds(t)
	builder.set(nil, make(chan struct{})) // which nobody opens
	ctx := stepped(t, b)
	mustStep(ctx, t, b, 1)
	builder.fleet.Store(&inForce{fleet: hostless(), commit: state.Commit{Hash: "c2"}})
	mustStep(ctx, t, b, 1)
	caller, leave := context.WithCancel(t.Context())
	asked := plan.BuildsOf(testFleet(), "debian")
	asks(ctx, caller, b, asked)
	leave()
	b.over(ctx, <-b.ended)
	if rec := record(t, b, asked[0].Recipe); rec.Phase != state.BuildFailed || rec.Asked {
		t.Errorf("record of what nobody waits for: %+v, want it as it was stopped", rec)
	}
	mustStep(ctx, t, b, 0)
}

// A build that cannot have a log is not begun, and others are; it is tried again later.
func TestBuildThatCannotBeRecordedWaits(t *testing.T) {
	b, _ := newTestBuilds(t)
	b.logs.dir = filepath.Join(b.logs.dir, "file")
	if err := os.WriteFile(b.logs.dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	b.now = func() time.Time { return now }
	ctx := stepped(t, b)
	next, err := b.step(ctx)
	if err != nil || len(b.running) != 0 || !next.Equal(now.Add(firstRetry)) {
		t.Fatalf("%d builds are under way, the next step is at %s, %v", len(b.running), next, err)
	}
	if err := os.Remove(b.logs.dir); err != nil {
		t.Fatal(err)
	}
	mustStep(ctx, t, b, 0)
	b.now = func() time.Time { return next }
	mustStep(ctx, t, b, 1)
}

// Who asks by name is told the recipes of what has that name: an image goes before a role.
func TestBuildByName(t *testing.T) {
	fleet := unusedFleet()
	role := fleet.Roles["spare-role"]
	role.Name = "spare"
	fleet.Roles["spare"] = role
	b, builder := newTestBuilds(t)
	builder.fleet.Store(&inForce{fleet: fleet, commit: state.Commit{Hash: "c2"}})
	stop := start(t, b)
	defer stop()
	r := &Reconciler{follow: &follow{}, builds: b}
	r.follow.fleet.Store(&inForce{fleet: fleet, commit: state.Commit{Hash: "c2"}})
	base := images.BaseRecipeOf(fleet.Images["spare"]).ID()
	for name, want := range map[string][]digest.Digest{
		"spare":      {base},
		"spare-role": {base, images.DeltaRecipeOf(base, fleet.Roles["spare-role"]).ID()},
	} {
		got, err := imageBuilds{r}.Build(t.Context(), name)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
	if _, err := (imageBuilds{r}).Build(t.Context(), "none"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("an unknown name: %v", err)
	}
}
