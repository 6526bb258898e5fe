package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
)

// heartbeat is how often a node reports when nothing happens.
const heartbeat = 5 * time.Second

// sinceBoot is CLOCK_BOOTTIME: it counts from the kernel's start and never jumps.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // the clock is there since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}

// A reporter tells the server how the node is: at once when something changed, and every few seconds. A mark is kept
// until the server acknowledged it; after a lost answer it is sent again, the same as before, so that the server can
// tell that it has it.
type reporter struct {
	client  *agentapi.Client
	log     *slog.Logger
	onReply func(agentapi.ReportReply)
	save    func(marks []agentapi.Mark) // is told of the marks that are not acknowledged; may be nil
	session func() *agentapi.Session    // how the session is; nil for none

	// sending has room for one: what two reports at a time acknowledged could not be told apart.
	sending chan struct{}

	mu      sync.Mutex
	report  agentapi.Report // Marks: not acknowledged
	refusal string          // why the newest assignment is not run, whatever else is wrong; "" where it is
	marked  map[agentapi.Stage]bool
	kick    chan struct{}
}

func newReporter(c *agentapi.Client, log *slog.Logger, base agentapi.Report) *reporter {
	return &reporter{
		client: c, log: log, report: base, marked: map[agentapi.Stage]bool{},
		kick: make(chan struct{}, 1), sending: make(chan struct{}, 1),
	}
}

// mark notes that a stage was reached, once per boot and stage.
func (r *reporter) mark(m agentapi.Mark) {
	m.At = sinceBoot()
	r.mu.Lock()
	if r.marked[m.Stage] {
		r.mu.Unlock()
		return
	}
	r.marked[m.Stage] = true
	r.report.Marks = append(r.report.Marks, m)
	r.persist()
	r.mu.Unlock()
	r.log.Info("stage reached", "stage", m.Stage, "at", m.At.Round(time.Millisecond), "detail", m.Detail)
	r.wake()
}

// has says whether a stage was marked, and not forgotten.
func (r *reporter) has(s agentapi.Stage) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.marked[s]
}

// forget lets a stage be marked again.
func (r *reporter) forget(stages ...agentapi.Stage) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range stages {
		delete(r.marked, s)
	}
}

// update changes the report, and sends it at once where now is set.
func (r *reporter) update(now bool, change func(*agentapi.Report)) {
	r.mu.Lock()
	change(&r.report)
	r.mu.Unlock()
	if now {
		r.wake()
	}
}

// mending is an error that the next try may well get past without anybody's help: it is told, but nothing has failed.
type mending struct{ error }

func (m mending) Unwrap() error { return m.error }

// fail reports what keeps the node from its assignment; nil says that nothing does any more. What needs somebody's
// help is a stage of the boot, too.
func (r *reporter) fail(err error) {
	text := ""
	var m mending
	goesOn := err == nil || errors.As(err, &m)
	if err != nil {
		text = err.Error()
		if goesOn {
			text += "; trying again"
		}
	}
	r.mu.Lock()
	changed := r.report.Error != text
	r.report.Error = text
	if changed {
		delete(r.marked, agentapi.StageFailed)
	}
	r.mu.Unlock()
	if !goesOn && changed {
		r.mark(agentapi.Mark{Stage: agentapi.StageFailed, Detail: text})
	}
	if changed {
		r.wake()
	}
}

// refuse reports that the newest assignment is not run since nobody vouches for its release, and that its node goes on as it
// does; nil that it is. Another error does not hide it.
func (r *reporter) refuse(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	r.mu.Lock()
	changed := r.refusal != text
	r.refusal = text
	if changed {
		delete(r.marked, agentapi.StageFailed)
	}
	r.mu.Unlock()
	if changed && err != nil {
		r.log.Error("an assignment is refused", "error", err)
		r.mark(agentapi.Mark{Stage: agentapi.StageFailed, Detail: text})
	}
	if changed {
		r.wake()
	}
}

func (r *reporter) wake() {
	select {
	case r.kick <- struct{}{}:
	default: // it is awake already
	}
}

// persist is called with mu held.
func (r *reporter) persist() {
	if r.save != nil {
		r.save(slices.Clone(r.report.Marks))
	}
}

// pending are the marks that the server did not acknowledge.
func (r *reporter) pending() []agentapi.Mark {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.report.Marks)
}

// run reports until ctx is done.
func (r *reporter) run(ctx context.Context) {
	tries := agentapi.Retry()
	for {
		wait := heartbeat
		err := r.send(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			wait = tries.Next()
			r.log.Warn("the server does not take the report", "error", err, "again_in", wait.Round(time.Millisecond))
			if backoff.Sleep(ctx, wait) != nil { // not woken: each mark would be one more knock on a closed door
				return
			}
			continue
		}
		tries.Reset()
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-r.kick:
		}
		t.Stop()
	}
}

// send reports once.
func (r *reporter) send(ctx context.Context) error {
	select {
	case r.sending <- struct{}{}:
		defer func() { <-r.sending }()
	case <-ctx.Done():
		return ctx.Err()
	}
	r.mu.Lock()
	rep := r.report
	rep.Marks = slices.Clone(rep.Marks)
	if r.refusal != "" {
		rep.Error = r.refusal
	}
	r.mu.Unlock()
	rep.Uptime = sinceBoot()
	if r.session != nil {
		rep.Session = r.session()
	}
	reply, err := r.client.Report(ctx, rep)
	if err != nil {
		return err
	}
	if !reply.Hello { // else the marks may have been written nowhere: they come again after the hello
		r.acknowledged(len(rep.Marks))
	}
	if r.onReply != nil {
		r.onReply(reply)
	}
	return nil
}

// acknowledged takes away the n oldest marks. Marks are only ever added at the end: what was sent is still the beginning.
func (r *reporter) acknowledged(n int) {
	if n == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Marks = slices.Delete(r.report.Marks, 0, min(n, len(r.report.Marks)))
	r.persist()
}

// stages are those that were reached in this boot.
func (r *reporter) stages() []agentapi.Stage {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(r.marked))
}
