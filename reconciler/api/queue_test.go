package api

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/troupe-dev/troupe/internal/quiet"
)

// fill takes all places in q, those of who reads and those of who waits. The function that it returns gives them back.
func fill(t *testing.T, q *queue) (reading []*turn, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	for range maxReads {
		turn, err := q.enter(ctx)
		if err != nil {
			t.Fatal(err)
		}
		reading = append(reading, turn)
	}
	for range maxListing - maxReads {
		go func() {
			if turn, err := q.enter(ctx); err == nil {
				<-ctx.Done()
				turn.leave()
			}
		}()
	}
	synctest.Wait()
	return reading, func() {
		cancel()
		synctest.Wait()
	}
}

func refusedAsBusy(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusServiceUnavailable
}

func (q *queue) want(t *testing.T, what string, reading, all int) {
	t.Helper()
	synctest.Wait()
	if r, a := len(q.turns), int(q.all.inside.Load()); r != reading || a != all {
		t.Errorf("%s: %d read of %d, want %d of %d", what, r, a, reading, all)
	}
}

func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		reading, end := fill(t, q)
		q.want(t, "at first", maxReads, maxListing)
		start := time.Now()
		if _, err := q.enter(t.Context()); !refusedAsBusy(err) || time.Since(start) > 0 {
			t.Errorf("where there is no room: %v after %s", err, time.Since(start))
		}
		reading[0].end() // and somebody else's turn comes
		q.want(t, "after the end of a turn", maxReads, maxListing)
		reading[0].leave()
		q.want(t, "after it was answered", maxReads, maxListing-1)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := q.enter(gone); !errors.Is(err, context.Canceled) {
			t.Errorf("who went away: %v", err)
		}
		if _, err := q.enter(t.Context()); !refusedAsBusy(err) || time.Since(start) != turnTime {
			t.Errorf("who has waited for long enough: %v after %s", err, time.Since(start))
		}
		q.want(t, "after all that waited gave up", maxReads, maxReads)
		end()
		for _, turn := range reading[1:] {
			turn.leave()
		}
		q.want(t, "in the end", 0, 0)
	})
}

// Each request that reads all records waits for its turn; agents and monitoring do not wait for operators.
func TestListsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := &Server{Log: slog.New(slog.NewTextHandler(&log, nil))} // without a store: nothing may be read
		h := s.Handler()
		_, end := fill(t, s.lists)
		defer end()
		for path, want := range map[string]int{
			"GET /api/v1/status": 503, "GET /api/v1/hosts": 503, "GET /api/v1/hosts/n1": 503, "GET /api/v1/roles": 503, "GET /api/v1/images": 503,
			"GET /api/v1/images/web": 503, "GET /api/v1/releases": 503, "GET /api/v1/events": 503, "GET /metrics": 503,
			"GET /api/v1/openapi.json": 200, "GET /node/v1/assignment": 501, "GET /api/v1/nosuch": 404,
		} {
			method, path, _ := strings.Cut(path, " ")
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, nil))
			if w.Code != want || (want == 503) != (w.Header().Get("Retry-After") != "") {
				t.Errorf("%s: %d, Retry-After %q, want %d", path, w.Code, w.Header().Get("Retry-After"), want)
			}
		}
		time.Sleep(time.Second)
		log.Reset()
		for range 1000 { // nor may they fill the log
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/hosts", nil))
		}
		if n := strings.Count(log.String(), "\n"); n != quiet.LinesPerSecond {
			t.Errorf("%d log lines for 1000 requests, want %d", n, quiet.LinesPerSecond)
		}
		if _, err := s.recipe(t.Context(), "web"); !refusedAsBusy(err) {
			t.Errorf("a log: %v", err)
		}
	})
}

// deadlined has the deadline of a connection.
type deadlined struct {
	http.ResponseWriter
	at time.Time
}

func (d *deadlined) SetWriteDeadline(at time.Time) error {
	d.at = at
	return nil
}

// A client may be slow with an answer that was made of all records, but not for ever: others wait for its place.
func TestAnswersAreTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{lists: newQueue()}
		conn := &deadlined{ResponseWriter: httptest.NewRecorder()}
		start := time.Now()
		serve := s.queued(func(w http.ResponseWriter, r *http.Request) error {
			if got := conn.at.Sub(start); got != takeTime {
				t.Errorf("at first the deadline is in %s, want %s", got, takeTime)
			}
			out := &flusher{w: w, ctl: http.NewResponseController(w)}
			s.lists.want(t, "while it reads", 1, 1)
			for _, left := range []time.Duration{slowClient, slowClient, 0} {
				_, _ = out.Write([]byte("x"))
				s.lists.want(t, "while it is taken", 0, 1)
				if got := time.Until(conn.at); got != left {
					t.Errorf("after %s: the deadline is in %s, want %s", time.Since(start), got, left)
				}
				time.Sleep(takeTime / 2)
			}
			return nil
		})
		if err := serve(conn, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)); err != nil {
			t.Error(err)
		}
		s.lists.want(t, "in the end", 0, 0)
	})
}
