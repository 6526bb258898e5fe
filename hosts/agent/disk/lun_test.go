package disk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

const lunSize = 64 << 20

func TestEnsureLUNMakesANodeDiskOnceAndKeepsIt(t *testing.T) {
	d := newLoopDisk(t, lunSize)
	m := d.maker()
	found, err := m.EnsureLUN(t.Context(), d.dev, lunSize)
	if err != nil || found != (Found{Path: d.dev, Made: true}) {
		t.Fatalf("EnsureLUN: %+v, %v", found, err)
	}
	mounted(t, d.dev, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "x"), []byte("kept"), 0o600); err != nil {
			t.Error(err)
		}
	})
	found, err = m.EnsureLUN(t.Context(), d.dev, lunSize)
	if err != nil || found != (Found{Path: d.dev}) {
		t.Fatalf("EnsureLUN again: %+v, %v", found, err)
	}
	dir := t.TempDir()
	if _, err = m.Mount(t.Context(), found, dir); err != nil { // nobody's, and so everybody's
		t.Fatal(err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	mounted(t, d.dev, func(dir string) {
		if b, err := os.ReadFile(filepath.Join(dir, "x")); string(b) != "kept" {
			t.Errorf("the node disk lost its content: %v", err)
		}
	})
}

// mkfs leaves the superblock to the end: what was broken off before has no name, and is made again.
func TestEnsureLUNFinishesWhatAPowerCutLeft(t *testing.T) {
	d := newLoopDisk(t, lunSize)
	put(t, d.dev, 4096, "inode tables and the like")
	found, err := d.maker().EnsureLUN(t.Context(), d.dev, lunSize)
	if err != nil || found != (Found{Path: d.dev, Made: true, Note: "which held unknown data"}) {
		t.Errorf("EnsureLUN: %+v, %v", found, err)
	}
}

func TestEnsureLUNOverwritesNothingWithAName(t *testing.T) {
	d := newLoopDisk(t, lunSize)
	writeTable(t, d.file, 512)
	before := identify(t, d.dev)
	if found, err := d.maker().EnsureLUN(t.Context(), d.dev, lunSize); !errors.Is(err, ErrHolds) {
		t.Errorf("EnsureLUN of a partition table: %+v, %v", found, err)
	}
	run(t, "mkfs.ext4", "-q", "-F", d.dev) // another one's, without our label
	if found, err := d.maker().EnsureLUN(t.Context(), d.dev, lunSize); !errors.Is(err, ErrHolds) {
		t.Errorf("EnsureLUN of another's ext4 (before: %s): %+v, %v", before, found, err)
	}
}

func TestTrimGivesSpaceBack(t *testing.T) {
	d := newLoopDisk(t, lunSize)
	if _, err := d.maker().EnsureLUN(t.Context(), d.dev, lunSize); err != nil {
		t.Fatal(err)
	}
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(d.file, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	mounted(t, d.dev, func(dir string) {
		const size = 16 << 20
		big := filepath.Join(dir, "big")
		f, err := os.Create(big)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(i)
		}
		_, err = f.Write(b)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
		full := blocks()
		if err := os.Remove(big); err != nil {
			t.Fatal(err)
		}
		unix.Sync()
		if err := Trim(dir); err != nil {
			t.Fatal(err)
		}
		if now := blocks(); full-now < size/2 {
			t.Errorf("the disk has %d bytes of %d after the removal of %d", now, full, size)
		}
	})
}
