package load

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/troupe-dev/troupe/schema"
)

// evaluate has a child evaluate plans, and returns the shards it finished, also beside an error. Where the child was
// stopped by a limit or died of the fleet, the error is a *limitError.
func (l *Loader) evaluate(ctx context.Context, src *sources, plans []*plan) ([]*shard, error) {
	if len(plans) == 0 {
		return nil, nil
	}
	lim := l.limits()
	body, err := json.Marshal(makeRequest(lim, src, plans))
	if err != nil {
		return nil, fmt.Errorf("writing the evaluator's request: %w", err)
	}
	run := &childRun{plans: plans, begun: map[int]bool{}}
	err = run.start(ctx, lim, l.command, body)
	if err == nil && len(run.shards) < len(plans) {
		err = errors.New("the evaluator ended without an answer for every directory")
	}
	return run.shards, err
}

// command is the evaluating child, not yet started.
func (l *Loader) command(ctx context.Context) *exec.Cmd {
	if len(l.Command) > 0 {
		return exec.CommandContext(ctx, l.Command[0], l.Command[1:]...)
	}
	// Not os.Executable: this is the program that runs, even after its file was replaced by a newer one.
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "eval")
	cmd.Args[0] = os.Args[0]
	return cmd
}

// makeRequest sends only the files that plans need.
func makeRequest(lim limits, src *sources, plans []*plan) request {
	req := request{Memory: lim.memory, Workers: lim.workers}
	sent := map[int]int{}
	for _, p := range plans {
		sr := shardRequest{Dir: p.dir}
		for _, i := range p.files {
			if _, ok := sent[i]; !ok {
				sent[i] = len(req.Files)
				req.Files = append(req.Files, src.files[i])
			}
			sr.Files = append(sr.Files, sent[i])
		}
		req.Shards = append(req.Shards, sr)
	}
	return req
}

// A childRun is one run of the child.
type childRun struct {
	plans  []*plan
	shards []*shard
	begun  map[int]bool // shards that the child works on, in plans
}

// start runs the child to its end.
func (r *childRun) start(ctx context.Context, lim limits, command func(context.Context) *exec.Cmd, body []byte) error {
	// The kernel kills the child when the thread that started it ends (PR_SET_PDEATHSIG in prctl(2)), so this
	// goroutine keeps its thread until the child is gone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	bounded, cancel := context.WithTimeout(ctx, lim.deadline)
	defer cancel()
	cmd := command(bounded)
	cmd.Env = []string{"GOTRACEBACK=none"} // a fleet is the same whatever the environment is
	cmd.Stdin = bytes.NewReader(body)
	stderr := &head{max: 16 << 10}
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 2 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("starting the evaluator: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the evaluator: %w", err)
	}
	readErr := r.read(out)
	nonsense := readErr != nil && !errors.Is(readErr, io.ErrUnexpectedEOF)
	if nonsense {
		cancel()
	}
	waitErr := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("evaluating the fleet: %w", context.Cause(ctx))
	case errors.Is(bounded.Err(), context.DeadlineExceeded):
		return r.refuse(lim, "evaluating %s took too long")
	case errors.Is(readErr, errTooMuch):
		return r.refuse(lim, "evaluating %s made too much data")
	case nonsense:
		return readErr
	case waitErr != nil:
		return r.died(lim, waitErr, stderr.String())
	}
	return readErr
}

// read takes the child's lines until it closes its output.
func (r *childRun) read(out io.Reader) error {
	limited := &io.LimitedReader{R: bufio.NewReaderSize(out, 1<<16), N: maxResponse}
	dec := json.NewDecoder(limited)
	for {
		var res response
		err := dec.Decode(&res)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil && limited.N <= 0:
			return errTooMuch
		case err != nil:
			return fmt.Errorf("reading the evaluator's answer: %w", err)
		}
		if err := r.take(res); err != nil {
			return err
		}
	}
}

var errTooMuch = errors.New("the evaluator's answer is too long")

func (r *childRun) take(res response) error {
	known := func(i *int) bool { return i != nil && *i >= 0 && *i < len(r.plans) }
	switch {
	case known(res.Begin):
		r.begun[*res.Begin] = true
	case known(res.End) && res.Result != nil && r.begun[*res.End]:
		delete(r.begun, *res.End)
		res.Result.key = r.plans[*res.End].key
		r.shards = append(r.shards, res.Result)
	default:
		return errors.New("reading the evaluator's answer: neither the begin nor the end of a directory")
	}
	return nil
}

// died says why the child ended without being told to.
func (r *childRun) died(lim limits, err error, stderr string) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("evaluating the fleet: %w", err)
	}
	memory := []string{
		"out of memory", "cannot allocate memory", "cannot map pages", "failed to create new OS thread",
		"pthread_create failed",              // the same of a program built with cgo
		"ThreadSanitizer failed to allocate", // of a program built with -race
	}
	saysMemory := slices.ContainsFunc(memory, func(s string) bool { return strings.Contains(stderr, s) })
	status, _ := exit.Sys().(syscall.WaitStatus)
	switch {
	case saysMemory, status.Signaled() && status.Signal() == syscall.SIGKILL: // the kernel's OOM killer
		return r.refuse(lim, "evaluating %s took too much memory")
	case strings.Contains(stderr, "stack overflow"), strings.Contains(stderr, "stack exceeds"):
		return r.refuse(lim, "evaluating %s went too deep")
	}
	line, _, _ := strings.Cut(strings.TrimSpace(stderr), "\n")
	if len(r.begun) == 0 {
		return fmt.Errorf("evaluating the fleet: %w: %s", err, line)
	}
	return r.refuse(lim, "evaluating %s crashed the evaluator ("+strings.ReplaceAll(line, "%", "%%")+")")
}

// refuse is the error for a fleet that stopped the child. The format takes the directories it was working on.
func (r *childRun) refuse(lim limits, format string) error {
	var dirs []string
	for i := range r.begun {
		dirs = append(dirs, r.plans[i].dir)
	}
	slices.Sort(dirs)
	what := "the fleet"
	switch {
	case len(dirs) == 1 && dirs[0] == ".":
		what = "the fleet's root directory"
	case len(dirs) > 0:
		what = strings.Join(dirs, ", ")
	}
	text := fmt.Sprintf(format, what) + "; " + lim.String() +
		"; look for a comprehension over a very long list, structs or strings that double again and again, or one that refers to itself"
	return &limitError{schema.Problems{{Message: text}}}
}

// A head keeps the first max bytes that are written to it.
type head struct {
	bytes.Buffer
	max int
}

func (h *head) Write(p []byte) (int, error) {
	if room := h.max - h.Len(); room > 0 {
		h.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
