package agent

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/command"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/digest"
)

// staged counts the bytes that several tries fetched for one release.
type staged struct {
	release digest.Digest
	bytes   int64
}

func (s *staged) add(r digest.Digest, n int64) {
	if s.release != r {
		*s = staged{release: r}
	}
	s.bytes += n
}

// take returns the count and begins anew.
func (s *staged) take(r digest.Digest) int64 {
	s.add(r, 0)
	n := s.bytes
	s.bytes = 0
	return n
}

// Values of ioprio_set(2): a class in the upper bits.
const (
	ioprioWhoProcess = 1
	ioprioIdle       = 3 << 13
)

// inBackground calls f on a thread that gets the processor and the disks only when nobody else wants them: the role
// that runs comes first. The thread ends with it, so that nobody inherits its low priority.
func inBackground(f func() (int64, error)) (n int64, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the runtime throws the thread away
		// Best effort: without the right priority the work is still done.
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
		_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, 0, ioprioIdle)
		n, err = f()
	}()
	<-done
	return n, err
}

// rebootPatience is how long the system's own way of shutting down may take.
const rebootPatience = 90 * time.Second

// rebootSystem shuts the system down as its init does, and forces it where that hangs: also where a disk does not answer,
// so that nothing which may wait for one is waited for without a limit. It returns only with an error.
func rebootSystem(ctx context.Context, log *slog.Logger) error {
	if err := syncDisks(); err != nil {
		log.Error("rebooting without it", "error", err)
	}
	if err := bounded(rebootPatience, func() error { return askSystemd(ctx) }); err != nil {
		log.Error("systemd does not reboot, forcing it", "error", err)
		return forced()
	}
	if err := backoff.Sleep(ctx, rebootPatience); err != nil {
		return err
	}
	log.Error("the shutdown hangs, forcing the reboot", "after", rebootPatience)
	return forced()
}

func askSystemd(ctx context.Context) error {
	out, err := command.New(ctx, "systemctl", "--no-block", "reboot").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

func forced() error {
	if err := forceReboot(); err != nil {
		return fmt.Errorf("forcing a reboot: %w", err)
	}
	return nil
}
