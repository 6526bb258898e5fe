// Package quiet bounds what strangers can write into a log: a few lines a second go through, and the next one says how
// many did not. Nobody on the network shall be able to fill a disk.
package quiet

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// LinesPerSecond go through.
const LinesPerSecond = 10

// New is log for lines that anybody on the network can cause; nil for none at all. Debug lines all go through: who asked
// for them wants to see each.
func New(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(handler{log.Handler(), new(budget)})
}

// A handler shares its budget with those that were made of it.
type handler struct {
	slog.Handler
	budget *budget
}

// Handle implements slog.Handler.
func (h handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelInfo {
		return h.Handler.Handle(ctx, r)
	}
	kept, ok := h.budget.spend(time.Now())
	if !ok {
		return nil
	}
	if kept > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("suppressed", kept))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return handler{h.Handler.WithAttrs(attrs), h.budget}
}

// WithGroup implements slog.Handler.
func (h handler) WithGroup(name string) slog.Handler {
	return handler{h.Handler.WithGroup(name), h.budget}
}

// A budget is what is left of LinesPerSecond.
type budget struct {
	mu     sync.Mutex
	second time.Time // when it began
	lines  int       // since then
	kept   int       // back, since the last line that went through
}

// spend takes one line from the budget, and says how many before it were kept back; ok is false where it is, too.
func (b *budget) spend(now time.Time) (kept int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.Sub(b.second) >= time.Second {
		b.second, b.lines = now, 0
	}
	if b.lines++; b.lines > LinesPerSecond {
		b.kept++
		return 0, false
	}
	kept, b.kept = b.kept, 0
	return kept, true
}
