// Command init is what the tests boot as /init: it looks at what Modules brought, as the agent would use it, says so on
// the console, and powers the machine off.
package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Printf("INIT-ERROR: %v\n", err)
	} else {
		fmt.Println("INIT-OK")
	}
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Printf("INIT-ERROR: powering off: %v\n", err)
	}
	select {}
}

func run() error {
	for _, m := range []struct{ dev, dir, kind string }{
		{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"}, {"tmpfs", "/tmp", "tmpfs"},
	} {
		if err := unix.Mount(m.dev, m.dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m.dir, err)
		}
	}
	for _, name := range []string{"virtio_net", "virtio_blk", "virtio_pci", "erofs", "overlay", "ext4", "loop", "vfat"} {
		if err := load(name); err != nil {
			return err
		}
	}
	if nics, err := filepath.Glob("/sys/class/net/*/device/driver"); err != nil || len(nics) == 0 {
		return fmt.Errorf("no network interface has a driver (%v)", err)
	}
	if err := format(); err != nil {
		return err
	}
	return overlay()
}

// format makes a file system on the disk with the tools of the archive, and mounts it.
func format() error {
	for _, argv := range [][]string{
		{"/sbin/mke2fs", "-q", "-t", "ext4", "-L", "test", "/dev/vda"},
		{"/usr/sbin/e2fsck", "-f", "-n", "/dev/vda"},
	} {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%v: %w: %s", argv, err, out)
		}
	}
	return unix.Mount("/dev/vda", "/mnt", "ext4", 0, "")
}

// overlay mounts one directory over another, as the agent makes a node's root.
func overlay() error {
	for _, d := range []string{"/tmp/low", "/mnt/up", "/mnt/work", "/tmp/root"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile("/tmp/low/file", []byte("low"), 0o644); err != nil {
		return err
	}
	if err := unix.Mount("overlay", "/tmp/root", "overlay", 0, "lowerdir=/tmp/low,upperdir=/mnt/up,workdir=/mnt/work"); err != nil {
		return fmt.Errorf("mounting overlay: %w", err)
	}
	if _, err := os.Stat("/tmp/root/file"); err != nil {
		return err
	}
	unix.Sync()
	return nil
}

// load loads a module after what modules.dep names, unless it is built in.
func load(name string) error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	dir := "/lib/modules/" + unix.ByteSliceToString(uts.Release[:])
	line, err := find(dir+"/modules.dep", name)
	if err != nil {
		return err
	}
	if line == "" {
		line, err = find(dir+"/modules.builtin", name)
		if err == nil && line == "" {
			err = fmt.Errorf("%s is neither a module nor built in", name)
		}
		return err
	}
	self, deps, _ := strings.Cut(line, ":")
	files := append([]string{self}, strings.Fields(deps)...)
	for i := len(files) - 1; i >= 0; i-- {
		if err := insert(dir + "/" + files[i]); err != nil {
			return fmt.Errorf("loading %s for %s: %w", files[i], name, err)
		}
	}
	return nil
}

func find(file, name string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		p, _, _ := strings.Cut(s.Text(), ":")
		if strings.ReplaceAll(strings.TrimSuffix(filepath.Base(p), ".ko"), "-", "_") == name {
			return s.Text(), nil
		}
	}
	return "", s.Err()
}

func insert(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}
