package scsi

import "sync"

// stripes keep COMPARE AND WRITE and ORWRITE, which read before they write, apart from what else writes to the same
// blocks (SBC-3 5.2, 5.17). A stripe stands for each stripeBlocks of the medium, and for those that lie a multiple of
// stripeCount stripes away. Who only writes shares it; who reads and writes has it alone. They are taken by rising index,
// so that no two commands wait for one another.
type stripes [stripeCount]sync.RWMutex

const (
	stripeCount  = 64
	stripeBlocks = 2048 // 1 MiB
)

// A span is the stripes of some blocks: count of them from first on, around the end.
type span struct{ first, count int }

func spanOf(lba, blocks uint64) span {
	if blocks == 0 {
		return span{}
	}
	first, last := lba/stripeBlocks, (lba+blocks-1)/stripeBlocks
	return span{int(first % stripeCount), int(min(last-first+1, stripeCount))} //nolint:gosec // both are at most stripeCount
}

// each calls f for the stripes of a span by rising index.
func (s *stripes) each(p span, f func(*sync.RWMutex)) {
	wrapped := max(p.first+p.count-stripeCount, 0)
	for i := range wrapped {
		f(&s[i])
	}
	for i := p.first; i < min(p.first+p.count, stripeCount); i++ {
		f(&s[i])
	}
}

func (s *stripes) share(p span)   { s.each(p, (*sync.RWMutex).RLock) }
func (s *stripes) unshare(p span) { s.each(p, (*sync.RWMutex).RUnlock) }
func (s *stripes) lock(p span)    { s.each(p, (*sync.RWMutex).Lock) }
func (s *stripes) unlock(p span)  { s.each(p, (*sync.RWMutex).Unlock) }
