package build

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/initramfs"
	"github.com/troupe-dev/troupe/images/store"
)

// firstFleet is the recipe of an OS base as a small fleet has it.
func firstFleet() images.BaseRecipe {
	return images.BaseRecipe{
		Suite:      "bookworm",
		Mirror:     "http://deb.debian.org/debian",
		Components: []string{"main"},
		Arch:       "amd64",
		Packages:   []string{"busybox-static", "iproute2", "systemd-sysv", "udev"},
		Kernel:     "linux-image-cloud-amd64",
	}
}

// debian is the base of firstFleet, made by real tools from the real archive once for all tests.
var debian struct {
	once sync.Once
	dir  string
	b    *Builder
	base images.Base
	rec  recorder
	err  error
}

func TestMain(m *testing.M) {
	status := m.Run()
	if debian.b != nil {
		if err := errors.Join(debian.b.Store.Close(), os.RemoveAll(debian.dir)); err != nil && status == 0 {
			os.Stderr.WriteString(err.Error() + "\n")
			status = 1
		}
	}
	os.Exit(status)
}

func debianBase(t *testing.T) (*Builder, images.Base) {
	t.Helper()
	debian.once.Do(func() { debian.err = buildDebian() })
	if debian.err != nil {
		t.Fatalf("building the base that this test needs: %v\n%s", debian.err, debian.rec.output.String())
	}
	return debian.b, debian.base
}

func buildDebian() (err error) {
	if debian.dir, err = os.MkdirTemp("", "troupe-build-test-"); err != nil {
		return err
	}
	if err := os.Chmod(debian.dir, 0o755); err != nil { // for builds that do not run as root
		return err
	}
	s, err := store.Open(debian.dir + "/store")
	if err != nil {
		return err
	}
	debian.b = &Builder{Store: s, Dir: debian.dir + "/scratch"}
	debian.base, err = debian.b.Base(context.Background(), firstFleet(), &debian.rec)
	return err
}

func TestBase(t *testing.T) {
	b, base := debianBase(t)
	nothingLeft(t, b)
	if diff := cmp.Diff([]string{"packages", "image", "modules"}, debian.rec.steps); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
	if base.Recipe != firstFleet().ID() || base.Arch != "amd64" || !strings.HasSuffix(base.Version, "-cloud-amd64") {
		t.Errorf("recipe %s, arch %s, kernel %s", base.Recipe, base.Arch, base.Version)
	}
	for _, name := range []string{"busybox-static", "kmod", "e2fsprogs", "libc6", "linux-image-" + base.Version} {
		if !slices.ContainsFunc(base.Packages, func(p string) bool { return strings.HasPrefix(p, name+"=") }) {
			t.Errorf("%s is not in the lock %v", name, base.Packages)
		}
	}
	list := listing(t, b, base.Image)
	checkBaseTree(t, base, list)
	checkBoot(t, b, base)
}

// checkBaseTree compares what matters of the root file system.
func checkBaseTree(t *testing.T, base images.Base, list string) {
	t.Helper()
	modules := "usr/lib/modules/" + base.Version
	for _, want := range []string{
		"\nLrwxrwxrwx 0:0 lib -> usr/lib\n",
		"\n-rw-r--r-- 0:0 etc/machine-id \"\"\n",
		"\n-rw-r--r-- 0:0 etc/fstab \"\"\n",
		"\ndtrwxrwxrwx 0:0 tmp\n",
		"\nurwxr-xr-x 0:0 usr/bin/su ",
		" usr/sbin/init -> /lib/systemd/systemd\n",
		" " + modules + "/modules.dep \"kernel/",
		" " + modules + "/kernel/fs/erofs/erofs.ko ",
		" " + modules + "/kernel/fs/overlayfs/overlay.ko ",
		" etc/systemd/system/timers.target.wants/fstrim.timer -> ",
		" usr/lib/systemd/system/e2scrub_reap.service ", // not enabled, but there for a role that wants it
	} {
		if !strings.Contains(list, want) {
			t.Errorf("not in the base: %q", want)
		}
	}
	checkLacks(t, list, "dev/", "boot/", ".troupe", "var/lib/apt/lists/", "etc/resolv.conf", "etc/hostname", "usr/share/man/man1/",
		"var/cache/apt/", "var/log/dpkg.log", "usr/share/initramfs-tools/hook-functions",
		"etc/systemd/system/timers.target.wants/apt-daily", "etc/systemd/system/timers.target.wants/dpkg-db-backup",
		"etc/systemd/system/timers.target.wants/e2scrub", "etc/systemd/system/multi-user.target.wants/e2scrub",
		"etc/systemd/system/default.target.wants/e2scrub")
	if strings.Contains(list, "later than epoch") {
		t.Error("a file has a time after the epoch")
	}
	_, shadow, _ := strings.Cut(list, " etc/shadow ")
	if !strings.Contains(shadow[:strings.Index(shadow, "\n")], `root:*:`) {
		t.Error("root has a password, or none")
	}
}

// checkLacks fails the test if the path of a file in the listing starts with one of prefixes.
func checkLacks(t *testing.T, list string, prefixes ...string) {
	t.Helper()
	for line := range strings.Lines(list) {
		_, rest, _ := strings.Cut(line, " ")
		_, rest, _ = strings.Cut(rest, " ")
		if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(rest, p) }) {
			t.Errorf("in the image: %.200s", line)
		}
	}
}

// checkBoot looks at the blobs that a machine boots.
func checkBoot(t *testing.T, b *Builder, base images.Base) {
	t.Helper()
	kernel, err := os.ReadFile(b.Store.Path(base.Kernel.Digest))
	if err != nil {
		t.Fatal(err)
	}
	if len(kernel) < 0x206 || string(kernel[0x202:0x206]) != "HdrS" { // Linux documentation, arch/x86/boot.rst
		t.Error("the kernel blob is no bzImage")
	}
	modules, err := b.Store.Open(t.Context(), base.Modules.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer modules.Close()
	files, err := initramfs.List(modules)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"/erofs.ko", "/overlay.ko", "/virtio_net.ko", "/mke2fs"} {
		if !slices.ContainsFunc(files, func(f initramfs.File) bool { return strings.HasSuffix(f.Name, want) }) {
			t.Errorf("not in the modules blob: %s", want)
		}
	}
}

func TestBaseTwiceIsTheSame(t *testing.T) {
	b, base := debianBase(t)
	other := newBuilder(t)
	again, err := other.Base(t.Context(), firstFleet(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(base, again); diff != "" {
		t.Errorf("built twice (-first +second):\n%s", diff)
		if d := cmp.Diff(listing(t, b, base.Image), listing(t, other, again.Image)); len(d) < 1<<16 {
			t.Log(d)
		}
	}
	nothingLeft(t, other)
}

func TestDeltaOfPackagesAndRun(t *testing.T) {
	b, base := debianBase(t)
	r := images.DeltaRecipe{
		Base:     base.Recipe,
		Packages: []string{"hello"},
		Files: map[string]images.File{
			"/etc/motd":               {Content: "hi\n", Mode: 0o644},
			"/lib/troupe/some/file":   {Content: "over a link\n", Mode: 0o600, UID: 7, GID: 8},
			"/usr/share/doc/hello/ab": {Content: "beside a package's\n", Mode: 0o644},
			"/var/log/dir/kept":       {Content: "the role's own\n", Mode: 0o644},
		},
		Run: []string{
			"echo hi >/etc/hi; hello >/etc/said; cp /lib/troupe/some/file /etc/copy",
			"rm /etc/issue.net; rm -r /etc/apt; mkdir /etc/apt; touch /etc/apt/mine; echo log >/var/log/x; cp /etc/issue /etc/i",
			"hostname; ls /sys/class/net; test ! -e /etc/resolv.conf; test -c /dev/null; chmod 600 /etc/issue",
			"printf '[Install]\\nWantedBy=a.target\\n' >/etc/systemd/system/late.service; mv /etc/i /etc/issue",
		},
		Enable: []string{"late.service"},
	}
	var rec recorder
	d, err := b.Delta(t.Context(), r, base, &rec)
	if err != nil {
		t.Fatalf("%v\n%s", err, rec.output.String())
	}
	if diff := cmp.Diff([]string{"hello"}, names(d.Packages)); diff != "" {
		t.Errorf("lock (-want +got):\n%s", diff)
	}
	if out := rec.output.String(); !strings.HasSuffix(out, "\nlocalhost\nlo\n") {
		t.Errorf("output of the run steps: %q", out)
	}
	list := listing(t, b, d.Image)
	for _, want := range []string{
		"-rw-r--r-- 0:0 etc/hi \"hi\\n\"\n",
		"-rw-r--r-- 0:0 etc/said \"Hello, world!\\n\"\n",
		"-rw------- 0:0 etc/copy \"over a link\\n\"\n",
		"-rw------- 7:8 usr/lib/troupe/some/file \"over a link\\n\"\n",
		"Dc--------- 0:0 etc/issue.net\n",
		"-rw-r--r-- 0:0 var/log/dir/kept \"the role's own\\n\"\n",
		"drwxr-xr-x 0:0 etc/apt trusted.overlay.opaque=\"y\"\n",
		" etc/systemd/system/a.target.wants/late.service -> /etc/systemd/system/late.service\n",
	} {
		if !strings.Contains(list, want) {
			t.Errorf("not in the layer: %q", want)
		}
	}
	checkLacks(t, list, "var/log/x", "var/log/apt/", "var/log/dpkg", "etc/issue ", "etc/resolv", "usr/sbin/policy-rc.d", "var/cache/apt", "dev")
	again, err := newBuilderOn(t, b).Delta(t.Context(), r, base, nil)
	if err != nil || again.Image != d.Image {
		t.Errorf("built again: %v, %v; want %v; %s", again.Image, err, d.Image,
			cmp.Diff(list, listing(t, b, again.Image)))
	}
	nothingLeft(t, b)
	checkMounted(t, b, base, d)
}

func names(lock []string) []string {
	var all []string
	for _, p := range lock {
		name, _, _ := strings.Cut(p, "=")
		all = append(all, name)
	}
	return all
}

// checkMounted has the kernel mount the images as a node does, and looks at what it shows.
func checkMounted(t *testing.T, b *Builder, base images.Base, d images.Delta) {
	t.Helper()
	const script = `cd "$0"
mkdir base delta upper work root
mount -t erofs -o ro,loop "$1" base
mount -t erofs -o ro,loop "$2" delta
mkdir rw; mount -t tmpfs rw rw; mkdir rw/upper rw/work
mount -t overlay overlay -o lowerdir=delta:base,upperdir=rw/upper,workdir=rw/work root
chroot root /bin/sh -ec 'hello; ls /etc/apt; test ! -e /etc/issue.net; test -u /bin/su; ls -ld / /etc >/etc/ls; cat /etc/motd'`
	cmd := exec.Command("sh", "-ec", script, t.TempDir(), b.Store.Path(base.Image.Digest), b.Store.Path(d.Image.Digest))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if want := "Hello, world!\nmine\nhi\n"; err != nil || string(out) != want {
		t.Errorf("mounted: got %q, %v; want %q", out, err, want)
	}
}

// TestEnableAsSystemctl compares the links with those that systemctl itself makes in a run step.
func TestEnableAsSystemctl(t *testing.T) {
	b, base := debianBase(t)
	units := []string{"getty@ttyS1.service", "serial-getty@.service", "systemd-networkd.service", "my@x.service", "my.socket"}
	files := map[string]images.File{
		"/etc/systemd/system/my@.service": {Mode: 0o644, Content: "[Service]\nExecStart=/bin/true\n" +
			"[Install]\nWantedBy=w-%i.target\nRequiredBy=%p-%j.target\nAlias=your@x.service\n"},
		"/usr/lib/systemd/system/my.socket": {Mode: 0o644, Content: "[Socket]\nListenStream=1\nAccept=yes\n" +
			"[Install]\nWantedBy=sockets.target\nAlso=systemd-timesyncd.service systemd-pstore.service\n"},
	}
	units = slices.DeleteFunc(units, func(u string) bool { return u == "serial-getty@.service" }) // no DefaultInstance
	ours, err := b.Delta(t.Context(), images.DeltaRecipe{Base: base.Recipe, Files: files, Enable: units}, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	var rec recorder
	theirs, err := b.Delta(t.Context(), images.DeltaRecipe{
		Base: base.Recipe, Files: files, Run: []string{"systemctl enable " + strings.Join(units, " ")},
	}, base, &rec)
	if err != nil {
		t.Fatalf("%v\n%s", err, rec.output.String())
	}
	// /lib is a link to /usr/lib: systemd of Debian 12 says the one, this package the other.
	theirList := strings.ReplaceAll(listing(t, b, theirs.Image), "-> /lib/systemd", "-> /usr/lib/systemd")
	if diff := cmp.Diff(links(theirList), links(listing(t, b, ours.Image))); diff != "" {
		t.Errorf("links (-systemctl +ours):\n%s", diff)
	}
}

// links are the lines of a listing that are of symbolic links.
func links(list string) []string {
	var all []string
	for line := range strings.Lines(list) {
		if strings.HasPrefix(line, "L") {
			all = append(all, line)
		}
	}
	return all
}

func TestFailedRunNamesItsStep(t *testing.T) {
	b, base := debianBase(t)
	before := blobs(t, b)
	_, err := b.Delta(t.Context(), images.DeltaRecipe{
		Base: base.Recipe, Run: []string{"true", "for i in $(seq 30); do echo line $i; done; echo bad >&2; exit 3", "true"},
	}, base, nil)
	var se *StepError
	if !errors.As(err, &se) {
		t.Fatalf("got error %v", err)
	}
	if want := "run 2/3: for i in $(seq 30); do echo line $i; done; echo bad >&2…"; !strings.HasPrefix(se.Step, want[:40]) {
		t.Errorf("got step %q, want %q", se.Step, want)
	}
	if len(se.Tail) != tailLines || !slices.Contains(se.Tail, "bad") || !slices.Contains(se.Tail, "line 30") {
		t.Errorf("got tail %q", se.Tail)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("got error %v, want exit status 3", err)
	}
	if diff := cmp.Diff(before, blobs(t, b)); diff != "" {
		t.Errorf("left in the store:\n%s", diff)
	}
	nothingLeft(t, b)
}

// TestUmaskIsInNoImage builds under the umask that a service may be given (UMask= of systemd.exec(5)).
func TestUmaskIsInNoImage(t *testing.T) {
	b, base := debianBase(t)
	r := images.DeltaRecipe{Base: base.Recipe, Run: []string{"umask; echo made >/etc/made; mkdir /etc/made.d"}}
	usual := syscall.Umask(0o022)
	t.Cleanup(func() { syscall.Umask(usual) })
	want, err := b.Delta(t.Context(), r, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	syscall.Umask(0o077)
	got, err := b.Delta(t.Context(), r, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.Image != want.Image {
		t.Errorf("another umask makes another image: %v and %v", want.Image, got.Image)
	}
	for _, line := range []string{`-rw-r--r-- 0:0 etc/made "made\n"`, "drwxr-xr-x 0:0 etc/made.d"} {
		if list := listing(t, b, got.Image); !strings.Contains(list, line) {
			t.Errorf("no %q in the image:\n%s", line, list)
		}
	}
}

func TestUnknownPackageIsNamed(t *testing.T) {
	b, base := debianBase(t)
	_, err := b.Delta(t.Context(), images.DeltaRecipe{Base: base.Recipe, Packages: []string{"no-such-package"}}, base, nil)
	var se *StepError
	if !errors.As(err, &se) || se.Step != "packages" || !strings.Contains(err.Error(), "Unable to locate package no-such-package") {
		t.Errorf("in a delta: got error %v", err)
	}
	nothingLeft(t, b)
	b = newBuilder(t)
	r := firstFleet()
	r.Packages = append(r.Packages, "no-such-package")
	_, err = b.Base(t.Context(), r, nil)
	if !errors.As(err, &se) || se.Step != "packages" ||
		!slices.ContainsFunc(se.Tail, func(l string) bool { return strings.Contains(l, "Unable to locate package no-such-package") }) {
		t.Errorf("in a base: got error %v, tail %q", err, se)
	}
	if left := blobs(t, b); len(left) > 0 {
		t.Errorf("left in the store: %v", left)
	}
	nothingLeft(t, b)
}

// The package is fine: what is missing is the way to the mirror.
func TestMirrorAwayIsNamed(t *testing.T) {
	b, base := debianBase(t)
	for _, name := range []string{"http_proxy", "https_proxy"} {
		t.Setenv(name, "http://127.0.0.1:1")
	}
	_, err := b.Delta(t.Context(), images.DeltaRecipe{Base: base.Recipe, Packages: []string{"hello"}}, base, nil)
	var se *StepError
	if !errors.As(err, &se) || se.Step != "packages" || !strings.Contains(err.Error(), "E: Failed to fetch http") ||
		strings.Contains(strings.Join(se.Tail, "\n"), "Unable to locate") {
		t.Errorf("in a delta: got error %v, tail %q", err, se)
	}
	nothingLeft(t, b)
	b = newBuilder(t)
	_, err = b.Base(t.Context(), firstFleet(), nil)
	if !errors.As(err, &se) || !strings.Contains(err.Error(), "E: Failed to fetch http") {
		t.Errorf("in a base: got error %v, tail %q", err, se)
	}
	nothingLeft(t, b)
}

func TestCancelLeavesNothing(t *testing.T) {
	b, base := debianBase(t)
	before := blobs(t, b)
	ctx, rec := cancelAt(t, "here")
	_, err := b.Delta(ctx, images.DeltaRecipe{
		Base: base.Recipe, Run: []string{"setsid sh -c 'while :; do :; done' & echo here; sleep infinity"},
	}, base, rec)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("delta: got error %v", err)
	}
	if diff := cmp.Diff(before, blobs(t, b)); diff != "" {
		t.Errorf("left in the store:\n%s", diff)
	}
	nothingLeft(t, b)

	fresh := newBuilder(t)
	ctx, rec = cancelAt(t, "extracting archives")
	if _, err := fresh.Base(ctx, firstFleet(), rec); !errors.Is(err, context.Canceled) {
		t.Errorf("base: got error %v", err)
	}
	if left := blobs(t, fresh); len(left) > 0 {
		t.Errorf("left in the store: %v", left)
	}
	nothingLeft(t, fresh)
}

// TestKilledBuild kills the process that builds, as nothing in it can expect, and cleans up after it.
func TestKilledBuild(t *testing.T) {
	const env = "TROUPE_TEST_BUILD_IN"
	if dir := os.Getenv(env); dir != "" {
		buildUntilKilled(t, dir)
		return
	}
	b := newBuilder(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledBuild$")
	cmd.Env = append(os.Environ(), env+"="+b.Dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	buf := make([]byte, 4096)
	for !strings.Contains(seen.String(), "installing essential packages") {
		n, err := out.Read(buf)
		seen.Write(buf[:n])
		if err != nil {
			t.Fatalf("the build ended: %v\n%s", err, seen.String())
		}
	}
	if len(processesOf(b.Dir)) == 0 {
		t.Error("no process of the build is to be seen, so that none is left means nothing")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	awaitNone(t, b.Dir)
	if left, err := os.ReadDir(b.Dir); err != nil || len(left) == 0 {
		t.Errorf("scratch of a killed build: %v, %v; want some", left, err)
	}
	if err := b.Clean(); err != nil {
		t.Error(err)
	}
	nothingLeft(t, b)
}

func buildUntilKilled(t *testing.T, dir string) {
	t.Helper()
	s, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	rec := &recorder{onLine: func(line string) { os.Stdout.WriteString(line) }}
	_, err = (&Builder{Store: s, Dir: dir}).Base(t.Context(), firstFleet(), rec)
	t.Fatalf("nobody killed the build: %v", err)
}

// awaitNone waits until no process names dir: the kernel kills them one after the other.
func awaitNone(t *testing.T, dir string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for len(processesOf(dir)) > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("still running: %q", processesOf(dir))
		}
	}
}

// TestCleanOfSubordinateUsers has the scratch of a Builder that is not root: some of it belongs to its subordinate users.
// Without those it stays, which is no reason for a server not to start.
func TestCleanOfSubordinateUsers(t *testing.T) {
	const (
		env          = "TROUPE_TEST_CLEAN"
		nobody, subs = 65534, 200000
	)
	if dir := os.Getenv(env); dir != "" {
		var log bytes.Buffer
		b := &Builder{Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))}
		if err := b.Clean(); err != nil {
			t.Error(err)
		}
		t.Log(log.String())
		return
	}
	self, err := os.Open("/proc/self/exe") // by a path it may be out of nobody's reach
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	namespaces := exec.Command("setpriv", fmt.Sprint("--reuid=", nobody), "--clear-groups", "unshare", "--user", "true").Run() == nil
	for _, tt := range []struct {
		subuid string
		chroot bool // where Linux gives nobody a user namespace
		left   string
	}{
		{fmt.Sprintf("%d:%d:65536\n", nobody, subs), false, ""},
		{fmt.Sprintf("%d:%d:65536\n", nobody, subs), true, "base-1"},
		{"", false, "base-1"},
	} {
		if !namespaces { // we are in a chroot ourselves, or in a container
			tt.left = "base-1"
		}
		dir, err := os.MkdirTemp("", "troupe-build-test-") //nolint:usetesting // all above it can be entered by everybody
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		scratch, theirs := dir+"/base-1", dir+"/base-1/root/etc"
		ids := filepath.Join(t.TempDir(), "ids")
		err = errors.Join(os.MkdirAll(theirs, 0o700), os.WriteFile(theirs+"/x", nil, 0o600), os.WriteFile(ids, []byte(tt.subuid), 0o644),
			os.Chown(dir, nobody, nobody), os.Chown(scratch, nobody, nobody), os.Chown(scratch+"/root", subs, subs), os.Chown(theirs, subs, subs), os.Chown(theirs+"/x", subs+1, subs))
		if err != nil {
			t.Fatal(err)
		}
		root := "/"
		if tt.chroot {
			root = t.TempDir()
		}
		cmd := exec.Command("unshare", "--mount", "sh", "-ec", `mount --bind "$1" /etc/subuid; mount --bind "$1" /etc/subgid
			[ "$3" = / ] || mount --rbind / "$3"
			exec chroot "$3" setpriv --reuid="$2" --regid="$2" --clear-groups /proc/self/fd/3 -test.run='^TestCleanOfSubordinateUsers$' -test.v`,
			"sh", ids, fmt.Sprint(nobody), root)
		cmd.Env, cmd.Dir, cmd.ExtraFiles = append(os.Environ(), env+"="+dir), "/", []*os.File{self}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "PASS: TestCleanOfSubordinateUsers") {
			t.Errorf("cleaning: %v\n%s", err, out)
		}
		left, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range left {
			names = append(names, e.Name())
		}
		if got := strings.Join(names, " "); got != tt.left {
			t.Errorf("with subordinate users %q, chroot %v: left %q, want %q\n%s", tt.subuid, tt.chroot, got, tt.left, out)
		}
		if told := strings.Contains(string(out), "level=ERROR"); told != (tt.left != "") {
			t.Errorf("with subordinate users %q, chroot %v: told of an error: %v\n%s", tt.subuid, tt.chroot, told, out)
		}
	}
}

func TestCleanWithoutADirectory(t *testing.T) {
	b := &Builder{Dir: t.TempDir() + "/none"}
	if err := b.Clean(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(b.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v: cleaning made the directory", err)
	}
}

func TestBaseRefuses(t *testing.T) {
	b := newBuilder(t)
	for _, c := range []struct {
		change func(*images.BaseRecipe)
		want   string
	}{
		{func(r *images.BaseRecipe) { r.Suite = "" }, `"" is no name`},
		{func(r *images.BaseRecipe) { r.Suite = "--help" }, `"--help" is no name`},
		{func(r *images.BaseRecipe) { r.Kernel = "x; reboot" }, `"x; reboot" is no name`},
		{func(r *images.BaseRecipe) { r.Packages = []string{"a,b"} }, `"a,b" is no name`},
		{func(r *images.BaseRecipe) { r.Components = nil }, "no component"},
		{func(r *images.BaseRecipe) { r.Mirror = "copy:///etc" }, "no http or https URL"},
		{func(r *images.BaseRecipe) { r.Mirror = "http://x/ [trusted=yes]" }, "no http or https URL"},
	} {
		r := firstFleet()
		c.change(&r)
		if _, err := b.Base(t.Context(), r, nil); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got error %v, want one with %q", err, c.want)
		}
	}
	nothingLeft(t, b)
}

func TestBaseTreeLeavesIdleUnitsOut(t *testing.T) {
	b := newBuilder(t)
	var stream bytes.Buffer
	tw := tar.NewWriter(&stream)
	add := func(h tar.Header, content string) {
		h.Size = int64(len(content))
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{
		"", "boot", "etc", "etc/systemd", "etc/systemd/system", "sbin", "var", "var/lib", "var/lib/dpkg",
		"etc/systemd/system/default.target.wants", "etc/systemd/system/multi-user.target.wants", "etc/systemd/system/timers.target.wants",
	} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: "./" + d + "/", Mode: 0o755}, "")
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./boot/vmlinuz-6", Mode: 0o644}, "kernel")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./var/lib/dpkg/status", Mode: 0o644}, "Package: a\n")
	for name, to := range map[string]string{
		"sbin/init": "/lib/systemd/systemd",
		"etc/systemd/system/default.target.wants/e2scrub_reap.service":    "/lib/systemd/system/e2scrub_reap.service",
		"etc/systemd/system/multi-user.target.wants/e2scrub_reap.service": "/lib/systemd/system/e2scrub_reap.service",
		"etc/systemd/system/multi-user.target.wants/web.service":          "/lib/systemd/system/web.service",
		"etc/systemd/system/timers.target.wants/apt-daily.timer":          "/lib/systemd/system/apt-daily.timer",
		"etc/systemd/system/timers.target.wants/fstrim.timer":             "/lib/systemd/system/fstrim.timer",
		"etc/systemd/system/e2scrub_reap.service":                         "/dev/null", // masked, which is no link that enables
	} {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: "./" + name, Linkname: to, Mode: 0o777}, "")
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	w, err := b.newImage(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer w.abort()
	tree := &baseTree{store: b.Store, w: w, s: newSteps(&recorder{})}
	if err := tree.read(t.Context(), &stream); err != nil {
		t.Fatal(err)
	}
	image, err := w.commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"Lrwxrwxrwx 0:0 etc/systemd/system/e2scrub_reap.service -> /dev/null\n",
		"Lrwxrwxrwx 0:0 etc/systemd/system/multi-user.target.wants/web.service -> /lib/systemd/system/web.service\n",
		"Lrwxrwxrwx 0:0 etc/systemd/system/timers.target.wants/fstrim.timer -> /lib/systemd/system/fstrim.timer\n",
		"Lrwxrwxrwx 0:0 sbin/init -> /lib/systemd/systemd\n",
	}
	if diff := cmp.Diff(want, links(listing(t, b, image))); diff != "" {
		t.Errorf("links (-want +got):\n%s", diff)
	}
}

func TestSources(t *testing.T) {
	r := firstFleet()
	r.Components = []string{"contrib", "main"}
	want := []string{
		"deb http://deb.debian.org/debian bookworm contrib main",
		"deb http://deb.debian.org/debian bookworm-updates contrib main",
		"deb http://deb.debian.org/debian-security bookworm-security contrib main",
	}
	if diff := cmp.Diff(want, sources(r)); diff != "" {
		t.Errorf("of deb.debian.org (-want +got):\n%s", diff)
	}
	r.Mirror = "http://snapshot.debian.org/archive/debian/20260901T000000Z"
	if diff := cmp.Diff([]string{"deb " + r.Mirror + " bookworm contrib main"}, sources(r)); diff != "" {
		t.Errorf("of another mirror (-want +got):\n%s", diff)
	}
}

func TestInstalled(t *testing.T) {
	const status = `Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9
Description: a library
 Package: not-one

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1

Package: libc6
Status: install ok installed
Architecture: i386
Version: 2.36-9

Package: apt
Status: hold ok installed
Architecture: amd64
Version: 1:2.6.1+b1
`
	want := []string{"apt=1:2.6.1+b1", "libc6:amd64=2.36-9", "libc6:i386=2.36-9"}
	got := installed([]byte(status))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("installed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"apt=1:2.6.1+b1"}, added([]string{"apt=1:2.6.1", "libc6:amd64=2.36-9", "libc6:i386=2.36-9"}, got)); diff != "" {
		t.Errorf("added (-want +got):\n%s", diff)
	}
}
