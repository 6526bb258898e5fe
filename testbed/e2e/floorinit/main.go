// Command floorinit is the shortest init of an initramfs that gets from two disks with EROFS images (vda: the base, vdb: the
// role delta) to the system on them: what a boot takes that knows all beforehand and asks nobody. The benchmark of a role
// switch holds troupe against it. It is told apart on the console by its two lines, "floor: starts" and "floor: leaves".
package main

import (
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"os"
	"path/filepath"
	"time"

	"github.com/u-root/u-root/pkg/mount"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/kmod"
)

const root = "/mnt"

func main() {
	if err := boot(); err != nil {
		say("fails: " + err.Error()) // then PID 1 ends, and the kernel with it
	}
}

func boot() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m[1], err)
		}
	}
	say("starts")
	mods, err := kmod.OpenRunning()
	if err != nil {
		return err
	}
	for _, name := range []string{"virtio_pci", "virtio_blk", "erofs", "overlay"} {
		if err := mods.Load(name); err != nil && !errors.Is(err, kmod.ErrNoModule) { // else it is built in
			return err
		}
	}
	for disk, dir := range map[string]string{"vda": "/run/floor/base", "vdb": "/run/floor/delta"} {
		if err := mountImage("/dev/"+disk, dir); err != nil {
			return err
		}
	}
	if err := mountRoot(); err != nil {
		return err
	}
	say("leaves")
	stdlog.SetOutput(io.Discard) // SwitchRoot tells its steps there
	return mount.SwitchRoot(root, "/sbin/init")
}

// mountImage waits for the disk, which shows soon after its driver was loaded.
func mountImage(disk, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); ; <-tick.C {
		err := unix.Mount(disk, dir, "erofs", unix.MS_RDONLY, "")
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.ENOENT) || time.Since(began) > 10*time.Second {
			return fmt.Errorf("mounting %s: %w", disk, err)
		}
	}
}

// mountRoot joins the images under an upper layer in memory, with what the agent would have seeded: without a machine ID
// systemd would take the boot for the first one of all, and do more.
func mountRoot() error {
	const rw = "/run/floor/rw"
	for name, content := range map[string]string{
		"etc/machine-id":     "0123456789abcdef0123456789abcdef\n",
		"etc/hostname":       "floor\n",
		"srv/www/index.html": "floor\n",
	} {
		name = filepath.Join(rw, "upper", name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(rw, "work"), 0o755); err != nil {
		return err
	}
	opts := "lowerdir=/run/floor/delta:/run/floor/base,upperdir=" + rw + "/upper,workdir=" + rw + "/work"
	if err := unix.Mount("floor", root, "overlay", 0, opts); err != nil {
		return fmt.Errorf("mounting the overlay: %w", err)
	}
	return nil
}

// say writes a line to the console, by the kernel's log.
func say(what string) {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return // nobody can hear it
	}
	defer f.Close()
	fmt.Fprintf(f, "<6>floor: %s\n", what)
}
