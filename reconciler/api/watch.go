package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/troupe-dev/troupe/reconciler/state"
)

// slowClient is how long a client may take no byte of what is sent to it before it is dropped.
const slowClient = 10 * time.Second

// How often the records are looked at for watchers. Looking lists all of them, so it may take one part in lookShare of
// the time; and a host becomes lost without any record changing, so it is done every lookAtLeast.
const (
	lookAtMost  = 100 * time.Millisecond
	lookShare   = 5
	lookAtLeast = 3 * time.Second
)

// maxWatchers bounds how many clients watch at a time.
const maxWatchers = 256

// shared is what all requests have in common.
type shared struct {
	requests               requests
	plans, watchers, looks gate

	mu   sync.Mutex
	last *frame
}

// A gate counts who is inside.
type gate struct{ inside atomic.Int64 }

// enter counts one more, unless that would be more than most.
func (g *gate) enter(most int64) bool {
	if g.inside.Add(1) <= most {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() { g.inside.Add(-1) }

// A frame is the fleet at one moment, with each of its objects encoded, so that watchers compare bytes. It never changes
// once made.
type frame struct {
	snapshot Snapshot
	made     time.Time
	cost     time.Duration
	order    []string // keys of objects
	objects  map[string]object
}

// An object is one thing that may change.
type object struct {
	kind string // the name of its field in Change
	same []byte // what tells it from its next state: JSON without what changes all the time
	send Change
	gone Change // what is sent when it is no longer there; none if zero
}

// Snapshot is the fleet as the records have it.
func (r *Records) Snapshot() Snapshot {
	hosts, images := r.Hosts(), r.Images()
	for i := range hosts {
		hosts[i].LastSeen = hosts[i].LastSeen.Truncate(heartbeat) // nobody wants a change for each report
	}
	events := sortEvents(r.Events)
	events = slices.Clone(events[max(0, len(events)-snapshotEvents):])
	slices.Reverse(events)
	return Snapshot{Status: r.Status(hosts, images), Hosts: hosts, Images: images, Events: events}
}

func newFrame(r *Records) (*frame, error) {
	s := r.Snapshot()
	f := &frame{snapshot: s, objects: make(map[string]object, len(s.Hosts)+len(r.Events))}
	for i := range s.Hosts {
		h := &s.Hosts[i]
		if err := f.add(h.Key(), "host", h, Change{Host: h}, Change{Gone: h.Key()}); err != nil {
			return nil, err
		}
	}
	for i := range s.Images {
		img := &s.Images[i]
		id := string(img.Recipe)
		if err := f.add(id, "image", img, Change{Image: img}, Change{GoneImage: id}); err != nil {
			return nil, err
		}
	}
	f.addEvents(r.Events)
	timeless := s.Status
	timeless.Time = time.Time{}
	return f, f.add("", "status", timeless, Change{Status: &s.Status}, Change{})
}

func (f *frame) add(key, kind string, same any, send, gone Change) error {
	b, err := json.Marshal(same)
	if err != nil {
		return fmt.Errorf("encoding %s %q: %w", kind, key, err)
	}
	key = kind + " " + key
	f.order = append(f.order, key)
	f.objects[key] = object{kind: kind, same: b, send: send, gone: gone}
	return nil
}

// addEvents adds all events, and not only those of the snapshot: a commit may change a thousand hosts between two frames.
// The oldest comes first, since that is how they are told and how their ids sort. What is the same of an event is its id:
// it never changes.
func (f *frame) addEvents(all map[string]state.Event) {
	for _, id := range slices.Sorted(maps.Keys(all)) {
		e, key := all[id], "event "+id
		f.order = append(f.order, key)
		f.objects[key] = object{kind: "event", same: []byte(id), send: Change{Event: &e}}
	}
}

// since are the changes that make f of old, in the order in which they are to be told.
func (f *frame) since(old *frame) []Change {
	var changes []Change
	for _, key := range old.order {
		o := old.objects[key]
		if _, ok := f.objects[key]; !ok && o.gone != (Change{}) {
			changes = append(changes, o.gone)
		}
	}
	for _, key := range f.order {
		if o := f.objects[key]; !bytes.Equal(o.same, old.objects[key].same) {
			changes = append(changes, o.send)
		}
	}
	return changes
}

// pause is how long to wait after f was made before the next one is.
func (f *frame) pause() time.Duration { return max(lookAtMost, lookShare*f.cost) }

// frame makes a frame, or gives the last one where that is hardly old. One at a time is made, whoever asks.
func (s *Server) frame(ctx context.Context) (*frame, error) {
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	if f := s.shared.last; f != nil && time.Since(f.made) < f.pause() {
		return f, nil
	}
	start := time.Now() // what changes from here on is not in it for sure
	recs, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	f, err := newFrame(recs)
	if err != nil {
		return nil, err
	}
	f.made, f.cost = start, time.Since(start)
	s.shared.last = f
	return f, nil
}

// Hosts are all hosts as the views show them.
func (s *Server) Hosts(ctx context.Context) ([]Host, error) {
	recs, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	return recs.Hosts(), nil
}

// forget has the next frame made from the records as they are then.
func (s *Server) forget() {
	s.shared.mu.Lock() // waits for a frame that is being made from older ones
	defer s.shared.mu.Unlock()
	s.shared.last = nil
}

// watch sends a snapshot and then what changes, as server-sent events (HTML standard, section 9.2), until the client
// goes.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) error {
	if !s.shared.watchers.enter(maxWatchers) {
		return &Error{Status: http.StatusServiceUnavailable, Message: "too many clients watch already"}
	}
	defer s.shared.watchers.leave()
	wake := s.Store.Watch(r.Context(), watched()...) // before the first look, so that nothing falls in between
	f, err := s.frame(r.Context())
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // proxies that gather answers would make it useless
	out := &eventWriter{out: &flusher{w: w, ctl: http.NewResponseController(w)}}
	out.send(Change{Snapshot: &f.snapshot})
	for out.err == nil && s.await(r.Context(), wake, f, out) {
		next, err := s.frame(r.Context())
		if err != nil {
			s.Log.Debug("a watcher is dropped", "error", err)
			return nil
		}
		for _, c := range next.since(f) {
			out.send(c)
		}
		f = next
	}
	return nil
}

// await returns true when it is time to look for what came after f, and false when the client or the store is gone.
func (s *Server) await(ctx context.Context, wake <-chan struct{}, f *frame, out *eventWriter) bool {
	least := time.NewTimer(lookAtLeast)
	defer least.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-least.C:
		out.beat()
		return true
	case _, ok := <-wake:
		if !ok {
			return false
		}
	}
	most := time.NewTimer(time.Until(f.made.Add(f.pause()))) // more may change meanwhile: one look is enough for all
	defer most.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-most.C:
		return true
	}
}

// An eventWriter writes server-sent events until one cannot be written; err says why.
type eventWriter struct {
	out  *flusher
	last time.Time // of the last write
	err  error
}

// send writes c as one event, named as the field of it that is set.
func (e *eventWriter) send(c Change) {
	data, err := json.Marshal(c)
	if err != nil {
		e.err = fmt.Errorf("encoding a change: %w", err)
		return
	}
	e.write(fmt.Appendf(nil, "event: %s\ndata: %s\n\n", c.Kind(), data))
}

// beat writes a comment where nothing was written for a while, so that both sides know of each other.
func (e *eventWriter) beat() {
	if time.Since(e.last) >= heartbeat {
		e.write([]byte(": here\n\n"))
	}
}

func (e *eventWriter) write(b []byte) {
	if e.err == nil {
		e.last = time.Now()
		_, e.err = e.out.Write(b)
	}
}

// Kind is the name of the field that is set.
func (c Change) Kind() string {
	switch {
	case c.Snapshot != nil:
		return "snapshot"
	case c.Status != nil:
		return "status"
	case c.Host != nil:
		return "host"
	case c.Gone != "":
		return "gone"
	case c.Image != nil:
		return "image"
	case c.GoneImage != "":
		return "goneImage"
	}
	return "event"
}
