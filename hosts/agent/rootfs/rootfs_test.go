package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain runs all tests in a mount namespace of their own: what they leave mounted is gone with them.
func TestMain(m *testing.M) {
	runtime.LockOSThread()
	if os.Getenv("TROUPE_ROOTFS_TEST") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "TROUPE_ROOTFS_TEST=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Unshareflags: unix.CLONE_NEWNS}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// image makes an EROFS image with these files; a name that ends in a slash is a directory, content "-> x" is a link.
func image(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(target, p)
		} else if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(p, 0o755)
		} else {
			err = os.WriteFile(p, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(t.TempDir(), "image.erofs")
	if b, err := exec.Command("mkfs.erofs", "--quiet", out, dir).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, b)
	}
	return out
}

// spec is a Spec in new directories, its node delta on a tmpfs: what overlayfs stands on must not be an overlay.
func spec(t *testing.T, base, delta string) Spec {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s := Spec{
		Base: Image{File: base}, Delta: Image{File: delta}, BaseDir: filepath.Join(dir, "base"), DeltaDir: filepath.Join(dir, "delta"),
		Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"), Root: filepath.Join(dir, "root"),
	}
	for _, d := range []string{s.Upper, s.Work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func mount(t *testing.T, s Spec) {
	t.Helper()
	if err := Mount(s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Unmount(s); err != nil {
			t.Error(err)
		}
	})
}

func want(t *testing.T, root, name, content string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil || string(b) != content {
		t.Errorf("%s: %q, %v; want %q", name, b, err, content)
	}
}

func loops(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("losetup", "-l", "-n", "-O", "BACK-FILE").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestMountJoinsTheLayers(t *testing.T) {
	base := image(t, map[string]string{"etc/motd": "base", "etc/os": "debian", "usr/bin/x": "x"})
	delta := image(t, map[string]string{"etc/motd": "role", "etc/role": "web"})
	s := spec(t, base, delta)
	mount(t, s)
	want(t, s.Root, "etc/motd", "role")
	want(t, s.Root, "etc/os", "debian")
	want(t, s.Root, "etc/role", "web")
	if err := os.WriteFile(filepath.Join(s.Root, "etc/motd"), []byte("node"), 0o644); err != nil {
		t.Fatal(err)
	}
	want(t, s.Root, "etc/motd", "node")
	want(t, s.DeltaDir, "etc/motd", "role")
	if err := os.WriteFile(filepath.Join(s.BaseDir, "x"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("the base can be written to: %v", err)
	}
}

func TestUnmountFreesTheLoopDevices(t *testing.T) {
	base := image(t, map[string]string{"a": "a"})
	s := spec(t, base, base)
	if err := Mount(s); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(loops(t), base) {
		t.Error("no loop device has the image")
	}
	if err := Unmount(s); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(loops(t), base) {
		t.Errorf("a loop device still has the image:\n%s", loops(t))
	}
}

func TestMountOfABrokenImageLeavesNothing(t *testing.T) {
	good := image(t, map[string]string{"a": "a"})
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s := spec(t, good, broken)
	if err := Mount(s); !errors.Is(err, ErrImage) || !strings.Contains(err.Error(), broken) {
		t.Errorf("Mount: %v", err)
	}
	if l := loops(t); strings.Contains(l, good) || strings.Contains(l, broken) {
		t.Errorf("loop devices are left:\n%s", l)
	}
}

func TestSeedThroughAnOverlay(t *testing.T) {
	base := image(t, map[string]string{
		"etc/machine-id": "uninitialized", "etc/resolv.conf": "-> ../run/resolve/stub.conf", "etc/localtime": "-> /usr/share/zoneinfo/UTC",
		"srv/": "", "run/": "", "var/run": "-> /run", "etc/secret/": "",
	})
	s := spec(t, base, image(t, map[string]string{"srv/www/old": "old"}))
	mount(t, s)
	if err := os.Chmod(filepath.Join(s.Root, "etc/secret"), 0o700); err != nil {
		t.Fatal(err)
	}
	err := Seed(s.Root, []File{
		{Path: "/etc/machine-id", Content: "abc\n", Mode: 0o444},
		{Path: "/etc/resolv.conf", Content: "nameserver 1\n", Mode: 0o644, KeepLink: true},
		{Path: "/etc/localtime", Content: "TZ", Mode: 0o644},
		{Path: "/srv/www/a/b/index.html", Content: "hi", Mode: 0o640, UID: 33, GID: 34},
		{Path: "/var/run/app.conf", Content: "in /run", Mode: 0o644},
		{Path: "/etc/secret/key", Content: "k", Mode: 0o4711, UID: 5},
	})
	if err != nil {
		t.Fatal(err)
	}
	want(t, s.Root, "etc/machine-id", "abc\n")
	want(t, s.Root, "etc/localtime", "TZ")
	want(t, s.Root, "srv/www/a/b/index.html", "hi")
	want(t, s.Root, "srv/www/old", "old")
	want(t, s.Root, "run/app.conf", "in /run")
	if l, err := os.Readlink(filepath.Join(s.Root, "etc/resolv.conf")); l != "../run/resolve/stub.conf" {
		t.Errorf("resolv.conf is no link any more: %v", err)
	}
	for name, mode := range map[string]fs.FileMode{
		"etc/machine-id": 0o444, "srv/www/a/b/index.html": 0o640, "srv/www/a": 0o755 | fs.ModeDir,
		"etc/secret": 0o700 | fs.ModeDir, "etc/secret/key": 0o711 | fs.ModeSetuid, "etc/localtime": 0o644,
	} {
		fi, err := os.Lstat(filepath.Join(s.Root, name))
		if err != nil || fi.Mode() != mode {
			t.Errorf("%s: mode %v, %v; want %v", name, fi.Mode(), err, mode)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(s.Root, "srv/www/a/b/index.html"), &st); err != nil || st.Uid != 33 || st.Gid != 34 {
		t.Errorf("owner %d:%d, %v", st.Uid, st.Gid, err)
	}
	left, err := filepath.Glob(filepath.Join(s.Upper, "*/.troupe-seed"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestSeedNeverLeavesTheRoot(t *testing.T) {
	out := t.TempDir()
	root := filepath.Join(out, "root")
	for _, d := range []string{"root/etc", "victim"} {
		if err := os.MkdirAll(filepath.Join(out, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"up": "../victim", "abs": filepath.Join(out, "victim"), "proc": "/proc/self/root" + filepath.Join(out, "victim"), "dots": "../../../../../../.." + filepath.Join(out, "victim"),
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"/up/x", "/abs/x", "/proc/x", "/dots/x", "/etc/../../victim/x", "relative", "/", "/etc/", "//etc/x", "/etc/\x00", ""} {
		_ = Seed(root, []File{{Path: p, Content: "bad", Mode: 0o644}}) // an error, or a file inside the root: both are right
		if left, err := os.ReadDir(filepath.Join(out, "victim")); err != nil || len(left) > 0 {
			t.Fatalf("%q wrote outside: %v, %v", p, left, err)
		}
	}
	for _, p := range []string{"/etc/../../victim/x", "relative", "/", "/etc/", "//etc/x", "/etc/\x00", "", "/etc"} {
		if err := Seed(root, []File{{Path: p}}); err == nil {
			t.Errorf("%q was written", p)
		}
	}
}
