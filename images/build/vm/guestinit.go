package vm

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/u-root/u-root/pkg/mount"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/kmod"
)

// A place is something to mount.
type place struct{ kind, dir, options string }

// runInit is process 1 of the initramfs. With Boot it becomes the system's init.
func runInit() error {
	for _, p := range []place{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""}, {"tmpfs", "/run", "mode=0755"},
	} {
		if err := mountAt("", p); err != nil {
			return err
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := mountLayers(); err != nil {
		return err
	}
	o, err := readOrder()
	if err != nil {
		return err
	}
	if o.Network {
		if err := bringUp(); err != nil {
			return err
		}
	}
	if o.Boot {
		return bootSystem()
	}
	return runAlone(o)
}

func mountAt(root string, p place) error {
	dir := filepath.Join(root, p.dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(p.kind, dir, p.kind, 0, p.options); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", p.kind, dir, err)
	}
	return nil
}

func loadModules() error {
	mods, err := kmod.OpenRunning()
	if err != nil {
		return err
	}
	for _, name := range []string{"virtio_pci", "virtio_blk", "erofs", "overlay", "ext4", "virtio_net", "virtio_rng"} {
		if err := mods.Load(name); err != nil && !errors.Is(err, kmod.ErrNoModule) { // else it is built in
			return err
		}
	}
	return nil
}

// mountLayers mounts the base with a layer over it, after the layer got what it begins with.
func mountLayers() error {
	for _, name := range []string{baseDisk, orderDisk, layerDisk, resultDisk} {
		if err := awaitDevice(name); err != nil {
			return err
		}
	}
	for _, d := range []string{baseDir, layerDir, rootDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(baseDisk, baseDir, "erofs", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mounting the base: %w", err)
	}
	if err := unix.Mount(layerDisk, layerDir, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mounting the layer: %w", err)
	}
	upper := filepath.Join(layerDir, "upper")
	for _, d := range []string{upper, filepath.Join(layerDir, "work")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := takeOrder(upper); err != nil {
		return fmt.Errorf("reading what is to be done: %w", err)
	}
	options := "lowerdir=" + baseDir + ",upperdir=" + upper + ",workdir=" + layerDir + "/work,redirect_dir=off,metacopy=off,index=off,xino=off"
	if err := unix.Mount("overlay", rootDir, "overlay", 0, options); err != nil {
		return fmt.Errorf("mounting the overlay: %w", err)
	}
	return nil
}

// takeOrder reads the order's disk: what is to be done, and what the upper layer begins with.
func takeOrder(upper string) error {
	if err := likeBase(upper); err != nil {
		return err
	}
	f, err := os.Open(orderDisk)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // it was only read
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Name == orderName {
			err = writeFile(orderPath, r, 0o600)
		} else if name, ok := strings.CutPrefix(h.Name, UpperNames); ok {
			err = unpack(upper, name, h, r)
		}
		if err != nil {
			return err
		}
	}
}

// likeBase gives the root directory of the layer the attributes of the base's, which it would hide otherwise.
func likeBase(upper string) error {
	var st unix.Stat_t
	if err := unix.Stat(baseDir, &st); err != nil {
		return err
	}
	return errors.Join(os.Chown(upper, int(st.Uid), int(st.Gid)), unix.Chmod(upper, st.Mode&0o7777))
}

func writeFile(name string, r io.Reader, mode os.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

// unpack makes one file of the upper layer.
func unpack(upper, name string, h *tar.Header, r io.Reader) error {
	full := filepath.Join(upper, name)
	if h.Typeflag == tar.TypeLink {
		return os.Link(filepath.Join(upper, strings.TrimPrefix(h.Linkname, UpperNames)), full)
	}
	if err := makeNode(full, h, r); err != nil {
		return fmt.Errorf("making %q: %w", h.Name, err)
	}
	if err := os.Lchown(full, h.Uid, h.Gid); err != nil {
		return err
	}
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrRecord)
		if !ok {
			continue
		}
		if err := unix.Lsetxattr(full, name, []byte(v), 0); err != nil {
			return fmt.Errorf("setting %s of %q: %w", name, h.Name, err)
		}
	}
	if h.Typeflag == tar.TypeSymlink {
		return nil
	}
	if err := unix.Chmod(full, uint32(h.Mode)&0o7777); err != nil { //nolint:gosec // so many bits there are
		return err
	}
	return os.Chtimes(full, h.ModTime, h.ModTime)
}

// xattrRecord begins the names of PAX records that are extended attributes.
const xattrRecord = "SCHILY.xattr."

func makeNode(full string, h *tar.Header, r io.Reader) error {
	dev := int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))) //nolint:gosec // so many bits they have
	switch h.Typeflag {
	case tar.TypeDir:
		err := os.Mkdir(full, 0o700)
		if errors.Is(err, os.ErrExist) {
			err = nil
		}
		return err
	case tar.TypeSymlink:
		return os.Symlink(h.Linkname, full)
	case tar.TypeChar:
		return unix.Mknod(full, unix.S_IFCHR|0o600, dev)
	case tar.TypeBlock:
		return unix.Mknod(full, unix.S_IFBLK|0o600, dev)
	case tar.TypeFifo:
		return unix.Mkfifo(full, 0o600)
	}
	return writeFile(full, r, 0o600)
}

// runAlone runs the steps over the root file system, with nothing else there, and hands out what they made.
func runAlone(o order) error {
	for _, p := range []place{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"devpts", "/dev/pts", "mode=0620,gid=5,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"tmpfs", "/run", "mode=0755"},
		{"tmpfs", "/tmp", "mode=1777,size=75%"},
	} {
		if err := mountAt(rootDir, p); err != nil {
			return err
		}
	}
	if o.Network {
		if err := os.WriteFile(filepath.Join(rootDir, "etc/resolv.conf"), []byte(resolvConf), 0o644); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte("localhost")); err != nil {
		return err
	}
	killAll := func() { _ = unix.Kill(-1, unix.SIGKILL) } // nothing of a step goes on behind it; that there was nothing left is no error
	if err := runSteps(o, &syscall.SysProcAttr{Chroot: rootDir, Setsid: true}, killAll); err != nil {
		return err
	}
	if o.Output == "" {
		return handOut(filepath.Join(layerDir, "upper"))
	}
	return handOutput(o.Output)
}

// bootSystem leaves the initramfs for the system's own init, with the steps as a service of it.
func bootSystem() error {
	if err := plant(); err != nil {
		return fmt.Errorf("preparing the system: %w", err)
	}
	stdlog.SetOutput(io.Discard) // SwitchRoot tells its steps there
	return mount.SwitchRoot(rootDir, "/sbin/init")
}

// buildTarget is what systemd starts: the system up to multi-user.target, then the steps.
const buildTarget = "troupe-build.target"

// plant puts what the system needs of us into /run, which it keeps.
func plant() error {
	self, err := os.Open("/init")
	if err != nil {
		return err
	}
	defer func() { _ = self.Close() }() // it was only read
	units := "/run/systemd/system"
	for _, d := range []string{units, exitDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := writeFile(programFile, self, 0o755); err != nil {
		return err
	}
	if err := os.Link(programFile, exitDir+shutdownArg); err != nil {
		return err
	}
	for name, text := range map[string]string{
		buildTarget: "[Unit]\nDescription=The steps of a build\nRequires=multi-user.target\nWants=troupe-build.service\n" +
			"After=multi-user.target\nAllowIsolate=yes\n",
		// Of type exec: while it runs the system counts as started, and a step may wait for that.
		"troupe-build.service": "[Unit]\nDescription=The steps of a build\nAfter=multi-user.target\n" +
			"[Service]\nType=exec\nExecStart=" + programFile + " " + guestArg + "\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS0\n" +
			"Restart=no\nOOMScoreAdjust=-900\n",
	} {
		if err := os.WriteFile(filepath.Join(units, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
