package iscsi

import (
	"math/bits"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The residency table looks at mapped memory by chunks of 64 pages, and remembers 16,384 of them: 4 GiB of what is read
// most, for 256 KiB of memory.
const (
	pageShift  = 12
	chunkShift = pageShift + 6
	chunkPages = 1 << (chunkShift - pageShift)
	chunkSlots = 1 << 14
)

// A residency knows which mapped memory is in the page cache, so that writing it to a socket waits for no disk. mincore
// says so, but costs as much as a quarter of a read of 4 KiB, and more for the many pieces of a copy-on-write read; so
// what it said is believed for one to two seconds. Where a page was evicted meanwhile, or two goroutines use a slot at
// once, the worst is that one write waits for the disk, and its connection with it.
//
// Linux (5.2 and later) says of files that this process neither owns nor may write that all of them is there. A read of
// such a file that is not there waits in sendmsg, and its connection with it.
//
// A kernel whose pages are larger than 4 KiB refuses to look at what is not aligned; then all is as if it were not there,
// and workers read it.
type residency struct {
	start time.Time
	slots [chunkSlots]struct {
		key   atomic.Uint64 // the chunk's address by chunkShift, in the upper half; the second, in the lower
		pages atomic.Uint64 // a bit for each page that is there
	}
}

// holds says whether all of these pieces are in the page cache.
func (r *residency) holds(parts [][]byte) bool {
	now := uint64(time.Since(r.start)/time.Second+1) & 0xffffffff //nolint:gosec // since a start in the past
	for _, p := range parts {
		at := uintptr(unsafe.Pointer(&p[0])) >> pageShift
		end := (uintptr(unsafe.Pointer(&p[0])) + uintptr(len(p)) - 1) >> pageShift
		for at <= end {
			first := at % chunkPages
			n := min(end-at+1, chunkPages-first)
			wanted := ^uint64(0) >> (chunkPages - n) << first
			if !r.has(uint64(at/chunkPages), wanted, now) {
				return false
			}
			at += n
		}
	}
	return true
}

// has says whether the wanted pages of a chunk are there.
func (r *residency) has(chunk, wanted, now uint64) bool {
	slot := &r.slots[chunk%chunkSlots]
	key := slot.key.Load()
	if key>>32 == chunk && now-key&0xffffffff <= 1 && slot.pages.Load()&wanted == wanted {
		return true
	}
	pages, ok := mincore(chunk, ^uint64(0))
	if !ok { // where a mapping begins or ends
		pages, _ = mincore(chunk, wanted)
	}
	slot.pages.Store(pages)
	slot.key.Store(chunk<<32 | now)
	return pages&wanted == wanted
}

// mincore gives a bit for each page of a chunk that is there, from the first to the last of those that are wanted. It
// fails where some of them are not mapped at all.
func mincore(chunk, wanted uint64) (pages uint64, ok bool) {
	var in [chunkPages]byte
	first := bits.TrailingZeros64(wanted)
	n := bits.Len64(wanted) - first
	start := uintptr(chunk)<<chunkShift + uintptr(first<<pageShift&0xffffffff)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, start, uintptr(n<<pageShift&0xffffffff), uintptr(unsafe.Pointer(&in[0])))
	if errno != 0 {
		return 0, false
	}
	for i, b := range in[:n] {
		pages |= uint64(b&1) << (first + i)
	}
	return pages, true
}

// populate reads mapped memory into the page cache. It fails where there is no file below it, where the disk fails, and
// on a kernel before 5.14.
func populate(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	first := uintptr(unsafe.Pointer(&p[0]))
	start := first >> pageShift << pageShift
	_, _, errno := unix.Syscall(unix.SYS_MADVISE, start, first+uintptr(len(p))-start, unix.MADV_POPULATE_READ)
	if errno != 0 {
		return os.NewSyscallError("madvise", errno)
	}
	return nil
}
