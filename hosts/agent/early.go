package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/kmsg"
	"github.com/troupe-dev/troupe/internal/backoff"
)

// mounts are what an init of an initramfs finds missing. /run is kept over switch_root.
var mounts = []struct {
	fstype, dir string
	flags       uintptr
	options     string
}{
	{"proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=755"},
	{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=755,size=20%"},
	{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// mountEarly mounts them. One that is there already is left alone.
func mountEarly() error {
	var errs []error
	for _, m := range mounts {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			errs = append(errs, err)
			continue
		}
		err := unix.Mount(m.fstype, m.dir, m.fstype, m.flags, m.options)
		if err != nil && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, fmt.Errorf("mounting %s on %s: %w", m.fstype, m.dir, err))
		}
	}
	return errors.Join(errs...)
}

// KernelLog is a logger to the kernel's ring buffer, and so to every console.
func KernelLog() *slog.Logger {
	var w io.Writer = os.Stderr
	// Without this the kernel drops what one process writes too fast: the one who reads it is stuck with half a story.
	_ = os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on\n"), 0) // a kernel without the knob does not limit
	if f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		w = f
	}
	level := slog.LevelInfo
	if b, err := os.ReadFile("/proc/cmdline"); err == nil && slices.Contains(splitArgs(string(b)), "troupe.debug") {
		level = slog.LevelDebug
	}
	return slog.New(kmsg.NewHandler(w, "troupe", level))
}

// panicReboot is how long the kernel shows a panic before it reboots, in seconds: a crashed agent is one.
const panicReboot = "30\n"

// setPanic sets what the kernel does after a panic and returns what it was.
func setPanic(v string) string {
	const knob = "/proc/sys/kernel/panic"
	old, err := os.ReadFile(knob)
	if err != nil || os.WriteFile(knob, []byte(v), 0) != nil {
		return ""
	}
	return string(old)
}

// consoles are the terminals that the kernel writes to.
func consoles() []string {
	b, err := os.ReadFile("/sys/class/tty/console/active")
	if err != nil {
		return nil
	}
	var out []string
	for _, name := range splitArgs(string(b)) {
		out = append(out, filepath.Join("/dev", name))
	}
	return out
}

// syncLimit is how long the disks may take to write what is cached, before a reboot.
const syncLimit = 10 * time.Second

// errPatience says that a call has not come back.
var errPatience = errors.New("no end of it")

// bounded calls f and waits for it, but not longer than limit: f may hang in the kernel, as on a disk that does not
// answer, and then is left behind with its goroutine. This is for the way to a reboot, after which there is neither.
func bounded(limit time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return fmt.Errorf("%w within %v", errPatience, limit)
	}
}

// syncDisks writes all that is cached to the disks, as far as they take it in time.
func syncDisks() error {
	err := bounded(syncLimit, func() error {
		unix.Sync()
		return nil
	})
	if err != nil {
		return fmt.Errorf("writing to the disks: %w", err)
	}
	return nil
}

// forceReboot writes what is cached to the disks and boots the machine anew, also where a disk hangs: to end that may be
// what the reboot is for. The kernel's own way down waits for such a disk, too, and for an iSCSI target that is away it
// waits for ever; then it is left out. It returns only with an error.
func forceReboot() error {
	err := syncDisks()
	err = errors.Join(bounded(rebootLimit, func() error { return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) }), err)
	return errors.Join(os.WriteFile("/proc/sysrq-trigger", []byte("b"), 0), err)
}

// rebootLimit is how long the kernel may take for its way down.
const rebootLimit = 30 * time.Second

// awaitReboot reboots after a while; until then people can look, and use the shell on the console.
func awaitReboot(ctx context.Context, log *slog.Logger, after time.Duration) error {
	log.Error("the machine reboots; press Enter on the console for a shell before that", "in", after)
	if err := backoff.Sleep(ctx, after); err != nil {
		return err
	}
	return forceReboot()
}
