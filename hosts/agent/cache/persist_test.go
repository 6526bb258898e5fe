package cache

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// TestKeep keeps one directory for each host and path, from when it was seeded on.
func TestKeep(t *testing.T) {
	c, err := Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	keep := func(host, path string, fresh bool) *Kept {
		t.Helper()
		k, err := c.Keep(host, path)
		if err != nil || k.Fresh != fresh {
			t.Fatalf("host %s, %s: fresh %v, %v; want fresh %v", host, path, k.Fresh, err, fresh)
		}
		return k
	}
	k := keep("n1", "/var/lib/x", true)
	for _, name := range []string{"a/b", "a/c", "d"} {
		if err := os.MkdirAll(filepath.Join(k.Data, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	k = keep("n1", "/var/lib/x", true) // a boot was cut before it was seeded
	if _, err := os.Stat(filepath.Join(k.Data, "d")); err == nil {
		t.Error("what a cut boot left is there")
	}
	if err := os.MkdirAll(filepath.Join(k.Data, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	k.Order = "first"
	if err := k.Seeded(); err != nil {
		t.Fatal(err)
	}
	if k = keep("n1", "/var/lib/x", false); k.Order != "first" {
		t.Errorf("order %q, want first", k.Order)
	}
	keep("n2", "/var/lib/x", true)
	keep("n1", "/var/lib/y", true)
	for _, bad := range []string{"", "/", "a", "/a/../b"} {
		if _, err := c.Keep("n1", bad); err == nil {
			t.Errorf("keeping %q is no error", bad)
		}
	}
	if fresh, err := k.Drop([]string{"/var/lib/x/a/b", "/var/lib/xy", "/etc"}); fresh || err != nil {
		t.Errorf("dropping what is below: %v, %v", fresh, err)
	}
	if _, err := os.Stat(filepath.Join(k.Data, "a/b")); err == nil {
		t.Error("what was dropped is there")
	}
	for _, p := range []string{"/var/lib/x", "/var/lib", "/var"} {
		if fresh, err := k.Drop([]string{p}); !fresh || err != nil {
			t.Errorf("dropping %s: %v, %v; want all of it to go", p, fresh, err)
		}
	}
}
