package disk

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// makerOf sees these disks, and those that are attached later.
func makerOf(disks ...*loopDisk) Maker {
	isOne := func(n string) bool { return slices.ContainsFunc(disks, func(d *loopDisk) bool { return d.name == n }) }
	return Maker{Scanner: Scanner{Keep: isOne}, Mke2fs: "mke2fs", MinSize: 32 << 20, Log: slog.New(slog.DiscardHandler)}
}

// diskWith is a disk with a cache, or with what make makes on it.
func diskWith(t *testing.T, make ...string) *loopDisk {
	t.Helper()
	d := newLoopDisk(t, 128<<20)
	if len(make) > 0 {
		run(t, make[0], append(make[1:], d.dev)...)
		return d
	}
	if _, err := d.maker().Ensure(t.Context(), agentapi.Disks{}); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestALateCacheIsFoundAndNoOtherDiskTaken has the cache's disk show after another one that could be used.
func TestALateCacheIsFoundAndNoOtherDiskTaken(t *testing.T) {
	for _, tt := range []struct {
		name string
		make []string
		spec agentapi.Disks
	}{
		{"a blank disk", []string{"true"}, agentapi.Disks{}},
		{"a disk that may be taken", []string{"mke2fs", "-q", "-F", "-t", "ext4"}, agentapi.Disks{Take: true}},
		{"an unfinished cache", []string{"sgdisk", "-n", "1:1M:+64M", "-c", "1:" + Label}, agentapi.Disks{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			other, late := diskWith(t, tt.make...), diskWith(t)
			late.detach(t)
			late.name = ""
			before := run(t, "sha256sum", other.dev)
			m := makerOf(other, late)
			m.Settle = time.Hour // a test that waited for this would fail
			attached := false
			m.Rescan = func() {
				if !attached {
					late.attach(t)
					attached = true
				}
			}
			found, err := m.Ensure(t.Context(), tt.spec)
			if !attached {
				late.attach(t) // the cleanup detaches it
			}
			if err != nil || found.Made || found.Path != late.dev+"p1" {
				t.Errorf("Ensure: %+v, %v; the cache is on %s", found, err, late.dev)
			}
			if run(t, "sha256sum", other.dev) != before {
				t.Error("the other disk was written to")
			}
		})
	}
}

// TestNamesThatChangedTakeNoOtherDisk has the fleet name the disk that the cache is on, as it was called at the last boot.
func TestNamesThatChangedTakeNoOtherDisk(t *testing.T) {
	data, cache := diskWith(t, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "photos"), diskWith(t)
	before := run(t, "sha256sum", data.dev)
	found, err := makerOf(data, cache).Ensure(t.Context(), agentapi.Disks{Take: true, Device: data.dev})
	if err != nil || found.Made || found.Path != cache.dev+"p1" || !strings.Contains(found.Note, "not on "+data.dev) {
		t.Errorf("Ensure: %+v, %v; the cache is on %s", found, err, cache.dev)
	}
	if run(t, "sha256sum", data.dev) != before {
		t.Error("the other disk was written to")
	}
}

// TestADiskThatCannotBeReadMayHaveTheCache has the cache's device answer with an error.
func TestADiskThatCannotBeReadMayHaveTheCache(t *testing.T) {
	for _, make := range [][]string{{"true"}, {"mke2fs", "-q", "-F", "-t", "ext4"}, {"sgdisk", "-n", "1:1M:+64M", "-c", "1:" + Label}} {
		other, cache := diskWith(t, make...), diskWith(t)
		before := run(t, "sha256sum", other.dev)
		m := makerOf(other, cache)
		m.Scanner.Dev = t.TempDir()
		if err := os.Symlink(other.dev, filepath.Join(m.Scanner.Dev, other.name)); err != nil {
			t.Fatal(err)
		}
		found, err := m.Ensure(t.Context(), agentapi.Disks{Take: true})
		if !errors.Is(err, ErrNoDisk) || !strings.Contains(err.Error(), cache.name+" cannot be read") {
			t.Errorf("%s: Ensure: %+v, %v", make[0], found, err)
		}
		if run(t, "sha256sum", other.dev) != before {
			t.Errorf("%s: the other disk was written to", make[0])
		}
	}
}

// A fakeMachine has disks that are files: they can be looked at, not be made a cache on.
type fakeMachine struct {
	t        *testing.T
	sys, dev string
}

func newFakeMachine(t *testing.T) *fakeMachine {
	t.Helper()
	f := &fakeMachine{t: t, sys: t.TempDir(), dev: t.TempDir()}
	if err := os.Mkdir(filepath.Join(f.sys, "block"), 0o700); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fakeMachine) add(name string, size int64) {
	f.t.Helper()
	dir := filepath.Join(f.sys, "block", name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		f.t.Fatal(err)
	}
	for path, content := range map[string]string{filepath.Join(dir, "size"): strconv.FormatInt(size/512, 10), filepath.Join(f.dev, name): ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			f.t.Fatal(err)
		}
	}
	if err := os.Truncate(filepath.Join(f.dev, name), size); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeMachine) maker() Maker {
	return Maker{Scanner: Scanner{Sys: f.sys, Dev: f.dev}, Settle: 6 * time.Second, Log: slog.New(slog.DiscardHandler)}
}

// TestSettledWaitsFromTheLastChange runs on a clock of its own.
func TestSettledWaitsFromTheLastChange(t *testing.T) {
	for _, tt := range []struct {
		name        string
		spec        agentapi.Disks
		change      func(*fakeMachine) // after 4 s
		disks       string
		least, most time.Duration
	}{
		{"nothing changes", agentapi.Disks{}, func(*fakeMachine) {}, "sda", 6 * time.Second, 7 * time.Second},
		{"a disk shows", agentapi.Disks{}, func(f *fakeMachine) { f.add("sdb", 64<<20) }, "sda sdb", 10 * time.Second, 11 * time.Second},
		{"a disk is written to by somebody", agentapi.Disks{}, func(f *fakeMachine) { put(f.t, filepath.Join(f.dev, "sda"), 0, claimText) }, "sda", 12 * time.Second, 13 * time.Second},
		{"a cache shows", agentapi.Disks{}, func(f *fakeMachine) {
			f.add("sdb", 64<<20)
			put(f.t, filepath.Join(f.dev, "sdb"), 1024+56, "\x53\xef")
			put(f.t, filepath.Join(f.dev, "sdb"), 1024+120, Label)
		}, "sda sdb", 4 * time.Second, 5 * time.Second},
		{"named as it may be called in this boot only", agentapi.Disks{Device: "/dev/sda"}, func(*fakeMachine) {}, "sda", 6 * time.Second, 7 * time.Second},
		{"named by what it is", agentapi.Disks{Device: byID + "virtio-S1"}, func(*fakeMachine) {}, "sda", 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFakeMachine(t)
			f.add("sda", 64<<20)
			if err := os.WriteFile(filepath.Join(f.sys, "block/sda/serial"), []byte("S1\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				began, isChanged := time.Now(), false
				m := f.maker()
				m.Rescan = func() {
					if !isChanged && time.Since(began) > 4*time.Second {
						isChanged = true
						tt.change(f)
					}
				}
				disks, err := m.settled(t.Context(), tt.spec)
				if took := time.Since(began); err != nil || names(disks) != strings.ReplaceAll(tt.disks, " ", ", ") || took < tt.least || took > tt.most {
					t.Errorf("settled on %q after %v: %v; want %q after %v", names(disks), took, err, tt.disks, tt.least)
				}
			})
		})
	}
}

func TestWaitingForDisksEndsWithItsContext(t *testing.T) {
	d := diskWith(t, "true")
	before := run(t, "sha256sum", d.dev)
	ctx, cancel := context.WithCancel(t.Context())
	m := makerOf(d)
	m.Settle, m.Rescan = time.Hour, cancel
	if found, err := m.Ensure(ctx, agentapi.Disks{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Ensure: %+v, %v", found, err)
	}
	if run(t, "sha256sum", d.dev) != before {
		t.Error("the disk was written to")
	}
}

func TestFindMakesNothing(t *testing.T) {
	blank := diskWith(t, "true")
	before := run(t, "sha256sum", blank.dev)
	if found, err := makerOf(blank).Find(); !errors.Is(err, ErrNoDisk) {
		t.Errorf("on a blank disk: %+v, %v", found, err)
	}
	if run(t, "sha256sum", blank.dev) != before {
		t.Error("the blank disk was written to")
	}
	ours := diskWith(t)
	if found, err := makerOf(blank, ours).Find(); err != nil || found.Made || found.Path != ours.dev+"p1" {
		t.Errorf("our cache: %+v, %v", found, err)
	}
}
