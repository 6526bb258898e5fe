package reconciler

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/troupe-dev/troupe/reconciler/state"
)

// targetOff is why a host waits whose role boots from a server that has no iSCSI target.
const targetOff = "its role boots from LUNs of the server, whose iSCSI target is off (serve --iscsi-listen)"

// off is run where there is no target: it tells people which hosts wait for one, until ctx ends.
func (l *luns) off(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changed := l.store.Watch(ctx, state.Assignments.Prefix())
	var waiting []string
	for {
		assigned, err := state.Assignments.List(ctx, l.store)
		switch {
		case ctx.Err() != nil:
			return nil // whatever the read ended with
		case err != nil:
			return err
		}
		waiting = l.keepWaiting(ctx, waiting, assigned)
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// keepWaiting publishes why those hosts wait that are to run from LUNs, and returns them. before are those of the last time.
func (l *luns) keepWaiting(ctx context.Context, before []string, assigned map[string]state.Assignment) []string {
	var waiting []string
	for _, host := range slices.Sorted(maps.Keys(assigned)) {
		if assigned[host].ISCSI != nil {
			waiting = append(waiting, host)
			l.publish(host, portal{lunView: lunView{why: targetOff}}, nil)
		}
	}
	for _, host := range before {
		if !slices.Contains(waiting, host) {
			l.unpublish(host)
		}
	}
	if len(before) == 0 && len(waiting) > 0 {
		l.events.note(ctx, state.Event{Kind: "disk", Subject: "server", Warning: true, Message: fmt.Sprintf(
			"roles of %s boot from the server, whose iSCSI target is off: start the server with another --iscsi-listen", named(waiting))})
	}
	if l.settled() {
		l.refresh()
	}
	return waiting
}

// Waiting is what keeps hosts from their LUNs, by host, for people.
func (l *luns) Waiting() map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	why := map[string]string{}
	for host, at := range l.byHost {
		if at.why != "" {
			why[host] = at.why
		}
	}
	return why
}

// named are hosts, for people: the first three, and how many more.
func named(hosts []string) string {
	const most = 3
	if len(hosts) <= most {
		return strings.Join(hosts, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(hosts[:most], ", "), len(hosts)-most)
}
