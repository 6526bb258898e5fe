package testbed

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
)

// A relay hands each connection of a listener to a new one that dial makes. Its zero conns is ready.
type relay struct {
	listener net.Listener
	dial     func(context.Context) (net.Conn, error)
	log      *slog.Logger
	conns    connSet
}

// serve relays until Close, and waits for what is under way.
func (r *relay) serve() {
	ctx, cancel := context.WithCancel(context.Background())
	var dialing sync.WaitGroup
	for {
		near, err := r.listener.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				r.log.Error("relay ended", "at", r.listener.Addr(), "err", err)
			}
			break
		}
		dialing.Go(func() {
			far, err := r.dial(ctx)
			if err != nil {
				near.Close()
				r.log.Debug("relay", "at", r.listener.Addr(), "err", err)
				return
			}
			r.conns.splice(near, far)
		})
	}
	cancel()
	dialing.Wait()
}

// Close ends the relay with all its connections.
func (r *relay) Close() error {
	err := r.listener.Close()
	r.conns.close()
	return err
}

// A connSet is connections that are being spliced, so that they can be ended from outside.
type connSet struct {
	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
	open   sync.WaitGroup
}

// splice copies between a and b, both ways, until both directions have ended or the set is closed, and closes both. The
// end of one side's input is passed on, while the other direction goes on.
func (s *connSet) splice(a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	if !s.add(a, b) {
		return
	}
	defer s.drop(a, b)
	done := make(chan struct{})
	go func() {
		defer close(done)
		copyHalf(a, b)
	}()
	copyHalf(b, a)
	<-done
}

func (s *connSet) add(conns ...net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if s.conns == nil {
		s.conns = map[net.Conn]struct{}{}
	}
	for _, c := range conns {
		s.conns[c] = struct{}{}
	}
	s.open.Add(1)
	return true
}

func (s *connSet) drop(conns ...net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range conns {
		delete(s.conns, c)
	}
	s.open.Done()
}

// close ends every connection of the set, and those that would join it later.
func (s *connSet) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.conns {
		c.Close()
	}
}

// wait returns when no connection is left.
func (s *connSet) wait() { s.open.Wait() }

func copyHalf(dst, src net.Conn) {
	_, err := io.Copy(dst, src)
	if half, ok := dst.(interface{ CloseWrite() error }); ok && err == nil {
		_ = half.CloseWrite() // where the other end is gone already, its reader sees that
		return
	}
	// A broken direction ends both: nobody waits for the rest of half a conversation.
	dst.Close()
	src.Close()
}
