package api

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/reconciler/state"
)

// A watcher is told of every event between two looks, however many: also of one that was written after a later one.
func TestEveryEventIsTold(t *testing.T) {
	start := time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)
	id := func(n int) string { return fmt.Sprintf("%019d-%06d", start.UnixNano()+int64(n), n) }
	event := func(n int) state.Event {
		return state.Event{Time: start.Add(time.Duration(n)), Kind: "assignment", Subject: fmt.Sprint("n", n), Message: "generation 2"}
	}
	frameOf := func(events map[string]state.Event) *frame {
		f, err := newFrame(&Records{Now: start, Events: events})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	before, after := map[string]state.Event{}, map[string]state.Event{}
	var want []string
	for n := range 2000 {
		if n < 500 && n != 400 { // of which the oldest are dropped meanwhile
			before[id(n)] = event(n)
		} else {
			want = append(want, event(n).Subject)
		}
		if n >= 300 {
			after[id(n)] = event(n)
		}
	}
	old, next := frameOf(before), frameOf(after)
	if n := len(old.snapshot.Events); n != snapshotEvents {
		t.Errorf("%d events in the snapshot, want %d", n, snapshotEvents)
	}
	var got []string
	for _, c := range next.since(old) {
		if c.Kind() != "event" {
			t.Errorf("told of %+v", c)
			continue
		}
		got = append(got, c.Event.Subject)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
	if more := next.since(next); len(more) > 0 {
		t.Errorf("told again: %+v", more)
	}
}
