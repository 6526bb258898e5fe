package iscsi

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"time"
)

// A lastWord ends a shutdown that hangs on disks which do not answer: what is left then of the system is the kernel, and
// this process.
type lastWord struct {
	log  *slog.Logger
	proc *os.Root
	isUp func() bool
	end  func() // ends the session; may be called more than once
}

const (
	lastWordLook = 5 * time.Second
	lastWordTime = 90 * time.Second // without the target, in a shutdown
)

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
			w.speak()
		}
	}
}

// speak has the kernel do what the shutdown was for. A reboot ("b") asks no disk any more. Power off ("o") does, in the
// background: there the disks have to fail before it comes to its end, and so the session ends. Where the kernel has no
// such power, the shutdown itself goes on then.
func (w *lastWord) speak() {
	how, key := "rebooting", "b"
	if w.isToStayOff() {
		how, key = "powering off", "o"
	}
	w.log.Error("the shutdown waits for an iSCSI target that is away: " + how + " without it")
	if err := writeIn(w.proc, "sysrq-trigger", key); err != nil {
		w.log.Error("the kernel does not end the shutdown", "error", err)
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
