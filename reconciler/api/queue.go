package api

import (
	"context"
	"errors"
	"net/http"
	"time"
)

// Bounds of the requests for which all records are read: with 10,000 hosts each decodes and encodes some tens of MB.
const (
	maxLists  = 8           // at a time
	maxQueued = 256         // that wait for their turn
	takeTime  = time.Minute // for the client to take its answer, which is in memory for so long
)

// A queue lets maxLists in at a time, and maxQueued more wait.
type queue struct {
	slots   chan struct{} // of maxLists; it has one for each that is inside
	waiting gate
}

func newQueue() *queue { return &queue{slots: make(chan struct{}, maxLists)} }

// enter waits until there is room. Whoever it let in calls leave.
func (q *queue) enter(ctx context.Context) (leave func(), err error) {
	leave = func() { <-q.slots }
	select {
	case q.slots <- struct{}{}:
		return leave, nil
	default:
	}
	busy := &Error{Status: http.StatusServiceUnavailable, Message: "too many requests at once"}
	if !q.waiting.enter(maxQueued) {
		return nil, busy
	}
	defer q.waiting.leave()
	select {
	case q.slots <- struct{}{}:
		return leave, nil
	case <-ctx.Done():
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, busy
	}
	return nil, ctx.Err()
}

// queued has serve wait for its turn, and its client take the answer within takeTime.
func (s *Server) queued(serve func(http.ResponseWriter, *http.Request) error) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		leave, err := s.lists.enter(r.Context())
		if err != nil {
			return err
		}
		defer leave()
		t := &taker{ResponseWriter: w, end: time.Now().Add(takeTime)}
		_ = t.SetWriteDeadline(t.end) // where a writer has no deadlines, nobody is slow
		return serve(t, r)
	}
}

// A taker is a ResponseWriter whose deadline for writing is never after end.
type taker struct {
	http.ResponseWriter
	end time.Time
}

// SetWriteDeadline is what http.ResponseController calls.
func (t *taker) SetWriteDeadline(at time.Time) error {
	if at.IsZero() || at.After(t.end) {
		at = t.end
	}
	return http.NewResponseController(t.ResponseWriter).SetWriteDeadline(at)
}

// Unwrap is for http.ResponseController.
func (t *taker) Unwrap() http.ResponseWriter { return t.ResponseWriter }
