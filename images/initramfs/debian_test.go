package initramfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images/initramfs"
)

// These tests use Debian's own packages, downloaded and unpacked, not installed: kernels, e2fsprogs and its libraries.

// The kernels of Debian: for virtual machines, and for all.
const (
	cloud   = "linux-image-cloud-amd64"
	generic = "linux-image-amd64"
)

var toolPackages = []string{"e2fsprogs", "libext2fs2", "libcom-err2", "libblkid1", "libuuid1", "libc6"}

// A debianRoot is a root file system of a kernel and the tools, and what Modules makes of it.
type debianRoot struct {
	dir  string
	kver string
	img  []byte
	sum  initramfs.Summary
}

func (r debianRoot) fs() fs.FS      { return os.DirFS(r.dir) }
func (r debianRoot) kernel() string { return filepath.Join(r.dir, "boot", "vmlinuz-"+r.kver) }

// roots are made once for all tests, below scratch.
var (
	scratch string
	roots   = map[string]func() (debianRoot, error){
		cloud:   sync.OnceValues(func() (debianRoot, error) { return unpack(cloud) }),
		generic: sync.OnceValues(func() (debianRoot, error) { return unpack(generic) }),
	}
)

func TestMain(m *testing.M) {
	var err error
	scratch, err = os.MkdirTemp("", "initramfs-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := os.RemoveAll(scratch); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func debian(t testing.TB, meta string) debianRoot {
	t.Helper()
	r, err := roots[meta]()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func unpack(meta string) (debianRoot, error) {
	kernel, err := realPackage(meta)
	if err != nil {
		return debianRoot{}, err
	}
	debs, root := filepath.Join(scratch, meta+".debs"), filepath.Join(scratch, meta)
	if err := os.Mkdir(debs, 0o755); err != nil {
		return debianRoot{}, err
	}
	if _, err := command(debs, "apt-get", append([]string{"-q", "download", kernel}, toolPackages...)...); err != nil {
		return debianRoot{}, err
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return debianRoot{}, err
	}
	for _, f := range files {
		if _, err := command(debs, "dpkg", "-x", f, root); err != nil {
			return debianRoot{}, err
		}
	}
	r := debianRoot{dir: root, kver: strings.TrimPrefix(kernel, "linux-image-")}
	r.img, r.sum, err = modules(r.fs(), r.kver)
	return r, errors.Join(err, os.RemoveAll(debs))
}

// realPackage is the package with the kernel that a package of packages stands for now.
func realPackage(meta string) (string, error) {
	out, err := command(".", "apt-cache", "depends", meta)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if _, p, ok := strings.Cut(line, "Depends: linux-image-"); ok {
			return "linux-image-" + strings.TrimSpace(p), nil
		}
	}
	return "", fmt.Errorf("%s depends on no kernel:\n%s", meta, out)
}

func command(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %v: %w\n%s", name, args, err, out)
	}
	return string(out), nil
}

func modules(root fs.FS, kver string) ([]byte, initramfs.Summary, error) {
	var b bytes.Buffer
	sum, err := initramfs.Modules(&b, root, kver)
	return b.Bytes(), sum, err
}

func TestModulesOfDebian(t *testing.T) {
	common := []string{
		"virtio_net", "virtio_blk", "virtio_scsi", "sd_mod", "erofs", "overlay", "loop", "dm_verity", "vfat", "iscsi_tcp",
		"8021q", "bonding",
	}
	for meta, want := range map[string][]string{
		cloud:   slices.Concat(common, []string{"ena", "gve", "hv_netvsc", "mana"}),
		generic: slices.Concat(common, []string{"ahci", "nvme", "e1000e", "igb", "r8169", "tg3", "usb_storage", "usbhid", "xhci_pci", "i6300esb", "megaraid_sas", "crc32c_generic"}),
	} {
		t.Run(meta, func(t *testing.T) {
			r := debian(t, meta)
			t.Logf("%s: %d modules, %d bytes, %d unpacked, %d kinds of firmware not there", r.kver, len(r.sum.Modules), len(r.img),
				r.sum.Unpacked, len(r.sum.NoFirmware))
			for _, m := range want {
				if !slices.Contains(r.sum.Modules, m) {
					t.Errorf("module %s was not taken", m)
				}
			}
			checkContent(t, r)
		})
	}
}

// The budget: agent and modules under 16 MB for Debian's cloud kernel. The agent has 4 of them.
func TestModulesFitTheBudget(t *testing.T) {
	img, sum := debian(t, cloud).img, debian(t, cloud).sum
	if len(img) > 12<<20 {
		t.Errorf("the modules of %s take %d bytes, want at most 12 MiB", cloud, len(img))
	}
	if sum.Unpacked > 64<<20 {
		t.Errorf("they unpack to %d bytes, too much for a machine of 512 MiB", sum.Unpacked)
	}
}

// checkContent holds the archive against the root that it came from, and against depmod.
func checkContent(t *testing.T, r debianRoot) {
	t.Helper()
	files := list(t, r.img)
	moddir := "usr/lib/modules/" + r.kver + "/"
	dep := parseDep(string(files[moddir+"modules.dep"].Data))
	want := depmod(t, r)
	for rel, deps := range dep {
		if _, ok := files[moddir+rel]; !ok {
			t.Errorf("modules.dep speaks of %q, which is not in the archive", rel)
		}
		for _, d := range deps {
			if _, ok := dep[d]; !ok {
				t.Errorf("%s depends on %s, which is not in modules.dep", rel, d)
			}
		}
		for _, d := range want[rel] {
			if !slices.Contains(deps, d) {
				t.Errorf("%s depends on %s for depmod, but not here", rel, d)
			}
		}
		checkOrder(t, rel, deps, dep)
	}
	for name, f := range files {
		rel, ok := strings.CutPrefix(name, moddir)
		if ok && path.Ext(rel) == ".ko" {
			if _, ok := dep[rel]; !ok {
				t.Errorf("%s is not in modules.dep", rel)
			}
			b, err := os.ReadFile(filepath.Join(r.dir, "lib/modules", r.kver, rel))
			if err != nil || !bytes.Equal(b, f.Data) {
				t.Errorf("%s is not what the package has (%v)", rel, err)
			}
		}
	}
}

// checkOrder wants each module of a line to come before, from the right, those that depend on it.
func checkOrder(t *testing.T, rel string, deps []string, dep map[string][]string) {
	t.Helper()
	for i, d := range deps {
		for _, dd := range dep[d] {
			if !slices.Contains(deps[i+1:], dd) {
				t.Errorf("modules.dep, line of %s: %s would be loaded before %s", rel, d, dd)
			}
		}
	}
}

func depmod(t *testing.T, r debianRoot) map[string][]string {
	t.Helper()
	out, err := command(r.dir, "depmod", "-b", r.dir, "-n", r.kver)
	if err != nil {
		t.Fatal(err)
	}
	dep, _, _ := strings.Cut(out, "# Aliases")
	m := parseDep(dep)
	if len(m) == 0 {
		t.Fatalf("depmod printed no dependencies: %.200s", out)
	}
	return m
}

func parseDep(s string) map[string][]string {
	m := make(map[string][]string)
	for line := range strings.Lines(s) {
		if rel, deps, ok := strings.Cut(line, ":"); ok && strings.HasPrefix(line, "kernel/") {
			m[rel] = strings.Fields(deps)
		}
	}
	return m
}

func list(t testing.TB, img []byte) map[string]initramfs.File {
	t.Helper()
	files, err := initramfs.List(bytes.NewReader(img))
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]initramfs.File)
	for _, f := range files {
		if _, ok := m[f.Name]; ok {
			t.Errorf("%s is twice in the archive", f.Name)
		}
		m[f.Name] = f
	}
	return m
}

// The aliases by which a loader finds a driver for a device are those that depmod would write.
func TestAliasesAreDepmods(t *testing.T) {
	r := debian(t, cloud)
	got := strings.Split(strings.TrimSpace(string(list(t, r.img)["usr/lib/modules/"+r.kver+"/modules.alias"].Data)), "\n")
	out, err := command(r.dir, "depmod", "-b", r.dir, "-n", r.kver)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "alias" && slices.Contains(r.sum.Modules, f[2]) && !strings.HasPrefix(f[1], "symbol:") {
			want = append(want, strings.TrimSpace(line))
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if d := cmp.Diff(slices.Compact(want), slices.Compact(got)); d != "" {
		t.Errorf("modules.alias (-depmod +ours):\n%s", d)
	}
}

// A node's kernel takes both archives, one after the other, and what is in them works: modules load in the order of
// modules.dep, mke2fs and e2fsck find their libraries, a root can be mounted.
func TestBoots(t *testing.T) {
	agent := filepath.Join(t.TempDir(), "init")
	build := exec.Command("go", "build", "-trimpath", "-o", agent, "./testdata/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the init of the test: %v\n%s", err, out)
	}
	prog, err := os.ReadFile(agent)
	if err != nil {
		t.Fatal(err)
	}
	var first bytes.Buffer
	if err := initramfs.Agent(&first, bytes.NewReader(prog), ""); err != nil {
		t.Fatal(err)
	}
	for _, meta := range []string{cloud, generic} {
		t.Run(meta, func(t *testing.T) {
			r := debian(t, meta)
			// Boot loaders pad between files (iPXE to 4 bytes), and the kernel must not mind.
			initrd := slices.Concat(first.Bytes(), make([]byte, -first.Len()&3), r.img)
			boot(t, r.kernel(), initrd)
		})
	}
}

func boot(t *testing.T, kernel string, initrd []byte) {
	t.Helper()
	dir := t.TempDir()
	img, disk := filepath.Join(dir, "initrd"), filepath.Join(dir, "disk")
	if err := os.WriteFile(img, initrd, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(disk, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 64<<20); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-m", "512", "-nographic", "-no-reboot",
		"-nodefaults", "-serial", "stdio", "-kernel", kernel, "-initrd", img, "-append", "console=ttyS0 panic=-1 loglevel=4",
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=",
		"-drive", "if=none,id=d,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=d")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "INIT-OK") {
		t.Fatalf("the machine did not do what it should (%v, %v); its console:\n%s", err, ctx.Err(), out)
	}
}

func BenchmarkModules(b *testing.B) {
	for _, meta := range []string{cloud, generic} {
		b.Run(meta, func(b *testing.B) {
			r := debian(b, meta)
			for b.Loop() {
				var n counter
				sum, err := initramfs.Modules(&n, r.fs(), r.kver)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(n)/1e6, "MB")
				b.ReportMetric(float64(sum.Unpacked)/1e6, "MB-unpacked")
				b.ReportMetric(float64(len(sum.Modules)), "modules")
			}
		})
	}
}

// A counter counts what is written to it.
type counter int64

var _ io.Writer = (*counter)(nil)

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// In a build, the root file system is the image that was just made of it: its links work like a directory's, and the same
// content gives the same bytes.
func TestRootMayBeAnImage(t *testing.T) {
	r := debian(t, cloud)
	img := filepath.Join(t.TempDir(), "root.erofs")
	if _, err := command(".", "mkfs.erofs", "--quiet", img, r.dir); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	root, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	got, sum, err := modules(root, r.kver)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(r.sum, sum); d != "" {
		t.Errorf("summary (-of the directory +of the image):\n%s", d)
	}
	if !bytes.Equal(got, r.img) {
		t.Errorf("the image gave %d bytes, other ones than the %d of the directory", len(got), len(r.img))
	}
}
