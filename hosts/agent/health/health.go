// Package health finds out whether a node does what its role is for: it runs the checks that its fleet declares, or,
// where there are none, asks systemd whether the system is up.
package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/command"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
)

// Bounds of what a check asks for; zero is filled in, the rest is cut.
const (
	defaultEvery   = 10 * time.Second
	defaultTimeout = 5 * time.Second
	minEvery       = 500 * time.Millisecond
	// Until a check passes for the first time it is tried more often, since a push waits for it: one that asks a port
	// costs next to nothing, the others a process. One that has not passed by then will hardly do so soon, and each of
	// its tries may be one more report: then it is tried as often as it asks for.
	eagerEvery   = 500 * time.Millisecond
	eagerFor     = 3 * time.Minute
	eagerPort    = 150 * time.Millisecond
	eagerPortFor = 30 * time.Second
)

// A Runner runs the checks of one assignment.
type Runner struct {
	Checks []agentapi.Check
	Log    *slog.Logger
	// Changed is told of the health after each check that changed it, and once all were run for the first time. It
	// is called by one goroutine at a time.
	Changed func(agentapi.Health)
}

// Run runs each check by its own clock until ctx is done.
func (r Runner) Run(ctx context.Context) {
	checks := r.Checks
	if len(checks) == 0 {
		checks = []agentapi.Check{{}} // systemd's own word
	}
	b := board{failing: make([]string, len(checks)), known: make([]bool, len(checks)), changed: r.Changed}
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() { r.loop(ctx, i, c, &b) })
	}
	wg.Wait()
}

func (r Runner) loop(ctx context.Context, i int, c agentapi.Check, b *board) {
	every, timeout := c.Every, c.Timeout
	if every <= 0 {
		every = defaultEvery
	}
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	every = max(every, minEvery)
	passed, began := false, time.Now()
	var p prober
	for {
		err := p.try(ctx, c, timeout)
		if ctx.Err() != nil {
			return
		}
		passed = passed || err == nil
		line := ""
		if err != nil {
			line = Name(c) + ": " + err.Error()
			r.Log.Debug("a check fails", "check", Name(c), "error", err)
		}
		b.set(i, line)
		wait := every
		if !passed {
			wait = min(every, eager(c, every, time.Since(began)))
		}
		if backoff.Sleep(ctx, wait) != nil {
			return
		}
	}
}

// eager is the pause of a check that has not passed yet, so long after it began.
func eager(c agentapi.Check, every, age time.Duration) time.Duration {
	switch {
	case age < eagerPortFor && (c.HTTP != nil || c.TCP != nil):
		return eagerPort
	case age < eagerFor:
		return eagerEvery
	}
	return every
}

// A board has the last outcome of each check.
type board struct {
	mu      sync.Mutex
	failing []string
	known   []bool
	last    *agentapi.Health
	changed func(agentapi.Health)
}

func (b *board) set(i int, line string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failing[i], b.known[i] = line, true
	h := agentapi.Health{}
	for j, l := range b.failing {
		if !b.known[j] {
			return
		}
		if l != "" {
			h.Failing = append(h.Failing, l)
		}
	}
	h.Healthy = len(h.Failing) == 0
	if b.last != nil && b.last.Healthy == h.Healthy && strings.Join(b.last.Failing, "\n") == strings.Join(h.Failing, "\n") {
		return
	}
	b.last = &h
	b.changed(h)
}

// Name is a check for people: "http :80/", "unit ssh.service".
func Name(c agentapi.Check) string {
	switch {
	case c.HTTP != nil:
		return fmt.Sprintf("http :%d%s", c.HTTP.Port, c.HTTP.Path)
	case c.TCP != nil:
		return fmt.Sprintf("tcp :%d", c.TCP.Port)
	case c.Unit != "":
		return "unit " + c.Unit
	case len(c.Exec) > 0:
		return "exec " + strings.Join(c.Exec, " ")
	}
	return "system"
}

// Try runs a check once; nil says that it passed. It returns some 2 s after the timeout at the latest.
func Try(ctx context.Context, c agentapi.Check, timeout time.Duration) error {
	return new(prober).try(ctx, c, timeout)
}

// A prober makes the tries of one check, one after the other.
type prober struct {
	hung <-chan struct{} // closed once a command ends that was left behind; nil for none
}

// errHangs says that a command does not even end when it is killed, as one that waits for a disk which does not answer.
var errHangs = errors.New("it hangs in the kernel")

func (p *prober) try(ctx context.Context, c agentapi.Check, timeout time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %v", timeout))
	defer cancel()
	var err error
	switch {
	case c.HTTP != nil:
		err = tryHTTP(ctx, *c.HTTP)
	case c.TCP != nil:
		err = tryTCP(ctx, c.TCP.Port)
	case c.Unit != "":
		err = p.tryUnit(ctx, c.Unit)
	case len(c.Exec) > 0:
		err = p.tryExec(ctx, c.Exec)
	default:
		err = p.trySystem(ctx)
	}
	switch {
	case errors.Is(err, errHangs):
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return err
}

// client speaks to the node itself, anew each time: a kept connection would not notice that the listener is gone. A
// redirect is an answer.
var client = http.Client{
	Transport:     &http.Transport{DisableKeepAlives: true, Proxy: nil},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func tryHTTP(ctx context.Context, c agentapi.HTTPCheck) error {
	path, want := c.Path, c.Status
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	if want == 0 {
		want = http.StatusOK
	}
	url := "http://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(int(c.Port))) + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return unwrapURL(err)
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, 1<<20) // the server may finish its answer; the status is what counts
	if resp.StatusCode != want {
		return fmt.Errorf("answered %d, want %d", resp.StatusCode, want)
	}
	return nil
}

// unwrapURL leaves out the method and the URL, which the check's name has.
func unwrapURL(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

func tryTCP(ctx context.Context, port uint16) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return unwrapURL(err)
	}
	return conn.Close()
}

func (p *prober) tryUnit(ctx context.Context, unit string) error {
	state, err := p.output(ctx, "systemctl", "is-active", "--", unit)
	if err != nil && state != "" {
		return errors.New(state)
	}
	return err
}

// trySystem passes once systemd has reached its default target. A unit that failed makes a system "degraded", which
// is healthy where the fleet asks for no check of it.
func (p *prober) trySystem(ctx context.Context) error {
	if _, err := p.output(ctx, "systemctl", "--quiet", "is-active", "default.target", "multi-user.target"); err == nil {
		return nil // one of them is enough
	}
	state, err := p.output(ctx, "systemctl", "is-system-running")
	switch state {
	case "running", "degraded":
		return nil
	case "":
		return err
	}
	return fmt.Errorf("systemd says %q", state)
}

func (p *prober) tryExec(ctx context.Context, argv []string) error {
	out, err := p.output(ctx, argv[0], argv[1:]...)
	if err != nil && out != "" {
		lines := strings.Split(out, "\n")
		return fmt.Errorf("%w: %.200s", err, lines[len(lines)-1])
	}
	return err
}

// How long a command may go on after it was killed. What it started may have got away and hold its output open: that is
// closed after the first of these. After the second it is left behind.
const (
	closeAfter = time.Second
	leaveAfter = 2 * time.Second
)

// output runs a command and returns the end of what it printed, also with an error. The command and all that it
// started are killed when ctx ends. One that goes on even then, or does not even begin, is left to a goroutine of its own,
// so that it holds up nobody, and no other is started before it has ended.
func (p *prober) output(ctx context.Context, name string, args ...string) (string, error) {
	if p.hung != nil {
		select {
		case <-p.hung:
			p.hung = nil
		case <-ctx.Done():
			return "", errHangs
		}
	}
	var t tail
	var err error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd := command.New(ctx, name, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		cmd.WaitDelay = closeAfter
		cmd.Stdout, cmd.Stderr = &t, &t
		err = cmd.Run()
	}()
	if !endsWith(ctx, ended) {
		p.hung = ended
		return "", errHangs
	}
	return strings.TrimSpace(string(t.b)), err
}

// endsWith waits for a command that is killed when ctx ends, and says whether it has ended.
func endsWith(ctx context.Context, ended <-chan struct{}) bool {
	select {
	case <-ended:
		return true
	case <-ctx.Done():
	}
	grace := time.NewTimer(leaveAfter)
	defer grace.Stop()
	select {
	case <-ended:
		return true
	case <-grace.C:
		return false
	}
}

// tail keeps the last bytes of an output that may be endless.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if len(t.b) > 4096 {
		t.b = append([]byte(nil), t.b[len(t.b)-2048:]...)
	}
	return len(p), nil
}
