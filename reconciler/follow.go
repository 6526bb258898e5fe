package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"github.com/troupe-dev/troupe/reconciler/source"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
	"github.com/troupe-dev/troupe/schema/load"
)

const (
	// lookEvery is how often the source record is looked after while nothing changes.
	lookEvery = time.Minute
	// A commit that could not be evaluated is tried again after retryEvery; one that took too long or too much memory,
	// which may have been a busy server's fault, after retryLimit, since each try costs as much again.
	retryEvery = time.Minute
	retryStep  = 5 * time.Second // after an error of ours, such as a full disk
	retryLimit = 10 * time.Minute
	// lookGap is how long after one look at the repo the next may begin that somebody asked for: anybody can ask, and a
	// forge wants to be asked no more often.
	lookGap = time.Second
)

// maxProblems bounds how many problems of a commit are recorded; the record says how many there were.
const maxProblems = 100

// A Loader turns the files of a commit into a fleet. What is wrong with the commit comes back as schema.Problems.
type Loader interface {
	Load(ctx context.Context, tree fs.FS) (*schema.Fleet, error)
}

// inForce is a fleet and the commit that it came from.
type inForce struct {
	fleet  *schema.Fleet
	commit state.Commit
}

// follow is the controller that brings Git into force: it fetches, loads, and publishes the newest good fleet. A commit
// that is not good changes nothing but the source record.
type follow struct {
	repo   *source.Repo
	branch string // what repo follows, for people
	path   string
	loader Loader
	store  *state.Store
	events *recorder
	log    *slog.Logger
	now    func() time.Time

	looks looks         // ended ones, for those who wait for one
	gap   time.Duration // lookGap; shorter in tests

	fleet   atomic.Pointer[inForce] // nil before the first good commit
	changed func()                  // called after fleet was replaced
	wake    chan struct{}
}

// poke makes the controller look at the repo now.
func (f *follow) poke() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// run follows the branch until ctx ends.
func (f *follow) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan error, 1)
	go func() { watched <- f.repo.Watch(ctx, f.poke) }()
	defer func() {
		cancel()
		<-watched
	}()
	f.poke()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	var asked <-chan time.Time // when the look begins that somebody asked for
	var retry <-chan time.Time // after a step that ended in the middle: nothing else would wake us
	var last time.Time         // when the last look ended
	for {
		select {
		case <-f.wake:
			if asked == nil {
				asked = time.After(f.gap - time.Since(last))
			}
		case <-asked:
			retry, asked, last = f.stepped(ctx), nil, time.Now()
		case <-retry:
			retry, last = f.stepped(ctx), time.Now()
		case <-look.C:
			if err := f.look(ctx); err != nil && ctx.Err() == nil {
				f.log.Error("looking after the fleet's repo", "error", err)
			}
		case err := <-watched:
			watched <- err // for the one who waits for it
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watching the fleet's repo: %w", err)
		}
	}
}

// stepped is one look at the repo, and the time of the next one where this one failed.
func (f *follow) stepped(ctx context.Context) <-chan time.Time {
	n := f.looks.begin()
	err := f.step(ctx)
	f.looks.end(n, err)
	if err == nil || ctx.Err() != nil {
		return nil
	}
	f.log.Error("following the fleet's repo", "error", err)
	return time.After(retryStep)
}

func (f *follow) record(ctx context.Context) (state.Source, error) {
	rec, err := state.Sources.Get(ctx, f.store, state.SourceID)
	if err != nil && !notFound(err) {
		return rec, err
	}
	return rec, nil
}

// look keeps the record true while nothing changes in the repo: when it last answered, and whether a commit that was
// refused for want of time or memory is to be tried again.
func (f *follow) look(ctx context.Context) error {
	rec, err := f.record(ctx)
	if err != nil {
		return err
	}
	if due(rec, f.now()) || f.fleet.Load() == nil && rec.Applied != nil {
		return f.step(ctx)
	}
	if at := f.repo.Answered(); rec.FetchError == "" && at.Sub(rec.Fetched) >= lookEvery {
		rec.Fetched = at
		return f.put(ctx, rec)
	}
	return nil
}

// due says whether a refused commit is to be tried again.
func due(rec state.Source, now time.Time) bool { return !rec.Retry.IsZero() && !now.Before(rec.Retry) }

// resume takes up the fleet that was in force when the server last ran, so that machines are answered while the remote
// is away, or has a commit that is not good.
func (f *follow) resume(ctx context.Context, rec state.Source) {
	rev, err := f.repo.Revision(ctx, rec.Applied.Hash)
	if err != nil {
		f.log.Warn("the commit in force is not in the mirror: its machines wait for the repo", "commit", rec.Applied.Hash, "error", err)
		return
	}
	fleet, err := f.loader.Load(ctx, rev.Tree)
	if err != nil {
		f.log.Error("the commit in force does not load now; it is tried again", "commit", rec.Applied.Hash, "error", err)
		return
	}
	f.publish(fleet, *rec.Applied)
}

func (f *follow) publish(fleet *schema.Fleet, c state.Commit) {
	f.fleet.Store(&inForce{fleet: fleet, commit: c})
	f.changed()
}

// step is one look at the repo.
func (f *follow) step(ctx context.Context) error {
	rec, err := f.record(ctx)
	if err != nil {
		return err
	}
	if f.fleet.Load() == nil && rec.Applied != nil {
		f.resume(ctx, rec)
	}
	before := rec
	rec.Repo, rec.Branch, rec.Path = f.repo.Repo(), f.branch, f.path
	rev, err := f.repo.FetchSince(ctx, known(before, rec))
	unusable := errors.Is(err, source.ErrNoPath) || errors.Is(err, source.ErrTree)
	if err != nil && !unusable {
		return f.unreachable(ctx, rec, err)
	}
	rec.FetchError, rec.Fetched = "", f.now()
	if before.FetchError != "" {
		f.events.note(ctx, state.Event{Kind: "source", Subject: rec.Repo, Message: "the repo can be followed again"})
	}
	if rev.Rewritten {
		rec.Rewritten = f.now()
		f.events.note(ctx, state.Event{
			Kind: "source", Subject: short(rev.Commit.Hash), Warning: true,
			Message: "the branch was rewritten (force-push): the new head does not descend from the commit before",
		})
	}
	if refused(before, rec, rev.Commit.Hash) && !due(before, f.now()) {
		return f.putNews(ctx, before, rec)
	}
	rec.Attempted, rec.Problems, rec.Retry = &rev.Commit, nil, time.Time{}
	if unusable {
		return f.refuse(ctx, rec, schema.Problems{{Message: err.Error()}})
	}
	if current := f.fleet.Load(); current != nil && current.commit.Hash == rev.Commit.Hash {
		return f.putNews(ctx, before, rec)
	}
	return f.attempt(ctx, rec, rev)
}

// known is the head of the branch that was dealt with last, before what rec follows; "" where that was another branch.
func known(before, rec state.Source) string {
	if before.Attempted == nil || before.Repo != rec.Repo || before.Branch != rec.Branch {
		return ""
	}
	return before.Attempted.Hash
}

// refused says whether a commit was refused before, and is still the same: of that repo and branch, and for that path.
// A server that was started with the wrong path, and then with the right one, sees another fleet in it.
func refused(before, now state.Source, hash string) bool {
	return len(before.Problems) > 0 && before.Attempted != nil && before.Attempted.Hash == hash &&
		before.Repo == now.Repo && before.Branch == now.Branch && before.Path == now.Path
}

// unreachable records why the repo cannot be followed now. The fleet in force stays.
func (f *follow) unreachable(ctx context.Context, rec state.Source, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	why := cut(err.Error())
	if rec.FetchError == why {
		return nil
	}
	rec.FetchError = why
	f.events.note(ctx, state.Event{Kind: "source", Subject: rec.Repo, Warning: true, Message: "the repo cannot be followed: " + rec.FetchError})
	return f.put(ctx, rec)
}

// attempt loads a commit and brings it into force, or records why not.
func (f *follow) attempt(ctx context.Context, rec state.Source, rev source.Revision) error {
	if err := f.put(ctx, rec); err != nil { // so that nobody takes the fleet for converged while the commit loads
		return err
	}
	fleet, err := f.loader.Load(ctx, rev.Tree)
	if err == nil {
		err = f.emptied(ctx, fleet)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return f.refuse(ctx, rec, err)
	}
	rec.Applied, rec.AppliedAt = &rev.Commit, f.now()
	if err := f.put(ctx, rec); err != nil {
		return err
	}
	f.events.note(ctx, state.Event{Kind: "commit", Subject: short(rev.Commit.Hash), Message: "in force: " + rev.Commit.Subject})
	f.publish(fleet, rev.Commit)
	return nil
}

// emptied says no to a fleet that has lost all of its hosts and does not say that it is meant. Where the fleet before
// could not be loaded at this start, its assignments tell of its hosts.
func (f *follow) emptied(ctx context.Context, fleet *schema.Fleet) error {
	if cur := f.fleet.Load(); cur != nil {
		return schema.Emptied(cur.fleet, fleet)
	}
	assigned, err := state.Assignments.List(ctx, f.store)
	if err != nil {
		return err
	}
	old := &schema.Fleet{Hosts: make(map[string]schema.Host, len(assigned))}
	for name := range assigned {
		old.Hosts[name] = schema.Host{Name: name}
	}
	return schema.Emptied(old, fleet)
}

// refuse records what is wrong with the attempted commit. What may not be the commit's fault is tried again later.
func (f *follow) refuse(ctx context.Context, rec state.Source, err error) error {
	var problems schema.Problems
	switch {
	case !errors.As(err, &problems):
		problems = schema.Problems{{Message: "not evaluated, tried again soon: " + err.Error()}}
		rec.Retry = f.now().Add(retryEvery)
	case errors.Is(err, load.ErrLimit):
		rec.Retry = f.now().Add(retryLimit)
	}
	n := len(problems)
	if n > maxProblems {
		problems = append(problems[:maxProblems:maxProblems], schema.Problem{Message: fmt.Sprintf("and %d more", n-maxProblems)})
	}
	rec.Problems = slices.Clone(problems)
	for i := range rec.Problems { // a commit may have a name of a megabyte, and its problem has that name
		rec.Problems[i].File, rec.Problems[i].Message = cut(rec.Problems[i].File), cut(rec.Problems[i].Message)
	}
	if err := f.put(ctx, rec); err != nil {
		return err // and is refused again, before anybody is told so
	}
	count := "a problem"
	if n > 1 {
		count = fmt.Sprintf("%d problems, the first", n)
	}
	f.events.note(ctx, state.Event{
		Kind: "commit", Subject: short(rec.Attempted.Hash), Warning: true,
		Message: fmt.Sprintf("refused, the fleet stays as it is; %s: %s", count, rec.Problems[0]),
	})
	return nil
}

// putNews writes rec where it says more than that the repo answered within a minute of when it did before: each write is
// an fsync, and makes the other controllers list all that they work on.
func (f *follow) putNews(ctx context.Context, before, rec state.Source) error {
	quiet := before
	quiet.Fetched = rec.Fetched
	if reflect.DeepEqual(quiet, rec) && rec.Fetched.Sub(before.Fetched) < lookEvery {
		return nil
	}
	return f.put(ctx, rec)
}

func (f *follow) put(ctx context.Context, rec state.Source) error {
	return state.Sources.Put(ctx, f.store, state.SourceID, rec)
}

// files are those of a commit, from the fleet's directory on.
func (r *Reconciler) files(ctx context.Context, commit string) (fs.FS, error) {
	rev, err := r.cfg.Repo.Revision(ctx, commit)
	if err != nil {
		return nil, err
	}
	return rev.Tree, nil
}

func short(hash string) string { return hash[:min(len(hash), 10)] }

func notFound(err error) bool { return errors.Is(err, state.ErrNotFound) }
