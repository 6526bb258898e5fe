// Package watchdog has the machine reset when its system hangs (Documentation/watchdog/watchdog-api.rst of the kernel).
//
//	initramfs   Arm: opens a device, sets a time that a slow boot survives, and closes it without the magic character, so that
//	            it goes on counting over the switch of root
//	service     Run: opens the same device, sets a short time, and pets it for as long as its context lasts
//	shutdown    it is left armed with a time in which a shutdown ends. The drivers stop it themselves when the kernel goes down
//	            (reboot notifier), so a machine that is halted stays so; a shutdown that hangs is reset
//	stop        whoever stops the service alone disarms it
//
// A device can be open once. systemd takes it where a role sets RuntimeWatchdogSec: it opens the device before the service
// does, which then leaves it alone. Then systemd pets it, and the machine is watched all the same.
package watchdog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// BootTime is how long a system may take from the switch of root to the agent's service.
	BootTime = 5 * time.Minute
	// RunTime is for how long nobody may have petted it while the system runs.
	RunTime = time.Minute
	// DownTime is how long a shutdown may take after all units were stopped: systemd gives the last processes 90 s.
	DownTime = 5 * time.Minute
)

// ErrNone says that the machine has no watchdog that can be used.
var ErrNone = errors.New("no watchdog can be used")

// Options of a driver (struct watchdog_info of linux/watchdog.h).
const (
	canSetTimeout = 0x80
	hasMagicClose = 0x100
)

// device is an open watchdog. The zero timeout is none.
type device interface {
	options() (uint32, error)
	setTimeout(time.Duration) error
	keepAlive() error
	disarm() error // closes it, and stops it
	leave() error  // closes it, and it goes on counting
}

// A Dog finds and holds the machine's watchdog.
type Dog struct {
	Dev  string // "" means /dev
	Sys  string // "" means /sys/class/watchdog
	Log  *slog.Logger
	open func(path string) (device, error) // openFile; another one in tests
}

func (d Dog) devices() []string {
	sys := d.Sys
	if sys == "" {
		sys = "/sys/class/watchdog"
	}
	entries, err := os.ReadDir(sys)
	if err != nil {
		return nil
	}
	var hard, soft []string
	for _, e := range entries {
		b, _ := os.ReadFile(filepath.Join(sys, e.Name(), "identity")) // a kernel that does not tell has its devices in order
		if strings.Contains(string(b), "Software Watchdog") {
			soft = append(soft, e.Name())
		} else {
			hard = append(hard, e.Name())
		}
	}
	return slices.Concat(hard, soft)
}

func (d Dog) openDevice(name string) (device, error) {
	if d.open != nil {
		return d.open(name)
	}
	dev := d.Dev
	if dev == "" {
		dev = "/dev"
	}
	return openFile(filepath.Join(dev, name))
}

// Arm starts a watchdog that resets the machine after limit, and returns its name for Run. Of the machine's own ones the
// first is taken that can count so long, and goes on when it is closed; where there is none, load is to bring the kernel's
// software watchdog, which resets a machine whose programs hang, but not one whose kernel does.
func (d Dog) Arm(limit time.Duration, load func() error) (string, error) {
	var errs []error
	tried := map[string]bool{}
	for range 2 {
		for _, name := range d.devices() {
			if tried[name] {
				continue
			}
			tried[name] = true
			if err := d.arm(name, limit); err != nil {
				errs = append(errs, fmt.Errorf("watchdog %s: %w", name, err))
				continue
			}
			return name, nil
		}
		if err := load(); err != nil {
			errs = append(errs, fmt.Errorf("loading the software watchdog: %w", err))
			break
		}
	}
	return "", errors.Join(append([]error{ErrNone}, errs...)...)
}

func (d Dog) arm(name string, limit time.Duration) error {
	dev, err := d.openDevice(name)
	if err != nil {
		return err
	}
	has, err := dev.options()
	if err == nil && has&(canSetTimeout|hasMagicClose) != canSetTimeout|hasMagicClose {
		err = errors.New("it has a time of its own, or stops when it is closed")
	}
	if err == nil {
		err = dev.setTimeout(limit)
	}
	if err == nil {
		err = dev.keepAlive()
	}
	if err != nil {
		return errors.Join(err, dev.disarm())
	}
	return dev.leave()
}

// Run pets the watchdog called name until ctx is done. goesDown is asked then whether the system shuts down.
func (d Dog) Run(ctx context.Context, name string, goesDown func() bool) error {
	dev, err := d.openDevice(name)
	if err != nil {
		return fmt.Errorf("watchdog %s: %w", name, err)
	}
	if err := dev.setTimeout(RunTime); err != nil {
		d.Log.Warn("the watchdog keeps the time of the boot", "name", name, "error", err)
	}
	tick := time.NewTicker(RunTime / 4)
	defer tick.Stop()
	for {
		if err := dev.keepAlive(); err != nil {
			return errors.Join(fmt.Errorf("watchdog %s: %w", name, err), dev.leave())
		}
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
		}
		if !goesDown() {
			return dev.disarm()
		}
		if err := errors.Join(dev.setTimeout(DownTime), dev.keepAlive()); err != nil {
			d.Log.Warn("the shutdown has the watchdog's time of before", "name", name, "error", err)
		}
		return dev.leave()
	}
}

// file is a device of the kernel.
type file struct{ *os.File }

func openFile(path string) (device, error) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	return file{f}, nil
}

func (f file) options() (uint32, error) {
	info, err := unix.IoctlGetWatchdogInfo(int(f.Fd()))
	if err != nil {
		return 0, fmt.Errorf("asking what it can: %w", err)
	}
	return info.Options, nil
}

func (f file) setTimeout(d time.Duration) error {
	secs := int(d / time.Second)
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.WDIOC_SETTIMEOUT, secs); err != nil {
		return fmt.Errorf("setting it to %v: %w", d, err)
	}
	return nil
}

func (f file) keepAlive() error {
	if err := unix.IoctlWatchdogKeepalive(int(f.Fd())); err != nil {
		return fmt.Errorf("petting it: %w", err)
	}
	return nil
}

// disarm writes the magic character, after which a driver stops when it is closed.
func (f file) disarm() error {
	_, err := f.WriteString("V")
	return errors.Join(err, f.Close())
}

func (f file) leave() error { return f.Close() }
