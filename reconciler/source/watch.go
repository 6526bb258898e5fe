package source

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/internal/backoff"
)

const (
	pollTimeout = 30 * time.Second
	maxBackoff  = 2 * time.Minute // between polls of a remote that does not answer, unless the interval is longer

	// A push touches several files. The repository is looked at when it was quiet for debounce, or after maxDebounce.
	debounce    = 30 * time.Millisecond
	maxDebounce = 300 * time.Millisecond
)

// An observation is how a remote was found: its kind of answer and, where it answered, a digest of its names.
type observation struct {
	kind  int
	names [sha256.Size]byte
}

func observe(got refs) observation {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(got)) {
		fmt.Fprintf(h, "%s %s\n", got[name], name)
	}
	return observation{kind: kindOK, names: [sha256.Size]byte(h.Sum(nil))}
}

// note keeps how a Fetch found the remote.
func (r *Repo) note(o observation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known = o
	if o.kind == kindOK {
		r.answered = time.Now()
	}
}

// Watch calls wake whenever a Fetch would give something else than the last one did: another head, another branch or
// tag, an error where there was none, or none where there was one. It polls every Config.Interval, more and more seldom
// while the remote does not answer, and looks at once when a local repository changes. It calls wake in its own goroutine
// and calls it again until a Fetch has seen what it saw: wake is a hint, must not block, and may come for nothing. Watch
// returns ctx's error when ctx ends, and nothing else ends it.
func (r *Repo) Watch(ctx context.Context, wake func()) error {
	n := newNotifier(r.remote, r.log)
	defer n.close()
	misses := 0
	for {
		n.refresh() // before looking: what changes after it will be heard
		now, ok := r.look(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if misses++; ok {
			misses = 0
		}
		if r.differs(now) {
			wake()
		}
		if err := n.wait(ctx, pause(r.cfg.Interval, misses)); err != nil {
			return err
		}
	}
}

// look lists the remote.
func (r *Repo) look(ctx context.Context) (observation, bool) {
	ctx, cancel := context.WithTimeout(ctx, min(pollTimeout, r.cfg.Timeout))
	defer cancel()
	got, err := r.remote.list(ctx)
	if err != nil {
		r.log.Debug("polling", "repo", r.Repo(), "err", r.scrub.text(err.Error()))
		return observation{kind: kindOf(err)}, false
	}
	r.mu.Lock()
	r.answered = time.Now()
	r.mu.Unlock()
	return observe(got), true
}

func (r *Repo) differs(now observation) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known != now
}

// pause is the time to the next poll: the interval, doubled for each poll in a row without an answer, and a tenth more or
// less, so that many servers do not ask one remote at the same time.
func pause(interval time.Duration, misses int) time.Duration {
	d := backoff.Exponential(interval, max(interval, maxBackoff), max(misses, 1))
	return d - d/10 + rand.N(d/5+1) //nolint:gosec // a wait is no secret
}
