package agent

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
)

// cacheWith is a cache that has the images of an assignment.
func cacheWith(t *testing.T, dir string, a agentapi.Assignment, contents ...string) *cache.Cache {
	t.Helper()
	c, err := cache.Open(dir, nothing)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range []agentapi.Blob{a.Release.Base.Blob, a.Release.Delta.Blob} {
		file, _ := agentapitest.ImageFile([]byte(contents[i]))
		if err := os.WriteFile(c.Path(b.Digest), file, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// TestAMountThatFailsEachTimeIsOneFailure tries as pursue does: the timeline of a boot has room for so many marks.
func TestAMountThatFailsEachTimeIsOneFailure(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	dir := t.TempDir()
	b := &boot{log: nothing, cache: cacheWith(t, dir, a, "base", "delta of web"), rep: newReporter(nil, nothing, agentapi.Report{})}
	if err := os.Remove(filepath.Join(dir, "deltas")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "deltas"), nil, 0o600); err != nil { // where no node delta can be made
		t.Fatal(err)
	}
	var stages []string
	for range 3 {
		m, err := b.activate(t.Context(), a)
		if m != nil || err == nil {
			t.Fatalf("activate: %+v, %v", m, err)
		}
		b.rep.fail(err)
	}
	for _, m := range b.rep.pending() {
		stages = append(stages, string(m.Stage))
	}
	if got := strings.Join(stages, " "); got != "fetch failed" {
		t.Errorf("marks %q, want one failure", got)
	}
}

func TestRefreshResolvLeavesAloneWhatIsNotOurs(t *testing.T) {
	const conf = netup.ResolvConfMark + "nameserver 10.77.0.1\n"
	for _, tt := range []struct{ name, old, conf, want string }{
		{"ours", netup.ResolvConfMark + "nameserver 10.77.0.9\n", conf, conf},
		{"the role's", "nameserver 192.0.2.1\n", conf, "nameserver 192.0.2.1\n"},
		{"nothing to write", netup.ResolvConfMark + "old\n", "", netup.ResolvConfMark + "old\n"},
	} {
		root := t.TempDir()
		name := filepath.Join(root, "etc/resolv.conf")
		if err := os.Mkdir(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(tt.old), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := refreshResolv(root, tt.conf); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if got, err := os.ReadFile(name); err != nil || string(got) != tt.want {
			t.Errorf("%s: %q, want %q; %v", tt.name, got, tt.want, err)
		}
	}
	if err := refreshResolv(t.TempDir(), conf); err != nil {
		t.Errorf("no file: %v", err)
	}
}

// TestADamagedCacheIsOpenedAgain has a file system that became read-only, as the kernel makes one that it finds damaged.
func TestADamagedCacheIsOpenedAgain(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // where the test failed
	b := &boot{log: nothing, cache: cacheWith(t, dir, a, "base", "delta of web"), rep: newReporter(nil, nothing, agentapi.Report{}), unmount: unix.Unmount}
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageCache})
	b.closeDamaged(t.Context(), nil)
	b.closeDamaged(t.Context(), context.Canceled)
	if b.cache == nil {
		t.Fatal("a whole cache was closed")
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if m, err := b.activate(t.Context(), a); m != nil || !errors.Is(err, unix.EROFS) {
		t.Fatalf("activate: %+v, %v", m, err)
	}
	if b.cache != nil || b.rep.has(agentapi.StageCache) {
		t.Error("the next try does not open it again")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("it is still mounted: %v, %v", left, err)
	}
}

func TestCacheDetail(t *testing.T) {
	for want, f := range map[string]disk.Found{
		"found on /dev/sda1":           {Path: "/dev/sda1"},
		"found on /dev/sda1, repaired": {Path: "/dev/sda1", Repaired: true},
		"made on /dev/sda1, anew":      {Path: "/dev/sda1", Made: true, Note: "anew"},
	} {
		if got := cacheDetail(f); got != want {
			t.Errorf("%+v: %q, want %q", f, got, want)
		}
	}
}

// TestABootThatCannotBeCounted has a disk that takes no write any more.
func TestABootThatCannotBeCounted(t *testing.T) {
	var s agentapitest.Server
	a := assigned(&s, "web", 1)
	dir := filepath.Join(t.TempDir(), "cache")
	var said bytes.Buffer
	b := &boot{log: slog.New(slog.NewTextHandler(&said, nil)), cache: cacheWith(t, dir, a, "base", "delta of web")}
	if err := b.begin(a); err != nil {
		t.Fatal(err)
	}
	if r, _ := b.cache.Record(deltaID(a)); r.Used != 1 || r.Attempts != 1 || r.Assignment.Release.ID != a.Release.ID || said.Len() > 0 {
		t.Errorf("remembered %+v, said %q", r, said.String())
	}
	good := func(r *cache.Record) { r.Healthy = r.Used }
	if err := b.cache.Change(deltaID(a), good); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	b.begun = ""
	if err := b.begin(a); err != nil || !strings.Contains(said.String(), "cannot be counted") {
		t.Errorf("a boot into what was good: %v, said %q", err, said.String())
	}
	if err := b.begin(assigned(&s, "idle", 2)); err == nil {
		t.Error("a boot into what was never good goes on uncounted")
	}
}
