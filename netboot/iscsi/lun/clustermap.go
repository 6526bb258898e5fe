package lun

import (
	"math/bits"
	"sync/atomic"
)

// low has the lower bit of every cluster of a word.
const low = 0x5555555555555555

// settled is a word in which what is new is delta.
func settled(w uint64) uint64 { return w &^ (w & low << 1) }

// A clusterMap says what each cluster is. It is read without a lock; who writes holds the lock of the sector.
type clusterMap struct {
	words    []atomic.Uint64
	clusters int64
}

func newClusterMap(clusters, sectors int64) clusterMap {
	return clusterMap{make([]atomic.Uint64, sectors*wordsPerSector), clusters}
}

// run says what cluster c is, and how many from there on, up to end, are the same; c < end. What is new is delta.
func (m *clusterMap) run(c, end int64) (state uint64, n int64) {
	w := settled(m.words[c/perWord].Load())
	state = w >> (2 * (c % perWord)) & 3
	pattern := state * low
	for i := c; ; {
		at := i % perWord
		same := min(int64(bits.TrailingZeros64((w^pattern)>>(2*at))/2), perWord-at)
		i += same
		if i >= end {
			return state, end - c
		}
		if i%perWord != 0 {
			return state, i - c
		}
		w = settled(m.words[i/perWord].Load())
		if w&3 != state {
			return state, i - c
		}
	}
}

// state is what cluster c is.
func (m *clusterMap) state(c int64) uint64 {
	return m.words[c/perWord].Load() >> (2 * (c % perWord)) & 3
}

// load copies a sector.
func (m *clusterMap) load(i int64, s *sector) {
	for w := range s.words {
		s.words[w] = m.words[i*wordsPerSector+int64(w)].Load()
	}
}

// store replaces a sector.
func (m *clusterMap) store(i int64, s *sector) {
	for w := range s.words {
		m.words[i*wordsPerSector+int64(w)].Store(s.words[w])
	}
}

// A bitset has one bit for each sector. It is used by many at once.
type bitset []atomic.Uint64

func newBitset(n int64) bitset { return make(bitset, (n+63)/64) }

func (b bitset) set(i int64) { b[i/64].Or(1 << (i % 64)) }

func (b bitset) clear(i int64) { b[i/64].And(^(uint64(1) << (i % 64))) }

func (b bitset) has(i int64) bool { return b[i/64].Load()>>(i%64)&1 == 1 }

// take appends what is set to dst, in order, and clears it.
func (b bitset) take(dst []int64) []int64 {
	for w := range b {
		if b[w].Load() == 0 {
			continue
		}
		for word := b[w].Swap(0); word != 0; word &= word - 1 {
			dst = append(dst, int64(w*64+bits.TrailingZeros64(word)))
		}
	}
	return dst
}
