package build

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
)

func TestDeltaOfFilesAndUnits(t *testing.T) {
	b := newBuilder(t)
	base := fakeBase(t, b)
	r := images.DeltaRecipe{
		Base: base.Recipe,
		Files: map[string]images.File{
			"/etc/motd":                       {Content: "web\n", Mode: 0o644},
			"/etc/localtime":                  {Content: "mine", Mode: 0o600},                           // in place of a link
			"/lib/systemd/system/web.service": {Content: "[Install]\nWantedBy=a.target\n", Mode: 0o644}, // over a link
			"/srv/www/index.html":             {Content: strings.Repeat("x", 5000), Mode: 0o640, UID: 33, GID: 100000},
			"/usr/local/bin/tool":             {Content: "", Mode: 0o4755},
		},
		Enable: []string{"plain.service", "web"},
	}
	var rec recorder
	d, err := b.Delta(t.Context(), r, base, &rec)
	if err != nil {
		t.Fatal(err)
	}
	want := `drwxr-xr-x 0:0 etc
-rw------- 0:0 etc/localtime "mine"
-rw-r--r-- 0:0 etc/motd "web\n"
drwxr-xr-x 0:0 etc/systemd
drwxr-xr-x 0:0 etc/systemd/system
drwxr-xr-x 0:0 etc/systemd/system/a.target.wants
Lrwxrwxrwx 0:0 etc/systemd/system/a.target.wants/web.service -> /usr/lib/systemd/system/web.service
drwxr-xr-x 0:0 etc/systemd/system/multi-user.target.wants
Lrwxrwxrwx 0:0 etc/systemd/system/multi-user.target.wants/plain.service -> /usr/lib/systemd/system/plain.service
dgrwxrwx--- 33:0 srv
drwxr-xr-x 0:0 srv/www
-rw-r----- 33:100000 srv/www/index.html "` + strings.Repeat("x", 5000) + `"
drwxr-xr-x 0:0 usr
drwxr-xr-x 0:0 usr/lib
drwxr-xr-x 0:0 usr/lib/systemd
drwxr-xr-x 0:0 usr/lib/systemd/system
-rw-r--r-- 0:0 usr/lib/systemd/system/web.service "[Install]\nWantedBy=a.target\n"
drwxr-xr-x 0:0 usr/local
drwxr-xr-x 0:0 usr/local/bin
urwxr-xr-x 0:0 usr/local/bin/tool ""
`
	if diff := cmp.Diff(want, listing(t, b, d.Image)); diff != "" {
		t.Errorf("layer (-want +got):\n%s", diff)
	}
	wantDelta := images.Delta{Recipe: r.ID(), Base: base.Image.Blob, Image: d.Image}
	if diff := cmp.Diff(wantDelta, d); diff != "" {
		t.Errorf("delta (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"files", "services", "image"}, rec.steps); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
	again, err := newBuilderOn(t, b).Delta(t.Context(), r, base, nil)
	if err != nil || again.Image != d.Image {
		t.Errorf("built again: %v, %v; want %v", again.Image, err, d.Image)
	}
	nothingLeft(t, b)
}

// newBuilderOn is b with another scratch directory.
func newBuilderOn(t *testing.T, b *Builder) *Builder {
	t.Helper()
	return &Builder{Store: b.Store, Dir: t.TempDir()}
}

func TestEmptyDeltaIsAnImage(t *testing.T) {
	b := newBuilder(t)
	base := fakeBase(t, b)
	d, err := b.Delta(t.Context(), images.DeltaRecipe{Base: base.Recipe}, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := listing(t, b, d.Image); got != "" {
		t.Errorf("an empty delta has files:\n%s", got)
	}
}

func TestDeltaRefuses(t *testing.T) {
	b := newBuilder(t)
	base := fakeBase(t, b)
	file := func(paths ...string) images.DeltaRecipe {
		files := make(map[string]images.File)
		for _, p := range paths {
			files[p] = images.File{Content: "x", Mode: 0o644}
		}
		return images.DeltaRecipe{Base: base.Recipe, Files: files}
	}
	unit := func(name string) images.DeltaRecipe {
		return images.DeltaRecipe{Base: base.Recipe, Enable: []string{name}}
	}
	for _, c := range []struct {
		recipe images.DeltaRecipe
		want   string
	}{
		{images.DeltaRecipe{Base: digest.Of([]byte("another"))}, "not for that of"},
		{images.DeltaRecipe{Base: base.Recipe, Packages: []string{"a;reboot"}}, `"a;reboot" is no name of a package`},
		{images.DeltaRecipe{Base: base.Recipe, Packages: []string{"apt-"}}, `"apt-" is no name of a package`},
		{file("etc/x"), "no absolute path"},
		{file("/etc/../x"), "no absolute path"},
		{file("/etc"), `step "files": putting file "/etc": "/etc" is a directory`},
		{file("/etc/motd/x"), `"/etc/motd" is not a directory`},
		{file("/a", "/a/b"), `"/a" is not a directory`},
		{file("/lib/x", "/usr/lib/x"), `it is the same file as "/lib/x"`},
		{file("/loop/x"), "more than 40 symbolic links"},
		{unit("gone.service"), `step "services": enabling unit "gone.service": there is no such unit`},
		{unit("masked.service"), "it is masked"},
		{unit("static.service"), "nothing in an [Install] section"},
		{unit("worker@.service"), "template without DefaultInstance="},
		{unit("bad.service"), "%H is not known before a machine runs"},
		{unit("path.service"), "not the name of a unit"},
		{unit("/usr/lib/systemd/system/plain.service"), "not by a path"},
	} {
		before := blobs(t, b)
		_, err := b.Delta(t.Context(), c.recipe, base, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got error %v, want one with %q", err, c.want)
		}
		if diff := cmp.Diff(before, blobs(t, b)); diff != "" {
			t.Errorf("%s: left in the store:\n%s", c.want, diff)
		}
	}
	nothingLeft(t, b)
}

// TestEnable enables units of the fake base and compares all the links that come of it. That these are the ones which
// systemctl makes is what TestEnableAsSystemctl holds.
func TestEnable(t *testing.T) {
	for _, c := range []struct {
		units []string
		want  map[string]string // below /etc/systemd/system, to below /usr/lib/systemd/system
	}{
		{[]string{"plain"}, map[string]string{"multi-user.target.wants/plain.service": "plain.service"}},
		{[]string{"called.service"}, map[string]string{"multi-user.target.wants/plain.service": "plain.service"}},
		{[]string{"getty@.service"}, map[string]string{"getty.target.wants/getty@tty1.service": "getty@.service"}},
		{[]string{"getty@ttyS0.service"}, map[string]string{"getty.target.wants/getty@ttyS0.service": "getty@.service"}},
		{[]string{"worker@red-a.service", "worker@blue.service"}, map[string]string{
			"workers@red-a.target.wants/worker@red-a.service": "worker@.service",
			"multi-user.target.wants/worker@red-a.service":    "worker@.service",
			"workers@blue.target.wants/worker@blue.service":   "worker@.service",
			"multi-user.target.wants/worker@blue.service":     "worker@.service",
		}},
		{[]string{"many.socket"}, map[string]string{
			"sockets.target.wants/many.socket": "many.socket",
			"a.service.requires/many.socket":   "many.socket",
			"b.service.requires/many.socket":   "many.socket",
			"other.socket":                     "many.socket",
			"other.service":                    "many.service",
		}},
	} {
		b := newBuilder(t)
		base := fakeBase(t, b)
		root, closeRoot, err := b.openImage(t.Context(), base.Image.Digest)
		if err != nil {
			t.Fatal(err)
		}
		v, err := newView(root)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time there is nothing to do
			if err := v.enable(c.units); err != nil {
				t.Fatal(err)
			}
		}
		got := make(map[string]string)
		for name, e := range v.top {
			if e.isLink() {
				got[strings.TrimPrefix(name, "etc/systemd/system/")] = strings.TrimPrefix(e.target, "/usr/lib/systemd/system/")
			}
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("links of %v (-want +got):\n%s", c.units, diff)
		}
		closeRoot()
	}
}

func TestEnableReadsDropInsAndReplacesNothing(t *testing.T) {
	b := newBuilder(t)
	base := fakeBase(t, b)
	r := images.DeltaRecipe{
		Base: base.Recipe,
		Files: map[string]images.File{
			"/etc/systemd/system/static.service.d/more.conf": {Content: "[Install]\nAlias=extra.service\n", Mode: 0o644},
		},
		Enable: []string{"static.service"},
	}
	d, err := b.Delta(t.Context(), r, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := "etc/systemd/system/extra.service -> /usr/lib/systemd/system/static.service\n"
	if got := listing(t, b, d.Image); !strings.Contains(got, want) {
		t.Errorf("no link of the drop-in's alias in:\n%s", got)
	}
	r.Files["/etc/systemd/system/extra.service"] = images.File{Content: "[Unit]\n", Mode: 0o644}
	if _, err := b.Delta(t.Context(), r, base, nil); err == nil || !strings.Contains(err.Error(), "would replace") {
		t.Errorf("an alias over a file: got error %v", err)
	}
}

// What a step deleted must stay deleted when a later one makes a directory in its place.
func TestViewOverWhiteouts(t *testing.T) {
	b := newBuilder(t)
	root, closeRoot, err := b.openImage(t.Context(), fakeBase(t, b).Image.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer closeRoot()
	v, err := newView(root)
	if err != nil {
		t.Fatal(err)
	}
	v.top["usr"] = entry{mode: unix.S_IFCHR}
	if _, err := v.readFile("lib/systemd/system/plain.service"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("reading below a whiteout: %v", err)
	}
	if _, _, err := v.put("usr/lib/x", regular("x", 0o644)); err != nil {
		t.Fatal(err)
	}
	if !v.top["usr"].isOpaque() {
		t.Error("a directory in place of a whiteout is not opaque")
	}
	names, err := v.readDir("lib")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"x"}, names); diff != "" {
		t.Errorf("directory made in place of a whiteout (-want +got):\n%s", diff)
	}
}

func TestDiskFull(t *testing.T) {
	b := newBuilder(t)
	base := fakeBase(t, b)
	before := blobs(t, b)
	b.Dir = filepath.Join(b.Dir, "small")
	if err := os.Mkdir(b.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("small", b.Dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(b.Dir, 0); err != nil {
			t.Error(err)
		}
	})
	r := images.DeltaRecipe{Base: base.Recipe, Files: map[string]images.File{
		"/etc/large": {Content: strings.Repeat("x", 1<<20), Mode: 0o644},
	}}
	_, err := b.Delta(t.Context(), r, base, nil)
	checkDiskFull(t, err, "image")
	_, err = b.Base(t.Context(), firstFleet(), nil)
	checkDiskFull(t, err, "packages")
	if diff := cmp.Diff(before, blobs(t, b)); diff != "" {
		t.Errorf("left in the store:\n%s", diff)
	}
	left, err := os.ReadDir(b.Dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left in the scratch directory: %v, %v", left, err)
	}
}

func checkDiskFull(t *testing.T, err error, step string) {
	t.Helper()
	var se *StepError
	if !errors.As(err, &se) || se.Step != step || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got error %v, want a full disk in step %q", err, step)
	}
}

func FuzzParseInstall(f *testing.F) {
	f.Add("[Install]\nWantedBy=a.target b.target\nAlias=x.service\\\n y.service\nAlias=\n", "web@x.service")
	f.Add("[Unit]\n[Install\n=\n[Install]\nAlso=%i%n%%\n", "a-b@.socket")
	f.Add("[Install]\nDefaultInstance=%", "@")
	f.Fuzz(func(t *testing.T, text, unit string) {
		values := make(map[string][]string)
		parseInstall(text, values)
		for key, list := range values {
			for _, v := range list {
				if v == "" || strings.ContainsAny(v, " \t\n") {
					t.Errorf("%s= has the value %q", key, v)
				}
				if got, err := expand(v, unit); err == nil && !strings.Contains(v, "%") && got != v {
					t.Errorf("%q became %q", v, got)
				}
			}
		}
	})
}
