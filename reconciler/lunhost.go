package reconciler

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// An openHost is what is open of one host's LUNs. A target is made for one disk and goes with it: a login that began before
// the disk was changed, with the secrets of the one before, ends in a target without LUNs.
type openHost struct {
	target  *iscsi.Target // nil while the current disk is not open
	current string        // id of the disk that is its LUN 0
	images  map[digest.Digest]uint16
	disks   map[string]medium // by id: those that are open, whether or not they are LUNs
	failed  time.Time         // when LUN 0 was first seen to have lost something; zero: it has not
	heard   bool              // whoever runs from it has heard that, by now
	gone    []state.LUNDisk   // that the record has no more, and whose files are still there
	leaving *leaving          // nil for none
}

// closing says whether disks of the host are being closed: until that is done none is opened, which may be one of them.
func (h *openHost) closing() bool { return h.leaving != nil && h.leaving.closes }

// A leaving is the end of units of one host, or of disks. It takes as long as what was begun with them takes, or as a disk
// takes to be written, and no other host waits.
type leaving struct {
	done   chan struct{}
	err    error // once done is closed
	closes bool  // disks that are on record
	drops  int   // how many of those that are gone
}

// leave ends something of a host in the background, after all that ends already, and has the controller look again after that.
func (l *luns) leave(h *openHost, job leaving, end func() error) {
	before := h.leaving
	if before != nil {
		job.closes, job.drops = job.closes || before.closes, max(job.drops, before.drops)
	}
	job.done = make(chan struct{})
	h.leaving = &job
	go func() { // close waits for it
		defer l.poke()
		defer close(job.done)
		if before != nil {
			<-before.done
			job.err = before.err
		}
		job.err = errors.Join(job.err, end())
	}()
}

// left says whether nothing is ending any more, and what went wrong in what was.
func (h *openHost) left() (bool, error) {
	if h.leaving == nil {
		return true, nil
	}
	select {
	case <-h.leaving.done:
		err := h.leaving.err
		h.gone = h.gone[h.leaving.drops:]
		h.leaving = nil
		return true, err
	default:
		return false, nil
	}
}

// openHost is what is open of a host's LUNs, and has a place for it where nothing is.
func (l *luns) openHost(host string) *openHost {
	h := l.hosts[host]
	if h == nil {
		h = &openHost{disks: map[string]medium{}}
		l.hosts[host] = h
	}
	return h
}

// imageSerial is how many hex digits of an image's digest are the serial number of its units: a node compares them with those
// of the image that it was told of before it mounts it.
const imageSerial = 32

// serve opens what a host's record says, which was made of f, and publishes it.
func (l *luns) serve(ctx context.Context, rec state.LUNs, f lunFacts) error {
	h := l.openHost(rec.Host)
	wanted, _ := rec.Wanted(f.wants())
	at := portal{booted: rec.Boot != nil, ready: true}
	var bad troubles
	_, err := h.left()
	bad.note(err, false)
	ofWanted := h.current == wanted.ID
	bad.note(l.renew(h, rec.Host, f), ofWanted)
	l.renewOthers(h)
	for _, d := range rec.Disks {
		if d.ID == rec.Current || d.ID == wanted.ID {
			bad.note(l.openDisk(ctx, h, rec.Host, d), d.ID == wanted.ID)
		}
	}
	bad.note(l.changeDisk(h, rec), rec.Current == wanted.ID)
	for _, d := range slices.Sorted(maps.Keys(rec.Images)) { // so that the same trouble is told in the same words
		img := l.image(ctx, d)
		bad.note(errors.Join(img.err, h.addImage(img, rec.Images[d])), slices.Contains(f.images(), d))
		if _, open := h.images[d]; !open && awaits(&rec, f, img) {
			at.ready = false
		}
	}
	l.trim(h, rec)
	if err := errors.Join(bad.ofWanted...); err != nil {
		at.why = troubled(err)
	}
	l.show(h, rec, f, at)
	return errors.Join(bad.all...)
}

// show publishes what is open of a host, beside what at says of it already.
func (l *luns) show(h *openHost, rec state.LUNs, f lunFacts, at portal) {
	if cur, ok := rec.Disk(h.current); ok {
		at.current, at.file = cur, l.media.file(rec.Host, cur)
	}
	at.sizes = map[digest.Digest]int64{}
	for d := range h.images {
		at.sizes[d] = l.images[d].medium.Size()
	}
	at.ready = at.ready && h.target != nil
	at.target, at.images = h.target, maps.Clone(h.images)
	if cur, ok := rec.Disk(rec.Current); ok {
		at.chap = chapOf(rec.Host, cur)
	}
	wanted, _ := rec.Wanted(f.wants())
	if h.disks[wanted.ID] != nil {
		at.disk = wanted
	}
	if wanted.ID != rec.Current {
		at.next = at.disk
	}
	l.publish(rec.Host, at, f.boot)
}

// troubles are what goes wrong with the LUNs of a host. What is wrong with those that it does not need any more keeps it
// from nothing.
type troubles struct{ all, ofWanted []error }

func (t *troubles) note(err error, wanted bool) {
	t.all = append(t.all, err)
	if wanted {
		t.ofWanted = append(t.ofWanted, err)
	}
}

// awaits says whether a host's logins wait for an image that is not open: it may have that mounted, or nobody ever logged in
// and it comes at once. An image that comes for the next boot is waited for by nobody: the agent is told of it when it is open.
// For one that is lost they wait only while the host is to run it, as it may be built again. Whoever has another one mounted
// can do nothing but boot anew, and who does that needs it no more.
func awaits(rec *state.LUNs, f lunFacts, img *openImage) bool {
	if img.lost(f.now) && !slices.Contains(f.images(), img.digest) {
		return false
	}
	return f.runs(rec, img.digest) || rec.Login.IsZero() && img.err == nil
}

// troubled says, for people, what keeps a host from its disk.
func troubled(err error) string { return "its disk on the server: " + err.Error() }

func chapOf(host string, d state.LUNDisk) iscsi.CHAP {
	return iscsi.CHAP{User: host, Secret: d.Secret, MutualUser: mutualUser, MutualSecret: d.MutualSecret}
}

// openDisk opens a disk that a host writes to, unless it is, or the image under it is not yet.
func (l *luns) openDisk(ctx context.Context, h *openHost, host string, d state.LUNDisk) error {
	if h.disks[d.ID] != nil || h.closing() {
		return nil
	}
	var base *lun.Image
	if d.Image != nil {
		img := l.image(ctx, d.Image.Digest)
		if base = img.medium; base == nil {
			return img.err
		}
	}
	m, err := l.media.disk(host, d, base)
	if err == nil {
		h.disks[d.ID] = m
	}
	return err
}

// changeDisk makes the record's current disk LUN 0 of a target of its own, where it is not, and ends all that goes on with
// the one before.
func (l *luns) changeDisk(h *openHost, rec state.LUNs) error {
	if h.current == rec.Current {
		return nil
	}
	if h.target != nil {
		l.unready(rec.Host)
		l.endTarget(h, rec.Host)
	}
	if h.leaving != nil {
		return nil
	}
	m := h.disks[rec.Current]
	if m == nil {
		return nil // the image under it is being opened, or there is an error
	}
	d, _ := rec.Disk(rec.Current)
	unit, err := scsi.NewUnit(m, scsi.Config{Serial: d.ID, Keep: l.media.keeper(rec.Host, d)})
	if err != nil {
		return fmt.Errorf("making the disk of a host a logical unit: %w", err)
	}
	t := iscsi.NewTarget(targetName(rec.Host))
	if err := t.Add(0, unit); err != nil {
		return fmt.Errorf("adding LUN 0: %w", err)
	}
	h.target, h.current, h.images = t, d.ID, map[digest.Digest]uint16{}
	return nil
}

// endTarget ends a host's sessions and takes all LUNs from its target. The disks stay open.
func (l *luns) endTarget(h *openHost, host string) {
	target := h.target
	h.target, h.current, h.images, h.failed, h.heard = nil, "", nil, time.Time{}, false
	l.leave(h, leaving{}, func() error {
		l.target.Drop(initiatorName(host))
		return removeLUNs(target, target.LUNs())
	})
}

// renew has a disk opened anew that has lost something, and to which all writes fail since then: when whoever ran from it is
// gone. It says what was lost. Who runs from it must hear of it first, by writes that fail: a connection may have broken just
// when that was to be said, and then its machine asks again. Nobody is taken to have heard of it in the first minute, or where
// nobody came back for ten.
func (l *luns) renew(h *openHost, host string, f lunFacts) error {
	m := h.disks[h.current]
	if h.target == nil || m == nil || m.Lost() == nil {
		return nil
	}
	lost := m.Lost()
	if h.failed.IsZero() {
		h.failed = f.now
	}
	since, open := f.now.Sub(h.failed), len(f.sessions) > 0
	h.heard = h.heard || open && f.served == h.current && since >= resetGrace
	away := since >= leaveGrace && f.now.Sub(f.lastSeen) >= leaveGrace
	if !open && (h.heard || away) && h.leaving == nil {
		delete(h.disks, h.current)
		l.unready(host)
		l.endTarget(h, host)
		l.leave(h, leaving{closes: true}, m.Discard)
	}
	return fmt.Errorf("what is written to it fails until its machine boots again: %w", lost)
}

// renewOthers has those disks opened anew that have lost something, and from which nobody runs: they were kept for a host that
// goes back to them. Where the sessions to one are still ending, it is closed after them.
func (l *luns) renewOthers(h *openHost) {
	for id, m := range h.disks {
		if id != h.current && m.Lost() != nil {
			delete(h.disks, id)
			l.leave(h, leaving{closes: true}, m.Discard)
		}
	}
}

func removeLUNs(t *iscsi.Target, numbers []iscsi.LUN) error {
	for _, n := range numbers {
		if err := t.Remove(n); err != nil {
			return fmt.Errorf("removing LUN %d: %w", n, err)
		}
	}
	return nil
}

// addImage makes an image that is open a LUN, where it is not. It waits for another one that has the number to go.
func (h *openHost) addImage(img *openImage, n uint16) error {
	if _, has := h.images[img.digest]; has || h.target == nil || img.medium == nil || h.leaving != nil {
		return nil
	}
	for _, taken := range h.images {
		if taken == n {
			return nil // trim takes it, and has the controller look again
		}
	}
	unit, err := scsi.NewUnit(img.medium, scsi.Config{Serial: img.digest.Hex()[:imageSerial]})
	if err != nil {
		return fmt.Errorf("making an image a logical unit: %w", err)
	}
	if err := h.target.Add(n, unit); err != nil {
		return fmt.Errorf("adding LUN %d: %w", n, err)
	}
	h.images[img.digest] = n
	return nil
}

// trim takes from a host what its record does not have any more, and what is ending already is not in the way of.
func (l *luns) trim(h *openHost, rec state.LUNs) {
	if h.leaving != nil {
		return
	}
	var numbers []iscsi.LUN
	for d, n := range h.images {
		if rec.Images[d] != n {
			numbers = append(numbers, n)
			delete(h.images, d)
		}
	}
	var dead []medium
	for id, m := range h.disks {
		if _, known := rec.Disk(id); !known && id != h.current {
			dead = append(dead, m)
			delete(h.disks, id)
		}
	}
	target, gone := h.target, h.gone
	if len(numbers) == 0 && len(dead) == 0 && len(gone) == 0 {
		return
	}
	l.leave(h, leaving{drops: len(gone)}, func() error {
		return errors.Join(removeLUNs(target, numbers), l.dispose(rec.Host, nil, dead, gone))
	})
}

// lose notes that a host has no more some disks that were on its record: their files are deleted once they are closed. What
// a crash leaves of them is found by sweep.
func (l *luns) lose(host string, before, rec state.LUNs) {
	for _, d := range before.Disks {
		if _, has := rec.Disk(d.ID); !has {
			h := l.openHost(host)
			h.gone = append(h.gone, d)
		}
	}
}

// disposals is how many hosts' disks are closed or deleted at a time: to write what is dirty, or to give back many GiB,
// takes one thread of the system each.
const disposals = 16

// dispose closes disks, of which the dead are not needed any more, and then deletes the files of those that are gone.
func (l *luns) dispose(host string, disks, dead []medium, gone []state.LUNDisk) error {
	l.disposing <- struct{}{}
	defer func() { <-l.disposing }()
	var errs []error
	for _, m := range disks {
		errs = append(errs, m.Close())
	}
	for _, m := range dead {
		errs = append(errs, m.Discard())
	}
	return errors.Join(append(errs, l.media.clear(host, gone))...)
}

// closeDisks closes all of a host's disks in the background, and deletes the files of those that it lost.
func (l *luns) closeDisks(host string, h *openHost) {
	var disks, dead []medium
	for id, m := range h.disks {
		if slices.ContainsFunc(h.gone, func(d state.LUNDisk) bool { return d.ID == id }) {
			dead = append(dead, m)
		} else {
			disks = append(disks, m)
		}
	}
	gone := h.gone
	if h.leaving != nil {
		gone = gone[h.leaving.drops:]
	}
	h.disks = map[string]medium{}
	l.leave(h, leaving{closes: true, drops: len(h.gone)}, func() error {
		return errors.Join(l.dispose(host, disks, dead, gone), l.media.tidy(host))
	})
}

// closeHost closes all of a host's LUNs, and deletes the files of disks that it lost. Where it is not done yet, it is called
// again in the look after that.
func (l *luns) closeHost(host string) (done bool, err error) {
	h := l.hosts[host]
	if h == nil {
		return true, nil
	}
	if h.target != nil {
		l.endTarget(h, host)
	}
	done, err = h.left() // first: what it lost while disks were closed has yet to be deleted
	switch {
	case len(h.disks) > 0 || len(h.gone) > 0 && !h.closing():
		l.closeDisks(host, h)
		return false, err
	case done:
		delete(l.hosts, host)
	}
	return done, err
}
