package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
)

func (s *Server) getStatus(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, recs.Status(recs.Hosts(), recs.Images()))
}

func (s *Server) getHosts(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	hosts := recs.Hosts()
	if only, _ := strconv.ParseBool(r.FormValue("unclaimed")); only {
		hosts = slices.DeleteFunc(hosts, func(h Host) bool { return h.State != HostUnclaimed })
	}
	return writeJSON(w, http.StatusOK, hosts)
}

func (s *Server) getHost(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	key := r.PathValue("host")
	hosts := recs.Hosts()
	at := slices.IndexFunc(hosts, func(h Host) bool { return h.Name == key || h.MAC == strings.ToLower(key) })
	if at < 0 {
		return notFound("there is no host %q, and no machine of that MAC was seen", key)
	}
	d := recs.hostDetail(hosts[at])
	d.ISCSI = s.target(recs, d.Name)
	if d.MAC != "" {
		boots, err := state.Boots.ListUnder(r.Context(), s.Store, d.MAC+"/")
		if err != nil {
			return err
		}
		if b, ok := recs.Boots[d.MAC]; ok { // fresher than the store's
			boots[d.MAC+"/"+b.ID] = b
		}
		d.Boots = BootViews(slices.Collect(maps.Values(boots)))
		lease, err := state.Leases.Get(r.Context(), s.Store, d.MAC)
		if err == nil {
			d.Lease = &lease
		} else if !errors.Is(err, state.ErrNotFound) {
			return err
		}
	}
	return writeJSON(w, http.StatusOK, d)
}

// hostDetail adds to a host the records that it was made of.
func (r *Records) hostDetail(h Host) HostDetail {
	d := HostDetail{Host: h, Boots: []Boot{}}
	if r.Fleet != nil {
		if spec, ok := r.Fleet.Hosts[h.Name]; ok {
			d.Spec = &spec
		}
	}
	d.Assignment = find(r.Assignments, h.Name)
	d.Machine = find(r.Machines, h.MAC)
	d.Node = find(r.Nodes, h.MAC)
	return d
}

// find is a copy of an element, nil if there is none.
func find[T any](all map[string]T, key string) *T {
	v, ok := all[key]
	if !ok {
		return nil
	}
	return &v
}

func (s *Server) getRoles(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, recs.Roles(recs.Hosts()))
}

func (s *Server) getReleases(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, recs.ReleaseViews(recs.Hosts()))
}

func (s *Server) getImages(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, recs.Images())
}

func (s *Server) getImage(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	d, ok := recs.Image(r.PathValue("image"))
	if !ok {
		return notFound("there is no image %q", r.PathValue("image"))
	}
	return writeJSON(w, http.StatusOK, d)
}

func (s *Server) buildImage(w http.ResponseWriter, r *http.Request) error {
	if s.Images == nil {
		return notHere("image builder")
	}
	recipes, err := s.Images.Build(r.Context(), r.PathValue("image"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusAccepted, Noted{Recipes: recipes})
}

// getLog sends the output of a build as it comes.
func (s *Server) getLog(w http.ResponseWriter, r *http.Request) error {
	if s.Images == nil {
		return notHere("image builder")
	}
	recipe, err := s.recipe(r.Context(), r.PathValue("recipe"))
	if err != nil {
		return err
	}
	follow, _ := strconv.ParseBool(r.FormValue("follow"))
	log, err := s.Images.Log(r.Context(), recipe, follow)
	if err != nil {
		return err
	}
	defer log.Close()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, err = io.Copy(&flusher{w: w, ctl: http.NewResponseController(w)}, log)
	if err != nil {
		s.Log.Debug("a build log ended early", "recipe", recipe, "error", err)
	}
	return nil
}

// recipe finds a recipe by what people call it.
func (s *Server) recipe(ctx context.Context, name string) (digest.Digest, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	turn, err := s.lists.enter(ctx)
	if err != nil {
		return "", err
	}
	defer turn.leave()
	recs, err := s.records(ctx)
	if err != nil {
		return "", err
	}
	recipe, ok := recs.recipe(name)
	if !ok {
		return "", notFound("there is no build of %q", name)
	}
	return recipe, nil
}

// A flusher sends each write at once, and gives up on a client that takes none of it.
type flusher struct {
	w   io.Writer
	ctl *http.ResponseController
}

func (f *flusher) Write(b []byte) (int, error) {
	_ = f.ctl.SetWriteDeadline(time.Now().Add(slowClient))
	n, err := f.w.Write(b)
	if err == nil {
		err = f.ctl.Flush()
	}
	return n, err
}

// Limits of one answer with events.
const (
	defaultEvents = 100
	maxEvents     = 10_000
)

func (s *Server) getEvents(w http.ResponseWriter, r *http.Request) error {
	limit := defaultEvents
	var since time.Time
	var err error
	if v := r.FormValue("limit"); v != "" {
		if limit, err = strconv.Atoi(v); err != nil || limit < 1 || limit > maxEvents {
			return badRequest("limit=%s: want a number from 1 to %d", v, maxEvents)
		}
	}
	if v := r.FormValue("since"); v != "" {
		if since, err = time.Parse(time.RFC3339Nano, v); err != nil {
			return badRequest("since=%s: want a time as in 2006-01-02T15:04:05Z", v)
		}
	}
	all, err := state.Events.List(r.Context(), s.Store)
	if err != nil {
		return err
	}
	subject := r.FormValue("subject")
	events := sortEvents(all)
	events = slices.DeleteFunc(events, func(e state.Event) bool {
		return subject != "" && e.Subject != subject || !since.IsZero() && !e.Time.After(since)
	})
	return writeJSON(w, http.StatusOK, events[max(0, len(events)-limit):])
}

// sortEvents orders events by time, the oldest first; of one time, by id.
func sortEvents(all map[string]state.Event) []state.Event {
	ids := slices.Sorted(maps.Keys(all))
	events := make([]state.Event, 0, len(all))
	for _, id := range ids {
		events = append(events, all[id])
	}
	slices.SortStableFunc(events, func(a, b state.Event) int { return a.Time.Compare(b.Time) })
	return events
}

// poke takes any body: it is what a forge's webhook calls, and only that it does counts. With wait in the URL's query it
// answers after the look.
func (s *Server) poke(w http.ResponseWriter, r *http.Request) error {
	if wait, _ := strconv.ParseBool(r.URL.Query().Get("wait")); wait {
		return s.look(w, r)
	}
	if s.Poke == nil {
		return notHere("repo")
	}
	s.Poke()
	return writeJSON(w, http.StatusAccepted, struct{}{})
}

// look answers after a look at the repo. What is told from then on is no older than that.
func (s *Server) look(w http.ResponseWriter, r *http.Request) error {
	if s.Look == nil {
		return notHere("repo to wait for")
	}
	if !s.shared.looks.enter(maxWatchers) {
		return &Error{Status: http.StatusServiceUnavailable, Message: "too many clients wait for a look at the repo already"}
	}
	defer s.shared.looks.leave()
	ctx, cancel := context.WithTimeout(r.Context(), lookTime)
	defer cancel()
	if err := s.Look(ctx); err != nil {
		return fmt.Errorf("looking at the repo: %w", err)
	}
	s.forget()
	return writeJSON(w, http.StatusOK, struct{}{})
}

// healthz says whether the server can read its records.
func (s *Server) healthz(w http.ResponseWriter, r *http.Request) error {
	_, err := state.Sources.Get(r.Context(), s.Store, state.SourceID)
	if err != nil && !errors.Is(err, state.ErrNotFound) {
		return &Error{Status: http.StatusServiceUnavailable, Message: err.Error()}
	}
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}
