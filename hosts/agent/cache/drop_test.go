package cache

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// TestDrop drops paths of a delta, and none but those.
func TestDrop(t *testing.T) {
	c, err := Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	d, err := c.Delta("aa")
	if err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "outside")
	for _, name := range []string{d.Upper + "/a/b/c", d.Upper + "/a/bb", outside + "/x"} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, d.Upper+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := d.Drop([]string{"/a/b", "/link/x", "/not/there", "/a/bb/below"}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{d.Upper + "/a/b": false, d.Upper + "/a/bb": true, outside + "/x": true, d.Upper + "/link": true} {
		if _, err := os.Lstat(name); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", name, err == nil, want)
		}
	}
	for _, bad := range []string{"a", "/", "/../x", "/a/../b", ""} {
		if d.Drop([]string{bad}) == nil {
			t.Errorf("dropping %q is no error", bad)
		}
	}
}

// TestOrderIsKept wants a delta to know which order it followed, and an unseeded one to be made anew.
func TestOrderIsKept(t *testing.T) {
	c, err := Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	d, err := c.Delta("aa")
	if err != nil {
		t.Fatal(err)
	}
	d.Order = "first"
	if err := d.Seeded(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.Upper+"/kept", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if d, err = c.Delta("aa"); err != nil || d.Fresh || d.Order != "first" {
		t.Fatalf("got fresh %v, order %q, error %v", d.Fresh, d.Order, err)
	}
	if err := c.Unseed("aa"); err != nil {
		t.Fatal(err)
	}
	if d, err = c.Delta("aa"); err != nil || !d.Fresh || d.Order != "" {
		t.Fatalf("unseeded: got fresh %v, order %q, error %v", d.Fresh, d.Order, err)
	}
	if _, err := os.Lstat(d.Upper + "/kept"); err == nil {
		t.Error("what was in the delta is there after it was unseeded")
	}
}
