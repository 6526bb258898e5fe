package iscsi

import (
	"context"
	"math/bits"
	"sync"

	"golang.org/x/sync/semaphore"
)

// Buffers come in sizes of powers of two, so that they can be used again, from 4 KiB to 8 MiB, the most that a command
// moves.
const (
	minBufferShift = 12
	maxBufferShift = 23
)

// A buffer is memory for data that is no mapped memory. Its first byte is aligned as the allocator does for its size.
type buffer struct {
	b     []byte
	class int
}

// buffers keeps those that are not in use, one pool for each size.
type buffers struct {
	pools [maxBufferShift - minBufferShift + 1]sync.Pool
}

// bufferClass is the class of the smallest buffers that n bytes fit into.
func bufferClass(n int) int {
	if n <= 1<<minBufferShift {
		return 0
	}
	return bits.Len(uint(n-1)) - minBufferShift
}

// bufferSize is what a buffer for n bytes takes.
func bufferSize(n int) int64 { return 1 << (bufferClass(n) + minBufferShift) }

// get gives a buffer of at least n bytes, up to 8 MiB; what is in it is of whoever had it before.
func (p *buffers) get(n int) *buffer {
	class := bufferClass(n)
	if b, ok := p.pools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{make([]byte, 1<<(class+minBufferShift)), class}
}

func (p *buffers) put(b *buffer) { p.pools[b.class].Put(b) }

// A quota bounds the memory of one initiator's data, within that of all connections. It has its own part from the end of the
// login on.
type quota struct {
	own, all *semaphore.Weighted
}

// try takes n bytes if they are there.
func (q *quota) try(n int64) bool {
	if !q.own.TryAcquire(n) {
		return false
	}
	if !q.all.TryAcquire(n) {
		q.own.Release(n)
		return false
	}
	return true
}

// wait takes n bytes when they are there. Who waits gets them in turn. The error is ctx's.
func (q *quota) wait(ctx context.Context, n int64) error {
	if err := q.own.Acquire(ctx, n); err != nil {
		return err
	}
	if err := q.all.Acquire(ctx, n); err != nil {
		q.own.Release(n)
		return err
	}
	return nil
}

func (q *quota) release(n int64) {
	if n > 0 {
		q.all.Release(n)
		q.own.Release(n)
	}
}
