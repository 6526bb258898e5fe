package lun

import (
	"slices"
	"sync"
	"sync/atomic"
)

// Sync implements scsi.Medium. Who calls it at the same time as others shares the work with them.
//
// A sector of the map may name a cluster as delta once its data is on stable storage, which takes two syncs, one after
// the other. Where little was written since the last Sync, one is enough: the sector is written beside the data and names
// it with a sum (see the file's format). Until a later version of the sector names it without, the data must not change:
// it is held, and who wants to write there has a Sync done before.
func (d *Delta) Sync() error {
	if err := d.syncs.do(d.commit); err != nil {
		return mediumError("syncing delta", d.path, 0, d.h.size, withoutPath(err))
	}
	return nil
}

// release has no cluster be held that is held now.
func (d *Delta) release() error {
	for _, i := range d.held.sectors() {
		d.dirty.set(i)
	}
	return d.syncs.do(d.commit)
}

// A plan is what one commit brings to stable storage.
type plan struct {
	sectors  []int64  // in order
	versions []sector // of them, as they were when it was decided
	wrote    bool     // data, too
	quick    bool     // with sums
}

// maxQuick is how many clusters are read again, to have their sums, instead of being synced before the map: 1 MiB. That takes
// some 0.25 ms (measured), which is what the shortest sync takes; one that writes as much takes longer.
const maxQuick = 256

// maxQuickSectors bounds what a quick commit reads of the map.
const maxQuickSectors = 64

// commit makes what was written before it began outlive a loss of power. One runs at a time.
func (d *Delta) commit() error {
	if err := d.lost.check(d.f, d.h.fileSize()); err != nil {
		return err
	}
	p := d.decide()
	var err error
	if versions, ok := d.quickVersions(p); ok {
		err = d.commitQuick(p, versions)
	} else {
		err = d.commitSlow(p)
	}
	if err != nil {
		d.undecide(p)
		return err
	}
	d.unsure = false
	return nil
}

// decide says what a commit is about. Where it is to be quick, all that is new is held from here on.
func (d *Delta) decide() *plan {
	d.epoch.Lock()
	defer d.epoch.Unlock()
	p := &plan{wrote: d.wrote.Swap(false), sectors: d.dirty.take(nil)}
	p.versions = make([]sector, len(p.sectors))
	fresh := 0
	for at, i := range p.sectors {
		d.m.load(i, &p.versions[at])
		fresh += p.versions[at].count()
	}
	p.quick = !d.unsure && fresh <= maxQuick && len(p.sectors) <= maxQuickSectors
	if p.quick {
		for at, i := range p.sectors {
			d.held.set(i, p.versions[at].fresh(func(int) bool { return true }))
		}
	}
	return p
}

// undecide has the next commit do what this one could not. As nobody knows what of it was done, that one is not quick.
func (d *Delta) undecide(p *plan) {
	d.unsure = true
	for _, i := range p.sectors {
		d.dirty.set(i)
	}
	d.wrote.Store(true)
}

// flush is fdatasync(2), also of versions of sectors. When it fails nobody knows what the kernel dropped, so no live map
// is believed any more: the next start goes by the map, as after a loss of power, and by what storage has. The sectors are
// written again without the runs of this sync, which nobody was told of: what else they say was so before it.
func (d *Delta) flush(sectors []int64, versions []sector) error {
	err := d.f.Sync()
	if err == nil {
		return nil
	}
	_ = d.lost.note(err)
	_, _ = d.f.WriteAt(make([]byte, sectorSize), sessionOff) // all that can be tried
	safe := slices.Clone(versions)
	for at := range safe {
		safe[at].runs = nil
	}
	_ = d.writeSectors(sectors, safe) // as above
	return err
}

// commitSlow syncs the data, then the map.
func (d *Delta) commitSlow(p *plan) error {
	if !p.wrote && len(p.sectors) == 0 {
		return nil
	}
	if err := d.flush(nil, nil); err != nil || len(p.sectors) == 0 {
		return err
	}
	if err := d.writeSectors(p.sectors, p.versions); err != nil {
		return err
	}
	if err := d.flush(p.sectors, p.versions); err != nil {
		return err
	}
	for at, i := range p.sectors {
		d.settle(i, &p.versions[at], nil)
	}
	return nil
}

// commitQuick syncs the map beside the data.
func (d *Delta) commitQuick(p *plan, versions []sector) error {
	if err := d.writeSectors(p.sectors, versions); err != nil {
		return err
	}
	if err := d.flush(p.sectors, versions); err != nil {
		return err
	}
	for at, i := range p.sectors {
		d.settle(i, &p.versions[at], versions[at].runs)
	}
	return nil
}

// quickVersions are the sectors of p with sums of the data that is not known to be on stable storage. It says no where p
// is not quick, there is too much of that, or it cannot be read.
func (d *Delta) quickVersions(p *plan) (versions []sector, ok bool) {
	if !p.quick || len(p.sectors) == 0 {
		return nil, false
	}
	versions = slices.Clone(p.versions)
	for at, i := range p.sectors {
		if !d.addRuns(i, &versions[at]) {
			return nil, false
		}
	}
	return versions, true
}

// addRuns makes runs of what is new in sector i and, by the map on stable storage, not in the delta there.
func (d *Delta) addRuns(i int64, s *sector) bool {
	old, err := d.readSector(i)
	if err != nil {
		return false // a slow commit writes it anew
	}
	// What was in a run there was synced with it. What is delta there and was zeroed and written since may be of any time.
	s.runs = s.fresh(func(c int) bool { return !old.pending(c) && old.state(c) != stateDelta })
	if len(s.runs) > maxRuns {
		return false
	}
	for at, r := range s.runs {
		for c := r.first; c < r.first+r.n; c++ {
			s.set(c, old.state(c))
		}
		s.runs[at].sum, err = d.sumOf(i*perSector+int64(r.first), int64(r.n))
		if err != nil {
			return false
		}
	}
	return true
}

// readSector reads a sector of the map.
func (d *Delta) readSector(i int64) (*sector, error) {
	buf := make([]byte, sectorSize)
	if _, err := d.f.ReadAt(buf, mapAt(i)); err != nil {
		return nil, cutShort(err)
	}
	return d.h.parseSector(buf, i)
}

// writeSectors writes sectors of the map, those that lie side by side at once.
func (d *Delta) writeSectors(at []int64, versions []sector) error {
	var buf []byte
	for n, i := range at {
		buf = d.h.encodeSector(buf, i, &versions[n])
		if n+1 < len(at) && at[n+1] == i+1 && (i+1)%perPage != 0 {
			continue
		}
		if _, err := d.f.WriteAt(buf, mapAt(i)+sectorSize-int64(len(buf))); err != nil {
			return err
		}
		buf = buf[:0]
	}
	return nil
}

// settle takes note that a version of sector i is on stable storage: what was new in it, and is in none of runs, is delta
// from now on. Only runs are held.
func (d *Delta) settle(i int64, version *sector, runs []run) {
	lock := &d.maps[i%int64(len(d.maps))]
	lock.Lock()
	defer lock.Unlock()
	var now sector
	d.m.load(i, &now)
	kept := sector{runs: runs}
	for _, r := range version.fresh(func(c int) bool { return !kept.pending(c) && now.state(c) == stateNew }) {
		for c := r.first; c < r.first+r.n; c++ {
			now.set(c, stateDelta)
		}
	}
	d.m.store(i, &now)
	d.held.set(i, runs)
}

// count is how many clusters of s are new.
func (s *sector) count() int {
	n := 0
	for _, r := range s.fresh(func(int) bool { return true }) {
		n += r.n
	}
	return n
}

// fresh are the clusters of s that are new and that want says yes to.
func (s *sector) fresh(want func(c int) bool) []run {
	var runs []run
	for w, word := range s.words {
		if word&(word>>1)&low == 0 {
			continue
		}
		for c := w * perWord; c < (w+1)*perWord; c++ {
			if s.state(c) != stateNew || !want(c) {
				continue
			}
			if n := len(runs); n > 0 && runs[n-1].first+runs[n-1].n == c {
				runs[n-1].n++
				continue
			}
			runs = append(runs, run{first: c, n: 1})
		}
	}
	return runs
}

// held are the clusters whose data a run has the sum of, by sector.
type held struct {
	n    atomic.Int64 // sectors
	mu   sync.RWMutex
	runs map[int64][]run
}

// set replaces what is held of a sector.
func (h *held) set(i int64, runs []run) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(runs) == 0 {
		delete(h.runs, i)
	} else {
		h.runs[i] = runs
	}
	h.n.Store(int64(len(h.runs)))
}

// overlaps says that one of the clusters from first up to end is held.
func (h *held) overlaps(first, end int64) bool {
	if h.n.Load() == 0 {
		return false
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	for i := first / perSector; i <= (end-1)/perSector; i++ {
		for _, r := range h.runs[i] {
			from := i*perSector + int64(r.first)
			if from < end && first < from+int64(r.n) {
				return true
			}
		}
	}
	return false
}

// sectors are those of which something is held.
func (h *held) sectors() []int64 {
	h.mu.RLock()
	defer h.mu.RUnlock()
	all := make([]int64, 0, len(h.runs))
	for i := range h.runs {
		all = append(all, i)
	}
	return all
}
