package reconciler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"reflect"
	"slices"
	"sync"
	"time"

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

	disposing chan struct{} // has room for as many as may dispose of disks

	portals

	// Owned by run:
	recs     map[string]state.LUNs       // by host, as in the store; nil: not read yet
	unsure   map[string]bool             // hosts whose records may be others in the store: a write of them failed
	assigned map[string]state.Assignment // by host; nil: to be read again
	nodes    *nodeFacts                  // nil: to be read again
	hosts    map[string]*openHost
	images   map[digest.Digest]*openImage
	queue    []digest.Digest // of images that are to be opened
	opening  int             // how many are
	opened   chan *openImage
	shown    time.Time            // when it was last told, amid a look, that something is open
	seen     map[string]time.Time // when a session of a host was last seen
	began    time.Time            // when it was looked first
	looked   bool                 // and the images that machines run from were put first
	told     map[string]string    // of which trouble people were told, by host
	swept    time.Time            // when files were last looked for that no record knows
	lean     bool                 // there is little room left, and people were told
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
		wake: make(chan struct{}, 1), asks: make(chan lunAsk), ended: make(chan struct{}), disposing: make(chan struct{}, disposals),
		portals: newPortals(), hosts: map[string]*openHost{}, images: map[digest.Digest]*openImage{},
		opened: make(chan *openImage), unsure: map[string]bool{}, told: map[string]string{}, seen: map[string]time.Time{},
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
	l.assigned, l.nodes = nil, nil
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
			l.assigned = nil
		case <-l.wake:
		case <-tick.C:
			l.nodes = nil
		case <-soon:
		case img := <-l.opened:
			l.took(img)
			l.openNext(ctx)
		case a := <-l.asks:
			a.done <- l.reset(ctx, a.host, a.force)
		case <-ctx.Done():
			return nil
		}
	}
}

// settle waits for images that are being opened, and forgets those that wait for that.
func (l *luns) settle() {
	for l.opening > 0 {
		l.took(<-l.opened)
	}
	for _, d := range l.queue {
		delete(l.images, d)
	}
	l.queue = nil
}

// close closes everything. Nobody may use the target, and run must have ended.
func (l *luns) close() error {
	for name, h := range l.hosts {
		if h.target != nil {
			l.endTarget(h, name)
		}
		l.closeDisks(name, h)
	}
	var errs []error
	for name, h := range l.hosts {
		<-h.leaving.done
		errs = append(errs, h.leaving.err)
		delete(l.hosts, name)
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
	if !l.looked {
		l.openRunning(ctx, all)
		l.looked = true
	}
	l.openNext(ctx)
	var errs []error
	for hosts := range slices.Chunk(slices.Sorted(maps.Keys(all)), together) {
		l.ahead(ctx, hosts, all)
		for _, host := range hosts {
			at, err := l.host(ctx, host, all[host])
			if err != nil {
				errs = append(errs, fmt.Errorf("host %s: %w", host, err))
			}
			next = sooner(next, at)
			l.meanwhile(ctx)
		}
	}
	l.sweep(ctx)
	if !l.anyLeaves() { // what ends may still read an image
		errs = append(errs, l.closeImages())
	}
	errs = append(errs, l.checkRoom(ctx))
	if l.settled() {
		l.refresh()
	}
	return next, errors.Join(errs...)
}

// together is how many hosts' records and disks are made at a time: what storage takes for one is shared by others.
const together = 64

// ahead writes the records of hosts that have none yet, and then makes the disks of those that begin blank. What goes wrong
// with one is left to host, which tries again and says so.
func (l *luns) ahead(ctx context.Context, hosts []string, all map[string]lunFacts) {
	type made struct {
		rec   state.LUNs
		wrote bool
		disk  medium // nil where it is not made
	}
	var fresh []*made
	for _, host := range hosts {
		if _, has := l.recs[host]; !has && all[host].wants() != nil {
			rec := nextLUNs(state.LUNs{}, all[host], newDisk)
			rec.Host = host
			fresh = append(fresh, &made{rec: rec})
		}
	}
	var making sync.WaitGroup
	for _, m := range fresh {
		making.Go(func() {
			m.wrote = state.LUNSets.Put(ctx, l.store, m.rec.Host, m.rec) == nil
			if d := m.rec.Disks[0]; m.wrote && d.Image == nil {
				if disk, err := l.media.disk(m.rec.Host, d, nil); err == nil {
					m.disk = disk
				}
			}
		})
	}
	making.Wait()
	for _, m := range fresh {
		if m.wrote {
			l.recs[m.rec.Host] = m.rec
		}
		if m.disk != nil {
			l.openHost(m.rec.Host).disks[m.rec.Current] = m.disk
		}
	}
}

// sooner is the earlier time of two, of which the zero one is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// showEvery is how often, at most, those who answer machines are told amid a look that something is open: to hear of it they
// read all records.
const showEvery = 250 * time.Millisecond

// meanwhile is what cannot wait until all of a thousand hosts were looked at: those that are ready may boot, images are
// opened, and operators are answered.
func (l *luns) meanwhile(ctx context.Context) {
	if now := l.now(); now.Sub(l.shown) >= showEvery && l.fresh() {
		l.shown = now
		l.refresh()
	}
	select {
	case img := <-l.opened:
		l.took(img)
		l.openNext(ctx)
	case a := <-l.asks:
		a.done <- l.reset(ctx, a.host, a.force)
	default:
	}
}

// anyLeaves says whether units of some host are ending.
func (l *luns) anyLeaves() bool {
	for _, h := range l.hosts {
		if h.leaving != nil {
			return true
		}
	}
	return false
}

// host brings one host to what it is to be: first its record, then what is open, then the files of what it lost.
func (l *luns) host(ctx context.Context, host string, f lunFacts) (next time.Time, err error) {
	before := l.recs[host]
	rec := nextLUNs(before, f, newDisk)
	if rec.Current != before.Current && l.sessionsOf(host, &f) {
		rec = nextLUNs(before, f, newDisk)
	}
	if rec.Disks == nil && rec.Images == nil && f.wants() == nil {
		return next, l.remove(ctx, host)
	}
	rec.Host = host
	if err := l.write(ctx, before, rec); err != nil {
		l.hold(host, troubled(err))
		return next, err
	}
	l.lose(host, before, rec)
	l.tellBoot(before.Boot, rec)
	if f.assigned == nil && f.now.Sub(rec.Unused) >= leaveGrace {
		return next, l.shut(ctx, host, len(f.sessions) > 0)
	}
	err = l.serve(ctx, rec, f)
	l.tell(ctx, host, err)
	return lookAgain(rec, f, err != nil), err
}

// lookAgain is when time alone may change what a host is to have; zero: never.
func lookAgain(rec state.LUNs, f lunFacts, failed bool) (next time.Time) {
	if failed {
		next = f.now.Add(assignAgain)
	}
	cur, _ := rec.Disk(rec.Current)
	if wanted, ok := rec.Wanted(f.wants()); ok && wanted.ID != cur.ID && cur.Ends.After(f.now) {
		next = sooner(next, cur.Ends)
	}
	if b := rec.Boot; b != nil && !b.Login.IsZero() && b.Booted.IsZero() && len(f.sessions) > 0 {
		next = sooner(next, f.now.Add(loaderGone))
	}
	return next
}

// sessionsOf looks again which sessions a host has, and says whether that is news: a look at a thousand hosts takes time, and
// a disk that nobody used may be in use by now.
func (l *luns) sessionsOf(host string, f *lunFacts) (news bool) {
	before := len(f.sessions)
	f.sessions, f.served = nil, l.serves(host)
	for _, s := range l.target.Sessions() {
		if hostOf(s.Initiator) == host {
			f.sessions = append(f.sessions, s)
		}
	}
	if len(f.sessions) > 0 {
		l.seen[host], f.lastSeen = f.now, f.now
	}
	return len(f.sessions) > 0 && before == 0
}

// shut closes the disk of a host that left the fleet a while ago, and keeps it.
func (l *luns) shut(ctx context.Context, host string, inUse bool) error {
	l.unpublish(host)
	h := l.hosts[host]
	if h == nil {
		return nil
	}
	if inUse && h.target != nil {
		l.events.note(ctx, state.Event{Kind: "disk", Subject: host, Message: "it left the fleet: its machine is cut off from its disk", Warning: true})
	}
	_, err := l.closeHost(host)
	return err
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

// write stores a record that changed. A disk is on record before its file is made, and taken from it before that goes. A
// write that failed may have been made all the same, or be made yet ("request timed out"): then the next one is made also
// where nothing changed, as the store makes the last one last.
func (l *luns) write(ctx context.Context, before, rec state.LUNs) error {
	if reflect.DeepEqual(before, rec) && !l.unsure[rec.Host] {
		return nil
	}
	if err := state.LUNSets.Put(ctx, l.store, rec.Host, rec); err != nil {
		l.unsure[rec.Host] = true
		return err
	}
	l.recs[rec.Host] = rec
	delete(l.unsure, rec.Host)
	return nil
}

// remove lets go of all that a host had. It is called in each look until that is gone.
func (l *luns) remove(ctx context.Context, host string) error {
	l.unpublish(host)
	if before, known := l.recs[host]; known {
		if err := state.LUNSets.Delete(ctx, l.store, host); err != nil {
			l.unsure[host] = true
			return err
		}
		l.lose(host, before, state.LUNs{})
		delete(l.recs, host)
		delete(l.unsure, host)
		delete(l.seen, host)
		l.events.note(ctx, state.Event{Kind: "disk", Subject: host, Message: "its disk on the server is deleted: nothing wanted it for a week"})
	}
	_, err := l.closeHost(host)
	return err
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
