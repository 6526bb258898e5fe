package cache

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/digest"
)

// put makes an image whose name is right, and returns it.
func put(t *testing.T, c *Cache, content string) digest.Digest {
	t.Helper()
	d := digest.Of([]byte(content))
	if err := os.WriteFile(c.Path(d), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestRecoverTakesOutWhatARepairLeft has the kinds of damage that a repair hides: other bytes under a right name, a
// directory in the place of a file, flags that nobody set, and files without a name.
func TestRecoverTakesOutWhatARepairLeft(t *testing.T) {
	dir := smallDisk(t, 64<<20) // which has lost+found
	c := open(t, dir)
	good, rotten, wild, flagged := put(t, c, "good"), put(t, c, "rotten"), digest.Of([]byte("wild")), put(t, c, "flagged")
	for _, d := range []digest.Digest{rotten, flagged} {
		if err := os.WriteFile(c.Path(d), []byte("zeros"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	chattr(t, "i", c.Path(flagged))
	for _, d := range []string{filepath.Join(c.Path(wild), "x"), c.path("lost+found/#12/upper/etc")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"lost+found/#12/upper/etc/resolv.conf", "lost+found/#13"} {
		if err := os.WriteFile(c.path(name), []byte("lost"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	chattr(t, "i", c.path("lost+found/#12/upper/etc/resolv.conf"))
	if c.IsDistrusted() {
		t.Fatal("a cache that was not repaired is distrusted")
	}
	if err := Distrust(dir); err != nil {
		t.Fatal(err)
	}
	if c = open(t, dir); !c.IsDistrusted() {
		t.Fatal("the note is gone before a Recover")
	}
	got, err := c.Recover()
	if want := (Recovered{Images: 3, Lost: 2}); err != nil || got != want {
		t.Errorf("Recover: %+v, %v; want %+v", got, err, want)
	}
	if list, err := c.List(); err != nil || len(list) != 1 || list[0] != good {
		t.Errorf("left are %v, want the good one, %s; %v", list, good, err)
	}
	if left, err := os.ReadDir(c.path("lost+found")); err != nil || len(left) != 0 {
		t.Errorf("left in lost+found: %v, %v", left, err)
	}
	if c.IsDistrusted() {
		t.Error("it is distrusted for ever")
	}
}

func TestARecoverThatFailsIsDueAgain(t *testing.T) {
	dir := smallDisk(t, 64<<20)
	c := open(t, dir)
	rotten := put(t, c, "rotten")
	if err := os.WriteFile(c.Path(rotten), []byte("zeros"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Distrust(dir); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Recover(); got.Images != 0 || !errors.Is(err, unix.EROFS) || !c.IsDistrusted() {
		t.Errorf("Recover: %+v, %v; it is due: %v", got, err, c.IsDistrusted())
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	c = open(t, dir)
	if got, err := c.Recover(); got.Images != 1 || err != nil || c.IsDistrusted() || c.Has(rotten, -1) {
		t.Errorf("the next Recover: %+v, %v; it is due: %v", got, err, c.IsDistrusted())
	}
}
