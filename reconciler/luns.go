package reconciler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"reflect"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// lunsEvery is how often the LUNs are looked at while nothing wakes their controller: what a node runs, and how much room
// is left, is not heard of otherwise.
const lunsEvery = 30 * time.Second

// A Target is the iSCSI target that machines without disks run from. It may be used before it listens.
type Target interface {
	Sessions() []iscsi.SessionInfo
	// Drop ends the sessions of an initiator, and returns when nothing is done for them any more.
	Drop(initiator string)
}

// luns is the controller of what hosts have on the iSCSI target: it decides (lunset.go), writes that down, opens what is to
// be there (lunmedia.go), and answers the target's logins from memory (targets.go). One goroutine, run's, does all but the
// answering, and the opening of images, which may have to be hashed first.
type luns struct {
	store   *state.Store
	media   lunMedia
	port    uint16 // of the target; 0: there is none
	target  Target
	refresh func() // tells those who answer machines that something is open, or is not any more
	observe func(netboot.Event)
	events  *recorder
	log     *slog.Logger
	now     func() time.Time

	wake  chan struct{}
	asks  chan lunAsk
	ended chan struct{} // closed when Run has ended: nothing is opened any more

	portals

	// Owned by run:
	recs   map[string]state.LUNs // by host, as in the store; nil: not read yet
	hosts  map[string]*openHost
	images map[digest.Digest]*openImage
	opened chan *openImage
	seen   map[string]time.Time // when a session of a host was last seen
	told   map[string]string    // of which trouble people were told, by host
	swept  time.Time            // when files were last looked for that no record knows
	lean   bool                 // there is little room left, and people were told
}

// A lunAsk is an operator's wish to reset a host's disk.
type lunAsk struct {
	host  string
	force bool
	done  chan<- error // has room for one
}

func newLUNs(store *state.Store, m lunMedia, port uint16, events *recorder, log *slog.Logger) *luns {
	return &luns{
		store: store, media: m, port: port, events: events, log: log, refresh: func() {}, observe: func(netboot.Event) {}, now: time.Now,
		wake: make(chan struct{}, 1), asks: make(chan lunAsk), ended: make(chan struct{}),
		portals: newPortals(), hosts: map[string]*openHost{}, images: map[digest.Digest]*openImage{},
		opened: make(chan *openImage), told: map[string]string{}, seen: map[string]time.Time{},
	}
}

func (l *luns) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run keeps the LUNs as they are to be until ctx ends. What is open stays open then: see close.
func (l *luns) run(ctx context.Context) error {
	if l.port == 0 {
		return l.off(ctx)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer l.settle()
	defer cancel()
	changed := l.store.Watch(ctx, state.Assignments.Prefix())
	tick := time.NewTicker(lunsEvery)
	defer tick.Stop()
	for {
		var soon <-chan time.Time
		select {
		case <-time.After(settle): // a thousand machines that boot are a few looks
		case <-ctx.Done():
			return nil
		}
		next, err := l.step(ctx)
		if err != nil && ctx.Err() == nil {
			l.log.Error("keeping the LUNs of hosts", "error", err)
			next = l.now().Add(assignAgain)
		}
		if !next.IsZero() {
			soon = time.After(next.Sub(l.now()))
		}
		select {
		case <-changed:
		case <-l.wake:
		case <-tick.C:
		case <-soon:
		case img := <-l.opened:
			l.took(img)
		case a := <-l.asks:
			err := l.reset(ctx, a.host, a.force)
			if err == nil {
				_, _ = l.step(ctx) // what goes wrong in it goes wrong in the next one, too
			}
			a.done <- err
		case <-ctx.Done():
			return nil
		}
	}
}

// settle waits for images that are being opened.
func (l *luns) settle() {
	for _, img := range l.images {
		if img.opening {
			l.took(<-l.opened)
		}
	}
}

// close closes everything. Nobody may use the target, and run must have ended.
func (l *luns) close() error {
	var errs []error
	for name := range l.hosts {
		errs = append(errs, l.closeHost(name))
	}
	for d, img := range l.images {
		errs = append(errs, img.close())
		delete(l.images, d)
	}
	return errors.Join(errs...)
}

// step writes and opens what is to be there. It returns when to look again, at the latest; zero: when something changes.
func (l *luns) step(ctx context.Context) (next time.Time, err error) {
	all, err := l.facts(ctx)
	if err != nil {
		return next, err
	}
	var errs []error
	for _, host := range slices.Sorted(maps.Keys(all)) {
		at, err := l.host(ctx, host, all[host])
		if err != nil {
			errs = append(errs, fmt.Errorf("host %s: %w", host, err))
		}
		if !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	l.sweep(ctx)
	errs = append(errs, l.closeImages(), l.checkRoom(ctx))
	if l.settled() {
		l.refresh()
	}
	return next, errors.Join(errs...)
}

// facts reads what decides, of each host that has LUNs or is to have some.
func (l *luns) facts(ctx context.Context) (map[string]lunFacts, error) {
	if l.recs == nil {
		recs, err := state.LUNSets.List(ctx, l.store)
		if err != nil {
			return nil, err
		}
		if err := os.MkdirAll(l.media.dir, 0o700); err != nil {
			return nil, fmt.Errorf("making the directory of hosts' disks: %w", err)
		}
		l.recs = recs
	}
	assigned, err := state.Assignments.List(ctx, l.store)
	if err != nil {
		return nil, err
	}
	nodes, err := state.Nodes.List(ctx, l.store)
	if err != nil {
		return nil, err
	}
	booting, now := l.takeBooting(), l.now()
	all := map[string]lunFacts{}
	for host := range l.recs {
		all[host] = lunFacts{now: now, boot: booting[host]}
	}
	for host, a := range assigned {
		if f, known := all[host]; known || a.ISCSI != nil {
			f.assigned, f.now, f.boot = &a, now, booting[host]
			all[host] = f
		}
	}
	running := newestRunning(nodes)
	for host, f := range all {
		f.running, f.lastSeen = running[host], l.seen[host]
		all[host] = f
	}
	for _, s := range l.target.Sessions() {
		host := hostOf(s.Initiator)
		if f, known := all[host]; known {
			f.sessions = append(f.sessions, s)
			l.seen[host] = now
			all[host] = f
		}
	}
	return all, nil
}

// newestRunning is what runs as each host, by who was heard of last.
func newestRunning(nodes map[string]state.Node) map[string]*agentapi.Running {
	out, seen := map[string]*agentapi.Running{}, map[string]time.Time{}
	for _, n := range nodes {
		if n.Running != nil && !n.LastSeen.Before(seen[n.Running.Host]) {
			out[n.Running.Host], seen[n.Running.Host] = n.Running, n.LastSeen
		}
	}
	return out
}

// host brings one host to what it is to be: first its record, then what is open, then the files of what it lost.
func (l *luns) host(ctx context.Context, host string, f lunFacts) (next time.Time, err error) {
	before := l.recs[host]
	rec := nextLUNs(before, f, newDisk)
	rec = l.markOpened(rec, f)
	if rec.Disks == nil && rec.Images == nil && f.wants() == nil {
		return next, l.remove(ctx, host)
	}
	rec.Host = host
	if err := l.write(ctx, before, rec); err != nil {
		return next, err
	}
	l.tellBoot(before.Boot, rec)
	if f.assigned == nil && f.now.Sub(rec.Unused) >= leaveGrace {
		return next, l.shut(ctx, host, len(f.sessions) > 0)
	}
	err = l.serve(ctx, rec, f.wants(), f.boot)
	l.tell(ctx, host, err)
	if err != nil {
		next = f.now.Add(assignAgain)
	}
	if cur, ok := rec.Disk(rec.Current); ok && !cur.Ends.IsZero() {
		next = cur.Ends
	}
	if b := rec.Boot; b != nil && !b.Login.IsZero() && b.Booted.IsZero() && len(f.sessions) > 0 {
		next = f.now.Add(loaderGone)
	}
	if lost := slices.ContainsFunc(before.Disks, func(d state.LUNDisk) bool { _, has := rec.Disk(d.ID); return !has }); lost {
		return next, errors.Join(err, l.media.clear(host, before, rec))
	}
	return next, nil
}

// shut closes the disk of a host that left the fleet a while ago, and keeps it.
func (l *luns) shut(ctx context.Context, host string, inUse bool) error {
	if l.hosts[host] == nil {
		return nil
	}
	if inUse {
		l.events.note(ctx, state.Event{Kind: "disk", Subject: host, Message: "it left the fleet: its machine is cut off from its disk", Warning: true})
	}
	l.unpublish(host)
	return l.closeHost(host)
}

// tellBoot notes in the machine's timeline how far it came with its disk.
func (l *luns) tellBoot(before *state.LUNBoot, rec state.LUNs) {
	b := rec.Boot
	if b == nil {
		return
	}
	if before == nil || before.ID != b.ID || !before.Told.Equal(b.Told) {
		before = &state.LUNBoot{}
	}
	mac, err := net.ParseMAC(b.MAC)
	if err != nil {
		return // the boot loader told another one: whoever wrote the record checked it
	}
	if before.Login.IsZero() && !b.Login.IsZero() {
		l.observe(netboot.Event{MAC: mac, Stage: netboot.StageDisk, Time: b.Login, Detail: "LUN 0 of " + targetName(rec.Host)})
	}
	if before.Booted.IsZero() && !b.Booted.IsZero() {
		l.observe(netboot.Event{MAC: mac, Stage: netboot.StageBooted, Time: b.Booted})
	}
}

// markOpened notes that the current disk was in an initiator's hands.
func (l *luns) markOpened(rec state.LUNs, f lunFacts) state.LUNs {
	h := l.hosts[rec.Host]
	if len(f.sessions) == 0 || h == nil || h.current != rec.Current {
		return rec
	}
	for i := range rec.Disks {
		if d := &rec.Disks[i]; d.ID == rec.Current && d.Opened.IsZero() {
			d.Opened = f.now
		}
	}
	return rec
}

// write stores a record that changed. A disk is on record before its file is made, and taken from it before that goes.
func (l *luns) write(ctx context.Context, before, rec state.LUNs) error {
	if reflect.DeepEqual(before, rec) {
		return nil
	}
	if err := state.LUNSets.Put(ctx, l.store, rec.Host, rec); err != nil {
		return err
	}
	l.recs[rec.Host] = rec
	return nil
}

// remove lets go of all that a host had.
func (l *luns) remove(ctx context.Context, host string) error {
	l.unpublish(host)
	l.target.Drop(initiatorName(host))
	if err := l.closeHost(host); err != nil {
		return err
	}
	if err := state.LUNSets.Delete(ctx, l.store, host); err != nil {
		return err
	}
	before := l.recs[host]
	delete(l.recs, host)
	delete(l.seen, host)
	if err := l.media.clear(host, before, state.LUNs{}); err != nil {
		return err
	}
	l.events.note(ctx, state.Event{Kind: "disk", Subject: host, Message: "its disk on the server is deleted: nothing wanted it for a week"})
	return nil
}

// tell notes trouble with a host's LUNs, once while it is the same.
func (l *luns) tell(ctx context.Context, host string, err error) {
	if err == nil {
		delete(l.told, host)
		return
	}
	if l.told[host] != err.Error() {
		l.told[host] = err.Error()
		l.events.note(ctx, state.Event{Kind: "disk", Subject: host, Message: err.Error(), Warning: true})
	}
}

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
	select {
	case l.asks <- lunAsk{host: host, force: force, done: done}:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// reset is Reset, by run.
func (l *luns) reset(ctx context.Context, host string, force bool) error {
	all, err := l.facts(ctx)
	if err != nil {
		return err
	}
	f := all[host]
	if f.wants() == nil {
		return &ConflictError{Reason: fmt.Sprintf("host %s has no disk on the server: what it writes lies on a disk of its own, which cannot be reset yet", host)}
	}
	rec := l.recs[host]
	wanted, ok := rec.Wanted(f.wants())
	if !ok {
		return nil // it gets its first one
	}
	if wanted.Image != nil && wanted.ID == rec.Current && len(f.sessions) > 0 && !force {
		return &ConflictError{Reason: fmt.Sprintf("host %s is logged in to its disk, and nobody can have its system let go of that: "+
			"shut it down first, or use --force, after which all that it reads and writes fails until it is booted again", host)}
	}
	ends := f.now
	if len(f.sessions) > 0 && !force {
		ends = ends.Add(resetGrace)
	}
	rec.Disks = slices.Clone(rec.Disks)
	for i := range rec.Disks {
		if rec.Disks[i].ID == wanted.ID {
			rec.Disks[i].Ends = ends
		}
	}
	if err := l.write(ctx, l.recs[host], rec); err != nil {
		return err
	}
	l.events.note(ctx, state.Event{Kind: "disk", Subject: host, Message: "reset: what it wrote is dropped, and its next boot begins anew"})
	return nil
}
