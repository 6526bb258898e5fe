package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/qemu"
)

// grace is what a step's limit is exceeded by before the machine itself is ended: it ends its steps by its own clock, and tells which.
const grace = time.Minute

// epoch is the time at the start of a machine without a network: not before the newest time of a file in an image, so that whatever
// is made in it counts as new.
const epoch = "2026-01-01T00:00:00"

// args are QEMU's arguments. Descriptor 3 is the console, 4 takes the events.
func (h *Host) args(j Job, accel string) []string {
	file := func(name string) string { return strings.ReplaceAll(name, ",", ",,") }
	disk := func(id, name, more string) []string {
		return []string{
			"-drive", "if=none,id=" + id + ",format=raw,cache=unsafe,file=" + file(name) + more,
			"-device", "virtio-blk-pci,drive=" + id,
		}
	}
	clock := "base=" + epoch + ",clock=vm"
	if j.Network {
		clock = "base=utc" // certificates are of today
	}
	memory := j.Memory
	if memory == 0 {
		memory = 1024
	}
	args := []string{
		"-no-user-config", "-nodefaults", "-no-reboot", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "q35,vmport=off,usb=off,smbus=off,sata=off",
		// The same processor with KVM and without.
		"-accel", accel, "-cpu", "qemu64", "-smp", strconv.Itoa(h.cpus), "-m", strconv.Itoa(memory), "-rtc", clock,
		"-chardev", "socket,id=console,fd=3", "-serial", "chardev:console",
		"-chardev", "socket,id=events,fd=4", "-serial", "chardev:events",
		"-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng",
		"-kernel", j.Kernel, "-initrd", filepath.Join(j.Scratch, initrdFile), "-append", cmdline(j),
	}
	args = append(args, disk("base", j.Base, ",readonly=on")...)
	args = append(args, disk("order", filepath.Join(j.Scratch, orderFile), ",readonly=on")...)
	args = append(args, disk("layer", filepath.Join(j.Scratch, layerFile), ",discard=unmap")...)
	args = append(args, disk("result", filepath.Join(j.Scratch, resultFile), "")...)
	if j.Network {
		args = append(args, "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
	}
	return args
}

// cmdline is what the kernel is told, and systemd through it.
func cmdline(j Job) string {
	words := []string{"console=ttyS0", "quiet", "loglevel=3", "panic=-1", "rw"}
	if j.Boot {
		words = append(words,
			"systemd.unit="+buildTarget,
			// Not the first boot, nor one after an update: neither would leave the same in every build.
			"systemd.machine_id="+strings.Repeat("74726f7570650001", 2), "systemd.firstboot=no",
			"systemd.condition-first-boot=no", "systemd.condition-needs-update=no",
			"systemd.getty_auto=no", "systemd.show_status=auto", "systemd.log_color=no", "systemd.hostname=localhost",
		)
	}
	return strings.Join(append(words, "--", guestArg), " ")
}

// runMachine runs QEMU to its end and gives the length of the result.
func (h *Host) runMachine(ctx context.Context, j Job) (int64, error) {
	accel, _ := qemu.ProbeAccel(ctx)
	console, consoleEnd, err := socketPair()
	if err != nil {
		return 0, err
	}
	defer unix.Close(console) // it was only read
	events, eventsEnd, err := socketPair()
	if err != nil {
		return 0, errors.Join(err, consoleEnd.Close())
	}
	defer unix.Close(events)                              // it was only read
	cmd := exec.Command(qemu.Binary, h.args(j, accel)...) //nolint:noctx // ended by its process group below
	var said bytes.Buffer
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = []*os.File{consoleEnd, eventsEnd}, &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// The parent of which Pdeathsig speaks is the thread, so the thread must stay until the machine is gone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	_, _ = consoleEnd.Close(), eventsEnd.Close() // QEMU has its own
	if err != nil {
		return 0, fmt.Errorf("starting %s: %w", cmd.Path, err)
	}
	kill := func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	defer context.AfterFunc(ctx, kill)()
	w := &watcher{job: j, console: console, events: events}
	limit := j.Limit
	if limit == 0 {
		limit = DefaultLimit
	}
	w.limit = limit + grace
	w.timer = time.AfterFunc(w.limit, kill)
	werr := w.watch()
	late := !w.timer.Stop()
	if werr != nil {
		kill()
	}
	exit := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	case werr != nil:
		return 0, werr
	case w.failure != nil:
		return 0, w.failure
	case late:
		return 0, fmt.Errorf("the machine did nothing to be seen for %v: it was ended", w.limit)
	case w.done == nil && exit != nil:
		return 0, fmt.Errorf("running %s: %w: %s", qemu.Binary, exit, bytes.TrimSpace(said.Bytes()))
	case w.done == nil:
		return 0, ErrEnded
	case *w.done < 0 || *w.done > resultSize:
		return 0, fmt.Errorf("the machine says that its result has %d bytes", *w.done)
	}
	return *w.done, nil
}

// socketPair is a connection: a descriptor that does not block, and a file for a child.
func socketPair() (int, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("connecting with the machine: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return 0, nil, errors.Join(err, unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return fds[0], os.NewFile(uintptr(fds[1]), "machine"), nil
}

// A watcher reads what a machine says, until that is gone. One goroutine reads both: what was said on the console before an event is
// passed on before it.
type watcher struct {
	job             Job
	console, events int
	limit           time.Duration
	timer           *time.Timer // ends the machine

	line    []byte // of the events, so far
	failure error
	done    *int64
}

func (w *watcher) watch() error {
	fds := []unix.PollFd{{Fd: int32(w.console), Events: unix.POLLIN}, {Fd: int32(w.events), Events: unix.POLLIN}} //nolint:gosec // descriptors are small
	for open := 2; open > 0; {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("listening to the machine: %w", err)
		}
		for i, take := range []func([]byte) error{w.takeConsole, w.takeEvents} {
			if fds[i].Fd < 0 {
				continue
			}
			end, err := drain(int(fds[i].Fd), take)
			if err != nil {
				return err
			}
			if end {
				fds[i].Fd = -1 // which Poll skips
				open--
			}
		}
	}
	return nil
}

// drain takes all that there is to read now, and says whether it was the last.
func drain(fd int, take func([]byte) error) (end bool, err error) {
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return false, nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECONNRESET) || n == 0 && err == nil:
			return true, nil
		case err != nil:
			return true, fmt.Errorf("reading from the machine: %w", err)
		}
		if err := take(buf[:n]); err != nil {
			return true, err
		}
	}
}

func (w *watcher) takeConsole(p []byte) error {
	if w.job.Console == nil || w.failure != nil || w.done != nil { // that a kernel says good-bye is of no interest
		return nil //nolint:nilerr // the failure is told when the machine is gone
	}
	_, err := w.job.Console.Write(p)
	return err
}

// maxEvent bounds a line of an event, in bytes.
const maxEvent = 64 << 10

func (w *watcher) takeEvents(p []byte) error {
	w.line = append(w.line, p...)
	for {
		line, rest, ok := bytes.Cut(w.line, []byte("\n"))
		if !ok {
			break
		}
		w.line = rest
		if err := w.take(line); err != nil {
			return err
		}
	}
	if len(w.line) > maxEvent {
		return fmt.Errorf("the machine tells of an event in more than %d bytes", maxEvent)
	}
	return nil
}

// take takes one event. What is none is passed by: a step may write to any device of its machine.
func (w *watcher) take(line []byte) error {
	var e event
	if json.Unmarshal(line, &e) != nil {
		return nil //nolint:nilerr // what is none is passed by
	}
	w.timer.Reset(w.limit)
	// The console is on another wire; what was said there before is there already.
	if _, err := drain(w.console, w.takeConsole); err != nil {
		return err
	}
	switch {
	case e.Begin != nil && *e.Begin >= 0 && *e.Begin < len(w.job.Steps):
		if w.job.Step != nil {
			w.job.Step(*e.Begin)
		}
	case e.Ended != nil:
		w.failure = &ExitError{Step: e.Ended.Step, Status: e.Ended.Status}
	case e.Failed != "":
		w.failure = errors.New(e.Failed)
	case e.Done != nil:
		w.done = e.Done
	}
	return nil
}
