package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// rtmin is SIGRTMIN as C programs have it. systemd as process 1 reboots in good order by SIGRTMIN+5: systemd(1), "Signals".
const rtmin = 34

// runService runs the steps as a service of the system in the machine, then has that end.
func runService() int {
	o, err := readOrder()
	if err == nil {
		err = runSteps(o, &syscall.SysProcAttr{Setsid: true}, func() {})
	}
	if err != nil {
		end(err) // as fast as can be: nobody wants what there is
		return 1
	}
	tell(event{Leave: true})
	if err := unix.Kill(1, syscall.Signal(rtmin+5)); err != nil {
		fail(fmt.Errorf("having the system end: %w", err))
		return 1
	}
	return 0
}

// runSteps runs the order's steps one after the other, with after behind each.
func runSteps(o order, attr *syscall.SysProcAttr, after func()) error {
	for i, step := range o.Steps {
		tell(event{Begin: &i})
		err := runStep(o, step, attr)
		after()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ProcessState != nil {
			return &ExitError{Step: i, Status: statusOf(exit.ProcessState)}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// statusOf is the exit status as a shell has it.
func statusOf(p *os.ProcessState) int {
	if ws, ok := p.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return p.ExitCode()
}

func runStep(o order, step string, attr *syscall.SysProcAttr) error {
	ctx, cancel := context.WithTimeout(context.Background(), o.Limit)
	defer cancel()
	console, err := os.OpenFile("/dev/ttyS0", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = console.Close() }() // drained by tell
	cmd := exec.CommandContext(ctx, "/bin/sh", "-ec", step)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = o.Env, o.Dir, console, console, attr
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	err = cmd.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("it took longer than %v", o.Limit.Round(time.Second))
	}
	return err
}

// Addresses of QEMU's user-mode network (its -netdev user).
const (
	ownAddress = "10.0.2.15/24"
	router     = "10.0.2.2"
	resolvConf = "nameserver 10.0.2.3\n"
)

// bringUp configures the one network interface that is not the loopback.
func bringUp() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("looking for the network interface: %w", err)
	}
	for _, l := range links {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("bringing %s up: %w", l.Attrs().Name, err)
		}
		if l.Attrs().EncapType != "ether" {
			continue
		}
		addr, err := netlink.ParseAddr(ownAddress)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("giving %s its address: %w", l.Attrs().Name, err)
		}
		via, err := netlink.ParseAddr(router + "/32")
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: via.IP}); err != nil {
			return fmt.Errorf("setting the default route: %w", err)
		}
	}
	return nil
}
