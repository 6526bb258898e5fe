package backoff

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestNextDoublesUpToTheLimit(t *testing.T) {
	b := Backoff{First: 100 * time.Millisecond, Limit: time.Second}
	for i, ms := range []int{100, 200, 400, 800, 1000, 1000} {
		step := time.Duration(ms) * time.Millisecond
		if d := b.Next(); d < step/2 || d > step {
			t.Errorf("try %d: waits %v, want between %v and %v", i, d, step/2, step)
		}
	}
	b.Reset()
	if d := b.Next(); d > 100*time.Millisecond {
		t.Errorf("after Reset: waits %v", d)
	}
}

func TestNextNeverOverflows(t *testing.T) {
	var b Backoff
	for range 1000 {
		if d := b.Next(); d <= 0 || d > time.Minute {
			t.Fatalf("waits %v", d)
		}
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		b := Backoff{First: time.Hour, Limit: time.Hour}
		if err := b.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wait: %v", err)
		}
	})
}

func TestExponential(t *testing.T) {
	for tries, want := range map[int]time.Duration{
		0: time.Second, 1: time.Second, 2: 2 * time.Second, 3: 4 * time.Second, 4: 8 * time.Second, 5: 10 * time.Second, 1 << 30: 10 * time.Second,
	} {
		if got := Exponential(time.Second, 10*time.Second, tries); got != want {
			t.Errorf("Exponential(1s, 10s, %d) = %s, want %s", tries, got, want)
		}
	}
}
