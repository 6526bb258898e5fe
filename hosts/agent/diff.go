package agent

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/overdiff"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// countEvery is how often a node counts by itself what it changed: each time costs a look at each file of its node delta.
const countEvery = 10 * time.Minute

// diffAsks holds the newest question for a diff that the server has. The zero value is ready.
type diffAsks struct {
	mu   sync.Mutex
	last string
	wake chan struct{} // has room for one; made by the first who needs it
}

// ask takes a question; one that is known is not asked again.
func (d *diffAsks) ask(id string) {
	wake := d.woken()
	d.mu.Lock()
	known := id == "" || id == d.last
	if !known {
		d.last = id
	}
	d.mu.Unlock()
	if known {
		return
	}
	select {
	case wake <- struct{}{}:
	default: // whoever is awake will see the newest
	}
}

func (d *diffAsks) woken() chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.wake == nil {
		d.wake = make(chan struct{}, 1)
	}
	return d.wake
}

func (d *diffAsks) newest() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last
}

// runDiffs answers questions for a diff until ctx ends, and counts the changes now and then.
func (s *service) runDiffs(ctx context.Context) {
	tick := time.NewTicker(countEvery)
	defer tick.Stop()
	answered := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-s.diff.woken():
		}
		var d agentapi.DeltaDiff
		_, err := inBackground(func() (_ int64, err error) {
			d, err = s.makeDiff(ctx)
			return 0, err
		})
		if err == nil {
			count := d.DeltaCount
			s.rep.update(true, func(r *agentapi.Report) { r.Changes = &count })
		}
		id := s.diff.newest()
		if id == answered {
			continue
		}
		answered = id
		s.answerDiff(ctx, id, d, err)
	}
}

func (s *service) answerDiff(ctx context.Context, id string, d agentapi.DeltaDiff, err error) {
	a := agentapi.DeltaAnswer{Identity: s.state.get().Identity, ID: id, Diff: d}
	if err != nil {
		a.Error = err.Error()
	}
	if err := s.client.Delta(ctx, a); err != nil { // who asked may ask again
		s.log.Warn("what the node changed cannot be told", "error", err)
	}
}

// makeDiff compares the node delta with the images below, and with what it began with.
func (s *service) makeDiff(ctx context.Context) (agentapi.DeltaDiff, error) {
	st := s.state.get()
	seeds := map[string]string{}
	for _, f := range seedFiles(st.Assignment, st.Identity, st.Lease) {
		seeds[f.Path] = f.Content
	}
	stack := overdiff.Stack{
		Upper: filepath.Join(st.CacheDir, "deltas", st.NodeDelta, "upper"), Lower: []string{deltaDir, baseDir}, Seeds: seeds,
	}
	d, err := stack.Diff(ctx)
	d.Host, d.Release = st.Assignment.Host, st.Assignment.Release.ID
	return d, err
}
