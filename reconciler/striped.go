package reconciler

import (
	"hash/maphash"
	"sync"
)

// A striped lock lets one at a time do something for one machine, and others for others. Two machines may share a lock
// by chance; that costs time and nothing else.
type striped struct {
	seed  maphash.Seed
	locks [64]sync.Mutex
}

func newStriped() *striped { return &striped{seed: maphash.MakeSeed()} }

// lock waits for the machine's lock; unlock gives it back.
func (s *striped) lock(mac string) (unlock func()) {
	l := &s.locks[maphash.String(s.seed, mac)%uint64(len(s.locks))]
	l.Lock()
	return l.Unlock
}
