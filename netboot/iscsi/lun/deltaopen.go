package lun

import (
	"errors"
	"fmt"
	"io"
)

// newDelta brings the delta in f, whose header is h, to where it was left. boot is the kernel's boot id.
func newDelta(path string, f file, h *header, base below, boot string) (*Delta, error) {
	d := &Delta{
		path: path, f: f, base: base, h: h, m: newClusterMap(h.clusters(), h.sectors()), dirty: newBitset(h.sectors()),
		torn: newBitset(h.sectors()),
		held: held{runs: map[int64][]run{}},
	}
	if err := d.load(boot); err != nil {
		return nil, err
	}
	// What was found out is settled before anybody writes over data that a run's sum is of; and with it what a process
	// wrote that was killed before its Sync.
	d.unsure = true
	d.wrote.Store(true)
	if err := d.Sync(); err != nil {
		return nil, err
	}
	return d, nil
}

// load reads the map, and the live map where that is of this run of the kernel and no sync failed in it.
func (d *Delta) load(boot string) error {
	page := make([]byte, sectorSize)
	if _, err := d.f.ReadAt(page, sessionOff); err != nil {
		return cutShort(err)
	}
	if d.h.sessionIs(page, boot) {
		return d.eachSector(d.loadLive)
	}
	// After a failed sync the kernel may have pages that storage has not, and takes them for clean (fsync(2)). What is
	// found in them would be gone after the next loss of power, whatever is synced before that. What is dirty is not
	// dropped, so it goes to storage first.
	if err := d.flush(nil, nil); err != nil {
		return fmt.Errorf("bringing what was written last to its storage: %w", err)
	}
	if err := d.f.Forget(); err != nil {
		return err
	}
	if err := d.eachSector(d.loadLasting); err != nil {
		return err
	}
	return d.beginLive(boot)
}

// cutShort says what the end of a file, found too early, means.
func cutShort(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it was cut short", errDamaged)
	}
	return withoutPath(err)
}

// eachSector reads the maps, and gives do each sector of the map and of the live map.
func (d *Delta) eachSector(do func(i int64, lasting, live []byte) error) error {
	buf := make([]byte, min(d.h.mapsLen(), dataUnit))
	for i := range d.h.sectors() {
		at := mapAt(i) - mapsOff
		if at%dataUnit == 0 {
			if _, err := d.f.ReadAt(buf[:min(int64(len(buf)), d.h.mapsLen()-at)], mapAt(i)); err != nil {
				return cutShort(err)
			}
		}
		lasting, live := buf[at%dataUnit:], buf[(liveAt(i)-mapsOff)%dataUnit:]
		if err := do(i, lasting[:sectorSize], live[:sectorSize]); err != nil {
			return err
		}
	}
	return nil
}

// loadLasting goes by the map alone. It looks at the data of runs, and takes for delta what has their sums.
func (d *Delta) loadLasting(i int64, lasting, _ []byte) error {
	s, err := d.h.parseSector(lasting, i)
	if err != nil {
		return err
	}
	for _, r := range s.runs {
		got, err := d.sumOf(i*perSector+int64(r.first), int64(r.n))
		if err != nil {
			return fmt.Errorf("reading what was written last: %w", err)
		}
		for c := r.first; got == r.sum && c < r.first+r.n; c++ {
			s.set(c, stateDelta)
		}
	}
	d.m.store(i, s)
	return nil
}

// loadLive goes by the live map, which knows of all that was written. Where the map lags behind it is brought up later.
func (d *Delta) loadLive(i int64, lasting, live []byte) error {
	old, err := d.h.parseSector(lasting, i)
	if err != nil {
		return err
	}
	s, err := d.h.parseSector(live, i)
	if err != nil {
		return err
	}
	if len(old.runs) > 0 || s.words != old.words {
		d.dirty.set(i)
	}
	d.m.store(i, s)
	return nil
}

// beginLive makes the live map that of this run of the kernel: first it is what was found, then the session says so. Up to
// then another start does the same again. The map, which lies between, is what was found, too: storage has its data.
func (d *Delta) beginLive(boot string) error {
	if err := d.h.writeMaps(d.f, &d.m); err != nil {
		return fmt.Errorf("writing the maps: %w", withoutPath(err))
	}
	if _, err := d.f.WriteAt(d.h.encodeSession(boot), sessionOff); err != nil {
		return fmt.Errorf("writing the session: %w", withoutPath(err))
	}
	return nil
}

// sumOf is the sum of the data of n clusters from c on.
func (d *Delta) sumOf(c, n int64) (uint64, error) {
	buf := make([]byte, min(n*clusterSize, 256<<10))
	s := uint64(0)
	for off, left := d.h.dataOff()+c*clusterSize, n*clusterSize; left > 0; {
		part := buf[:min(left, int64(len(buf)))]
		if _, err := d.f.ReadAt(part, off); err != nil {
			return 0, cutShort(err)
		}
		s = sum(s, part)
		off, left = off+int64(len(part)), left-int64(len(part))
	}
	return s, nil
}
