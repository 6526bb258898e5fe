package reconciler

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// nodeFacts are what runs as each host, and when that was reported.
type nodeFacts struct {
	running  map[string]*agentapi.Running
	reported map[string]time.Time
}

// readRecords reads the records that decide, where it does not have them. Those of nodes may be as old as lunsEvery: only what was
// reported after a host's last login says anything.
func (l *luns) readRecords(ctx context.Context) error {
	if l.recs == nil {
		recs, err := state.LUNSets.List(ctx, l.store)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(l.media.dir, 0o700); err != nil {
			return fmt.Errorf("making the directory of hosts' disks: %w", err)
		}
		l.recs = recs
	}
	if l.assigned == nil {
		assigned, err := state.Assignments.List(ctx, l.store)
		if err != nil {
			return err
		}
		l.assigned = assigned
	}
	if l.nodes == nil {
		nodes, err := state.Nodes.List(ctx, l.store)
		if err != nil {
			return err
		}
		l.nodes = newestRunning(nodes)
	}
	return nil
}

// facts are what decides, of each host that has LUNs or is to have some.
func (l *luns) facts(ctx context.Context) (map[string]lunFacts, error) {
	if err := l.readRecords(ctx); err != nil {
		return nil, err
	}
	now := l.now()
	if l.began.IsZero() {
		l.began = now
	}
	booting, proven := l.heard()
	all := map[string]lunFacts{}
	for host := range l.recs {
		all[host] = lunFacts{}
	}
	for host := range l.hosts { // of which there is no record any more
		all[host] = lunFacts{}
	}
	for host, a := range l.assigned {
		if _, known := all[host]; known || a.ISCSI != nil {
			all[host] = lunFacts{assigned: &a}
		}
	}
	for host, f := range all {
		f.now, f.began, f.boot, f.proven = now, l.began, booting[host], proven[host]
		f.running, f.reported = l.nodes.running[host], l.nodes.reported[host]
		f.lastSeen, f.served = l.seen[host], l.serves(host)
		all[host] = f
	}
	for _, s := range l.target.Sessions() {
		host := hostOf(s.Initiator)
		if f, known := all[host]; known {
			f.sessions, f.lastSeen = append(f.sessions, s), now
			l.seen[host] = now
			all[host] = f
		}
	}
	return all, nil
}

// serves is the id of the disk that a host's sessions are of; "" while those of one before end.
func (l *luns) serves(host string) string {
	if h := l.hosts[host]; h != nil {
		return h.current
	}
	return ""
}

// newestRunning is what runs as each host, by who was heard of last.
func newestRunning(nodes map[string]state.Node) *nodeFacts {
	f := nodeFacts{running: map[string]*agentapi.Running{}, reported: map[string]time.Time{}}
	for _, n := range nodes {
		if n.Running != nil && !n.LastSeen.Before(f.reported[n.Running.Host]) {
			f.running[n.Running.Host], f.reported[n.Running.Host] = n.Running, n.LastSeen
		}
	}
	return &f
}
