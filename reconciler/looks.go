package reconciler

import (
	"context"
	"sync"
)

// looks counts looks at the repo, so that somebody who has just pushed can wait for one that saw it: one that began
// after he asked.
type looks struct {
	mu    sync.Mutex
	begun uint64
	ended uint64        // the newest one that has ended
	err   error         // of that one
	next  chan struct{} // closed when another one ends; nil while nobody waits
}

// begin counts a look; its number is handed to end.
func (l *looks) begin() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begun++
	return l.begun
}

func (l *looks) end(n uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended, l.err = n, err
	if l.next != nil {
		close(l.next)
		l.next = nil
	}
}

// after calls start and waits until a look has ended that began after that call. It returns that look's error, or ctx's.
func (l *looks) after(ctx context.Context, start func()) error {
	l.mu.Lock()
	last := l.begun
	l.mu.Unlock()
	start()
	for {
		over, next, err := l.over(last)
		if over {
			return err
		}
		select {
		case <-next:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// over says whether a look after last has ended, and how; else next is closed when another one ends.
func (l *looks) over(last uint64) (over bool, next <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended > last {
		return true, nil, l.err
	}
	if l.next == nil {
		l.next = make(chan struct{})
	}
	return false, l.next, nil
}
