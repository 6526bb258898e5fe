package api

import (
	"context"
	"net/http"
	"time"
)

// Bounds of the requests for which all records are read. Measured with 10,000 hosts: each takes 0.7 s of a processor and
// 130 MB, and its answer has 6 MB.
const (
	maxReads   = 4                // that read at a time
	maxListing = 64               // that wait for their turn, read, or whose client takes the answer
	turnTime   = 15 * time.Second // for the turn to come; the rest of answerTime is for reading
	takeTime   = time.Minute      // from then on until the client has taken the answer
)

// A queue has room for maxListing requests, of which maxReads have their turn.
type queue struct {
	turns chan struct{} // of maxReads; it has one for each that reads
	all   gate
}

func newQueue() *queue { return &queue{turns: make(chan struct{}, maxReads)} }

// enter waits for a turn. Whoever gets one ends it once it has read, and leaves when it has been answered.
func (q *queue) enter(ctx context.Context) (*turn, error) {
	busy := &Error{Status: http.StatusServiceUnavailable, Message: "too many requests at once"}
	if !q.all.enter(maxListing) {
		return nil, busy
	}
	late := time.NewTimer(turnTime)
	defer late.Stop()
	select {
	case q.turns <- struct{}{}:
		return &turn{queue: q, reads: true}, nil
	case <-late.C:
		q.all.leave()
		return nil, busy
	case <-ctx.Done():
		q.all.leave()
		return nil, ctx.Err()
	}
}

// A turn is a place in a queue. It is not for concurrent use.
type turn struct {
	queue *queue
	reads bool
}

// end lets the next one read.
func (t *turn) end() {
	if t.reads {
		t.reads = false
		<-t.queue.turns
	}
}

func (t *turn) leave() {
	t.end()
	t.queue.all.leave()
}

// queued has serve wait for its turn. serve must not begin its answer before it has read and encoded all of it: the next
// one's turn comes then, so that slow clients keep nobody from reading.
func (s *Server) queued(serve func(http.ResponseWriter, *http.Request) error) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		turn, err := s.lists.enter(r.Context())
		if err != nil {
			return err
		}
		defer turn.leave()
		t := &taker{ResponseWriter: w, turn: turn, until: time.Now().Add(takeTime)}
		_ = t.SetWriteDeadline(t.until) // where a writer has no deadlines, nobody is slow
		return serve(t, r)
	}
}

// A taker is a ResponseWriter that ends a turn with the first byte of an answer, and whose deadline for writing is never
// after until.
type taker struct {
	http.ResponseWriter
	turn  *turn
	until time.Time
}

// WriteHeader implements http.ResponseWriter.
func (t *taker) WriteHeader(status int) {
	t.turn.end()
	t.ResponseWriter.WriteHeader(status)
}

func (t *taker) Write(b []byte) (int, error) {
	t.turn.end()
	return t.ResponseWriter.Write(b)
}

// SetWriteDeadline is what http.ResponseController calls.
func (t *taker) SetWriteDeadline(at time.Time) error {
	if at.IsZero() || at.After(t.until) {
		at = t.until
	}
	return http.NewResponseController(t.ResponseWriter).SetWriteDeadline(at)
}

// Unwrap is for http.ResponseController.
func (t *taker) Unwrap() http.ResponseWriter { return t.ResponseWriter }
