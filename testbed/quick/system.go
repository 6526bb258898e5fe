package quick

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/digest"
)

// kernelPackage is Debian's kernel for virtual machines.
const kernelPackage = "linux-image-cloud-amd64"

// A tools is what labs share in one run of a test program.
type tools struct {
	troupe, agent string // programs
	bin           string // directory with mmdebstrap, and the tree that it writes
}

// prepare builds the programs and the tree, once for all labs of a test program. They are kept in the user's cache, in a directory
// of this checkout's own: there Go builds only what changed, and a kernel is downloaded once.
var prepare = sync.OnceValues(func() (tools, error) {
	root, err := moduleRoot()
	if err != nil {
		return tools{}, err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return tools{}, err
	}
	dir := filepath.Join(cache, "troupe", "quick-"+digest.Of([]byte(root)).Short())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return tools{}, err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return tools{}, err
	}
	defer unlock()
	t := tools{troupe: filepath.Join(dir, "troupe"), agent: filepath.Join(dir, "troupe-agent"), bin: filepath.Join(dir, "bin")}
	if err := t.build(root); err != nil {
		return tools{}, err
	}
	kernel, err := unpackKernel(filepath.Join(cache, "troupe"))
	if err != nil {
		return tools{}, err
	}
	return t, t.plant(root, kernel)
})

// moduleRoot is the directory of go.mod, above that of the test.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d, nil
		}
		if d == "/" {
			return "", fmt.Errorf("no go.mod above %q", dir)
		}
	}
}

// lock waits until no other test program prepares in the same place.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %q: %w", path, err)
	}
	return func() { f.Close() }, nil
}

func command(dir, name string, args ...string) error {
	cmd := exec.Command(name, args...) //nolint:noctx // it is for all tests of the run
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

func (t tools) build(root string) error {
	return errors.Join(
		command(root, "go", "build", "-o", t.troupe, "./cmd/troupe"),
		command(root, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", t.agent, "./cmd/troupe-agent"),
		command(root, "go", "build", "-o", filepath.Join(t.bin, "mmdebstrap"), "./testbed/quick/mmdebstrap"),
	)
}

// wantModules are the kernel's modules that a machine of the lab may need, all that they depend on included. Few of them make a small
// initramfs, which is a second of each boot.
var wantModules = regexp.MustCompile(`/(virtio[a-z_]*|failover|net_failover|erofs|overlay|loop|ext4|jbd2|mbcache|crc16|crc32c_generic|crc32c-intel|` +
	`libcrc32c|dm-mod|dm-verity|dm-bufio|reed_solomon|sha256_generic|sha256-ssse3|crct10dif[a-z0-9_-]*|crc-t10dif|crc64[a-z0-9_-]*|t10-pi|squashfs|fat|vfat|nls_[a-z0-9_]+|` +
	`efivarfs|rng-core|virtio-rng|dax|softdog|i6300esb|watchdog|qemu_fw_cfg|scsi_mod|scsi_common|scsi_transport_iscsi|iscsi_tcp|` +
	`libiscsi|libiscsi_tcp|sd_mod|zstd[a-z_]*|xxhash|lz4[a-z_]*|netfs|fscache|cachefiles)\.ko(\.xz)?$`)

// unpackKernel downloads the kernel's package, and keeps what is in it in dir.
func unpackKernel(dir string) (string, error) {
	name, err := realPackage()
	if err != nil {
		return "", err
	}
	kernel := filepath.Join(dir, "quick-"+name)
	if _, err := os.Stat(kernel); err == nil {
		return kernel, nil
	}
	work, err := os.MkdirTemp(dir, "quick-kernel-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	if err := command(work, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", errors.Join(fmt.Errorf("downloading %s: got %d packages", name, len(debs)), err)
	}
	root := filepath.Join(work, "root")
	if err := command(work, "dpkg", "-x", debs[0], root); err != nil {
		return "", err
	}
	// Another checkout's test may have been faster; then this one's directory is not needed.
	if err := os.Rename(root, kernel); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return kernel, nil
}

// realPackage is the package with the kernel that kernelPackage stands for now.
func realPackage() (string, error) {
	out, err := exec.Command("apt-cache", "depends", kernelPackage).CombinedOutput() //nolint:noctx // it is for all tests of the run
	if err != nil {
		return "", fmt.Errorf("apt-cache depends %s: %w\n%s", kernelPackage, err, out)
	}
	m := regexp.MustCompile(`Depends: (linux-image-\S+)`).FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%s depends on no kernel:\n%s", kernelPackage, out)
	}
	return string(m[1]), nil
}

// hostPrograms are taken from this machine with their libraries: what the agent makes and mends its cache with, and a shell.
var hostPrograms = []string{"/sbin/mke2fs", "/sbin/e2fsck", "/bin/busybox"}

// plant makes the tree of the base.
func (t tools) plant(module, kernel string) error {
	tree := filepath.Join(t.bin, "root")
	if err := os.RemoveAll(tree); err != nil {
		return err
	}
	for _, d := range []string{
		"boot", "dev", "etc/systemd/system", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "usr/bin", "usr/sbin", "usr/lib64",
		"usr/lib/systemd/system/multi-user.target.wants", "usr/share/quick", "var/lib/dpkg", "var/log", "var/tmp",
	} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			return err
		}
	}
	for _, l := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+l, filepath.Join(tree, l)); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"etc/passwd":          "root:x:0:0:root:/root:/bin/sh\n",
		"etc/group":           "root:x:0:\n",
		"etc/os-release":      "ID=quick\nNAME=quick\n",
		"var/lib/dpkg/status": "",
	} {
		if err := os.WriteFile(filepath.Join(tree, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := command(module, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(tree, "usr/sbin/init"), "./testbed/quick/init"); err != nil {
		return err
	}
	if err := plantLinks(tree); err != nil {
		return err
	}
	for _, p := range hostPrograms {
		if err := plantProgram(tree, p); err != nil {
			return err
		}
	}
	return plantKernel(tree, kernel)
}

// plantLinks gives init and busybox their other names.
func plantLinks(tree string) error {
	links := map[string]string{"usr/bin/systemctl": "../sbin/init"}
	for _, name := range strings.Fields("sh cat cp dd df echo find grep head kill ls mkdir mount mv od ps rm sed sha256sum sleep stat sync tail test touch tr umount wc") {
		links["usr/bin/"+name] = "busybox"
	}
	for name, to := range links {
		if err := os.Symlink(to, filepath.Join(tree, name)); err != nil {
			return err
		}
	}
	return nil
}

// plantProgram copies a program with what it is linked with.
func plantProgram(tree, program string) error {
	files := []string{program}
	out, err := exec.Command("ldd", program).Output() //nolint:noctx // it is for all tests of the run
	if err == nil {                                   // else it is static
		for _, m := range regexp.MustCompile(`(/\S+) \(0x`).FindAllSubmatch(out, -1) {
			files = append(files, string(m[1]))
		}
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return fmt.Errorf("a machine's %s: %w", program, err)
		}
		to := strings.TrimPrefix(f, "/usr")
		to = filepath.Join(tree, "usr", to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(to, b, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// plantKernel copies the kernel and few of its modules.
func plantKernel(tree, kernel string) error {
	images, err := filepath.Glob(filepath.Join(kernel, "boot/vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return errors.Join(fmt.Errorf("%q has %d kernels", kernel, len(images)), err)
	}
	return filepath.WalkDir(kernel, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(kernel, path)
		if err != nil {
			return err
		}
		keep := path == images[0] || wantModules.MatchString(name) ||
			slices.Contains([]string{"modules.builtin", "modules.order", "modules.builtin.modinfo"}, filepath.Base(name))
		if !keep {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(name, "boot/") && !strings.HasPrefix(name, "usr/") {
			name = "usr/" + name
		}
		to := filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		return os.WriteFile(to, b, 0o644)
	})
}
