package e2e

import (
	"bytes"
	"context"
	"fmt"
	"regexp"
	"sync"
	"time"
)

// Lines of a console by which the points of a boot are told that no agent is there to report.
var (
	restarts    = regexp.MustCompile(`reboot: Restarting system`)
	kernelSpeak = regexp.MustCompile(`Linux version \d`)
	agentStarts = regexp.MustCompile(`troupe: agent starts`)
	floorStarts = regexp.MustCompile(`floor: starts`)
	floorLeaves = regexp.MustCompile(`floor: leaves`)
	systemdIs   = regexp.MustCompile(`systemd\[1\]: systemd \d.* running in system mode`)
	webStarted  = regexp.MustCompile(`Started .*web\.service`)
	multiUser   = regexp.MustCompile(`Reached target .*multi-user\.target`)
)

// A clock is a console whose lines have the time at which they came.
type clock struct {
	mu    sync.Mutex
	lines []stamped
	rest  []byte        // the beginning of a line
	more  chan struct{} // closed, and made anew, when a line comes or when no more will
	over  bool
}

type stamped struct {
	at   time.Time
	text string
}

func newClock() *clock { return &clock{more: make(chan struct{})} }

// Write takes what the console says.
func (c *clock) Write(p []byte) (int, error) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rest = append(c.rest, p...)
	for {
		line, rest, ok := bytes.Cut(c.rest, []byte("\n"))
		if !ok {
			break
		}
		c.lines = append(c.lines, stamped{now, string(line)})
		c.rest = rest
	}
	c.wake()
	return len(p), nil
}

// end says that the console is silent from now on.
func (c *clock) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	c.wake()
}

// wake wants mu to be held.
func (c *clock) wake() {
	close(c.more)
	c.more = make(chan struct{})
}

// after waits for the first line that matches and came after a point of time, and returns when it came.
func (c *clock) after(ctx context.Context, from time.Time, re *regexp.Regexp) (time.Time, error) {
	for {
		at, more, over := c.find(from, re)
		if !at.IsZero() {
			return at, nil
		}
		if over {
			return at, fmt.Errorf("the console ended without %q; it said last:\n%s", re, c.tail(20))
		}
		select {
		case <-more:
		case <-ctx.Done():
			return at, fmt.Errorf("waiting for %q on the console: %w; it said last:\n%s", re, context.Cause(ctx), c.tail(20))
		}
	}
}

// find looks for a line that is there; the zero time says that there is none.
func (c *clock) find(from time.Time, re *regexp.Regexp) (at time.Time, more <-chan struct{}, over bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.lines {
		if l.at.After(from) && re.MatchString(l.text) {
			return l.at, c.more, c.over
		}
	}
	return time.Time{}, c.more, c.over
}

func (c *clock) tail(n int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b bytes.Buffer
	for _, l := range c.lines[max(0, len(c.lines)-n):] {
		fmt.Fprintf(&b, "%s %s\n", l.at.Format("15:04:05.000"), l.text)
	}
	return b.String()
}
