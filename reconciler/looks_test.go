package reconciler

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestOnlyALookThatBeganLaterCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l looks
		early := l.begin()
		started := false
		done := make(chan error, 1)
		go func() { done <- l.after(t.Context(), func() { started = true }) }()
		synctest.Wait()
		if !started {
			t.Fatal("the look was not asked for")
		}
		l.end(early, nil)
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("a look that began before the question was taken for its answer: %v", err)
		default:
		}
		wrong := errors.New("no")
		l.end(l.begin(), wrong)
		if err := <-done; !errors.Is(err, wrong) {
			t.Errorf("got %v, want the look's error", err)
		}
	})
}

func TestWaitForALookEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var l looks
	if err := l.after(ctx, func() {}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that it was cancelled", err)
	}
}
