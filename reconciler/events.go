package reconciler

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/troupe-dev/troupe/reconciler/state"
)

const (
	// keepEvents is how many events are kept, and pruneEvery after how many new ones the old are dropped.
	keepEvents = 2000
	pruneEvery = 200
)

// recorder writes down what happened, for people. It is no log of the program: one line for each thing that an
// operator would want to be told.
type recorder struct {
	store *state.Store
	log   *slog.Logger
	n     atomic.Uint64
}

// note records an event. That it could not be written is only logged: no work stops for want of a note.
func (r *recorder) note(ctx context.Context, ev state.Event) {
	if ev.Time.IsZero() {
		ev.Time = time.Now()
	}
	ev.Message = cut(ev.Message)
	level := slog.LevelInfo
	if ev.Warning {
		level = slog.LevelWarn
	}
	r.log.Log(ctx, level, "event", "kind", ev.Kind, "subject", ev.Subject, "message", ev.Message)
	n := r.n.Add(1)
	id := fmt.Sprintf("%019d-%06d", ev.Time.UnixNano(), n%1_000_000)
	err := state.Events.Put(ctx, r.store, id, ev)
	if err == nil && n%pruneEvery == 1 { // the first, too: a server that is often started drops old ones
		err = r.prune(ctx)
	}
	if err != nil && ctx.Err() == nil {
		r.log.Warn("an event is not recorded", "error", err)
	}
}

func (r *recorder) prune(ctx context.Context) error {
	all, err := state.Events.List(ctx, r.store)
	if err != nil {
		return err
	}
	ids := slices.Sorted(maps.Keys(all))
	for ; len(ids) > keepEvents; ids = ids[1:] {
		if err := state.Events.Delete(ctx, r.store, ids[0]); err != nil {
			return err
		}
	}
	return nil
}
