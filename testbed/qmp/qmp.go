// Package qmp speaks the QEMU Machine Protocol: JSON objects, one a line, over a stream. A Client runs one command at a
// time and hands events to whoever listens; an event that nobody takes never holds up an answer.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// MaxLine is the longest line that a Client takes from QEMU, in bytes. What we ask for is answered in far less.
const MaxLine = 1 << 20

// ErrClosed is returned (wrapped) by Run when the connection ended, which is what a machine that is gone looks like.
var ErrClosed = errors.New("connection to QEMU is closed")

// An Error is a command that QEMU refused.
type Error struct {
	Class string `json:"class"` // "GenericError", "CommandNotFound", "DeviceNotFound", …
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return e.Desc }

// An Event is something that happened to the machine, e.g. RESET or SHUTDOWN.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
	Time time.Time       `json:"-"` // when it was read
}

// A Client is one QMP session. Its methods may be called from several goroutines.
type Client struct {
	conn    io.ReadWriteCloser
	onEvent func(Event)

	turn   chan struct{} // holds one token while no command is under way
	closed chan struct{} // closed by the reader when it ends
	err    error         // why the reader ended; set before closed is closed

	mu      sync.Mutex
	pending chan message // where the command under way waits for its answer; nil when none does
}

// message is any line that QEMU sends: a greeting, an answer or an event.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Err      *Error          `json:"error"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
}

// New greets QEMU at the other end of conn and leaves capabilities negotiation behind. onEvent (nil: events are dropped) is
// called from the reader's goroutine and must not call Run. The Client owns conn from here on, whatever is returned.
func New(ctx context.Context, conn io.ReadWriteCloser, onEvent func(Event)) (*Client, error) {
	if onEvent == nil {
		onEvent = func(Event) {}
	}
	c := &Client{
		conn: conn, onEvent: onEvent,
		turn: make(chan struct{}, 1), closed: make(chan struct{}),
	}
	greeted := make(chan struct{})
	go c.read(greeted)
	select {
	case <-greeted:
	case <-c.closed:
		return nil, c.ended("greeting")
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("waiting for QEMU's greeting: %w", context.Cause(ctx))
	}
	c.turn <- struct{}{}
	if err := c.Run(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Run executes a command, and decodes what it returns into result unless that is nil. A refusal is an *Error. When ctx
// ends first the session is closed: its next answer would belong to nobody.
func (c *Client) Run(ctx context.Context, command string, args, result any) error {
	select {
	case <-c.turn:
	case <-c.closed:
		return c.ended(command)
	case <-ctx.Done():
		return fmt.Errorf("qmp %s: %w", command, context.Cause(ctx))
	}
	defer func() { c.turn <- struct{}{} }()

	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return fmt.Errorf("qmp %s: arguments: %w", command, err)
	}
	answer := c.expect()
	// A QEMU that hangs does not read either: closing ends the write as well as the wait.
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer stop()
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		c.Close() // the reader knows better why
	}
	select {
	case m := <-answer:
		return finish(command, m, result)
	case <-c.closed:
		if err := context.Cause(ctx); err != nil {
			return fmt.Errorf("qmp %s: %w", command, err)
		}
		return c.ended(command)
	}
}

func finish(command string, m message, result any) error {
	if m.Err != nil {
		return fmt.Errorf("qmp %s: %w", command, m.Err)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("qmp %s: decoding the answer: %w", command, err)
	}
	return nil
}

// Done is closed when the session has ended.
func (c *Client) Done() <-chan struct{} { return c.closed }

// Close ends the session and waits for the reader. It leaves the machine alone.
func (c *Client) Close() {
	c.conn.Close()
	<-c.closed
}

func (c *Client) ended(command string) error {
	if c.err == nil {
		return fmt.Errorf("qmp %s: %w", command, ErrClosed)
	}
	return fmt.Errorf("qmp %s: %w (%w)", command, ErrClosed, c.err)
}

// read takes lines until the connection ends. An answer that nobody asked for ends it too: what follows cannot be told apart.
func (c *Client) read(greeted chan<- struct{}) {
	defer close(c.closed)
	defer c.conn.Close()
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(make([]byte, 0, 4096), MaxLine)
	for lines.Scan() {
		var m message
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			c.err = fmt.Errorf("line that is not QMP: %w", err)
			return
		}
		switch {
		case m.Event != "":
			c.onEvent(Event{Name: m.Event, Data: m.Data, Time: time.Now()})
		case m.Greeting != nil:
			if greeted == nil {
				c.err = errors.New("second greeting")
				return
			}
			close(greeted)
			greeted = nil
		case m.Return != nil || m.Err != nil:
			if !c.deliver(m) {
				c.err = errors.New("answer to no command")
				return
			}
		}
	}
	c.err = lines.Err()
}

// expect says where the answer to the command that is about to be sent will arrive. Only who has the turn calls it.
func (c *Client) expect() <-chan message {
	answer := make(chan message, 1) // the reader never waits for the command, which may have given up
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending = answer
	return answer
}

// deliver hands an answer to the command under way and says whether there was one.
func (c *Client) deliver(m message) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending == nil {
		return false
	}
	c.pending <- m
	c.pending = nil
	return true
}
