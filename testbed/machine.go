package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/qemu"
	"github.com/troupe-dev/troupe/testbed/qmp"
)

// Names in a machine's directory.
const (
	diskFile    = "disk.raw"
	varsFile    = "vars.fd"
	consoleFile = "console.log"
	consoleSock = "console.sock"
	qemuLog     = "qemu.log"
)

// quitGrace is how long QEMU may take for anything that it is asked to do.
const quitGrace = 10 * time.Second

// A machine is a node of the lab: a directory, and a QEMU process while it is on.
type machine struct {
	spec   Node
	dir    string
	tap    string
	accel  string
	server string // URL, for Direct machines
	log    *slog.Logger

	button sync.Mutex // held while somebody presses it: one thing is done at a time

	mu     sync.Mutex // guards what follows
	run    *run       // nil: off
	loader *loader    // of a Direct machine that is on; nil: off
	since  time.Time
	link   bool
	resets int
	reset  time.Time // the last one
	booted int64     // size of the console's file at power on
	err    string
}

// A run is a machine from power on to power off.
type run struct {
	cmd     *exec.Cmd
	monitor *qmp.Client
	asked   bool          // to end; guarded by the machine's mu
	again   bool          // QEMU ended since the machine was reset; guarded by the machine's mu
	ended   chan struct{} // closed when QEMU has ended, and the machine says so
}

func newMachine(spec Node, dir, tap, accel, server string, log *slog.Logger) (*machine, error) {
	m := &machine{spec: spec, dir: dir, tap: tap, accel: accel, server: server, link: true, log: log.With("node", spec.Name)}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := m.makeDisk(); err != nil {
		return nil, err
	}
	if spec.Firmware == UEFI {
		return m, m.makeVars()
	}
	return m, nil
}

// makeDisk makes a blank disk where there is none.
func (m *machine) makeDisk() error {
	if m.spec.Disk < 0 {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(m.dir, diskFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if os.IsExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(m.spec.Disk)
}

// makeVars gives the machine firmware settings of its own where it has none: UEFI writes to them.
func (m *machine) makeVars() error {
	path := filepath.Join(m.dir, varsFile)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	b, err := os.ReadFile(ovmfVars)
	if err != nil {
		return fmt.Errorf("UEFI firmware (Debian package ovmf): %w", err)
	}
	return os.WriteFile(path, b, 0o644)
}

// power does what a button does, and returns when it is done.
func (m *machine) power(ctx context.Context, action PowerAction) error {
	m.button.Lock()
	defer m.button.Unlock()
	var err error
	switch action {
	case On:
		err = m.on(ctx)
	case Off:
		err = m.off(ctx)
	case Cycle:
		if err = m.off(ctx); err == nil {
			err = m.on(ctx)
		}
	case Reset:
		err = m.monitor(ctx, "system_reset", nil)
	default:
		return fmt.Errorf("power %q: want %s, %s, %s or %s", action, On, Off, Reset, Cycle)
	}
	if err != nil {
		return fmt.Errorf("power %s node %q: %w", action, m.spec.Name, err)
	}
	return nil
}

// on starts QEMU and waits until it answers. The caller holds button.
func (m *machine) on(ctx context.Context) error {
	if m.isOn() {
		return nil
	}
	m.begins()
	if m.spec.Firmware == Direct {
		m.startLoader()
		return nil
	}
	_, err := m.start(ctx, qemuArgs(m.spec, m.tap, m.accel))
	return err
}

// begins notes that the power is on from now.
func (m *machine) begins() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.since, m.resets, m.reset, m.err, m.booted = time.Now(), 0, time.Time{}, "", m.consoleSize()
}

// start starts QEMU with args and waits until it answers.
func (m *machine) start(ctx context.Context, args []string) (*run, error) {
	out, err := os.Create(filepath.Join(m.dir, qemuLog))
	if err != nil {
		return nil, err
	}
	defer out.Close()
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd := exec.Command(qemu.Binary, args...) //nolint:noctx // it outlives the request: off ends it
	// Names of sockets must be short; so must those in qemuArgs.
	cmd.Dir, cmd.Stdout, cmd.Stderr = m.dir, out, out
	cmd.ExtraFiles = []*os.File{theirs} // descriptor 3: see qemuArgs
	if err := cmd.Start(); err != nil {
		ours.Close()
		return nil, fmt.Errorf("starting QEMU (Debian package qemu-system-x86): %w", err)
	}
	theirs.Close()
	r := &run{cmd: cmd, ended: make(chan struct{})}
	m.mu.Lock()
	m.run = r
	m.mu.Unlock()
	go m.wait(r)
	if err := m.begin(ctx, r, ours); err != nil {
		m.end(r)
		return nil, err
	}
	m.log.Info("power on")
	return r, nil
}

// begin lets a machine go that QEMU has made and holds.
func (m *machine) begin(ctx context.Context, r *run, monitor net.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, quitGrace)
	defer cancel()
	client, err := qmp.New(ctx, monitor, m.event)
	if err != nil {
		return m.explain(err)
	}
	m.mu.Lock()
	r.monitor = client
	link := m.link
	m.mu.Unlock()
	if !link {
		if err := client.Run(ctx, "set_link", linkArgs(false), nil); err != nil {
			return m.explain(err)
		}
	}
	if err := client.Run(ctx, "cont", nil, nil); err != nil {
		return m.explain(err)
	}
	return nil
}

// explain adds what QEMU itself said before it went.
func (m *machine) explain(err error) error {
	said, _ := tailFile(filepath.Join(m.dir, qemuLog), 5)
	if said == "" {
		return err
	}
	return fmt.Errorf("%w; QEMU said: %s", err, said)
}

// off ends QEMU, if it runs. The caller holds button.
func (m *machine) off(ctx context.Context) error {
	m.stopLoader()
	r := m.current()
	if r == nil {
		return nil
	}
	m.mu.Lock()
	r.asked = true
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, quitGrace)
	defer cancel()
	// QEMU may be gone before its answer is: what counts is that it ends.
	if err := r.monitor.Run(ctx, "quit", nil, nil); err != nil && !errors.Is(err, qmp.ErrClosed) {
		m.log.Warn("quit", "err", err)
	}
	select {
	case <-r.ended:
	case <-ctx.Done():
		m.log.Warn("QEMU does not quit and is killed")
		m.end(r)
	}
	m.log.Info("power off")
	return nil
}

// end kills QEMU and waits for that.
func (m *machine) end(r *run) {
	m.mu.Lock()
	r.asked = true
	m.mu.Unlock()
	_ = r.cmd.Process.Kill() // an error says that it has ended
	<-r.ended
}

// wait notes the end of QEMU: by off, by the guest itself, or by a failure.
func (m *machine) wait(r *run) {
	err := r.cmd.Wait()
	m.mu.Lock()
	monitor := r.monitor
	m.mu.Unlock()
	if monitor != nil {
		<-monitor.Done() // it has said all that it had to say
	}
	m.mu.Lock()
	m.run = nil
	if m.loader == nil {
		m.since = time.Now()
	}
	if err != nil && !r.asked {
		m.err = m.explain(err).Error()
	}
	m.mu.Unlock()
	if monitor != nil {
		monitor.Close()
	}
	m.log.Info("QEMU ended", "err", err)
	close(r.ended)
}

func (m *machine) current() *run {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.run
}

func (m *machine) isOn() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.run != nil || m.loader != nil
}

// monitor runs a QMP command on a machine that is on.
func (m *machine) monitor(ctx context.Context, command string, args any) error {
	r := m.current()
	if r == nil {
		return errors.New("it is off")
	}
	ctx, cancel := context.WithTimeout(ctx, quitGrace)
	defer cancel()
	return r.monitor.Run(ctx, command, args, nil)
}

func linkArgs(up bool) any { return map[string]any{"name": netdevID, "up": up} }

// setLink plugs or pulls the cable of the machine, which may be off.
func (m *machine) setLink(ctx context.Context, up bool) error {
	m.button.Lock()
	defer m.button.Unlock()
	m.mu.Lock()
	m.link = up
	m.mu.Unlock()
	if m.current() == nil {
		return nil
	}
	if err := m.monitor(ctx, "set_link", linkArgs(up)); err != nil {
		return fmt.Errorf("link of node %q: %w", m.spec.Name, err)
	}
	m.log.Info("link", "up", up)
	return nil
}

// event takes what QEMU says by itself. It is called by the monitor's reader.
func (m *machine) event(e qmp.Event) {
	if e.Name == "SHUTDOWN" {
		m.shutdown(e)
		return
	}
	if e.Name != "RESET" {
		return
	}
	var data struct{ Guest bool }
	if err := json.Unmarshal(e.Data, &data); err != nil {
		m.log.Warn("event RESET", "err", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.countReset(e.Time) {
		m.log.Info("reset", "by_guest", data.Guest)
	}
}

// resetBurst is how long after a reset another one belongs to it: a PC that reboots under BIOS is reset by several means,
// one after the other, and is back in the firmware only after the last.
const resetBurst = 2 * time.Second

// countReset says whether a reset at the time now is one of its own. The caller holds mu.
func (m *machine) countReset(now time.Time) bool {
	own := m.reset.IsZero() || now.Sub(m.reset) > resetBurst
	m.reset = now
	if own {
		m.resets++
	}
	return own
}

func (m *machine) consoleSize() int64 {
	info, err := os.Stat(filepath.Join(m.dir, consoleFile))
	if err != nil {
		return 0 // no output yet
	}
	return info.Size()
}

func (m *machine) status(now time.Time) NodeStatus {
	size := m.consoleSize()
	m.mu.Lock()
	defer m.mu.Unlock()
	on := m.run != nil || m.loader != nil
	return NodeStatus{
		Node: m.spec, On: on, Since: m.since, Link: m.link, Resets: m.resets, Console: size, Booted: m.booted,
		Silent: on && size <= m.booted && now.Sub(m.since) > SilentAfter, Error: m.err,
	}
}

// socketPair is a stream between this process and one that it starts.
func socketPair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "monitor")
	near := os.NewFile(uintptr(fds[0]), "monitor")
	defer near.Close()
	ours, err = net.FileConn(near)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	return ours, theirs, nil
}
