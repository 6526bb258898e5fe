// Package backoff says how long to wait before the next try: twice as long each time up to a limit, less a random
// part ("equal jitter"), so that many machines that lost one server do not come back to it in step.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// A Backoff counts tries. The zero value waits 1 s first and 1 min at most. It is not for concurrent use.
type Backoff struct {
	First time.Duration // before the second try; 0 means 1 s
	Limit time.Duration // never longer than this; 0 means 1 min
	tries int
}

// Next is how long to wait now: between half of the current step and all of it.
func (b *Backoff) Next() time.Duration {
	first, limit := b.First, b.Limit
	if first <= 0 {
		first = time.Second
	}
	if limit <= 0 {
		limit = time.Minute
	}
	b.tries++
	d := Exponential(first, limit, b.tries)
	return d/2 + rand.N(d/2+1) //nolint:gosec // a wait is no secret
}

// Exponential is the wait after so many failed tries, counted from 1, without a random part: first, twice that, four
// times that, and never more than limit.
func Exponential(first, limit time.Duration, tries int) time.Duration {
	d := first
	for range tries - 1 {
		if d >= limit/2 {
			return limit
		}
		d *= 2
	}
	return min(d, limit)
}

// Reset begins anew: call it after a success.
func (b *Backoff) Reset() { b.tries = 0 }

// Wait waits for Next, or until ctx is done; then it returns ctx's error.
func (b *Backoff) Wait(ctx context.Context) error { return Sleep(ctx, b.Next()) }

// Sleep waits for d, or until ctx is done; then it returns ctx's error.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
