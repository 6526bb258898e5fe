package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
)

// rottenCache is a cache that a repair left with a base that has other bytes, and two files without a name.
func rottenCache(t *testing.T) (dir string, a agentapi.Assignment) {
	t.Helper()
	var s agentapitest.Server
	a, dir = assigned(&s, "web", 1), t.TempDir()
	cacheWith(t, dir, a, "rot!", "delta of web")
	if err := os.Mkdir(filepath.Join(dir, "lost+found"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"#12", "#13"} {
		if err := os.WriteFile(filepath.Join(dir, "lost+found", name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, a
}

// wantRecovered wants that a rottenCache has only what is right.
func wantRecovered(t *testing.T, c *cache.Cache, a agentapi.Assignment, found disk.Found) {
	t.Helper()
	want := "found on /dev/sda1, repaired, broken images removed: 1, files without a name removed from lost+found: 2"
	if diff := cmp.Diff(want, cacheDetail(found)); diff != "" {
		t.Errorf("what it says (-want +got):\n%s", diff)
	}
	if c.Has(a.Release.Base.Digest, -1) || !c.Has(a.Release.Delta.Digest, -1) {
		t.Errorf("the broken base is there: %v; the delta: %v", c.Has(a.Release.Base.Digest, -1), c.Has(a.Release.Delta.Digest, -1))
	}
	if left, err := os.ReadDir(filepath.Join(c.Dir(), "lost+found")); err != nil || len(left) != 0 {
		t.Errorf("left in lost+found: %v, %v", left, err)
	}
}

func TestARepairedCacheIsLookedThroughOnce(t *testing.T) {
	dir, a := rottenCache(t)
	found := disk.Found{Path: "/dev/sda1"}
	if c, err := openMounted(dir, &found, nothing); err != nil || !c.Has(a.Release.Base.Digest, -1) || found.Repaired {
		t.Fatalf("a cache that was not repaired is hashed: %+v, %v", found, err)
	}
	found.Repaired = true
	c, err := openMounted(dir, &found, nothing)
	if err != nil {
		t.Fatal(err)
	}
	wantRecovered(t, c, a, found)
	again := disk.Found{Path: "/dev/sda1"}
	if _, err := openMounted(dir, &again, nothing); err != nil || cacheDetail(again) != "found on /dev/sda1" {
		t.Errorf("the next boot: %q, %v", cacheDetail(again), err)
	}
}

// TestARepairIsRememberedUntilTheCacheWasLookedThrough has a boot that ends after the repair; e2fsck finds nothing at the
// next one.
func TestARepairIsRememberedUntilTheCacheWasLookedThrough(t *testing.T) {
	dir, a := rottenCache(t)
	// The cache does not open: the directory of the transfers is a file.
	tmp := filepath.Join(dir, "images/tmp")
	if err := os.Remove(tmp); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tmp, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	found := disk.Found{Path: "/dev/sda1", Repaired: true}
	if _, err := openMounted(dir, &found, nothing); err == nil {
		t.Fatal("a cache was opened that has a file for a directory")
	}
	if err := os.Remove(tmp); err != nil {
		t.Fatal(err)
	}
	found = disk.Found{Path: "/dev/sda1"}
	c, err := openMounted(dir, &found, nothing)
	if err != nil {
		t.Fatal(err)
	}
	wantRecovered(t, c, a, found)
}

// brokenImage is a cache on a file system of its own, whose base is an EROFS image with a wrong checksum, and the error
// of its mount.
func brokenImage(t *testing.T) (b *boot, blobs []agentapi.Blob, why error) {
	t.Helper()
	var s agentapitest.Server
	a, dir := assigned(&s, "web", 1), t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // where the cache was not closed
	image := make([]byte, 4096)
	copy(image[1024:], "\xe2\xe1\xf5\xe0\x99\x99\x99\x99\x01\x00\x00\x00\x0c") // magic, checksum, that it has one, 1<<12 bytes a block
	b = &boot{log: nothing, cache: cacheWith(t, dir, a, string(image), "delta of web"), rep: newReporter(nil, nothing, agentapi.Report{}), unmount: unix.Unmount}
	mnt := t.TempDir()
	why = rootfs.Mount(rootfs.Spec{Base: rootfs.Image{File: b.cache.Path(a.Release.Base.Digest)}, BaseDir: mnt})
	if !errors.Is(why, rootfs.ErrImage) || !errors.Is(why, unix.EBADMSG) {
		t.Fatalf("mounting the broken image: %v", why)
	}
	return b, []agentapi.Blob{a.Release.Base.Blob, a.Release.Delta.Blob}, why
}

func TestABrokenImageIsNoDamagedCache(t *testing.T) {
	b, blobs, why := brokenImage(t)
	err := b.dropBroken(blobs, why)
	b.closeDamaged(t.Context(), err)
	if b.cache == nil || !errors.Is(err, why) {
		t.Fatalf("the cache was closed, for %v", err)
	}
	if b.cache.Has(blobs[0].Digest, -1) || !b.cache.Has(blobs[1].Digest, -1) {
		t.Error("not the broken image, and it alone, is gone")
	}
}

// TestACacheThatKeepsABrokenImageIsDamaged has one that became read-only: the image cannot be taken out.
func TestACacheThatKeepsABrokenImageIsDamaged(t *testing.T) {
	b, blobs, why := brokenImage(t)
	if err := unix.Mount("", b.cache.Dir(), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	err := b.dropBroken(blobs, why)
	if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), why.Error()) {
		t.Errorf("taking it out: %v", err)
	}
	b.closeDamaged(t.Context(), err)
	if b.cache != nil {
		t.Error("the next try does not open the cache again")
	}
}
