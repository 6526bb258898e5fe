package reconciler

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

const (
	// maxStrangers bounds how many machines that no host is have records, and of how many others, which netboot's servers
	// alone saw, boots are kept. Anybody on the network can make up machines; what is kept of one is bounded, too, to some
	// 200 KB (mostly it is 5), so that the fleet has room in the records whatever strangers say.
	maxStrangers = 4000
	// freshStranger is how long a stranger must have been silent to be forgotten for another: one that waits for a host to
	// name it is heard of every few seconds.
	freshStranger = time.Minute
	// freshHost is the same for one that was a host in its last boot: a commit that lost many may be reverted.
	freshHost = 24 * time.Hour
	// forgetEvery is how often at most it is looked for strangers to forget: that lists all machines and nodes.
	forgetEvery = 10 * time.Second
)

// A standing is what a machine is to the fleet in force.
type standing int

const (
	stranger  standing = iota // netboot's servers saw it; nothing else is known of it
	unclaimed                 // an agent spoke for it, and no host declares it
	declared                  // it is a host
)

// strangers is the controller that forgets machines which no host is, so that there is room for others.
type strangers struct {
	store  *state.Store
	views  *views
	boots  *boots
	events *recorder
	now    func() time.Time
	each   *striped // the agents' own: nobody is forgotten while it is being listened to

	most  int           // maxStrangers; fewer in tests
	pause time.Duration // forgetEvery; shorter in tests
	wake  chan struct{}

	mu sync.Mutex
	n  int // those that have a record, as far as they were counted
}

func newStrangers(a *agents) *strangers {
	return &strangers{
		store: a.store, views: a.views, boots: a.boots, events: a.events, now: a.now, each: a.each,
		most: maxStrangers, pause: forgetEvery, wake: make(chan struct{}, 1),
	}
}

// enter counts a stranger that is about to get a record. It says no while there is no room for one; room is made then,
// if there is somebody to forget.
func (s *strangers) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n >= s.most*7/8 {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	if s.n >= s.most {
		return false
	}
	s.n++
	return true
}

// run counts the strangers once there is a fleet to tell them by, and again when they have become many, until ctx ends.
func (s *strangers) run(ctx context.Context) error {
	for v, newer := s.views.get(); v.fleet == nil; v, newer = s.views.get() {
		select {
		case <-newer:
		case <-ctx.Done():
			return nil
		}
	}
	for {
		if err := s.forget(ctx); err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // it ended because ctx did
			}
			return fmt.Errorf("forgetting machines that no host is: %w", err)
		}
		select {
		case <-time.After(s.pause):
		case <-ctx.Done():
			return nil
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

// forget counts the strangers, and drops those that were not heard of for longest, where they are many.
func (s *strangers) forget(ctx context.Context) error {
	s.mu.Lock()
	counted := s.n
	s.mu.Unlock()
	all, err := s.list(ctx)
	if err != nil {
		return err
	}
	gone := 0
	if len(all) >= s.most*7/8 {
		for _, mac := range all {
			if len(all)-gone <= s.most*3/4 {
				break
			}
			dropped, err := s.drop(ctx, mac)
			if err != nil {
				return err
			}
			if dropped {
				gone++
			}
		}
	}
	s.mu.Lock()
	s.n += len(all) - gone - counted // others came meanwhile
	s.mu.Unlock()
	if gone > 0 {
		s.events.note(ctx, state.Event{
			Kind: "machine", Subject: "unclaimed", Warning: true,
			Message: fmt.Sprintf("%d machines that no host declares are forgotten, those that were silent for longest: %d are kept", gone, s.most),
		})
	}
	return nil
}

// list has the MACs of all strangers with a record of a machine or a node, those that were silent for longest first.
func (s *strangers) list(ctx context.Context) ([]string, error) {
	machines, err := state.Machines.List(ctx, s.store)
	if err != nil {
		return nil, err
	}
	nodes, err := state.Nodes.List(ctx, s.store)
	if err != nil {
		return nil, err
	}
	v, _ := s.views.get()
	match := plan.Match(v.fleet.Hosts, machines, nodes)
	heard := map[string]time.Time{}
	for mac, m := range machines {
		heard[mac] = m.FirstSeen
	}
	for mac, n := range nodes {
		if n.LastSeen.After(heard[mac]) {
			heard[mac] = n.LastSeen
		}
	}
	var all []string
	for mac := range heard {
		if match.Host(agentapi.Identity{MAC: mac}) == "" {
			all = append(all, mac)
		}
	}
	slices.SortFunc(all, func(a, b string) int { return heard[a].Compare(heard[b]) })
	return all, nil
}

// drop removes all records of a stranger, unless it was heard of lately or is a host by now. The machine's own goes last:
// whoever is killed in between finds it again.
func (s *strangers) drop(ctx context.Context, mac string) (bool, error) {
	defer s.each.lock(mac)()
	n, err := state.Nodes.Get(ctx, s.store, mac)
	if err != nil && !notFound(err) {
		return false, err
	}
	m, err := state.Machines.Get(ctx, s.store, mac)
	if err != nil && !notFound(err) {
		return false, err
	}
	fresh := freshStranger
	if s.boots.wasHost(mac) {
		fresh = freshHost
	}
	if before := s.now().Add(-fresh); n.LastSeen.After(before) || m.FirstSeen.After(before) {
		return false, nil
	}
	// A commit may have named it since it was listed.
	if v, _ := s.views.get(); v.host(agentapi.Identity{MAC: mac, UUID: m.UUID, Serial: m.Serial}) != "" {
		return false, nil
	}
	if err := s.boots.forget(ctx, mac); err != nil {
		return false, err
	}
	if err := state.Nodes.Delete(ctx, s.store, mac); err != nil {
		return false, err
	}
	return true, state.Machines.Delete(ctx, s.store, mac)
}
