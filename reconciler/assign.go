package reconciler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
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
	log    *slog.Logger
	again  time.Duration // assignAgain; shorter in tests

	planned atomic.Pointer[string] // the commit that all assignments are those of

	// busy is held while the controller makes assignments of records: nothing that they name may be swept meanwhile.
	busy sync.Mutex

	told map[string]string // of which commit people were told what cannot be assigned, by host or release; owned by run
}

const (
	// assignAgain is when what could not be assigned is tried again, where nothing changed before that.
	assignAgain = 30 * time.Second
	// maxTold bounds how many hosts of one step people are told of: a full disk is the same news for all.
	maxTold = 10
)

func (a *assign) run(ctx context.Context) error {
	changed := a.store.Watch(ctx, state.Sources.Prefix(), state.Bases.Prefix(), state.Deltas.Prefix(), state.Disks.Prefix(), state.Apps.Prefix())
	var retry <-chan time.Time
	for {
		select {
		case <-changed:
		case <-a.wake:
		case <-retry:
		case <-ctx.Done():
			return nil
		}
		retry = nil
		if err := a.step(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, errNoFleet) {
			a.log.Error("assigning releases to hosts", "error", err, "again_in", a.again)
			retry = time.After(a.again)
		}
	}
}

// step writes what the plan wants of each host that can have it now. One release or host that cannot be written keeps
// none of the others.
func (a *assign) step(ctx context.Context) error {
	a.busy.Lock()
	defer a.busy.Unlock()
	p, obs, err := a.plan(ctx)
	if err != nil {
		return err
	}
	now := a.now()
	failed := failures{of: map[string]error{}}
	for _, rel := range p.Releases {
		failed.add("release "+rel.ID.Short(), a.release(ctx, rel, now))
	}
	for _, h := range p.Hosts {
		if failed.of["release "+h.To.Short()] == nil { // else a machine would be sent to boot what nobody knows
			failed.add(h.Name, a.host(ctx, h, p.Commit, obs, now))
		}
	}
	a.tell(ctx, failed, p.Commit)
	if err := failed.err(); err != nil {
		return err
	}
	a.planned.Store(&p.Commit)
	return nil
}

// failures are errors by what they are about, in the order in which they came.
type failures struct {
	of    map[string]error
	order []string
}

func (f *failures) add(subject string, err error) {
	if err != nil {
		f.of[subject] = err
		f.order = append(f.order, subject)
	}
}

// err is the first few of them.
func (f *failures) err() error {
	var errs []error
	for i, subject := range f.order {
		if i == maxTold {
			errs = append(errs, fmt.Errorf("and %d more", len(f.order)-i))
			break
		}
		errs = append(errs, f.of[subject])
	}
	return errors.Join(errs...)
}

// tell notes what could not be written: once for each commit, and again after it could.
func (a *assign) tell(ctx context.Context, failed failures, commit string) {
	before := a.told
	a.told = map[string]string{}
	for i, subject := range failed.order {
		why := fmt.Sprint("cannot be assigned: ", failed.of[subject])
		if i == maxTold {
			subject, why = "assignments", fmt.Sprintf("%d more cannot be written", len(failed.order)-i)
		}
		a.told[subject] = commit
		if before[subject] != commit {
			a.events.note(ctx, state.Event{Kind: "assignment", Subject: subject, Message: why, Warning: true})
		}
		if i == maxTold {
			return
		}
	}
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
