package filediff_test

import (
	"bytes"
	"io"
	"io/fs"
	"os"
	"testing"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images/filediff"
)

// A spec is a file of a test's image.
type spec struct {
	name, text, target string
	mode               fs.FileMode
	uid                int
	white, opaque      bool
}

// image makes an EROFS image.
func image(t *testing.T, files ...spec) fs.FS {
	t.Helper()
	f, err := os.Create(t.TempDir() + "/image")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	w := erofs.Create(f, erofs.WithBuildTime(0, 0))
	for _, s := range files {
		switch {
		case s.white:
			err = w.Mknod(s.name, 0o020000, 0)
		case s.target != "":
			err = w.Symlink(s.target, s.name)
		case s.mode.IsDir():
			err = w.Mkdir(s.name, s.mode.Perm())
		default:
			var out io.WriteCloser
			if out, err = w.Create(s.name); err == nil {
				_, err = out.Write([]byte(s.text))
			}
			if err == nil {
				err = out.Close()
			}
			if err == nil && s.mode != 0 {
				err = w.Chmod(s.name, s.mode)
			}
		}
		if err == nil && s.uid != 0 {
			err = w.Chown(s.name, s.uid, 0)
		}
		if err == nil && s.opaque {
			err = w.Setxattr(s.name, "trusted.overlay.opaque", "y")
		}
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	root, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func short(t *testing.T, before, after []fs.FS) []string {
	t.Helper()
	changes, err := filediff.Diff(t.Context(), before, after)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range changes {
		got = append(got, c.Change+" "+c.Path)
	}
	return got
}

const dir = fs.ModeDir | 0o755

func TestDiff(t *testing.T) {
	long := string(bytes.Repeat([]byte("x"), 100_000))
	a := image(t, spec{name: "etc", mode: dir}, spec{name: "etc/same", text: long}, spec{name: "etc/text", text: long + "a"},
		spec{name: "etc/gone", text: "g"}, spec{name: "etc/mode", text: "m"}, spec{name: "etc/owner", text: "o"}, spec{name: "etc/link", target: "same"},
		spec{name: "etc/kind", text: "k"})
	b := image(t, spec{name: "etc", mode: dir}, spec{name: "etc/same", text: long}, spec{name: "etc/text", text: long + "b"},
		spec{name: "etc/new", text: "n"}, spec{name: "etc/mode", text: "m", mode: fs.ModeSetuid | 0o755}, spec{name: "etc/owner", text: "o", uid: 7}, spec{name: "etc/link", target: "text"},
		spec{name: "etc/kind", mode: dir})
	want := []string{
		"removed /etc/gone", "changed /etc/kind", "changed /etc/link", "changed /etc/mode", "added /etc/new", "changed /etc/owner", "changed /etc/text",
	}
	if d := cmp.Diff(want, short(t, []fs.FS{a}, []fs.FS{b})); d != "" {
		t.Errorf("changes (-want +got):\n%s", d)
	}
	if got := short(t, []fs.FS{a}, []fs.FS{a}); got != nil {
		t.Errorf("an image differs from itself: %v", got)
	}
	changes, err := filediff.Diff(t.Context(), []fs.FS{a}, []fs.FS{b})
	if err != nil {
		t.Fatal(err)
	}
	mode := filediff.Change{
		Path: "/etc/mode", Change: filediff.Changed,
		Before: &filediff.Attr{Mode: "-rw-r--r--", Size: 1}, After: &filediff.Attr{Mode: "urwxr-xr-x", Size: 1},
	}
	if d := cmp.Diff(mode, changes[3]); d != "" {
		t.Errorf("a change (-want +got):\n%s", d)
	}
}

func TestLayersAreLaidOverOneAnother(t *testing.T) {
	base := image(t, spec{name: "a", mode: dir}, spec{name: "a/deleted", text: "d"}, spec{name: "a/kept", text: "k"},
		spec{name: "b", mode: dir}, spec{name: "b/hidden", text: "h"}, spec{name: "c", mode: dir}, spec{name: "c/in", text: "c"}, spec{name: "d", text: "d"})
	delta := image(t, spec{name: "a", mode: dir}, spec{name: "a/deleted", white: true}, spec{name: "a/more", text: "m"},
		spec{name: "b", mode: dir, opaque: true}, spec{name: "b/instead", text: "i"}, spec{name: "c", white: true}, spec{name: "d", text: "D"})
	want := []string{
		"removed /a/deleted", "added /a/more", "removed /b/hidden", "added /b/instead", "removed /c", "removed /c/in", "changed /d",
	}
	if d := cmp.Diff(want, short(t, []fs.FS{base}, []fs.FS{base, delta})); d != "" {
		t.Errorf("changes (-want +got):\n%s", d)
	}
}
