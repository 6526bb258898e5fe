package lun

import "sync"

// Where little is written in sequence to clusters that are not in the delta yet, as by the journal of a file system, the file
// gets space for some more behind it, as zeros in the same write. A sync after one that got its space so needs not wait for
// the file system's journal, which has to say where new space is: that is a third of its time. The map knows nothing of it,
// so that to all readers, and after a crash, those clusters are what they were.
const (
	// aheadClusters is how many get their space at a time: no more than what is written as fast as one.
	aheadClusters = 16
	// aheadMost is up to how many bytes are little.
	aheadMost = 16 << 10
)

// streams are the last few sequences of writes.
type streams struct {
	mu   sync.Mutex
	list [8]stream
	next int // the one to be forgotten first
}

// A stream is a sequence of writes: the cluster where it goes on, and up to which clusters have their space.
type stream struct{ on, ready int64 }

// follow takes note of a write of the clusters from first up to end, and says how many behind them are to get their space
// with it.
func (s *streams) follow(first, end int64) (ahead int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.list {
		st := &s.list[i]
		if st.on != first || first == 0 {
			continue
		}
		st.on = end
		if end <= st.ready {
			return 0
		}
		st.ready = end + aheadClusters
		return aheadClusters
	}
	s.list[s.next] = stream{on: end}
	s.next = (s.next + 1) % len(s.list)
	return 0
}

// ahead says up to which cluster, end or one behind it in its chunk, the locks of a write of n bytes in the clusters from
// first up to end are to be taken.
func (d *Delta) ahead(first, end, n int64) int64 {
	if n > aheadMost {
		return end
	}
	return min(end+d.streams.follow(first, end), (first/stripes+1)*stripes, d.h.size/clusterSize)
}

// extend lengthens a piece by the zeros behind it that are to get their space with it, up to the cluster before last. The
// clusters are locked. What is in the delta there ends it.
func (d *Delta) extend(p piece, last int64) (longer piece, ok bool) {
	end := p.off + int64(len(p.data))
	first := end / clusterSize
	if end%clusterSize != 0 || first >= last || d.m.state(p.off/clusterSize) == stateDelta {
		return p, false
	}
	for c := first; c < last; c++ {
		if state := d.m.state(c); state != stateBase && state != stateZero {
			last = c
		}
	}
	longer = piece{make([]byte, last*clusterSize-p.off), p.off}
	copy(longer.data, p.data)
	return longer, first < last
}

// writePiece writes a piece, and gives space to what is behind it up to the cluster before last. Where there is none, that
// matters only to the piece itself.
func (d *Delta) writePiece(p piece, last int64) error {
	if longer, ok := d.extend(p, last); ok {
		if _, err := d.f.WriteAt(longer.data, d.h.dataOff()+p.off); err == nil {
			return nil
		}
	}
	_, err := d.f.WriteAt(p.data, d.h.dataOff()+p.off)
	return err
}
