package build

import (
	"context"
	"sync"

	"github.com/troupe-dev/troupe/internal/digest"
)

// oneByOne lets one at a time work on the same thing. The zero value is ready.
type oneByOne struct {
	mu   sync.Mutex
	busy map[digest.Digest]chan struct{} // closed when who works on it leaves
}

// enter waits until nobody else works on what; leave must be called after.
func (o *oneByOne) enter(ctx context.Context, what digest.Digest) (leave func(), err error) {
	for {
		o.mu.Lock()
		other, busy := o.busy[what]
		if !busy {
			if o.busy == nil {
				o.busy = make(map[digest.Digest]chan struct{})
			}
			mine := make(chan struct{})
			o.busy[what] = mine
			o.mu.Unlock()
			return func() {
				o.mu.Lock()
				delete(o.busy, what)
				o.mu.Unlock()
				close(mine)
			}, nil
		}
		o.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
