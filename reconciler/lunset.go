package reconciler

import (
	"crypto/rand"
	"encoding/hex"
	"maps"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// This file decides which logical units a host has: what is in its record. It does no I/O.

const (
	// keepUnused is how long what a host wrote is kept when no assignment wants it any more: a host that left the fleet
	// may come back, and one that went to a disk of its own, too.
	keepUnused = 7 * 24 * time.Hour
	// leaveGrace is how long a machine may go on with the LUNs of a host that left the fleet. An agent reboots within
	// seconds; nobody reboots an image that is booted as it is.
	leaveGrace = 10 * time.Minute
	// resetGrace is how long a node that is told to reboot for a reset keeps the disk that it runs from, and how long one
	// whose session broke is believed to come back to it.
	resetGrace = time.Minute
	// maxImageLUN is the highest number that an image gets.
	maxImageLUN = 255
)

// lunFacts are what decides about one host's LUNs.
type lunFacts struct {
	assigned *state.Assignment // nil: it has none
	running  *agentapi.Running // as its node last told; nil: unknown
	reported time.Time         // when it did
	sessions []iscsi.SessionInfo
	served   string    // id of the disk that they are of; "" where they are ending, or nothing is open
	lastSeen time.Time // when a session was last seen to be open, in the life of this process
	boot     *atBoot   // that began since it was looked last; nil for none
	proven   string    // id of the disk whose secrets a login was made with, while another one is LUN 0; "" for none
	began    time.Time // when this process began to look
	now      time.Time
}

// wants is what the host has on the server; nil for nothing.
func (f lunFacts) wants() *state.ISCSI {
	if f.assigned == nil {
		return nil
	}
	return f.assigned.ISCSI
}

// images are those that the host is to run, read-only.
func (f lunFacts) images() []digest.Digest {
	if of := f.wants(); of == nil || of.Image != nil {
		return nil
	}
	rel := f.assigned.Spec.Release
	return []digest.Digest{rel.Base.Digest, rel.Delta.Digest}
}

// runs says whether the host may have image d mounted: only what was reported after its last login says more than that it
// may have any of them. A session that is gone says nothing, as the machine may come back to what it has mounted. Of a disk
// that was used and without a login on record it was not kept: an earlier server wrote that.
func (f lunFacts) runs(rec *state.LUNs, d digest.Digest) bool {
	cur, _ := rec.Disk(rec.Current)
	switch {
	case rec.Login.IsZero():
		return !cur.Opened.IsZero()
	case f.running == nil || !f.reported.After(rec.Login):
		return true
	}
	return f.running.Base == d || f.running.Delta == d
}

// mayUse says whether a machine may have the current disk mounted: a session is open, or was a moment ago, or the server has
// just begun, and its machine may not be back yet. No login need be on record: an earlier server kept none, and a disk that
// was LUN 0 before has none since.
func (f lunFacts) mayUse(rec *state.LUNs) bool {
	moment := !f.lastSeen.IsZero() && f.now.Sub(f.lastSeen) < resetGrace
	cur, _ := rec.Disk(rec.Current)
	return len(f.sessions) > 0 || moment || !cur.Opened.IsZero() && f.now.Sub(f.began) < leaveGrace
}

// forgotten says whether nobody wanted or used what the host has for so long that it may go.
func (f lunFacts) forgotten(rec *state.LUNs) bool {
	since := rec.Unused
	for _, t := range []time.Time{rec.Used, f.lastSeen} {
		if t.After(since) {
			since = t
		}
	}
	// Whoever runs from it has the time to log in again to a server that was off for a week.
	back := f.now.Sub(f.began) >= leaveGrace
	return len(f.sessions) == 0 && back && f.now.Sub(since) >= keepUnused
}

// nextLUNs is what the record of a host is to be; the zero LUNs where nothing of it is left. fresh makes the id and the
// secrets of a disk.
func nextLUNs(rec state.LUNs, f lunFacts, fresh func() state.LUNDisk) state.LUNs {
	rec.Images, rec.Disks = maps.Clone(rec.Images), slices.Clone(rec.Disks)
	of := f.wants()
	markUsed(&rec, f)
	switch {
	case of != nil:
		rec.Unused = time.Time{}
	case rec.Unused.IsZero():
		rec.Unused = f.now
	case f.forgotten(&rec):
		return state.LUNs{}
	}
	numberImages(&rec, f)
	wanted, ok := rec.Wanted(of)
	if of != nil && !ok {
		wanted = fresh()
		wanted.Image, wanted.Size, wanted.Made = of.Image, of.Size, f.now
		rec.Disks = append(rec.Disks, wanted)
	}
	chooseDisk(&rec, wanted, f)
	dropDisks(&rec, wanted.ID)
	takeBoot(&rec, f)
	rec.Boot = nextBoot(rec, f)
	return rec
}

// usedEvery is how old the record of an open session may be.
const usedEvery = time.Hour

// markUsed notes that the current disk is in an initiator's hands, or was until it was last looked.
func markUsed(rec *state.LUNs, f lunFacts) {
	if f.lastSeen.Sub(rec.Used) >= usedEvery || len(f.sessions) == 0 && f.lastSeen.After(rec.Used) {
		rec.Used = f.lastSeen
	}
	if f.served != rec.Current {
		return
	}
	for _, s := range f.sessions {
		if s.Since.After(rec.Login) {
			rec.Login = s.Since
		}
	}
	for i := range rec.Disks {
		if d := &rec.Disks[i]; len(f.sessions) > 0 && d.ID == rec.Current && d.Opened.IsZero() {
			d.Opened = f.now
		}
	}
}

// takeBoot notes what the machine was told to boot. It may have been somebody else who asked: what runs is believed to go on
// until a session begins after that, or none is open.
func takeBoot(rec *state.LUNs, f lunFacts) {
	if f.boot != nil {
		rec.Next = &f.boot.told
	}
	if rec.Next == nil || rec.Next.Disk != "" && rec.Next.Disk != rec.Current {
		return
	}
	since := func(s iscsi.SessionInfo) bool { return !s.Since.Before(rec.Next.Told) }
	if len(f.sessions) > 0 && !slices.ContainsFunc(f.sessions, since) {
		return
	}
	rec.Boot, rec.Next = rec.Next, nil
	if rec.Boot.Disk == "" {
		rec.Boot = nil
	}
}

// loaderGone is after how long a session is not that of a boot loader which started a system that logged in for itself, and
// fell silent: the target has closed it by then.
const loaderGone = time.Minute

// nextBoot is what is to be on record of a machine without an agent: that it was told to boot, that its boot loader logged
// in, and that its system runs. That it does when it has logged in for itself, or goes on with the boot loader's session.
func nextBoot(rec state.LUNs, f lunFacts) *state.LUNBoot {
	if rec.Boot == nil {
		return nil
	}
	b := *rec.Boot
	if b.Disk != rec.Current {
		return &b // what it runs from is no more, or not there yet
	}
	for _, s := range f.sessions {
		if s.Since.Before(b.Told) {
			continue // of the boot before: its machine fell silent
		}
		if b.Login.IsZero() {
			b.Login, b.Loader = s.Since, s.ISID
		}
		if b.Booted.IsZero() && (s.ISID != b.Loader || f.now.Sub(s.Since) >= loaderGone) {
			b.Booted = f.now
		}
	}
	if len(f.sessions) == 0 && !b.Login.IsZero() && f.lastSeen.After(b.Seen) {
		b.Seen = f.lastSeen
	}
	return &b
}

// numberImages gives each image that the host is to run its number, and takes it from those that it does not run any more.
// What it takes is not given away at once: the target still has it.
func numberImages(rec *state.LUNs, f lunFacts) {
	wanted := f.images()
	taken := map[uint16]bool{}
	for d, n := range rec.Images {
		taken[n] = true
		if !slices.Contains(wanted, d) && !f.runs(rec, d) {
			delete(rec.Images, d)
		}
	}
	for _, d := range wanted {
		if rec.Images[d] != 0 {
			continue
		}
		for n := uint16(1); n <= maxImageLUN; n++ {
			if !taken[n] {
				if rec.Images == nil {
					rec.Images = map[digest.Digest]uint16{}
				}
				rec.Images[d], taken[n] = n, true
				break
			}
		}
	}
}

// chooseDisk makes wanted LUN 0, at a moment at which nobody has the one before mounted: when somebody logged in with its
// secrets, which only a machine that boots anew does, or when nobody ever used that. A disk that was reset waits for neither
// once its time is up.
func chooseDisk(rec *state.LUNs, wanted state.LUNDisk, f lunFacts) {
	if wanted.ID == "" || rec.Current == wanted.ID {
		return
	}
	cur, ok := rec.Disk(rec.Current)
	ended := !cur.Ends.IsZero() && !f.now.Before(cur.Ends)
	if ok && f.proven != wanted.ID && !cur.Opened.IsZero() && !ended {
		return
	}
	if !cur.Opened.IsZero() {
		rec.Before = cur.ID
	}
	rec.Current, rec.Login = wanted.ID, time.Time{}
}

// dropDisks forgets the disks that nobody needs. Of those that were neither reset nor are wanted now the one stays that was
// used last, for a host that goes back to what it ran before.
func dropDisks(rec *state.LUNs, wanted string) {
	keeps := func(d state.LUNDisk) bool {
		return d.Ends.IsZero() && !d.Opened.IsZero() && d.ID != rec.Current && d.ID != wanted
	}
	before, named := "", false // it is the one that the record names, or the newest where it names none
	var opened time.Time
	for _, d := range rec.Disks {
		if keeps(d) && (d.ID == rec.Before || !named && !d.Opened.Before(opened)) {
			before, opened, named = d.ID, d.Opened, d.ID == rec.Before
		}
	}
	rec.Disks = slices.DeleteFunc(rec.Disks, func(d state.LUNDisk) bool {
		return d.ID != rec.Current && d.ID != wanted && d.ID != before
	})
}

// diskIDBytes is how long a disk's id is, before it is text.
const diskIDBytes = 8

// newDisk is a disk with an id and secrets that nobody can guess: 128 random bits each, as text.
func newDisk() state.LUNDisk {
	return state.LUNDisk{ID: randomHex(diskIDBytes), Secret: randomHex(16), MutualSecret: randomHex(16)}
}

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b)
}
