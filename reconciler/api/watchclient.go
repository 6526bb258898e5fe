package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// heartbeat is how often a server that has nothing to tell says that it is there; a client that hears nothing for
// three times as long hangs up.
const heartbeat = 10 * time.Second

// errSilent ends a Watch whose server does not even send heartbeats.
var errSilent = fmt.Errorf("the server was silent for %s", 3*heartbeat)

// Watch hears what changes: first a Snapshot, then whatever is new, until ctx ends (its error), each returns an error
// (that error), or the connection breaks (an error that says so; never nil).
func (c *Client) Watch(ctx context.Context, each func(Change) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r, err := c.do(ctx, http.MethodGet, "/api/v1/watch", nil, nil)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	alive := time.AfterFunc(3*heartbeat, func() { cancel(errSilent) })
	defer alive.Stop()
	err = readChanges(r.Body, func() { alive.Reset(3 * heartbeat) }, each)
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// readChanges reads server-sent events (HTML standard, section 9.2) whose data is a Change, in one line each as our
// server writes them. It calls beat for each line. The end of the stream is io.ErrUnexpectedEOF.
func readChanges(r io.Reader, beat func(), each func(Change) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxAnswer)
	for lines.Scan() {
		beat()
		data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data:"))
		if !ok {
			continue // a heartbeat, a name, or the empty line between events
		}
		var change Change
		if err := json.Unmarshal(data, &change); err != nil {
			return fmt.Errorf("reading what changed: %w", err)
		}
		if err := each(change); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("watching the server: %w", err)
	}
	return fmt.Errorf("watching the server: %w", io.ErrUnexpectedEOF)
}

// errEnough ends a Watch from within.
var errEnough = errors.New("enough")

// Follow calls done with the fleet as it is, and again after each change, until done says true: then it returns nil.
// If the server goes away after it once answered, Follow waits for it to come back. The Snapshot belongs to Follow:
// done must not keep it.
func (c *Client) Follow(ctx context.Context, done func(*Snapshot) bool) error {
	var s Snapshot
	connected := false
	each := func(change Change) error {
		connected = true
		s.Apply(change)
		if done(&s) {
			return errEnough
		}
		return nil
	}
	for {
		err := c.Watch(ctx, each)
		var refused *Error
		switch {
		case errors.Is(err, errEnough):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !connected, errors.As(err, &refused) && refused.Status/100 == 4:
			return err
		}
		retry := time.NewTimer(time.Second)
		select {
		case <-ctx.Done():
			retry.Stop()
			return ctx.Err()
		case <-retry.C:
		}
	}
}
