package reconciler

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// assign is the controller that gives each host its release: as soon as the release is there, and not before, so that
// a host whose new release is being built, or cannot be built, goes on with what it has.
type assign struct {
	store  *state.Store
	plan   func(ctx context.Context) (plan.Plan, plan.Observed, error)
	events *recorder
	now    func() time.Time
	wake   chan struct{}

	planned atomic.Pointer[string] // the commit that all assignments are those of
}

func (a *assign) run(ctx context.Context) error {
	changed := a.store.Watch(ctx, state.Sources.Prefix(), state.Bases.Prefix(), state.Deltas.Prefix())
	for {
		select {
		case <-changed:
		case <-a.wake:
		case <-ctx.Done():
			return nil
		}
		if err := a.step(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, errNoFleet) {
			return fmt.Errorf("assigning releases to hosts: %w", err)
		}
	}
}

// step writes what the plan wants of each host that can have it now.
func (a *assign) step(ctx context.Context) error {
	p, obs, err := a.plan(ctx)
	if err != nil {
		return err
	}
	now := a.now()
	for _, rel := range p.Releases {
		if err := a.release(ctx, rel, now); err != nil {
			return err
		}
	}
	var errs []error
	for _, h := range p.Hosts {
		if err := a.host(ctx, h, p.Commit, obs, now); err != nil {
			errs = append(errs, err) // the others get theirs
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	a.planned.Store(&p.Commit)
	return nil
}

// release writes a release that is not known yet.
func (a *assign) release(ctx context.Context, rel state.Release, now time.Time) error {
	_, err := state.Releases.Get(ctx, a.store, rel.ID.String())
	if !notFound(err) {
		return err
	}
	rel.Created = now
	if err := state.Releases.Put(ctx, a.store, rel.ID.String(), rel); err != nil {
		return err
	}
	a.events.note(ctx, state.Event{Kind: "release", Subject: strings.Join(rel.Roles, ","), Message: "release " + rel.ID.Short() + " is ready"})
	return nil
}

// host writes or removes one host's assignment where the plan has another one for it.
func (a *assign) host(ctx context.Context, h plan.Host, commit string, obs plan.Observed, now time.Time) error {
	if h.Action == plan.Leave {
		if _, had := obs.Assignments[h.Name]; !had {
			return nil
		}
		if err := state.Assignments.Delete(ctx, a.store, h.Name); err != nil {
			return err
		}
		a.events.note(ctx, state.Event{Kind: "assignment", Subject: h.Name, Message: "left the fleet: its machine is unclaimed now"})
		return nil
	}
	if h.Spec == nil || !h.Changed {
		return nil
	}
	rec := h.Assignment(commit, now)
	if err := state.Assignments.Put(ctx, a.store, h.Name, rec); err != nil {
		return err
	}
	a.events.note(ctx, state.Event{Kind: "assignment", Subject: h.Name, Message: fmt.Sprintf("generation %d: %s", rec.Generation, rec.Why)})
	return nil
}
