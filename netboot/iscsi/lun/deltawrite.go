package lun

// chunk is how much one change takes at once, in bytes, and what it is aligned to: as many clusters as there are stripes,
// so that their locks are taken in order.
const chunk = stripes * clusterSize

// WriteAt implements scsi.Medium. Where the file system is full the error has ENOSPC in its chain, and what was there
// before is there still.
func (d *Delta) WriteAt(p []byte, off int64) (int, error) {
	if err := within(off, int64(len(p)), d.h.size); err != nil {
		return 0, mediumError("writing delta", d.path, off, int64(len(p)), err)
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		part := p[done:min(len(p), done+int(chunk-at%chunk))]
		if err := d.writeChunk(part, at); err != nil {
			return done, mediumError("writing delta", d.path, off, int64(len(p)), withoutPath(err))
		}
		done += len(part)
	}
	return done, nil
}

// writeChunk writes within one chunk.
func (d *Delta) writeChunk(p []byte, off int64) error {
	first, end := clustersOf(off, int64(len(p)))
	last := max(end, d.ahead(first, end, int64(len(p))))
	defer d.lockStripes(first, last)()
	pieces, err := d.pieces(p, off)
	if err != nil {
		return err
	}
	if err := d.begin(first, last); err != nil {
		return err
	}
	defer d.epoch.RUnlock()
	d.wrote.Store(true)
	for _, piece := range pieces {
		if err := d.writePiece(piece, last); err != nil {
			d.drop(first, last)
			return err
		}
	}
	return d.turn(first, end, stateNew)
}

// drop gives back the space of what was written to clusters that did not become a part of the delta: a full file system
// needs it.
func (d *Delta) drop(first, end int64) {
	for c := first; c < end; {
		state, n := d.m.run(c, end)
		if state != stateDelta {
			_ = d.f.Punch(d.h.dataOff()+c*clusterSize, n*clusterSize) // what stays is written over some day
		}
		c += n
	}
}

// clustersOf are the clusters that [off, off+n) touches: from first up to end.
func clustersOf(off, n int64) (first, end int64) {
	return off / clusterSize, (off + n + clusterSize - 1) / clusterSize
}

// lockStripes locks the clusters from first up to end, of one chunk, and returns what unlocks them.
func (d *Delta) lockStripes(first, end int64) (unlock func()) {
	for c := first; c < end; c++ {
		d.stripes[c%stripes].Lock()
	}
	return func() {
		for c := first; c < end; c++ {
			d.stripes[c%stripes].Unlock()
		}
	}
}

// begin starts a change of the data of clusters that are locked: until epoch is released by RUnlock, no sync decides
// anything. It waits until no run, which changed data would not have the sum of, has one of them.
func (d *Delta) begin(first, end int64) error {
	for {
		d.epoch.RLock()
		held := d.held.overlaps(first, end)
		err := d.lost.err()
		if err == nil && !held {
			err = d.mend(first, end)
		}
		if err == nil && !held {
			return nil
		}
		d.epoch.RUnlock()
		if err == nil {
			err = d.release()
		}
		if err != nil {
			return err
		}
	}
}

// mend writes the torn sectors of the live map that have the clusters from first up to end.
func (d *Delta) mend(first, end int64) error {
	for i := first / perSector; i <= (end-1)/perSector; i++ {
		if !d.torn.has(i) {
			continue
		}
		if err := d.changeLive(i, func(*sector) bool { return true }); err != nil {
			return err
		}
	}
	return nil
}

// changeLive has change change sector i, or say no, and writes it to the live map before anybody reads by it.
func (d *Delta) changeLive(i int64, change func(s *sector) bool) error {
	lock := &d.maps[i%int64(len(d.maps))]
	lock.Lock()
	defer lock.Unlock()
	var s sector
	d.m.load(i, &s)
	if !change(&s) {
		return nil
	}
	var buf [sectorSize]byte
	if _, err := d.f.WriteAt(d.h.encodeSector(buf[:0], i, &s), liveAt(i)); err != nil {
		d.torn.set(i)
		return err
	}
	d.torn.clear(i)
	d.m.store(i, &s)
	d.dirty.set(i)
	return nil
}

// A piece is some of what is written, whole clusters where they were not in the delta yet.
type piece struct {
	data []byte
	off  int64
}

// pieces are what to write so that p is at off, and around it what was there, in the clusters of p that are not in the
// delta. The clusters are locked.
func (d *Delta) pieces(p []byte, off int64) ([]piece, error) {
	pieces := make([]piece, 0, 3)
	head := min(int64(len(p)), (clusterSize-off%clusterSize)%clusterSize)
	tail := (off + int64(len(p))) % clusterSize
	if head == int64(len(p)) {
		tail = 0 // it ends in the cluster that it begins in
	}
	for _, part := range []struct{ from, to int64 }{{0, head}, {head, int64(len(p)) - tail}, {int64(len(p)) - tail, int64(len(p))}} {
		if part.from == part.to {
			continue
		}
		piece, err := d.piece(p[part.from:part.to], off+part.from)
		if err != nil {
			return nil, err
		}
		pieces = append(pieces, piece)
	}
	return pieces, nil
}

// piece is p, made a whole cluster where it is a part of one that is not in the delta.
func (d *Delta) piece(p []byte, off int64) (piece, error) {
	c := off / clusterSize
	state := d.m.state(c)
	if len(p)%clusterSize == 0 || state == stateDelta || state == stateNew {
		return piece{p, off}, nil
	}
	whole := make([]byte, clusterSize)
	if state == stateBase {
		if err := d.readBase(whole, c*clusterSize); err != nil {
			return piece{}, err
		}
	}
	copy(whole[off%clusterSize:], p)
	return piece{whole, c * clusterSize}, nil
}

// turn makes the clusters from first up to end stateNew or stateZero, first in the live map, then for readers. It runs
// between begin and RUnlock.
func (d *Delta) turn(first, end int64, state uint64) error {
	for c := first; c < end; {
		next := min(end, (c/perSector+1)*perSector)
		if err := d.turnSector(c, next, state); err != nil {
			return err
		}
		c = next
	}
	return nil
}

// turnSector is turn within one sector of the map.
func (d *Delta) turnSector(first, end int64, state uint64) error {
	i := first / perSector
	return d.changeLive(i, func(s *sector) bool {
		changed := false
		for c := int(first % perSector); c <= int((end-1)%perSector); c++ {
			if d.turns(i*perSector+int64(c), s.state(c), state) {
				s.set(c, state)
				changed = true
			}
		}
		return changed
	})
}

// turns says whether a cluster changes when it is to be what to is: what is in the delta stays so when it is written,
// and what has no base and was never written reads as zeros as it is.
func (d *Delta) turns(c int64, from, to uint64) bool {
	switch {
	case to == stateNew:
		return from == stateBase || from == stateZero
	case from == stateBase:
		return c*clusterSize < d.base.Size()
	default:
		return from != stateZero
	}
}

// Zero implements scsi.Medium. Space is given back in any case: it is the map that says that zeros are there.
func (d *Delta) Zero(off, n int64, _ bool) error {
	err := within(off, n, d.h.size)
	for at, left := off, n; err == nil && left > 0; {
		part := min(left, chunk-at%chunk)
		err = d.zeroChunk(at, part)
		at, left = at+part, left-part
	}
	if err != nil {
		return mediumError("zeroing delta", d.path, off, n, withoutPath(err))
	}
	return nil
}

// zeroChunk zeroes within one chunk: parts of clusters by writing, whole ones in the map.
func (d *Delta) zeroChunk(off, n int64) error {
	end := off + n
	first, last := roundUp(off, clusterSize), end/clusterSize*clusterSize
	if end == d.h.size {
		last = roundUp(end, clusterSize) // nothing is behind it
	}
	if err := d.zeroPart(off, min(first, end)-off); err != nil {
		return err
	}
	if first < last {
		if err := d.zeroClusters(first/clusterSize, last/clusterSize); err != nil {
			return err
		}
	}
	if last < first { // within one cluster
		return nil
	}
	return d.zeroPart(last, max(0, end-last))
}

// zeroPart zeroes a part of one cluster. One that reads as zeros there already takes no space for it.
func (d *Delta) zeroPart(off, n int64) error {
	if n == 0 {
		return nil
	}
	c := off / clusterSize
	if state := d.m.state(c); (state == stateBase || state == stateZero) && !d.torn.has(c/perSector) {
		var buf [clusterSize]byte
		if err := d.readRun(buf[:n], off, state); err != nil {
			return err
		}
		if [clusterSize]byte{} == buf {
			return nil
		}
	}
	return d.writeChunk(zeros[:n], off)
}

// zeroClusters makes the clusters from first up to end, of one chunk, zero, and gives back their space.
func (d *Delta) zeroClusters(first, end int64) error {
	defer d.lockStripes(first, end)()
	var punch []piece // data is nil
	var lengths []int64
	for c := first; c < end; {
		state, n := d.m.run(c, end)
		if state == stateDelta {
			punch, lengths = append(punch, piece{off: c * clusterSize}), append(lengths, n*clusterSize)
		}
		c += n
	}
	if err := d.begin(first, end); err != nil {
		return err
	}
	defer d.epoch.RUnlock()
	if err := d.turn(first, end, stateZero); err != nil {
		return err
	}
	d.wrote.Store(true)
	for i, p := range punch {
		if err := d.f.Punch(d.h.dataOff()+p.off, lengths[i]); err != nil {
			return err
		}
	}
	return nil
}
