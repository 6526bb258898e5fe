package reconciler

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// diffWait is how long a node may take to tell what it changed: it hears that somebody asks with its next report.
const diffWait = 25 * time.Second

// maxDrops bounds the paths of one order.
const maxDrops = 1000

// nodeDeltas writes down what operators want to be dropped of what hosts wrote, and asks nodes for what they changed.
type nodeDeltas struct {
	store  *state.Store
	events *recorder
	now    func() time.Time

	writing sync.Mutex // held while an order is made from the one before

	mu   sync.Mutex
	asks map[string]*diffAsk // by MAC
}

// A diffAsk is a question to a node for what it changed. All who ask at the same time wait for one answer.
type diffAsk struct {
	id      string
	waiting int           // guarded by nodeDeltas.mu
	done    chan struct{} // closed when there is an answer
	diff    agentapi.DeltaDiff
	err     error
}

func newNodeDeltas(s *state.Store, events *recorder) *nodeDeltas {
	return &nodeDeltas{store: s, events: events, now: time.Now, asks: map[string]*diffAsk{}}
}

// Drop has what a host wrote be dropped at its next boot: below some paths, or all of it where there are none; with reboot it boots
// now. It returns when that is on record. What an order before it wants, and was not done yet, is part of it.
func (n *nodeDeltas) Drop(ctx context.Context, host string, paths []string, reboot bool) error {
	for _, p := range paths {
		if !path.IsAbs(p) || path.Clean(p) != p || p == "/" || strings.ContainsRune(p, 0) || len(p) > 4096 {
			return &InvalidError{Reason: fmt.Sprintf("path %q: want an absolute path below /, without . and ..", p)}
		}
	}
	n.writing.Lock()
	defer n.writing.Unlock()
	before, err := state.Orders.Get(ctx, n.store, host)
	if err != nil && !notFound(err) {
		return err
	}
	running, _, err := n.node(ctx, host)
	if err != nil && !errors.As(err, new(*ConflictError)) {
		return err
	}
	o := state.Order{Host: host, Since: n.now(), DeltaOrder: agentapi.DeltaOrder{ID: rand.Text(), Paths: paths, Reboot: reboot}}
	if before.ID != "" && before.ID != running.Order {
		o.Reboot = o.Reboot || before.Reboot
		o.Paths = joinDrops(paths, before.Paths)
	}
	if len(o.Paths) > maxDrops {
		return &InvalidError{Reason: fmt.Sprintf("%d paths are to be dropped, with those that were not yet: %d at a time, or all of it", len(o.Paths), maxDrops)}
	}
	if err := state.Orders.Put(ctx, n.store, host, o); err != nil {
		return err
	}
	what := "all that it wrote"
	if len(o.Paths) > 0 {
		what = strings.Join(o.Paths, " ")
	}
	n.events.note(ctx, state.Event{Kind: "node", Subject: host, Message: cut("its next boot drops " + what)})
	return nil
}

// joinDrops are the paths of two orders; none, which is all, where one has none.
func joinDrops(a, b []string) []string {
	if len(a) == 0 || len(b) == 0 {
		return nil
	}
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(a, b))))
}

// node is what a host runs, and the MAC of the machine that does. That none does is a ConflictError.
func (n *nodeDeltas) node(ctx context.Context, host string) (agentapi.Running, string, error) {
	nodes, err := state.Nodes.List(ctx, n.store)
	if err != nil {
		return agentapi.Running{}, "", err
	}
	var last state.Node
	for _, node := range nodes {
		if node.Running != nil && node.Running.Host == host && node.LastSeen.After(last.LastSeen) {
			last = node
		}
	}
	if last.Running == nil {
		return agentapi.Running{}, "", &ConflictError{Reason: "no node runs as host " + host}
	}
	return *last.Running, last.MAC, nil
}

// Diff asks the node that a host runs on what it changed, and waits for its answer.
func (n *nodeDeltas) Diff(ctx context.Context, host string) (agentapi.DeltaDiff, error) {
	_, mac, err := n.node(ctx, host)
	if err != nil {
		return agentapi.DeltaDiff{}, err
	}
	return n.await(ctx, host, mac)
}

func (n *nodeDeltas) await(ctx context.Context, host, mac string) (agentapi.DeltaDiff, error) {
	a := n.join(mac)
	defer n.leave(mac, a)
	late := time.NewTimer(diffWait)
	defer late.Stop()
	select {
	case <-a.done:
		return a.diff, a.err
	case <-late.C:
		return agentapi.DeltaDiff{}, &ConflictError{Reason: fmt.Sprintf("host %s did not answer within %v: is it on?", host, diffWait)}
	case <-ctx.Done():
		return agentapi.DeltaDiff{}, ctx.Err()
	}
}

func (n *nodeDeltas) join(mac string) *diffAsk {
	n.mu.Lock()
	defer n.mu.Unlock()
	a := n.asks[mac]
	if a == nil {
		a = &diffAsk{id: rand.Text(), done: make(chan struct{})}
		n.asks[mac] = a
	}
	a.waiting++
	return a
}

// leave ends a question for which nobody waits any more.
func (n *nodeDeltas) leave(mac string, a *diffAsk) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a.waiting--; a.waiting == 0 && n.asks[mac] == a {
		delete(n.asks, mac)
	}
}

// asked names the question that a machine is to answer; "" for none.
func (n *nodeDeltas) asked(mac string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a := n.asks[mac]; a != nil {
		return a.id
	}
	return ""
}

// Answer takes a node's answer. One that nobody waits for is dropped.
func (n *nodeDeltas) Answer(_ context.Context, a agentapi.DeltaAnswer) error {
	id, err := cleanIdentity(a.Identity)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	ask := n.asks[id.MAC]
	if ask == nil || ask.id != a.ID {
		return nil
	}
	delete(n.asks, id.MAC)
	ask.diff = cleanDiff(a.Diff)
	if a.Error != "" {
		ask.err = &ConflictError{Reason: "the node could not tell: " + cut(a.Error)}
	}
	close(ask.done)
	return nil
}

// cleanDiff bounds what a node told.
func cleanDiff(d agentapi.DeltaDiff) agentapi.DeltaDiff {
	d.Host = cut(d.Host)
	room := agentapi.MaxDeltaPaths
	kept := make([]agentapi.DeltaChange, 0, min(len(d.List), agentapi.MaxDeltaChanges))
	for _, c := range d.List {
		if room -= len(c.Path); room < 0 || len(kept) == agentapi.MaxDeltaChanges {
			break
		}
		c.Path, c.Type, c.Kind = cutTo(c.Path, 4096), cutTo(c.Type, 16), agentapi.DeltaKind(cutTo(string(c.Kind), 16))
		kept = append(kept, c)
	}
	d.List = kept
	d.Changes = max(d.Changes, len(kept))
	d.More = d.Changes - len(kept)
	return d
}
