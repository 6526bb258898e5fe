package rescue

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/internal/kmod"
)

// A command is one that u-root has no package for.
type command struct {
	help string
	run  func(out io.Writer, args []string) error
}

func commands() map[string]command {
	return map[string]command{
		"dmesg":    {"what the kernel and the agent said", dmesg},
		"ip":       {"interfaces, addresses and routes", showNetwork},
		"lsblk":    {"disks, and what they hold", showDisks},
		"mount":    {"what is mounted; mount [-r] TYPE DEVICE DIR", mountCommand},
		"umount":   {"umount DIR", umount},
		"modprobe": {"modprobe MODULE ...", modprobe},
		"reboot":   {"boot the machine anew, at once", reboot(unix.LINUX_REBOOT_CMD_RESTART)},
		"poweroff": {"switch the machine off, at once", reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)},
	}
}

func dmesg(out io.Writer, _ []string) error {
	size, err := unix.Klogctl(10 /* SYSLOG_ACTION_SIZE_BUFFER */, nil)
	if err != nil {
		return err
	}
	buf := make([]byte, size)
	n, err := unix.Klogctl(3 /* SYSLOG_ACTION_READ_ALL */, buf)
	if err != nil {
		return err
	}
	_, err = out.Write(buf[:n])
	return err
}

func showNetwork(out io.Writer, _ []string) error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		a := l.Attrs()
		fmt.Fprintf(out, "%d: %s %s %s\n", a.Index, a.Name, a.HardwareAddr, a.OperState)
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, addr := range addrs {
			fmt.Fprintf(out, "    %s\n", addr.IPNet)
		}
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, r := range routes {
		line := "direct"
		if r.Gw != nil {
			line = "via " + r.Gw.String()
		}
		fmt.Fprintf(out, "%s %s interface %d\n", r.Dst, line, r.LinkIndex)
	}
	return nil
}

func showDisks(out io.Writer, _ []string) error {
	disks, err := disk.Scanner{}.Scan()
	for _, d := range disks {
		fmt.Fprintf(out, "%s %d MiB %s %s: %s\n", d.Name, d.Size>>20, d.Model, d.Serial, d.Holds)
		for _, p := range d.Parts {
			fmt.Fprintf(out, "    %d %q %d MiB %s\n", p.Number, p.Name, p.Size>>20, p.Path)
		}
	}
	return err
}

func mountCommand(out io.Writer, args []string) error {
	if len(args) == 0 {
		b, err := os.ReadFile("/proc/mounts")
		if err != nil {
			return err
		}
		_, err = out.Write(b)
		return err
	}
	var flags uintptr
	if args[0] == "-r" {
		flags, args = unix.MS_RDONLY, args[1:]
	}
	if len(args) != 3 {
		return errors.New("want [-r] TYPE DEVICE DIR")
	}
	return unix.Mount(args[1], args[2], args[0], flags, "")
}

func umount(_ io.Writer, args []string) error {
	if len(args) != 1 {
		return errors.New("want DIR")
	}
	return unix.Unmount(args[0], 0)
}

func modprobe(_ io.Writer, args []string) error {
	l, err := kmod.OpenRunning()
	if err != nil {
		return err
	}
	return l.LoadAll(args...)
}

func reboot(how int) func(io.Writer, []string) error {
	return func(_ io.Writer, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("takes no arguments: %s", strings.Join(args, " "))
		}
		unix.Sync()
		return unix.Reboot(how)
	}
}
