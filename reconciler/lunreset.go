package reconciler

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/troupe-dev/troupe/reconciler/state"
)

// A ConflictError says that what was asked for is not possible as things are.
type ConflictError struct{ Reason string }

func (e *ConflictError) Error() string { return e.Reason }

// Conflict marks the error for package api, which answers it with 409.
func (e *ConflictError) Conflict() bool { return true }

// Reset has a host begin with a disk as it was made first. A node with an agent reboots for it, and loses its old disk when
// it does, or after resetGrace. It returns when that is on record.
func (l *luns) Reset(ctx context.Context, host string, force bool) error {
	if l.port == 0 {
		return &ConflictError{Reason: "the server's iSCSI target is off (serve --iscsi-listen)"}
	}
	done := make(chan error, 1)
	return request(ctx, l.asks, lunAsk{host: host, force: force, done: done}, done)
}

// readAssignment reads one host's assignment again: whoever asks may know of a change that the controller has yet to hear of.
func (l *luns) readAssignment(ctx context.Context, host string) error {
	if err := l.readRecords(ctx); err != nil {
		return err
	}
	a, err := state.Assignments.Get(ctx, l.store, host)
	switch {
	case errors.Is(err, state.ErrNotFound):
		delete(l.assigned, host)
	case err != nil:
		return err
	default:
		l.assigned[host] = a
	}
	return nil
}

// reset is Reset, by run.
func (l *luns) reset(ctx context.Context, host string, force bool) error {
	if err := l.readAssignment(ctx, host); err != nil {
		return err
	}
	all, err := l.facts(ctx)
	if err != nil {
		return err
	}
	f := all[host]
	if f.wants() == nil {
		return &ConflictError{Reason: fmt.Sprintf("host %s has no disk on the server: what it writes lies on a disk of its own, which cannot be reset yet", host)}
	}
	rec := l.recs[host]
	wanted, _ := rec.Wanted(f.wants())
	cur, _ := rec.Disk(rec.Current)
	inUse := f.mayUse(&rec) && !force
	if cur.Image != nil && inUse {
		return &ConflictError{Reason: inUseReason(host, cur.ID, len(f.sessions) > 0)}
	}
	ends := f.now
	if inUse {
		ends = ends.Add(resetGrace)
	}
	rec.Disks = slices.Clone(rec.Disks)
	for i := range rec.Disks {
		if d := &rec.Disks[i]; d.ID == cur.ID || d.ID == wanted.ID {
			d.Ends = ends
		}
	}
	if err := l.write(ctx, l.recs[host], rec); err != nil {
		return err
	}
	l.events.note(ctx, state.Event{Kind: "disk", Subject: host, Message: "reset: what it wrote is dropped, and its next boot begins anew"})
	_, _ = l.host(ctx, host, f) // what goes wrong in it is told, and tried again
	l.poke()
	return nil
}

// inUseReason says why the disk of a system without an agent is not reset.
func inUseReason(host, disk string, open bool) string {
	if !open {
		return fmt.Sprintf("host %s may still run from its disk %s: its session broke less than a minute ago, or the server began less than ten minutes ago, "+
			"and it may log in again; where it is off, wait for that time to pass, or use --force", host, disk)
	}
	return fmt.Sprintf("host %s is logged in to its disk %s, and nobody can have its system let go of that: "+
		"shut it down first, or use --force, after which all that it reads and writes fails until it is booted again", host, disk)
}
