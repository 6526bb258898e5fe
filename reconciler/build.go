package reconciler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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
}

// builds is the controller that builds what the fleet in force needs and nobody has built yet: each recipe once, at most
// limit at a time. One goroutine, run's, decides; each build has one of its own, which writes the build's records and
// then says on ended that it is over. So a plan that run makes after that sees those records, and no recipe is begun
// twice.
type builds struct {
	builder Builder
	arch    string // of the images that can be booted
	blobs   Blobs
	store   *state.Store
	plan    func(ctx context.Context) (plan.Plan, plan.Observed, error)
	events  *recorder
	logs    logs
	log     *slog.Logger
	now     func() time.Time
	limit   int

	wake chan struct{}
	asks chan ask

	// Owned by run:
	running   map[images.RecipeID]context.CancelCauseFunc
	notBefore map[images.RecipeID]time.Time // of builds whose records could not be written
	waiting   []ask                         // for a build that ends
	ended     chan ended
}

// An ask is for builds that an operator wants now.
type ask struct {
	builds []plan.Build
	done   chan<- error // has room for one: the answer
}

// ended says that a build is over. err is of its records, not of the build.
type ended struct {
	recipe images.RecipeID
	err    error
}

// run starts what is missing, until ctx ends; then it waits for the builds, which ctx ends, too.
func (b *builds) run(ctx context.Context) error {
	b.running, b.notBefore = map[images.RecipeID]context.CancelCauseFunc{}, map[images.RecipeID]time.Time{}
	b.ended, b.waiting = make(chan ended), nil
	if err := b.settle(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx) // also where run panics: its builds end, and no second run meets them
	lost := make(chan artifact)
	var checking sync.WaitGroup
	checking.Go(func() { b.check(ctx, lost) })
	defer func() {
		cancel()
		for range b.running {
			<-b.ended
		}
		checking.Wait()
	}()
	changed := b.store.Watch(ctx, state.Sources.Prefix(), state.Bases.Prefix(), state.Deltas.Prefix())
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
		case <-ctx.Done():
			return nil
		}
		retry = b.next(ctx)
	}
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
	if rec.Kind == string(plan.KindBase) {
		var base images.Base
		base, err = state.Bases.Get(ctx, b.store, rec.Recipe.String())
		blob = base.Image
	} else {
		var delta images.Delta
		delta, err = state.Deltas.Get(ctx, b.store, rec.Recipe.String())
		blob = delta.Image
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

// over takes a build out of those that run, and answers who asked for it meanwhile.
func (b *builds) over(ctx context.Context, e ended) {
	b.running[e.recipe](nil)
	delete(b.running, e.recipe)
	delete(b.notBefore, e.recipe)
	if e.err != nil {
		b.log.Error("recording a build", "recipe", e.recipe.Short(), "error", e.err)
		b.notBefore[e.recipe] = b.now().Add(firstRetry)
	}
	waiting := b.waiting
	b.waiting = nil
	for _, a := range waiting {
		b.serve(ctx, a)
	}
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
		if at := b.after(obs.Builds[want.Recipe], want.Recipe); at.After(b.now()) {
			if next.IsZero() || at.Before(next) {
				next = at
			}
			continue
		}
		if len(b.running) < b.limit {
			b.begin(ctx, want, obs)
		}
	}
	for id, stop := range b.running {
		if !wanted[id] {
			stop(errUnwanted) // in vain where the build is through and only its records are left
		}
	}
	return next, b.unask(ctx, wanted, obs)
}

func baseIsThere(want plan.Build, obs plan.Observed) bool {
	if want.Delta == nil {
		return true
	}
	_, ok := obs.Bases[want.Delta.Base]
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

// begin starts one build.
func (b *builds) begin(ctx context.Context, want plan.Build, obs plan.Observed) {
	bctx, stop := context.WithCancelCause(ctx)
	b.running[want.Recipe] = stop
	go func() {
		var err error
		defer func() { b.ended <- ended{recipe: want.Recipe, err: err} }()
		err = caught(ctx, func(ctx context.Context) error { return b.one(ctx, bctx, want, obs) })
		if ctx.Err() != nil {
			err = nil // the server ends: the record stays at running, and the next start settles it
		}
	}()
}

// one builds one recipe and records how that went. ctx is of the records, bctx of the build.
func (b *builds) one(ctx, bctx context.Context, want plan.Build, obs plan.Observed) error {
	rec := state.Build{
		Recipe: want.Recipe, Kind: string(want.Kind), Name: want.Name, Phase: state.BuildRunning,
		Attempts: obs.Builds[want.Recipe].Attempts + 1, Started: b.now(), Parts: want.Parts,
		Asked: obs.Builds[want.Recipe].Asked,
	}
	out, err := b.logs.create(want.Recipe)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }() // an artifact is worth more than its log
	if err := state.Builds.Put(ctx, b.store, want.Recipe.String(), rec); err != nil {
		return err
	}
	b.events.note(ctx, state.Event{Kind: "build", Subject: want.Name, Message: fmt.Sprintf("building the %s (recipe %s)", want.Kind, want.Recipe.Short())})
	bctx, cancel := context.WithTimeoutCause(bctx, maxBuild, fmt.Errorf("it took longer than %s", maxBuild))
	defer cancel()
	keep, err := b.build(bctx, want, obs, &progress{file: out, ctx: ctx, builds: b, rec: &rec})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	rec.Finished = b.now()
	if err != nil {
		return b.failed(ctx, &rec, cmp.Or(context.Cause(bctx), err), err)
	}
	blob, err := keep(ctx)
	if err != nil {
		return err
	}
	rec.Phase, rec.Step, rec.Error, rec.Tail, rec.Asked = state.BuildDone, "", "", nil, false
	rec.Result, rec.Size = blob.Digest, blob.Size
	if err := state.Builds.Put(ctx, b.store, want.Recipe.String(), rec); err != nil {
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
		base, err := b.builder.Base(ctx, *want.Base, p)
		return func(ctx context.Context) (images.Blob, error) {
			return base.Image, state.Bases.Put(ctx, b.store, id, base)
		}, err
	}
	delta, err := b.builder.Delta(ctx, *want.Delta, obs.Bases[want.Delta.Base], p)
	return func(ctx context.Context) (images.Blob, error) {
		return delta.Image, state.Deltas.Put(ctx, b.store, id, delta)
	}, err
}

// failed records why a build ended without a result. cause says it in a word; err has the step and its output.
func (b *builds) failed(ctx context.Context, rec *state.Build, cause, err error) error {
	rec.Phase, rec.Error, rec.Asked = state.BuildFailed, cause.Error(), false
	var step *build.StepError
	if errors.As(err, &step) {
		rec.Step, rec.Tail = step.Step, step.Tail
	}
	if !errors.Is(cause, errUnwanted) { // such a one is started at once when it is wanted again
		rec.Retry = rec.Finished.Add(backoff.Exponential(firstRetry, lastRetry, rec.Attempts))
	}
	if err := state.Builds.Put(ctx, b.store, rec.Recipe.String(), *rec); err != nil {
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
	select {
	case b.asks <- ask{builds: builds, done: done}:
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

// serve answers an ask. One for a build of which the record says that it is over, and which has not said so itself yet,
// waits for that: it would be taken for one that is under way.
func (b *builds) serve(ctx context.Context, a ask) {
	_, obs, err := b.plan(ctx)
	if err != nil {
		a.done <- err
		return
	}
	for _, want := range a.builds {
		if b.running[want.Recipe] != nil && obs.Builds[want.Recipe].Phase != state.BuildRunning {
			b.waiting = append(b.waiting, a)
			return
		}
	}
	a.done <- b.take(ctx, a.builds, obs)
}

// take records what was asked for. What is built, or is being built, needs no record.
func (b *builds) take(ctx context.Context, builds []plan.Build, obs plan.Observed) error {
	for _, want := range builds {
		if b.running[want.Recipe] != nil || isBuilt(want, obs) {
			continue
		}
		delete(b.notBefore, want.Recipe)
		rec := obs.Builds[want.Recipe]
		rec.Recipe, rec.Kind, rec.Name = want.Recipe, string(want.Kind), cmp.Or(rec.Name, want.Name)
		rec.Phase, rec.Asked, rec.Retry = state.BuildQueued, true, time.Time{}
		rec.Step, rec.Error, rec.Tail = "", "", nil
		if err := state.Builds.Put(ctx, b.store, want.Recipe.String(), rec); err != nil {
			return err
		}
	}
	return nil
}

func isBuilt(want plan.Build, obs plan.Observed) bool {
	if want.Delta == nil {
		_, ok := obs.Bases[want.Recipe]
		return ok
	}
	base, based := obs.Bases[want.Delta.Base]
	delta, ok := obs.Deltas[want.Recipe]
	return based && ok && delta.Base == base.Image
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
	rec     *state.Build
	written time.Time
}

func (p *progress) Write(b []byte) (int, error) { return p.file.Write(b) }

func (p *progress) Step(name string) {
	_, _ = fmt.Fprintf(p.file, "==> %s\n", name)
	p.rec.Step = name
	if now := p.builds.now(); now.Sub(p.written) >= stepEvery {
		p.written = now
		if err := state.Builds.Put(p.ctx, p.builds.store, p.rec.Recipe.String(), *p.rec); err != nil {
			p.builds.log.Warn("recording a build's step", "error", err)
		}
	}
}
