package lun

import (
	"math"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A mapping is a part of a file in memory, for the kernel alone to look at. A nil mapping has nothing.
type mapping struct {
	mem    []byte
	broken atomic.Bool // the kernel could not look at it
}

// mapFile maps [off, off+n) of f, off a multiple of the page size. It gives nil where that is not possible: on a file
// system that cannot, or for what is larger than the address space.
func mapFile(f osFile, off, n int64) *mapping {
	if n <= 0 || n > math.MaxInt {
		return nil
	}
	mem, err := unix.Mmap(f.fd(), off, int(n), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil // reads are copied then, and those say what is wrong with the file
	}
	return &mapping{mem: mem}
}

// usable says whether segments may be asked for.
func (m *mapping) usable() bool { return m != nil && !m.broken.Load() }

func (m *mapping) segment(off, n int64) []byte { return m.mem[off : off+n : off+n] }

// fail makes the mapping unusable: the kernel could not look at a segment of it.
func (m *mapping) fail() {
	if m != nil {
		m.broken.Store(true)
	}
}

// close unmaps. No segment may be in use any more.
func (m *mapping) close() error {
	if m == nil {
		return nil
	}
	m.fail()
	return unix.Munmap(m.mem)
}
