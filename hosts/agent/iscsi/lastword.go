package iscsi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// A lastWord ends what hangs on disks that do not answer: a shutdown, of which only the kernel and this process are left,
// and a machine whose target has no disk for it any more.
type lastWord struct {
	log    *slog.Logger
	proc   *os.Root
	isUp   func() bool
	end    func()      // ends the session; may be called more than once
	isKept atomic.Bool // the system runs from the session
}

const (
	lastWordLook = 5 * time.Second
	lastWordTime = 90 * time.Second // without the target, in a shutdown
)

// Limits of a session that was up and is refused since then. Where the system can still reboot by itself, as the agent
// does for a disk that was reset, that takes less than goneTime. In the initramfs there is nothing to lose.
const (
	goneTime       = 5 * time.Minute
	goneTimeAtBoot = time.Minute
)

// refusalGap is how long after one refusal the next one may come, to be in a row with it: the clock goes on where a
// virtual machine stood still.
const refusalGap = 30 * time.Second

// refusals are those in a row by which a target says that it has no disk for this machine any more, as after troupe reset
// --force. Whatever waits for that disk would do so until somebody cuts the power.
type refusals struct{ first, last time.Time }

// add notes how a try to log in ended, and returns since when each one ended so; zero: this one did not.
func (r *refusals) add(err error, now time.Time) (since time.Time) {
	if !isGone(err) {
		*r = refusals{}
		return since
	}
	if now.Sub(r.last) > refusalGap {
		r.first = now
	}
	r.last = now
	return r.first
}

// isGone says whether a target answered that the disk of this machine is not there, or not this machine's. Nothing else
// does: a server that is away, starts, is busy or speaks another protocol will have the disk when it is back.
func isGone(err error) bool {
	var r *RefusedError
	return errors.As(err, &r) && r.Class == 2 && r.Detail >= 1 && r.Detail <= 4
}

func (w *lastWord) patience() time.Duration {
	if w.isKept.Load() {
		return goneTime
	}
	return goneTimeAtBoot
}

// gone ends a machine whose target is gone.
func (w *lastWord) gone(after time.Duration) {
	w.speak(fmt.Sprintf("it has refused the session for %v", after.Round(time.Second)))
}

// shutdownName is what PID 1 is called in the end (its name is cut to 15 bytes).
const shutdownName = "systemd-shutdow"

func (w *lastWord) run(ctx context.Context) {
	tick := time.NewTicker(lastWordLook)
	defer tick.Stop()
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if !w.isShutdown() || w.isUp() {
				since = time.Time{}
				continue
			}
			if since.IsZero() {
				since = now
			}
			if now.Sub(since) < lastWordTime {
				continue
			}
			w.speak("the shutdown waits for it, and it is away")
		}
	}
}

// speak has the kernel reboot, or do what a shutdown was for. A reboot ("b") asks no disk any more. Power off ("o") does, in the
// background: there the disks have to fail before it comes to its end, and so the session ends. Where the kernel has no
// such power, the shutdown itself goes on then.
func (w *lastWord) speak(why string) {
	key := "b"
	if w.isToStayOff() {
		key = "o"
		w.log.Error("powering off without the iSCSI target", "why", why)
	} else {
		w.log.Error("rebooting without the iSCSI target", "why", why)
	}
	if err := writeIn(w.proc, "sysrq-trigger", key); err != nil {
		w.log.Error("the kernel does not end the machine", "error", err)
	}
	if key == "o" {
		w.end()
	}
}

// isToStayOff reads what the shutdown is for from its command line: "systemd-shutdown VERB --timeout …".
func (w *lastWord) isToStayOff() bool {
	b, err := w.proc.ReadFile("1/cmdline")
	if err != nil {
		w.log.Warn("what the shutdown is for is not known", "error", err)
		return false
	}
	args := strings.Split(string(b), "\x00")
	return len(args) > 1 && (args[1] == "poweroff" || args[1] == "halt")
}

func (w *lastWord) isShutdown() bool {
	b, err := w.proc.ReadFile("1/comm")
	return err == nil && strings.TrimSpace(string(b)) == shutdownName
}
