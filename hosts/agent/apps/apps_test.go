package apps

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

// TestMain runs all tests in a mount namespace of their own: what they leave mounted is gone with them.
func TestMain(m *testing.M) {
	runtime.LockOSThread()
	if os.Getenv("TROUPE_APPS_TEST") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "TROUPE_APPS_TEST=1")
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

// errBroken is of an image that does not mount.
var errBroken = errors.New("broken")

// newPlace is a Place in a tmpfs, whose images are directories with one file, which says what image it is.
func newPlace(t *testing.T) Place {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, d := range []string{"root/opt", "root/usr/lib", "images"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return Place{
		Root: filepath.Join(dir, "root"), Run: filepath.Join(dir, "run"), Cache: filepath.Join(dir, "cache"), Units: filepath.Join(dir, "units"), Host: "n1",
		Image: func(img agentapi.Image, at string) error {
			if img.Size < 0 {
				return errBroken
			}
			if err := unix.Mount("test", at, "tmpfs", 0, ""); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(at, "which"), []byte(img.Root), 0o644); err != nil {
				return err
			}
			return unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		},
	}
}

func app(name, content string) agentapi.App {
	return agentapi.App{
		Name: name, Mount: "/opt/" + name, Data: keep,
		Image: agentapi.Image{Blob: agentapi.Blob{Digest: digest.Of([]byte(content))}, Root: content},
	}
}

func (p Place) wantFile(t *testing.T, name, want string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.Root, name))
	if err != nil && want == "" && errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil || string(b) != want {
		t.Errorf("%s: %q, %v; want %q", name, b, err, want)
	}
}

func (p Place) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(p.Root, name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// mounts are the places of dir where something is mounted.
func mounts(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if at := strings.Fields(line)[4]; strings.HasPrefix(at, dir+"/") {
			out = append(out, strings.TrimPrefix(at, dir))
		}
	}
	return strings.Join(out, " ")
}

func TestMountAndUnmount(t *testing.T) {
	p := newPlace(t)
	list := []agentapi.App{app("a", "one"), app("b", "two")}
	if err := p.Boot(list); err != nil {
		t.Fatal(err)
	}
	p.wantFile(t, "opt/a/which", "one")
	p.wantFile(t, "opt/b/which", "two")
	if err := os.WriteFile(filepath.Join(p.Root, "opt/a/x"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("an image can be written to: %v", err)
	}
	p.write(t, "var/lib/troupe/apps/a/db", "of a")
	open, err := os.Open(filepath.Join(p.Root, "opt/a/which")) // what is in use is let go of all the same
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := p.Unmount(list); err != nil {
		t.Fatal(err)
	}
	if left := mounts(t, filepath.Dir(p.Root)); left != "" {
		t.Errorf("left mounted: %s", left)
	}
	if err := p.Unmount(list); err != nil {
		t.Errorf("what is not mounted: %v", err)
	}
	// Another image of the same app finds its data.
	if err := p.Mount([]agentapi.App{app("a", "three")}); err != nil {
		t.Fatal(err)
	}
	p.wantFile(t, "opt/a/which", "three")
	p.wantFile(t, "var/lib/troupe/apps/a/db", "of a")
}

func TestOneBrokenImageLeavesNothingMounted(t *testing.T) {
	p := newPlace(t)
	broken := app("b", "two")
	broken.Image.Size = -1
	if err := p.Boot([]agentapi.App{app("a", "one"), broken}); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "app b") {
		t.Errorf("Boot: %v", err)
	}
	if left := mounts(t, filepath.Dir(p.Root)); left != "" {
		t.Errorf("left mounted: %s", left)
	}
}

func TestWhatIsKeptAndWhatIsFresh(t *testing.T) {
	p := newPlace(t)
	kept, fresh := app("kept", "one"), app("fresh", "one")
	kept.Delta, fresh.Delta, fresh.Data = keep, "fresh", "fresh"
	list := []agentapi.App{fresh, kept}
	files := []string{"opt/kept/which", "var/lib/troupe/apps/kept/x", "opt/fresh/which", "var/lib/troupe/apps/fresh/x"}
	again := func(boot func([]agentapi.App) error) {
		t.Helper()
		if err := errors.Join(p.Unmount(list), boot(list)); err != nil {
			t.Fatal(err)
		}
	}
	want := func(texts ...string) {
		t.Helper()
		for i, text := range texts {
			p.wantFile(t, files[i], text)
		}
	}
	again(p.Boot)
	for _, f := range files {
		p.write(t, f, "written")
	}
	again(p.Mount)
	want("written", "written", "one", "written")
	again(p.Boot)
	want("written", "written", "one", "")

	// A delta belongs to one image. That of the image before stays until the next boot: the node may go back to it.
	old := kept.Image
	list[1].Image = app("kept", "two").Image
	if err := errors.Join(p.Unmount([]agentapi.App{fresh, kept}), p.Mount(list)); err != nil {
		t.Fatal(err)
	}
	want("two", "written")
	list[1].Image = old
	if err := errors.Join(p.Unmount([]agentapi.App{app("kept", "two")}), p.Mount(list[1:])); err != nil {
		t.Fatal(err)
	}
	want("written")
}

func TestMountsStayInTheRoot(t *testing.T) {
	p := newPlace(t)
	outside := filepath.Join(filepath.Dir(p.Root), "outside")
	if err := errors.Join(os.Mkdir(outside, 0o755), os.Symlink(outside, filepath.Join(p.Root, "opt/a")), os.MkdirAll(p.Root+outside, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := p.Boot([]agentapi.App{app("a", "one")}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(outside, "which")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a link of the root led out of it: %v", err)
	}
	p.wantFile(t, outside+"/which", "one")
}

func TestCheck(t *testing.T) {
	for name, change := range map[string]func(*agentapi.App){
		"a name with a slash": func(a *agentapi.App) { a.Name = "../x" },
		"no image":            func(a *agentapi.App) { a.Image.Digest = "" },
		"the root":            func(a *agentapi.App) { a.Mount = "/" },
		"a relative place":    func(a *agentapi.App) { a.Mount = "opt" },
		"dots":                func(a *agentapi.App) { a.Mount = "/opt/../etc" },
		"a line more":         func(a *agentapi.App) { a.Exec = []string{"x\nUser=root"} },
		"a variable more":     func(a *agentapi.App) { a.Env = []string{"A=b\nC=d"} },
	} {
		a := app("a", "one")
		if change(&a); Check([]agentapi.App{a}) == nil {
			t.Errorf("%s is fine", name)
		}
	}
	if err := Check([]agentapi.App{app("a", "one"), app("b", "one")}); err != nil {
		t.Error(err)
	}
	if Check([]agentapi.App{app("a", "one"), app("a", "two")}) == nil {
		t.Error("one name twice is fine")
	}
}

func TestUnits(t *testing.T) {
	p := newPlace(t)
	a := app("web", "one")
	a.Exec, a.Env, a.User = []string{"bin/serve", "-d", `50% "$HOME"`}, []string{`MODE=a\b`}, "www-data"
	list := []agentapi.App{app("files", "two"), a}
	if err := errors.Join(p.WriteUnits(list), p.WriteUnits(list)); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(p.Units, wants, "troupe-app-web.service"))
	if err != nil {
		t.Fatal(err)
	}
	const want = `# Written at each boot by the troupe agent, from the role.
[Unit]
Description=app web
RequiresMountsFor="/opt/web" "/var/lib/troupe/apps/web"
After=network.target
[Service]
Restart=on-failure
RestartSec=1
WorkingDirectory=/opt/web
Environment="TROUPE_APP_NAME=web"
Environment="TROUPE_APP_DIR=/opt/web"
Environment="TROUPE_APP_DATA=/var/lib/troupe/apps/web"
Environment="MODE=a\\b"
User=www-data
ExecStartPre=+/bin/chown -- www-data: "/var/lib/troupe/apps/web"
ExecStart="/opt/web/bin/serve" "-d" "50%% \"$$HOME\""
`
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Errorf("unit (-want +got):\n%s", d)
	}
	a.Root, a.Exec, a.Env, a.User = true, []string{"/usr/bin/redis"}, nil, ""
	if u := Unit(a); !strings.Contains(u, "RootDirectory=/opt/web\nMountAPIVFS=yes\nBindPaths=/var/lib/troupe/apps/web\n") ||
		!strings.Contains(u, "ExecStart=\"/usr/bin/redis\"\n") || !strings.Contains(u, "TROUPE_APP_DIR=/\"") {
		t.Errorf("unit of an app with a root of its own:\n%s", u)
	}
	if err := p.RemoveUnits(list); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(p.Units, "*", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
