package disk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// usedCache is a cache with a file in it, and its maker, which uses the real tools.
func usedCache(t *testing.T) (Maker, Found) {
	t.Helper()
	m := newLoopDisk(t, 128<<20).maker()
	m.E2fsck = "e2fsck"
	return m, cacheWithFile(t, m)
}

// cacheWithFile has m make a cache, and puts a file into it.
func cacheWithFile(t *testing.T, m Maker) Found {
	t.Helper()
	found, err := m.Ensure(t.Context(), agentapi.Disks{})
	if err != nil {
		t.Fatal(err)
	}
	mounted(t, found.Path, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "x"), []byte("kept"), 0o600); err != nil {
			t.Error(err)
		}
	})
	return Found{Path: found.Path}
}

// mount mounts the cache, reads its file, and unmounts it again.
func mount(t *testing.T, m Maker, found Found) (Found, string, error) {
	t.Helper()
	return mountBy(t, func(dir string) (Found, error) { return m.Mount(t.Context(), found, dir) })
}

func mountBy(t *testing.T, by func(dir string) (Found, error)) (Found, string, error) {
	t.Helper()
	dir := t.TempDir()
	found, err := by(dir)
	if err != nil {
		return found, "", err
	}
	b, readErr := os.ReadFile(filepath.Join(dir, "x"))
	if readErr != nil && !errors.Is(readErr, os.ErrNotExist) {
		t.Error(readErr)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	return found, string(b), nil
}

// tool is a program that stands in for e2fsck.
func tool(t *testing.T, script string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "tool")
	if err := os.WriteFile(name, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

// breakDescriptors overwrites the block group descriptors, without which nothing mounts.
func breakDescriptors(t *testing.T, path string) {
	t.Helper()
	for line := range strings.Lines(run(t, "dumpe2fs", path)) {
		if size, ok := strings.CutPrefix(line, "Block size:"); ok && strings.TrimSpace(size) == "4096" {
			put(t, path, 4096, strings.Repeat("\xa5", 64))
			return
		}
	}
	put(t, path, 2048, strings.Repeat("\xa5", 64))
}

func TestMountOfAWholeCacheChecksNothing(t *testing.T) {
	m, found := usedCache(t)
	m.E2fsck = filepath.Join(t.TempDir(), "not there")
	if got, x, err := mount(t, m, found); err != nil || got != found || x != "kept" {
		t.Errorf("Mount: %+v, %q, %v", got, x, err)
	}
	// The same after a power cut: the image as it is while it is mounted.
	cut := filepath.Join(t.TempDir(), "cut.img")
	mounted(t, found.Path, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "y"), []byte("late"), 0o600); err != nil {
			t.Error(err)
		}
		unix.Sync()
		run(t, "dd", "if="+found.Path, "of="+cut, "bs=1M", "status=none")
	})
	if out := run(t, "dumpe2fs", "-h", cut); !strings.Contains(out, "needs_recovery") {
		t.Fatalf("this is no image of a power cut:\n%s", out)
	}
	dev := strings.TrimSpace(run(t, "losetup", "-f", "--show", cut))
	defer run(t, "losetup", "-d", dev)
	if got, x, err := mount(t, m, Found{Path: dev}); err != nil || got.Repaired || got.Made || x != "kept" {
		t.Errorf("Mount after a power cut: %+v, %q, %v", got, x, err)
	}
}

func TestMountRepairsWhatHasErrors(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, path string)
	}{
		{"the kernel met an error", func(t *testing.T, path string) {
			t.Helper()
			run(t, "debugfs", "-w", "-R", "set_super_value state 3", path)
		}},
		{"and one that takes an answer", func(t *testing.T, path string) {
			t.Helper()
			run(t, "debugfs", "-w", "-R", "set_inode_field lost+found mode 0", path)
			run(t, "debugfs", "-w", "-R", "set_super_value state 3", path)
		}},
		{"it does not mount", breakDescriptors},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, found := usedCache(t)
			tt.spoil(t, found.Path)
			got, x, err := mount(t, m, found)
			if err != nil || got.Made || x != "kept" {
				t.Fatalf("Mount: %+v, %q, %v", got, x, err)
			}
			if is, err := m.look(found.Path); is.hasErrors || err != nil {
				t.Errorf("it has errors still: %v", err)
			}
			run(t, "e2fsck", "-f", "-n", found.Path)
			if again, _, err := mount(t, m, found); again.Repaired || err != nil {
				t.Errorf("it is repaired each time: %+v, %v", again, err)
			}
			if tt.name != "the kernel met an error" && !got.Repaired {
				t.Error("it does not say that it was repaired")
			}
		})
	}
}

func TestMountMakesAnewOnlyWhatNothingRepairs(t *testing.T) {
	m, found := usedCache(t)
	breakDescriptors(t, found.Path)
	m.E2fsck = filepath.Join(t.TempDir(), "not there")
	if got, _, err := mount(t, m, found); err == nil || got.Made {
		t.Errorf("without e2fsck: %+v, %v", got, err)
	}
	m.E2fsck = tool(t, "kill -9 $$")
	if got, _, err := mount(t, m, found); err == nil || got.Made {
		t.Errorf("with one that is killed: %+v, %v", got, err)
	}
	m.E2fsck = tool(t, "exit 4") // it has run, and left errors
	got, x, err := mount(t, m, found)
	if err != nil || !got.Made || x != "" || !strings.Contains(got.Note, "is lost") {
		t.Errorf("Mount: %+v, %q, %v", got, x, err)
	}
	run(t, "e2fsck", "-f", "-n", found.Path)
}

// TestMountMakesNothingAnewForOneFailureOfE2fsck has an e2fsck that can do nothing: for want of memory, or for good.
func TestMountMakesNothingAnewForOneFailureOfE2fsck(t *testing.T) {
	for _, status := range []string{"8", "9"} {
		m, found := usedCache(t)
		broken, whole := tool(t, "echo no memory; exit "+status), "e2fsck"
		for i, tt := range []struct {
			tool, x string
			isMade  bool
		}{{broken, "", false}, {whole, "kept", false}, {broken, "", false}, {broken, "", true}} {
			if i%2 == 0 { // else it is still broken
				breakDescriptors(t, found.Path)
			}
			m.E2fsck = tt.tool
			got, x, err := mount(t, m, found)
			if isFailed := !tt.isMade && tt.x == ""; isFailed != (err != nil) || isFailed && (!errors.Is(err, unix.EUCLEAN) || !strings.Contains(err.Error(), "no memory")) {
				t.Errorf("status %s, try %d: %v", status, i, err)
			}
			if got.Made != tt.isMade || x != tt.x {
				t.Errorf("status %s, try %d: %+v, %q", status, i, got, x)
			}
		}
		if is, err := m.look(found.Path); is.hasFailed || err != nil {
			t.Errorf("the note was left: %v", err)
		}
	}
}

// TestANoteOfAFailureLeavesABootLoaderAlone has bytes where the note would be.
func TestANoteOfAFailureLeavesABootLoaderAlone(t *testing.T) {
	m, found := usedCache(t)
	put(t, found.Path, failedAt+100, "a boot loader")
	breakDescriptors(t, found.Path)
	m.E2fsck = tool(t, "exit 8")
	before := run(t, "sha256sum", found.Path)
	for range 2 {
		if got, _, err := mount(t, m, found); !errors.Is(err, unix.EUCLEAN) || got.Made {
			t.Errorf("Mount: %+v, %v", got, err)
		}
	}
	if run(t, "sha256sum", found.Path) != before {
		t.Error("it was written to")
	}
}

// goneSuperblock makes the cache of one machine, with a file in it, and takes its superblock away.
func goneSuperblock(t *testing.T, d *loopDisk) (Maker, Found) {
	t.Helper()
	m := makerOf(d).as(one)
	m.E2fsck = "e2fsck"
	found := cacheWithFile(t, m)
	put(t, found.Path, 1024, strings.Repeat("\x00", 1024))
	return m, found
}

func TestACacheWithoutItsSuperblockIsRepaired(t *testing.T) {
	for _, make := range [][]string{{"true"}, {"mke2fs", "-q", "-F", "-t", "ext4", "-L", Label}} { // in a partition, on the whole disk
		for _, who := range []struct {
			machine Machine
			spec    agentapi.Disks
			note    string
		}{{one, agentapi.Disks{}, ""}, {one, agentapi.Disks{Take: true}, ""}, {two, agentapi.Disks{Take: true}, one.MAC}} {
			d := diskWith(t, make...)
			m, damaged := goneSuperblock(t, d)
			before := run(t, "sha256sum", d.dev)
			if got, err := m.as(two).Ensure(t.Context(), agentapi.Disks{}); !errors.Is(err, ErrNoDisk) || !strings.Contains(err.Error(), one.MAC) {
				t.Errorf("%s: another machine's: %+v, %v", make[0], got, err)
			}
			if run(t, "sha256sum", d.dev) != before {
				t.Fatal("another machine wrote to the disk")
			}
			m = m.as(who.machine)
			found, err := m.Ensure(t.Context(), who.spec)
			if err != nil || found.Made || found.Path != damaged.Path || !strings.Contains(found.Note, who.note) {
				t.Fatalf("%s: Ensure: %+v, %v", make[0], found, err)
			}
			if got, x, err := mount(t, m, found); err != nil || !got.Repaired || got.Made || x != "kept" {
				t.Errorf("%s: Mount: %+v, %q, %v", make[0], got, x, err)
			}
			run(t, "e2fsck", "-f", "-n", found.Path)
			if got, err := m.Ensure(t.Context(), agentapi.Disks{}); err != nil || got != damaged {
				t.Errorf("%s: repaired: %+v, %v", make[0], got, err)
			}
		}
	}
}

// TestACacheWithoutAnySuperblockIsMadeAnew has nothing left that e2fsck could begin with, and a first mke2fs that is killed.
func TestACacheWithoutAnySuperblockIsMadeAnew(t *testing.T) {
	d := diskWith(t, "true")
	m, found := goneSuperblock(t, d)
	run(t, "sh", "-c", `tr '\0' x </dev/zero | dd of="$0" bs=1M seek=1 iflag=fullblock count=124 conv=notrunc status=none`, found.Path)
	if got, _, err := mount(t, m, found); !errors.Is(err, unix.EINVAL) || got.Made {
		t.Fatalf("Mount: %+v, %v", got, err)
	}
	m.Mke2fs = tool(t, "kill -9 $$")
	if got, _, err := mount(t, m, found); err == nil || got.Made {
		t.Errorf("with an mke2fs that is killed: %+v, %v", got, err)
	}
	if disks, err := m.Scanner.Scan(); err != nil || len(disks) != 1 || len(disks[0].Parts) != 1 || disks[0].Parts[0].Holds != Unknown {
		t.Errorf("a cache that was not made to the end: %+v, %v", disks, err)
	}
	m.Mke2fs = "mke2fs"
	if found, err := m.Ensure(t.Context(), agentapi.Disks{}); err != nil || !found.Made {
		t.Errorf("Ensure: %+v, %v", found, err)
	}
	put(t, found.Path, 1024, strings.Repeat("\x00", 1024))
	m.E2fsck = tool(t, "exit 4")
	got, x, err := mount(t, m, found)
	if err != nil || !got.Made || x != "" || !strings.Contains(got.Note, "is lost") {
		t.Errorf("Mount: %+v, %q, %v", got, x, err)
	}
	if again, err := m.Ensure(t.Context(), agentapi.Disks{}); err != nil || again != found {
		t.Errorf("Ensure after all: %+v, %v", again, err)
	}
}

// TestMountLeavesAloneWhatAnotherKernelCouldMount has a feature that the kernel does not know.
func TestMountLeavesAloneWhatAnotherKernelCouldMount(t *testing.T) {
	m, found := usedCache(t)
	m.E2fsck = tool(t, "exit 8")
	run(t, "debugfs", "-w", "-R", "set_super_value feature_incompat 0x800002c2", found.Path)
	before := run(t, "sha256sum", found.Path)
	if got, _, err := mount(t, m, found); !errors.Is(err, unix.EINVAL) || got.Made {
		t.Errorf("Mount: %+v, %v", got, err)
	}
	if run(t, "sha256sum", found.Path) != before {
		t.Error("it was written to")
	}
}
