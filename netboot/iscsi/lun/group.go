package lun

import "sync"

// A group lets callers who want the same thing done at the same time share it. The zero value is ready.
//
//	caller 1   |---- f ----|
//	caller 2       |.......|---- f ----|     waits for the next f, as the one that runs may have begun too early for it
//	caller 3         |.....|...........|     joins caller 2
type group struct {
	mu      sync.Mutex
	running *batch // or the last that ran
	next    *batch // whose f has not begun
}

type batch struct {
	done chan struct{}
	err  error
}

// do returns what one call of f gave that began after do was called. No two calls of f overlap.
func (g *group) do(f func() error) error {
	g.mu.Lock()
	if b := g.next; b != nil {
		g.mu.Unlock()
		<-b.done
		return b.err
	}
	b := &batch{done: make(chan struct{})}
	before := g.running
	g.next = b
	g.mu.Unlock()

	if before != nil {
		<-before.done
	}
	g.mu.Lock()
	g.next, g.running = nil, b
	g.mu.Unlock()
	defer close(b.done)
	b.err = f()
	return b.err
}
