package iscsi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

func lockThread() { runtime.LockOSThread() } // for good: the thread becomes another program

// A Session is one that a keeper holds for its starter, and, after Keep, for itself.
type Session struct {
	dir     string
	process *os.Process
	control *os.File // the keeper's descriptor controlFD
	notice  *os.File // noticeFD
	changed chan struct{}
	wg      sync.WaitGroup
}

// Start starts a keeper: program is the agent's, in a file system in memory, and so is dir.
func Start(program, dir string, c Config) (*Session, error) {
	if err := errors.Join(os.MkdirAll(dir, 0o700), WriteConfig(dir, c)); err != nil {
		return nil, fmt.Errorf("starting the keeper of the iSCSI session: %w", err)
	}
	if err := os.Remove(dir + "/" + statusFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("starting the keeper of the iSCSI session: %w", err)
	}
	s, err := start(program, dir, &unix.SysProcAttr{Setsid: true})
	if err != nil {
		return nil, fmt.Errorf("starting the keeper of the iSCSI session: %w", err)
	}
	s.wg.Go(s.listen)
	return s, nil
}

func start(program, dir string, attr *unix.SysProcAttr) (*Session, error) {
	theirs, control, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	notice, theirs2, err := os.Pipe()
	null, err2 := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err := errors.Join(err, err2); err != nil {
		return nil, errors.Join(err, theirs.Close(), control.Close())
	}
	p, err := os.StartProcess(program, []string{processName, Argument}, &os.ProcAttr{
		Dir: "/", Files: []*os.File{null, null, null, theirs, theirs2}, Env: []string{}, Sys: attr,
	})
	err = errors.Join(err, theirs.Close(), theirs2.Close(), null.Close())
	if p == nil {
		return nil, errors.Join(err, control.Close(), notice.Close())
	}
	return &Session{dir: dir, process: p, control: control, notice: notice, changed: make(chan struct{}, 1)}, nil
}

// Resume starts a keeper for a session whose own was killed. Cgroup is the directory of the control group that it is to
// be in: the one of the caller, a service, may end before the session.
func Resume(program, dir, cgroup string) error {
	group, err := os.Open(cgroup)
	if err != nil {
		return fmt.Errorf("starting a keeper for the iSCSI session: %w", err)
	}
	defer group.Close()
	s, err := start(program, dir, &unix.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(group.Fd())})
	if err != nil {
		return fmt.Errorf("starting a keeper for the iSCSI session: %w", err)
	}
	return errors.Join(s.Keep(), s.control.Close(), s.notice.Close(), s.process.Release())
}

// listen wakes who waits, until the keeper ends.
func (s *Session) listen() {
	defer close(s.changed)
	b := make([]byte, 64)
	for {
		if _, err := s.notice.Read(b); err != nil {
			return
		}
		select {
		case s.changed <- struct{}{}:
		default: // the status is read after this anyway
		}
	}
}

// ErrEnded says that the keeper has ended.
var ErrEnded = errors.New("the keeper of the iSCSI session has ended")

// Await waits until the session is up. Each try that fails is told to failed.
func (s *Session) Await(ctx context.Context, failed func(Status)) (Status, error) {
	for {
		st, err := ReadStatus(s.dir)
		switch {
		case err == nil && st.Up:
			return st, nil
		case err == nil:
			failed(st)
		case !errors.Is(err, os.ErrNotExist):
			return st, err
		}
		select {
		case <-ctx.Done():
			return st, ctx.Err()
		case _, ok := <-s.changed:
			if !ok {
				return st, ErrEnded
			}
		}
	}
}

// Configure changes what is logged in to from the next try on. The lease stays: who gets another one tells of it with
// ChangeConfig, and may know more than the caller by now.
func (s *Session) Configure(c Config) error {
	return ChangeConfig(s.dir, func(now *Config) {
		c.Lease = now.Lease
		*now = c
	})
}

// Keep lets the session outlive this process.
func (s *Session) Keep() error {
	if _, err := s.control.WriteString(keepWord); err != nil {
		return fmt.Errorf("keeping the iSCSI session: %w", err)
	}
	return nil
}

// Close ends a session that is not kept, with its disks, and waits for that.
func (s *Session) Close() error {
	err := s.control.Close()
	_, waitErr := s.process.Wait()
	s.wg.Wait()
	return errors.Join(err, waitErr, s.notice.Close())
}
