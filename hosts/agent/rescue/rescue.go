// Package rescue is the shell at the console of a machine that has no system yet: a POSIX shell (mvdan.cc/sh) with
// u-root's commands in it, in the agent's own program.
package rescue

import (
	"bufio"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/troupe-dev/troupe/internal/backoff"
)

// Argument makes the agent's program be the shell: see Offer.
const Argument = "shell"

// Offer waits at a terminal until somebody presses Enter, and gives them a shell: again and again, until ctx is done.
// The shell is a process of its own, with the terminal as its controlling one, so that Ctrl-C works and a crash of it
// is no crash of init. It ends with the terminal's hang-up: a boot that goes on leaves it behind.
func Offer(ctx context.Context, tty string, log *slog.Logger) {
	for ctx.Err() == nil {
		if err := offerOnce(ctx, tty); err != nil {
			log.Debug("no shell on a console", "tty", tty, "error", err)
			if backoff.Sleep(ctx, 10*time.Second) != nil { // such as a serial line that is not there
				return
			}
		}
	}
}

func offerOnce(ctx context.Context, tty string) error {
	f, err := os.OpenFile(tty, os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) }) // wakes the read below
	defer stop()
	if _, err := bufio.NewReaderSize(f, 16).ReadString('\n'); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return shellOn(ctx, tty)
}

func shellOn(ctx context.Context, tty string) error {
	// Opened again: the shell must not get a descriptor that does not block.
	f, err := os.OpenFile(tty, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", Argument)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = f, f, f
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/", "TERM=linux")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	return cmd.Run()
}
