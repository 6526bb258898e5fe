package agent

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/signing"
)

// pollWait is how long the server may hold a question for the assignment.
const pollWait = 30 * time.Second

// A follower knows the assignment of this machine, and keeps asking for a newer one.
type follower struct {
	client *agentapi.Client
	log    *slog.Logger
	hello  func() agentapi.Hello
	keys   signing.Keys // whose releases are run
	// refused is told of each assignment whether its release was refused, and why; may be nil.
	refused func(error)

	mu      sync.Mutex
	latest  agentapi.Assignment
	again   bool               // a hello is wanted
	stop    context.CancelFunc // of the question that is being asked
	changed chan struct{}      // has room for one: latest is not what the reader has seen
}

func newFollower(c *agentapi.Client, log *slog.Logger, hello func() agentapi.Hello) *follower {
	return &follower{client: c, log: log, hello: hello, changed: make(chan struct{}, 1)}
}

// get is the assignment as it is known.
func (f *follower) get() agentapi.Assignment {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.latest
}

// hear takes an assignment that came from the server. One whose release nobody vouches for is nothing but a reason to wait:
// what runs goes on.
func (f *follower) hear(a agentapi.Assignment) {
	opened, err := agentapi.Open(a, f.keys)
	if err != nil {
		opened = agentapi.Assignment{Version: a.Version, State: agentapi.Waiting, Reason: err.Error(), Host: a.Host, Role: a.Role}
	}
	if f.refused != nil {
		f.refused(err)
	}
	f.set(opened)
}

// set takes an assignment; one with another version wakes the reader.
func (f *follower) set(a agentapi.Assignment) {
	f.mu.Lock()
	same := a.Version == f.latest.Version
	f.latest = a
	f.mu.Unlock()
	if same {
		return
	}
	select {
	case f.changed <- struct{}{}:
	default: // it will look at latest anyway
	}
}

// reply takes what the server said to a report: it may have forgotten the machine, or have another assignment than the
// one that is known here, while a question hangs on a connection that nobody serves any more.
func (f *follower) reply(r agentapi.ReportReply) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Hello {
		f.again = true
	}
	if (r.Hello || r.Version != f.latest.Version) && f.stop != nil {
		f.stop()
	}
}

// greet says hello until the server answers with an assignment, and returns only then or with ctx's error. It calls heard
// at each answer of the server that is none, as while no fleet is in force.
func (f *follower) greet(ctx context.Context, heard func()) error {
	tries := agentapi.Retry()
	for {
		a, err := f.client.Hello(ctx, f.hello())
		if err == nil {
			f.hear(a)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if se := (*agentapi.StatusError)(nil); errors.As(err, &se) && se.Troupe {
			heard()
		}
		d := tries.Next()
		f.log.Warn("the server does not answer, trying again", "server", f.client.Server(), "error", err, "in", d.Round(time.Millisecond))
		if err := backoff.Sleep(ctx, d); err != nil {
			return err
		}
	}
}

// run asks until ctx is done.
func (f *follower) run(ctx context.Context) {
	tries := agentapi.Retry()
	for ctx.Err() == nil {
		err := f.ask(ctx)
		if err == nil {
			tries.Reset()
			continue
		}
		if ctx.Err() != nil {
			return
		}
		f.log.Debug("the assignment cannot be asked for", "error", err)
		_ = tries.Wait(ctx) // the loop looks at ctx itself
	}
}

// ask asks one question: hello where the server wants it, else for the assignment.
func (f *follower) ask(ctx context.Context) error {
	f.mu.Lock()
	again := f.again
	after := f.latest.Version
	qctx, stop := context.WithCancel(ctx)
	defer stop()
	if !again {
		f.stop = stop
	}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.stop = nil
		f.mu.Unlock()
	}()
	h := f.hello()
	if again {
		a, err := f.client.Hello(qctx, h)
		if err != nil {
			return err
		}
		f.mu.Lock()
		f.again = false
		f.mu.Unlock()
		f.hear(a)
		return nil
	}
	began := time.Now()
	a, err := f.client.Assignment(qctx, h.MAC, after, pollWait)
	switch {
	case agentapi.NotFound(err):
		f.mu.Lock()
		f.again = true
		f.mu.Unlock()
		return err
	case err != nil && qctx.Err() != nil && ctx.Err() == nil:
		return nil // stopped by reply: ask anew
	case err != nil:
		return err
	}
	f.hear(a)
	if a.Version == after && time.Since(began) < time.Second {
		return backoff.Sleep(ctx, time.Second) // a server that does not hold the question must not be asked in a loop
	}
	return nil
}

// errNewer says that an assignment was left for a newer one.
var errNewer = errors.New("there is a newer assignment")

// whileCurrent calls do for an assignment, with a context that ends when a newer one comes. It returns errNewer where one
// did, whatever do returned. The wake-up for it may have been taken here, but never without that answer: so whoever gets
// another one may wait for changed.
func (f *follower) whileCurrent(ctx context.Context, a agentapi.Assignment, do func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	woken := false
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-f.changed:
			woken = true
			cancel()
		case <-ctx.Done():
		}
	}()
	err := do(ctx)
	cancel()
	<-stopped // only then is it known what was taken: both cases may have been ready at once
	if woken || f.get().Version != a.Version {
		return errNewer
	}
	return err
}
