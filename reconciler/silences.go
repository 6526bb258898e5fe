package reconciler

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// listenEvery is how often it is looked who has fallen silent.
const listenEvery = 10 * time.Second

// listenShare is how many times as long as a look took nobody looks then: it reads all records.
const listenShare = 50

// What the events of a silence begin with. The first is looked for after a restart, too.
const (
	fellSilent = "lost: "
	heardAgain = "heard of again"
)

// silences tells people of hosts that are lost: a machine that lost its power or its cable says nothing itself.
type silences struct {
	hosts  func(context.Context) ([]api.Host, error)
	store  *state.Store
	events *recorder
	every  time.Duration // listenEvery; shorter in tests
}

// run looks until ctx ends.
func (s *silences) run(ctx context.Context) error {
	lost, err := s.toldBefore(ctx)
	if err != nil {
		return err
	}
	pause := s.every
	for {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		began := time.Now()
		hosts, err := s.hosts(ctx)
		pause = max(s.every, listenShare*time.Since(began))
		if err != nil {
			return err
		}
		for _, ev := range silenceEvents(lost, hosts) {
			s.events.note(ctx, ev)
		}
	}
}

// toldBefore are the hosts of which the last that was told is that they are lost: an earlier process did.
func (s *silences) toldBefore(ctx context.Context) (map[string]bool, error) {
	all, err := state.Events.List(ctx, s.store)
	if err != nil {
		return nil, err
	}
	lost := map[string]bool{}
	for _, id := range slices.Sorted(maps.Keys(all)) { // an event's id begins with its time
		if ev := all[id]; ev.Kind == "node" {
			lost[ev.Subject] = strings.HasPrefix(ev.Message, fellSilent)
		}
	}
	return lost, nil
}

// silenceEvents says what is new about who is silent, and brings lost up to date. A host whose state says that it is up
// to something is neither: its machine was heard of, and how it fares is told by others.
func silenceEvents(lost map[string]bool, hosts []api.Host) []state.Event {
	var events []state.Event
	for _, h := range hosts {
		switch {
		case h.Name == "":
		case h.State == api.HostLost && !lost[h.Name]:
			lost[h.Name] = true
			events = append(events, state.Event{Kind: "node", Subject: h.Name, Message: fellSilent + lastWord(h), Warning: true})
		case h.State != api.HostLost && lost[h.Name]:
			lost[h.Name] = false
			events = append(events, state.Event{Kind: "node", Subject: h.Name, Message: heardAgain})
		}
	}
	return events
}

// lastWord is for how long a host is silent, and what it did before.
func lastWord(h api.Host) string {
	if h.RunningRole != "" {
		return h.Detail + ", it ran role " + h.RunningRole
	}
	return h.Detail + ", it came as far as " + h.Stage
}
