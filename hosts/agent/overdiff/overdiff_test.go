package overdiff_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/overdiff"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// TestDiff holds the list against what was done to a real overlay.
func TestDiff(t *testing.T) {
	dir := t.TempDir()
	base, role, upper, work, root := filepath.Join(dir, "base"), filepath.Join(dir, "role"), filepath.Join(dir, "upper"), filepath.Join(dir, "work"), filepath.Join(dir, "root")
	write(t, base, "etc/a", "a\n", "etc/b", "b\n", "etc/same", "same\n", "usr/x/1", "1", "usr/x/2", "2", "opt/gone", "hidden below the role")
	write(t, role, "etc/b", "role\n", "srv/r", "r")
	for _, d := range []string{upper, work, root, filepath.Join(role, "opt")} {
		must(t, os.MkdirAll(d, 0o755))
	}
	must(t, unix.Mknod(filepath.Join(role, "opt/gone"), unix.S_IFCHR, 0))
	must(t, unix.Mount("overlay", root, "overlay", 0, fmt.Sprintf("lowerdir=%s:%s,upperdir=%s,workdir=%s", role, base, upper, work)))
	t.Cleanup(func() { must(t, unix.Unmount(root, 0)) })
	seeds := map[string]string{"/etc/hostname": "n1\n", "/etc/hosts": "localhost\n", "/etc/lost": "x", "/var/deep/seed": "s"}
	for path, text := range seeds {
		write(t, root, path, text)
	}

	write(t, root, "etc/b", "mine\n", "etc/hosts", "other\n", "new/dir/f", "12345", "opt/gone", "back")
	must(t, os.Remove(filepath.Join(root, "etc/a")))
	must(t, os.Remove(filepath.Join(root, "etc/lost")))
	must(t, os.RemoveAll(filepath.Join(root, "usr/x")))
	write(t, root, "usr/x/3", "3")
	must(t, os.Symlink("b", filepath.Join(root, "etc/link")))
	must(t, os.Chmod(filepath.Join(root, "srv/r"), 0o600))
	f, err := os.OpenFile(filepath.Join(root, "etc/same"), os.O_RDWR, 0) // is copied up, and not changed
	must(t, err)
	must(t, f.Close())
	write(t, root, "tmp1", "x")
	must(t, os.Remove(filepath.Join(root, "tmp1")))

	got, err := overdiff.Stack{Upper: upper, Lower: []string{role, base}, Seeds: seeds}.Diff(t.Context())
	must(t, err)
	want := agentapi.DeltaDiff{
		DeltaCount: agentapi.DeltaCount{Changes: 12, Bytes: 5 + 6 + 5 + 4 + 1 + 1},
		List: []agentapi.DeltaChange{
			{Path: "/etc/a", Kind: "removed"},
			{Path: "/etc/b", Kind: "changed", Type: "file", Size: 5},
			{Path: "/etc/hosts", Kind: "changed", Type: "file", Size: 6},
			{Path: "/etc/link", Kind: "added", Type: "link"},
			{Path: "/etc/lost", Kind: "removed"},
			{Path: "/new", Kind: "added", Type: "dir"},
			{Path: "/new/dir", Kind: "added", Type: "dir"},
			{Path: "/new/dir/f", Kind: "added", Type: "file", Size: 5},
			{Path: "/opt/gone", Kind: "added", Type: "file", Size: 4},
			{Path: "/srv/r", Kind: "changed", Type: "file", Size: 1},
			{Path: "/usr/x", Kind: "changed", Type: "dir"},
			{Path: "/usr/x/3", Kind: "added", Type: "file", Size: 1},
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("diff (-want +got):\n%s", d)
	}
}

// TestDiffIsBounded wants the list to end, and the count not to.
func TestDiffIsBounded(t *testing.T) {
	upper := t.TempDir()
	for i := range agentapi.MaxDeltaChanges + 7 {
		write(t, upper, fmt.Sprintf("f%d", i), "")
	}
	d, err := overdiff.Stack{Upper: upper, Lower: []string{t.TempDir()}}.Diff(t.Context())
	must(t, err)
	if len(d.List) != agentapi.MaxDeltaChanges || d.More != 7 || d.Changes != agentapi.MaxDeltaChanges+7 {
		t.Errorf("got %d listed, %d more, %d in all", len(d.List), d.More, d.Changes)
	}
}

func write(t *testing.T, root string, files ...string) {
	t.Helper()
	for i := 0; i < len(files); i += 2 {
		name := filepath.Join(root, files[i])
		must(t, os.MkdirAll(filepath.Dir(name), 0o755))
		must(t, os.WriteFile(name, []byte(files[i+1]), 0o644))
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
