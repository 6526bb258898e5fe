package reconciler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/build"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// Waits after failed builds: a mirror that is away for a minute costs a minute, a broken recipe costs a build each hour.
const (
	firstRetry = 30 * time.Second
	lastRetry  = time.Hour
)

const (
	// stepEvery bounds how often a running build's record is written for its steps.
	stepEvery = 200 * time.Millisecond
	// maxBuild ends a build that hangs: a mirror that sends nothing, a command that waits for input.
	maxBuild = 2 * time.Hour
)

// errUnwanted ends a build that the fleet in force needs no longer.
var errUnwanted = errors.New("stopped: the fleet in force needs it no longer")

// A Builder makes artifacts of recipes.
type Builder interface {
	Base(ctx context.Context, r images.BaseRecipe, p build.Progress) (images.Base, error)
	Delta(ctx context.Context, r images.DeltaRecipe, b images.Base, p build.Progress) (images.Delta, error)
	Disk(ctx context.Context, r images.DiskRecipe, p build.Progress) (images.Disk, error)
	App(ctx context.Context, r images.AppRecipe, src build.AppSource, p build.Progress) (images.App, error)
}

// builds is the controller that builds what the fleet in force needs and nobody has built yet: each recipe once, at most
// limit at a time. One goroutine, run's, decides and writes that a build begins; each build has one of its own, which
// writes the build's other records and then says on ended that it is over. So a plan that run makes after either sees
// those records, and no recipe is begun twice.
type builds struct {
	builder Builder
	arch    string // of the images that can be booted
	blobs   Blobs
	damage  damage
	store   *state.Store
	// artifacts has what was built before, here or elsewhere; nil: nothing.
	artifacts *artifacts
	plan      func(ctx context.Context) (plan.Plan, plan.Observed, error)
	events    *recorder
	logs      logs
	log       *slog.Logger
	now       func() time.Time
	limit     int
	files     func(ctx context.Context, commit string) (fs.FS, error) // of a commit of the fleet

	wake chan struct{}
	asks chan ask
	// alone takes what must not happen while a build begins: run does it, one after the other.
	alone chan func(context.Context)

	// Owned by run:
	running   map[images.RecipeID]*job
	notBefore map[images.RecipeID]time.Time // of builds whose records could not be written
	waiting   []ask                         // for builds that are ending
	ended     chan ended
}

// An ask is for builds that an operator wants now.
type ask struct {
	builds []plan.Build
	done   chan<- error    // has room for one: the answer
	gone   <-chan struct{} // closed when nobody waits for the answer any more
}

// A job is a build that is under way. Its record has two writers: the build, and run where an operator asks for it.
type job struct {
	stop    context.CancelCauseFunc
	stopped bool // told to stop; owned by run

	mu  sync.Mutex // held while the record is written, so that what is stored is never older than rec
	rec state.Build
}

// set changes the record in memory, for the next write.
func (j *job) set(change func(*state.Build)) {
	j.mu.Lock()
	defer j.mu.Unlock()
	change(&j.rec)
}

// write changes the record and stores it. It returns the record as it is then.
func (j *job) write(ctx context.Context, s *state.Store, change func(*state.Build)) (state.Build, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	change(&j.rec)
	return j.rec, state.Builds.Put(ctx, s, j.rec.Recipe.String(), j.rec)
}

// ask records that an operator wants the build. It does not where the build is about to end, or has ended: what it comes
// to is no answer to who asks now.
func (j *job) ask(ctx context.Context, s *state.Store) (taken bool, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.stopped || j.rec.Phase != state.BuildRunning {
		return false, nil
	}
	j.rec.Asked = true
	return true, state.Builds.Put(ctx, s, j.rec.Recipe.String(), j.rec)
}

// ended says that a build is over. err is of its records, not of the build.
type ended struct {
	recipe images.RecipeID
	err    error
}

// run starts what is missing, until ctx ends; then it waits for the builds, which ctx ends, too.
func (b *builds) run(ctx context.Context) error {
	b.reset()
	if err := b.settle(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx) // also where run panics: its builds end, and no second run meets them
	lost := make(chan artifactRecord)
	var checking sync.WaitGroup
	checking.Go(func() { b.check(ctx, lost) })
	defer func() {
		cancel()
		for range b.running {
			<-b.ended
		}
		checking.Wait()
	}()
	changed := b.store.Watch(ctx, state.Sources.Prefix(), state.Bases.Prefix(), state.Deltas.Prefix(), state.Disks.Prefix(), state.Apps.Prefix())
	var retry <-chan time.Time
	for {
		select {
		case <-changed:
		case <-b.wake:
		case <-retry:
		case a := <-b.asks:
			b.serve(ctx, a)
		case e := <-b.ended:
			b.over(ctx, e)
		case a := <-lost:
			b.forget(ctx, a)
		case do := <-b.alone:
			do(ctx)
		case <-ctx.Done():
			return nil
		}
		retry = b.next(ctx)
	}
}

func (b *builds) reset() {
	b.running, b.notBefore = map[images.RecipeID]*job{}, map[images.RecipeID]time.Time{}
	b.ended, b.waiting = make(chan ended), nil
}

// next starts what can be started, and returns the time when to look again, as a channel; nil for none.
func (b *builds) next(ctx context.Context) <-chan time.Time {
	next, err := b.step(ctx)
	if err != nil && ctx.Err() == nil && !errors.Is(err, errNoFleet) {
		b.log.Error("starting builds", "error", err)
		next = b.now().Add(firstRetry)
	}
	if next.IsZero() {
		return nil
	}
	return time.After(next.Sub(b.now()))
}

// settle ends the records of builds that were under way when an earlier process ended. What is still wanted is started
// again at once.
func (b *builds) settle(ctx context.Context) error {
	all, err := state.Builds.List(ctx, b.store)
	if err != nil {
		return err
	}
	for id, rec := range all {
		if rec.Phase != state.BuildRunning {
			continue
		}
		rec.Phase, rec.Error, rec.Finished = state.BuildFailed, "interrupted: the server ended", b.now()
		if blob, ok, err := b.result(ctx, rec); err != nil {
			return err
		} else if ok { // it ended between the artifact's record and this one
			rec.Phase, rec.Step, rec.Error, rec.Result, rec.Size, rec.Asked = state.BuildDone, "", "", blob.Digest, blob.Size, false
		}
		if err := state.Builds.Put(ctx, b.store, id, rec); err != nil {
			return err
		}
	}
	return nil
}

// result is what came out of a build, where its artifact has a record.
func (b *builds) result(ctx context.Context, rec state.Build) (images.Blob, bool, error) {
	var blob images.Blob
	var err error
	switch plan.Kind(rec.Kind) {
	case plan.KindBase:
		var base images.Base
		base, err = state.Bases.Get(ctx, b.store, rec.Recipe.String())
		blob = base.Image.Blob
	case plan.KindDisk:
		var disk images.Disk
		disk, err = state.Disks.Get(ctx, b.store, rec.Recipe.String())
		blob = disk.Image
	case plan.KindApp:
		var app images.App
		app, err = state.Apps.Get(ctx, b.store, rec.Recipe.String())
		blob = app.Image.Blob
	case plan.KindDelta:
		var delta images.Delta
		delta, err = state.Deltas.Get(ctx, b.store, rec.Recipe.String())
		blob = delta.Image.Blob
	}
	if notFound(err) {
		return blob, false, nil
	}
	return blob, err == nil, err
}

func (b *builds) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// over takes a build out of those that run, and answers who asked for it while it was ending.
func (b *builds) over(ctx context.Context, e ended) {
	b.running[e.recipe].stop(nil)
	delete(b.running, e.recipe)
	delete(b.notBefore, e.recipe)
	if e.err != nil {
		b.postpone(e.recipe, e.err)
	}
	waiting := b.waiting
	b.waiting = nil
	for _, a := range waiting {
		b.serve(ctx, a)
	}
}

// postpone has a recipe whose records could not be written wait.
func (b *builds) postpone(id images.RecipeID, err error) {
	b.log.Error("recording a build", "recipe", id.Short(), "error", err)
	b.notBefore[id] = b.now().Add(firstRetry)
}

// step starts what can be started and stops what nobody needs. It returns when a failed build may be tried again; the
// zero time when none waits.
func (b *builds) step(ctx context.Context) (next time.Time, err error) {
	p, obs, err := b.plan(ctx)
	if err != nil {
		return next, err
	}
	wanted := map[images.RecipeID]bool{}
	for _, want := range p.Builds {
		wanted[want.Recipe] = true
		if b.running[want.Recipe] != nil || !baseIsThere(want, obs) {
			continue // under way; or its base comes first, and wakes us
		}
		at := b.after(obs.Builds[want.Recipe], want.Recipe)
		if !at.After(b.now()) && len(b.running) < b.limit {
			if err := b.begin(ctx, want, obs); err != nil {
				b.postpone(want.Recipe, err)
				at = b.notBefore[want.Recipe]
			}
		}
		if at.After(b.now()) && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	for id, j := range b.running {
		if !wanted[id] {
			j.stop(errUnwanted) // in vain where the build is through and only its records are left
			j.stopped = true
		}
	}
	return next, b.unask(ctx, wanted, obs)
}

func baseIsThere(want plan.Build, obs plan.Observed) bool {
	base := want.After
	if want.Delta != nil {
		base = want.Delta.Base
	} else if want.App != nil {
		base = want.App.Compile.Base
	}
	if base == "" {
		return true
	}
	_, ok := obs.Bases[base]
	return ok
}

// after is when a recipe may be tried again.
func (b *builds) after(rec state.Build, id images.RecipeID) time.Time {
	at := b.notBefore[id]
	if rec.Phase == state.BuildFailed && rec.Retry.After(at) {
		at = rec.Retry
	}
	return at
}

// begin starts one build. When it returns without an error, the build has a log, and a record that says that it runs:
// who looks for either finds those of this attempt.
func (b *builds) begin(ctx context.Context, want plan.Build, obs plan.Observed) error {
	j := &job{rec: state.Build{
		Recipe: want.Recipe, Kind: string(want.Kind), Name: want.Name, Phase: state.BuildRunning,
		Attempts: obs.Builds[want.Recipe].Attempts + 1, Started: b.now(), Parts: want.Parts,
		Asked: obs.Builds[want.Recipe].Asked,
	}}
	out, err := b.logs.create(want.Recipe)
	if err != nil {
		return err
	}
	if _, err := j.write(ctx, b.store, func(*state.Build) {}); err != nil {
		_ = out.Close()
		return err
	}
	var bctx context.Context
	bctx, j.stop = context.WithCancelCause(ctx)
	b.running[want.Recipe] = j
	go func() {
		var err error
		defer func() { b.ended <- ended{recipe: want.Recipe, err: err} }()
		defer func() { _ = out.Close() }() // an artifact is worth more than its log
		err = caught(ctx, func(ctx context.Context) error {
			return b.one(ctx, bctx, want, obs, &progress{file: out, ctx: ctx, builds: b, job: j})
		})
		if ctx.Err() != nil {
			err = nil // the server ends: the record stays at running, and the next start settles it
		}
	}()
	return nil
}

// one builds one recipe and records how that went. ctx is of the records, bctx of the build.
func (b *builds) one(ctx, bctx context.Context, want plan.Build, obs plan.Observed, p *progress) error {
	b.events.note(ctx, state.Event{Kind: "build", Subject: want.Name, Message: fmt.Sprintf("building the %s (recipe %s)", want.Kind, want.Recipe.Short())})
	bctx, cancel := context.WithTimeoutCause(bctx, maxBuild, fmt.Errorf("it took longer than %s", maxBuild))
	defer cancel()
	keep, err := b.build(bctx, want, obs, p)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	finished := b.now()
	if err != nil {
		return b.failed(ctx, p.job, finished, cmp.Or(context.Cause(bctx), err), err)
	}
	blob, err := keep(ctx)
	if err != nil {
		return err
	}
	rec, err := p.job.write(ctx, b.store, func(rec *state.Build) {
		rec.Phase, rec.Step, rec.Error, rec.Tail, rec.Asked = state.BuildDone, "", "", nil, false
		rec.Finished, rec.Result, rec.Size = finished, blob.Digest, blob.Size
	})
	if err != nil {
		return err
	}
	took := rec.Finished.Sub(rec.Started).Round(100 * time.Millisecond)
	b.events.note(ctx, state.Event{Kind: "build", Subject: want.Name, Message: fmt.Sprintf("built %s %s in %s", want.Kind, blob.Digest.Short(), took)})
	return nil
}

// build makes the artifact. What it returns writes the artifact's record, for which the other controllers wait.
func (b *builds) build(ctx context.Context, want plan.Build, obs plan.Observed, p build.Progress) (keep func(context.Context) (images.Blob, error), err error) {
	id := want.Recipe.String()
	if want.Base != nil {
		if want.Base.Arch != b.arch {
			return nil, fmt.Errorf("image %s is for %s machines, and this server's agent for %s: it could boot none of them; "+
				"give it to a server with an agent for %[2]s (see serve --agent)", want.Name, want.Base.Arch, b.arch)
		}
		fits := func(v images.Base) bool { return v.Recipe == want.Recipe && v.Arch == want.Base.Arch }
		base, err := taken(ctx, b, want, fits, p, func() (images.Base, error) { return b.builder.Base(ctx, *want.Base, p) })
		if err == nil {
			b.artifacts.keepChunks(ctx, base.Image)
		}
		return func(ctx context.Context) (images.Blob, error) {
			return base.Image.Blob, state.Bases.Put(ctx, b.store, id, base)
		}, err
	}
	if want.Disk != nil {
		fits := func(v images.Disk) bool { return v.Recipe == want.Recipe }
		disk, err := taken(ctx, b, want, fits, p, func() (images.Disk, error) { return b.builder.Disk(ctx, *want.Disk, p) })
		return func(ctx context.Context) (images.Blob, error) {
			return disk.Image, state.Disks.Put(ctx, b.store, id, disk)
		}, err
	}
	if want.App != nil {
		app, err := b.app(ctx, want, obs, p)
		return func(ctx context.Context) (images.Blob, error) {
			return app.Image.Blob, state.Apps.Put(ctx, b.store, id, app)
		}, err
	}
	base := obs.Bases[want.Delta.Base]
	fits := func(v images.Delta) bool { return v.Recipe == want.Recipe && v.Base == base.Image.Blob }
	delta, err := taken(ctx, b, want, fits, p, func() (images.Delta, error) { return b.builder.Delta(ctx, *want.Delta, base, p) })
	if err == nil {
		b.artifacts.keepChunks(ctx, delta.Image)
	}
	return func(ctx context.Context) (images.Blob, error) {
		return delta.Image.Blob, state.Deltas.Put(ctx, b.store, id, delta)
	}, err
}

// taken is what a recipe makes: taken from a manifest where there is one, else made. Whatever keeps it from being taken, it is made.
func taken[T any](ctx context.Context, b *builds, want plan.Build, fits func(T) bool, p build.Progress, made func() (T, error)) (T, error) {
	if b.artifacts == nil {
		return made()
	}
	p.Step("look")
	v, from, ok := find(ctx, b.artifacts, want.Kind, want.Recipe, fits, p)
	if !ok {
		return made()
	}
	_, _ = fmt.Fprintf(p, "taken from %s\n", from)
	b.events.note(ctx, state.Event{Kind: "build", Subject: want.Name, Message: fmt.Sprintf("took the %s from %s: no need to build it", want.Kind, from)})
	return v, nil
}

// app makes an app image. The directory that it may be made of is that of the commit for which it was planned.
func (b *builds) app(ctx context.Context, want plan.Build, obs plan.Observed, p build.Progress) (images.App, error) {
	src := build.AppSource{Base: obs.Bases[want.App.Compile.Base]}
	if want.Dir != "" {
		files, err := b.files(ctx, want.Commit)
		if err == nil {
			src.Tree, err = fs.Sub(files, want.Dir)
		}
		if err != nil {
			return images.App{}, fmt.Errorf("reading %q of commit %s: %w", want.Dir, short(want.Commit), err)
		}
	}
	return b.builder.App(ctx, *want.App, src, p)
}

// failed records why a build ended without a result. cause says it in a word; err has the step and its output.
func (b *builds) failed(ctx context.Context, j *job, finished time.Time, cause, err error) error {
	var step *build.StepError
	isStep := errors.As(err, &step)
	rec, err := j.write(ctx, b.store, func(rec *state.Build) {
		rec.Phase, rec.Error, rec.Asked, rec.Finished = state.BuildFailed, cause.Error(), false, finished
		if isStep {
			rec.Step, rec.Tail = step.Step, step.Tail
		}
		if !errors.Is(cause, errUnwanted) { // such a one is started at once when it is wanted again
			rec.Retry = finished.Add(backoff.Exponential(firstRetry, lastRetry, rec.Attempts))
		}
	})
	if err != nil {
		return err
	}
	b.events.note(ctx, state.Event{
		Kind: "build", Subject: rec.Name, Warning: true,
		Message: fmt.Sprintf("the %s was not built (attempt %d): %v", rec.Kind, rec.Attempts, cause),
	})
	return nil
}

// ask has builds made now, also such as failed and wait to be tried again, and such as no host needs. When it returns
// without an error, that is on record.
func (b *builds) ask(ctx context.Context, builds []plan.Build) error {
	done := make(chan error, 1)
	return request(ctx, b.asks, ask{builds: builds, done: done, gone: ctx.Done()}, done)
}

// request gives a controller something to do, and waits for what it says when that is done.
func request[T any](ctx context.Context, asks chan<- T, what T, done <-chan error) error {
	select {
	case asks <- what:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// serve answers an ask, unless nobody waits for that any more. One for a build that is ending waits until that is over:
// it is for what comes after it.
func (b *builds) serve(ctx context.Context, a ask) {
	select {
	case <-a.gone:
		return
	default:
	}
	_, obs, err := b.plan(ctx)
	if err != nil {
		a.done <- err
		return
	}
	for len(a.builds) > 0 {
		taken, err := b.take(ctx, a.builds[0], obs)
		if err != nil {
			a.done <- err
			return
		}
		if !taken {
			b.waiting = append(b.waiting, a)
			return
		}
		a.builds = a.builds[1:] // taken once: if it fails now, that is the answer to who asked
	}
	a.done <- nil
}

// take records that a build was asked for, unless it is ending. What is built needs no record.
func (b *builds) take(ctx context.Context, want plan.Build, obs plan.Observed) (taken bool, err error) {
	if j := b.running[want.Recipe]; j != nil {
		return j.ask(ctx, b.store)
	}
	if isBuilt(want, obs) {
		return true, nil
	}
	delete(b.notBefore, want.Recipe)
	rec := obs.Builds[want.Recipe]
	rec.Recipe, rec.Kind, rec.Name = want.Recipe, string(want.Kind), cmp.Or(rec.Name, want.Name)
	rec.Phase, rec.Asked, rec.Retry = state.BuildQueued, true, time.Time{}
	rec.Step, rec.Error, rec.Tail = "", "", nil
	return true, state.Builds.Put(ctx, b.store, want.Recipe.String(), rec)
}

func isBuilt(want plan.Build, obs plan.Observed) bool {
	switch {
	case want.Disk != nil:
		_, ok := obs.Disks[want.Recipe]
		return ok
	case want.App != nil:
		_, ok := obs.Apps[want.Recipe]
		return ok
	case want.Delta == nil:
		_, ok := obs.Bases[want.Recipe]
		return ok
	}
	base, based := obs.Bases[want.Delta.Base]
	delta, ok := obs.Deltas[want.Recipe]
	return based && ok && delta.Base == base.Image.Blob
}

// unask forgets what operators asked for and the fleet in force has no longer.
func (b *builds) unask(ctx context.Context, wanted map[images.RecipeID]bool, obs plan.Observed) error {
	for id, rec := range obs.Builds {
		if !rec.Asked || wanted[id] || b.running[id] != nil {
			continue
		}
		rec.Asked = false
		if rec.Phase == state.BuildQueued {
			rec.Phase, rec.Error = state.BuildFailed, errUnwanted.Error()
		}
		if err := state.Builds.Put(ctx, b.store, id.String(), rec); err != nil {
			return err
		}
	}
	return nil
}

// progress writes a build's output to its log, and its steps to its record.
type progress struct {
	file    logFile
	ctx     context.Context //nolint:containedctx // lives as long as one build: Progress has no room for it
	builds  *builds
	job     *job
	written time.Time
}

func (p *progress) Write(b []byte) (int, error) { return p.file.Write(b) }

func (p *progress) Step(name string) {
	_, _ = fmt.Fprintf(p.file, "==> %s\n", name)
	now, at := p.builds.now(), func(rec *state.Build) { rec.Step = name }
	if now.Sub(p.written) < stepEvery {
		p.job.set(at)
		return
	}
	p.written = now
	if _, err := p.job.write(p.ctx, p.builds.store, at); err != nil {
		p.builds.log.Warn("recording a build's step", "error", err)
	}
}
