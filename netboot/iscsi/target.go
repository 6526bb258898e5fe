package iscsi

import (
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// maxLUN is the highest number that flat space addressing has (SAM-5 4.7.7.3).
const maxLUN LUN = 0x3fff

// A Target is a name with logical units, which come and go while sessions run. One target may be open in many sessions,
// and be given out by many Directories.
//
// Locks are taken in this order: Target.mu, session.mu, then those of package scsi. Unit.LUNsChanged and Unit.Reset are
// called with none of ours.
type Target struct {
	name string

	mu       sync.RWMutex
	units    map[LUN]*unit
	sessions map[*session]struct{}
}

// A unit is a logical unit under its number.
type unit struct {
	*scsi.Unit
	lun    LUN
	mapper scsi.Mapper // nil where the Medium is none
}

// NewTarget makes a target without units. The name is an iSCSI name (RFC 7143 section 4.2.7).
func NewTarget(name string) *Target {
	return &Target{name: name, units: map[LUN]*unit{}, sessions: map[*session]struct{}{}}
}

// Name is what NewTarget was given.
func (t *Target) Name() string { return t.name }

// Add gives the target a unit. Sessions that run see it at once, and are told that the LUNs changed.
func (t *Target) Add(lun LUN, u *scsi.Unit) error {
	if lun > maxLUN {
		return fmt.Errorf("adding LUN %d to %s: the highest is %d", lun, t.name, maxLUN)
	}
	mapper, _ := u.Medium().(scsi.Mapper)
	t.mu.Lock()
	if t.units[lun] != nil {
		t.mu.Unlock()
		return fmt.Errorf("adding LUN %d to %s: there is one", lun, t.name)
	}
	others := t.unitList()
	t.units[lun] = &unit{Unit: u, lun: lun, mapper: mapper}
	t.mu.Unlock()
	tellLUNsChanged(others)
	return nil
}

// Remove takes a unit away. It returns when no session uses it any more, so that its Medium may be closed: what was being
// done is finished, but for reads that have pieces to come; what waited for something is ended; and what refers to its
// memory has been sent or, where the peer takes nothing for a few seconds, its connection closed. Of pages that the kernel
// was lent, the last data on its way may still show what is then written to the file.
func (t *Target) Remove(lun LUN) error {
	t.mu.Lock()
	u := t.units[lun]
	if u == nil {
		t.mu.Unlock()
		return fmt.Errorf("removing LUN %d from %s: there is none", lun, t.name)
	}
	delete(t.units, lun)
	others, sessions := t.unitList(), slices.Collect(maps.Keys(t.sessions))
	t.mu.Unlock()
	tellLUNsChanged(others)
	var leaving sync.WaitGroup
	for _, s := range sessions {
		leaving.Go(func() { s.leave(u) })
	}
	leaving.Wait()
	return nil
}

// LUNs are the numbers of the units, in order.
func (t *Target) LUNs() []LUN {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Sorted(maps.Keys(t.units))
}

// unitList needs t.mu.
func (t *Target) unitList() []*unit { return slices.Collect(maps.Values(t.units)) }

func tellLUNsChanged(units []*unit) {
	for _, u := range units {
		u.LUNsChanged()
	}
}

func (t *Target) join(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sessions[s] = struct{}{}
}

func (t *Target) part(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.sessions, s)
}

// sessionList is who has the target open now.
func (t *Target) sessionList() []*session {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Collect(maps.Keys(t.sessions))
}
