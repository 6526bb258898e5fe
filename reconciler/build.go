package reconciler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/build"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// Waits after failed builds: a mirror that is away for a minute costs a minute, a broken recipe costs a build each hour.
const (
	firstRetry = 30 * time.Second
	lastRetry  = time.Hour
)

// stepEvery bounds how often a running build's record is written for its steps.
const stepEvery = 200 * time.Millisecond

// A Builder makes artifacts of recipes.
type Builder interface {
	Base(ctx context.Context, r images.BaseRecipe, p build.Progress) (images.Base, error)
	Delta(ctx context.Context, r images.DeltaRecipe, b images.Base, p build.Progress) (images.Delta, error)
}

// Blobs tells whether the store has some bytes, whole. Bytes that it does not have are store.ErrNotFound.
type Blobs interface {
	Stat(ctx context.Context, d digest.Digest) (images.Blob, error)
}

// checkEvery is how often the store is asked whether it still has what the records say was built.
const checkEvery = time.Hour

// builds is the controller that builds what the fleet in force needs and nobody has built yet: each recipe once, at most
// limit at a time. A build that was under way when an earlier process died is simply not there, and is started again.
type builds struct {
	builder Builder
	blobs   Blobs
	store   *state.Store
	plan    func(ctx context.Context) (plan.Plan, plan.Observed, error)
	events  *recorder
	logs    logs
	log     *slog.Logger
	now     func() time.Time
	limit   int

	mu      sync.Mutex
	running map[images.RecipeID]bool
	wake    chan struct{}
	wait    sync.WaitGroup
}

// run starts what is missing, until ctx ends; then it waits for the builds, which ctx ends, too.
func (b *builds) run(ctx context.Context) error {
	defer b.wait.Wait()
	changed := b.store.Watch(ctx, state.Sources.Prefix(), state.Bases.Prefix(), state.Deltas.Prefix())
	check := time.NewTicker(checkEvery)
	defer check.Stop()
	b.checked(ctx)
	var retry <-chan time.Time
	for {
		select {
		case <-changed:
		case <-b.wake:
		case <-retry:
		case <-check.C:
			b.checked(ctx)
		case <-ctx.Done():
			return nil
		}
		next, err := b.step(ctx)
		if err != nil && ctx.Err() == nil && !errors.Is(err, errNoFleet) {
			b.log.Error("starting builds", "error", err)
			next = b.now().Add(firstRetry)
		}
		retry = nil
		if !next.IsZero() {
			retry = time.After(next.Sub(b.now()))
		}
	}
}

// checked forgets what was built and is no longer in the store, lost or rotten: then it is missing, and is built again.
func (b *builds) checked(ctx context.Context) {
	if err := b.check(ctx); err != nil && ctx.Err() == nil {
		b.log.Error("checking what was built against the store", "error", err)
	}
}

func (b *builds) check(ctx context.Context) error {
	bases, err := state.Bases.List(ctx, b.store)
	if err != nil {
		return err
	}
	for id, base := range bases {
		whole, err := b.have(ctx, base.Image, base.Kernel, base.Modules)
		if err == nil && !whole {
			b.lost(ctx, "base", id)
			err = state.Bases.Delete(ctx, b.store, id)
		}
		if err != nil {
			return err
		}
	}
	deltas, err := state.Deltas.List(ctx, b.store)
	if err != nil {
		return err
	}
	for id, delta := range deltas {
		whole, err := b.have(ctx, delta.Image)
		if err == nil && !whole {
			b.lost(ctx, "delta", id)
			err = state.Deltas.Delete(ctx, b.store, id)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *builds) lost(ctx context.Context, kind, id string) {
	b.events.note(ctx, state.Event{
		Kind: "build", Subject: digest.Digest(id).Short(), Warning: true,
		Message: "the " + kind + " is no longer in the store, or no longer what its digest says; it is built again where it is needed",
	})
}

// have says whether the store has all of these.
func (b *builds) have(ctx context.Context, all ...images.Blob) (bool, error) {
	for _, blob := range all {
		_, err := b.blobs.Stat(ctx, blob.Digest)
		if errors.Is(err, store.ErrNotFound) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

func (b *builds) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// step starts what can be started. It returns when a failed build may be tried again; the zero time when none waits.
func (b *builds) step(ctx context.Context) (next time.Time, err error) {
	p, obs, err := b.plan(ctx)
	if err != nil {
		return next, err
	}
	for _, want := range p.Builds {
		if want.Delta != nil {
			if _, ok := obs.Bases[want.Delta.Base]; !ok {
				continue // its base comes first, and wakes us
			}
		}
		if rec := obs.Builds[want.Recipe]; rec.Phase == state.BuildFailed && rec.Retry.After(b.now()) {
			if next.IsZero() || rec.Retry.Before(next) {
				next = rec.Retry
			}
			continue
		}
		if !b.begin(want.Recipe) {
			continue
		}
		b.wait.Go(func() {
			b.one(ctx, want, obs)
			b.end(want.Recipe)
			b.poke()
		})
	}
	return next, nil
}

// begin takes one of the places for a recipe; it says no where the recipe is being built already, or no place is free.
func (b *builds) begin(id images.RecipeID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.running[id] || len(b.running) >= b.limit {
		return false
	}
	b.running[id] = true
	return true
}

func (b *builds) end(id images.RecipeID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.running, id)
}

// one builds one recipe and records how that went.
func (b *builds) one(ctx context.Context, want plan.Build, obs plan.Observed) {
	rec := state.Build{
		Recipe: want.Recipe, Kind: string(want.Kind), Name: want.Name, Phase: state.BuildRunning,
		Attempts: obs.Builds[want.Recipe].Attempts + 1, Started: b.now(), Parts: want.Parts,
	}
	err := b.recorded(ctx, want, obs, &rec)
	if ctx.Err() != nil {
		return // the server ends: the record stays at running, which the next start takes for what it is
	}
	if err != nil {
		b.log.Error("recording a build", "recipe", want.Recipe.Short(), "error", err)
	}
}

func (b *builds) recorded(ctx context.Context, want plan.Build, obs plan.Observed, rec *state.Build) error {
	if err := state.Builds.Put(ctx, b.store, want.Recipe.String(), *rec); err != nil {
		return err
	}
	b.events.note(ctx, state.Event{Kind: "build", Subject: want.Name, Message: fmt.Sprintf("building the %s (recipe %s)", want.Kind, want.Recipe.Short())})
	out, err := b.logs.create(want.Recipe)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }() // an artifact is worth more than its log
	result, err := b.build(ctx, want, obs, &progress{file: out, ctx: ctx, builds: b, rec: rec})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	rec.Finished = b.now()
	if err != nil {
		return b.failed(ctx, rec, err)
	}
	rec.Phase, rec.Step, rec.Error, rec.Tail = state.BuildDone, "", "", nil
	rec.Result, rec.Size = result.Digest, result.Size
	took := rec.Finished.Sub(rec.Started).Round(100 * time.Millisecond)
	b.events.note(ctx, state.Event{Kind: "build", Subject: want.Name, Message: fmt.Sprintf("built %s %s in %s", want.Kind, result.Digest.Short(), took)})
	return state.Builds.Put(ctx, b.store, want.Recipe.String(), *rec)
}

// build makes the artifact and writes its record, which is what the other controllers wait for.
func (b *builds) build(ctx context.Context, want plan.Build, obs plan.Observed, p build.Progress) (images.Blob, error) {
	if want.Base != nil {
		base, err := b.builder.Base(ctx, *want.Base, p)
		if err != nil {
			return images.Blob{}, err
		}
		return base.Image, state.Bases.Put(ctx, b.store, want.Recipe.String(), base)
	}
	delta, err := b.builder.Delta(ctx, *want.Delta, obs.Bases[want.Delta.Base], p)
	if err != nil {
		return images.Blob{}, err
	}
	return delta.Image, state.Deltas.Put(ctx, b.store, want.Recipe.String(), delta)
}

func (b *builds) failed(ctx context.Context, rec *state.Build, err error) error {
	rec.Phase, rec.Error = state.BuildFailed, err.Error()
	var step *build.StepError
	if errors.As(err, &step) {
		rec.Step, rec.Tail = step.Step, step.Tail
	}
	rec.Retry = rec.Finished.Add(backoff.Exponential(firstRetry, lastRetry, rec.Attempts))
	b.events.note(ctx, state.Event{
		Kind: "build", Subject: rec.Name, Warning: true,
		Message: fmt.Sprintf("the %s was not built (attempt %d): %v", rec.Kind, rec.Attempts, err),
	})
	return state.Builds.Put(ctx, b.store, rec.Recipe.String(), *rec)
}

// retry forgets that a recipe failed, so that it is built now.
func (b *builds) retry(ctx context.Context, id images.RecipeID) error {
	rec, err := state.Builds.Get(ctx, b.store, id.String())
	if err == nil && rec.Phase == state.BuildFailed {
		rec.Retry = time.Time{}
		err = state.Builds.Put(ctx, b.store, id.String(), rec)
	}
	if err != nil && !notFound(err) {
		return err
	}
	b.poke()
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
