package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Progress is told how a build goes on. What is written to it is output of programs, in whole lines.
// Its methods are never called at the same time.
type Progress interface {
	// Step says that a new step begins, and with it that the one before is done.
	Step(name string)
	io.Writer
}

// tailLines is how many lines of output a StepError keeps.
const tailLines = 20

// maxLine bounds one line of a program's output, in bytes; the rest of a longer one comes as a line of its own.
const maxLine = 4096

// A StepError says in which step a build ended, and with what output.
type StepError struct {
	Step string
	Tail []string // the last lines that the step wrote, at most 20; none if it runs no program
	Err  error
}

func (e *StepError) Error() string {
	s := fmt.Sprintf("step %q: %v", e.Step, e.Err)
	if said := telling(e.Tail); said != "" {
		s += ": " + said
	}
	return s
}

// telling is the line of a step's last words that says most: the last one, unless apt said before it what it could not
// fetch, and from where.
func telling(tail []string) string {
	if len(tail) == 0 {
		return ""
	}
	i := slices.IndexFunc(tail, func(l string) bool { return strings.HasPrefix(l, "E: Failed to fetch ") })
	if i < 0 {
		i = len(tail) - 1
	}
	return strings.TrimSpace(tail[i])
}

func (e *StepError) Unwrap() error { return e.Err }

// steps passes a build's progress on, and remembers which step it is in and how that one's output ends.
type steps struct {
	mu   sync.Mutex
	to   Progress
	name string
	tail []string
	part []byte // of a line that has no end yet
}

func newSteps(to Progress) *steps {
	if to == nil {
		to = silent{}
	}
	return &steps{to: to}
}

func (s *steps) begin(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flush()
	s.name, s.tail = name, nil
	s.to.Step(name)
}

// Write takes a program's output and passes it on by whole lines.
func (s *steps) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range p {
		if c == '\n' || c == '\r' || len(s.part) == maxLine {
			s.flush()
		}
		if c != '\n' && c != '\r' {
			s.part = append(s.part, c)
		}
	}
	return len(p), nil
}

func (s *steps) flush() {
	if len(s.part) == 0 {
		return
	}
	line := strings.ToValidUTF8(string(s.part), "\uFFFD")
	s.part = s.part[:0]
	if len(s.tail) == tailLines {
		s.tail = slices.Delete(s.tail, 0, 1)
	}
	s.tail = append(s.tail, line)
	_, _ = io.WriteString(s.to, line+"\n") // progress that nobody can take is no reason to end a build
}

// fail is err as a StepError of the step that runs now; nil for nil.
func (s *steps) fail(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flush()
	if ctx.Err() != nil {
		err = fmt.Errorf("%w (%w)", context.Cause(ctx), err)
	}
	if !errors.Is(err, syscall.ENOSPC) && diskFull(s.tail) {
		err = fmt.Errorf("%w (%w)", syscall.ENOSPC, err)
	}
	return &StepError{Step: s.name, Tail: slices.Clone(s.tail), Err: err}
}

// diskFull says whether a program complained of a full disk: its exit status does not tell.
func diskFull(tail []string) bool {
	return slices.ContainsFunc(tail, func(l string) bool {
		return strings.Contains(strings.ToLower(l), syscall.ENOSPC.Error())
	})
}

type silent struct{}

func (silent) Step(string)                 {}
func (silent) Write(p []byte) (int, error) { return len(p), nil }

// run runs cmd to its end, which comes at once when ctx is done: cmd is then killed with all that it started.
// Where the build may, cmd is the first process of a PID namespace and has mounts of its own, so that neither process
// nor mount can outlive it, even if this process is killed. Its standard error, and its standard output if that is
// not set yet, go to s.
func (s *steps) run(ctx context.Context, cmd *exec.Cmd, extraFlags uintptr) error {
	cmd.Stderr = s
	if cmd.Stdout == nil {
		cmd.Stdout = s
	}
	cmd.WaitDelay = time.Minute // should a program that got away hold the output open
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if isRoot() {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | extraFlags
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS // and not in Cloneflags: this way mounts stay private
	}
	// The parent of which Pdeathsig speaks is the thread, so the thread must stay until the program is done.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", cmd.Path, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("running %s: %w", cmd.Args[0], err)
	}
	return nil
}

// trimmedLines are the lines of b that are not empty.
func trimmedLines(b []byte) []string {
	var lines []string
	for l := range bytes.Lines(b) {
		if l = bytes.TrimSpace(l); len(l) > 0 {
			lines = append(lines, string(l))
		}
	}
	return lines
}
