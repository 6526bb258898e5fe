// Package pipelisten is a listener without a network, for tests of servers: its connections are net.Pipes, whose deadlines
// go by the clock of a synctest bubble, which those of sockets do not.
package pipelisten

import (
	"context"
	"net"
	"sync"
)

// A Listener accepts what Dial made. The zero value is no Listener: see New.
type Listener struct {
	dialed chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// New is an open Listener.
func New() *Listener {
	return &Listener{dialed: make(chan net.Conn), closed: make(chan struct{})}
}

// Dial waits until the connection is accepted, and returns its other end. Its error is net.ErrClosed after Close, or
// ctx's.
func (l *Listener) Dial(ctx context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.dialed <- theirs:
		return ours, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept waits for a connection that is dialed. Its error is net.ErrClosed after Close.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.dialed:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends what waits in Accept and Dial. A second call does nothing.
func (l *Listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr is an address of no network.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }
