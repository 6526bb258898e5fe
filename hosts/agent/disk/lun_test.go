package disk

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
	if got, x, err := mountLUN(t, m, found, lunSize); err != nil || got != found || x != "kept" {
		t.Errorf("MountLUN: %+v, %q, %v", got, x, err)
	}
}

// mkfs leaves the superblock to the end: what was broken off before has no name, but says that it was to be made.
func TestEnsureLUNFinishesWhatAPowerCutLeft(t *testing.T) {
	for _, script := range []string{
		"exit 1", // the cut came before it wrote anything
		`for a; do case $a in /dev/*) dev=$a;; esac; done; mke2fs "$@" && dd if=/dev/zero of="$dev" bs=4096 count=1 conv=notrunc status=none
		for n in 8193 24577 40961 57345; do dd if=/dev/zero of="$dev" bs=1024 seek=$n count=1 conv=notrunc status=none; done; exit 1`,
	} {
		d := newLoopDisk(t, lunSize)
		m := d.maker()
		m.Mke2fs = tool(t, script)
		if _, err := m.EnsureLUN(t.Context(), d.dev, lunSize); err == nil {
			t.Fatal("the tool failed, and the disk is made")
		}
		m.Mke2fs = d.maker().Mke2fs
		found, err := m.EnsureLUN(t.Context(), d.dev, lunSize)
		if err != nil || found != (Found{Path: d.dev, Made: true, Note: "which was not made to the end"}) {
			t.Errorf("EnsureLUN: %+v, %v", found, err)
		}
		put(t, d.dev, 0, strings.Repeat("\xa5", 128<<10))
		for n := int64(8193); n < lunSize>>10; n += 8192 {
			put(t, d.dev, n<<10, strings.Repeat("\xa5", 1024))
		}
		if found, err := m.EnsureLUN(t.Context(), d.dev, lunSize); !errors.Is(err, ErrHolds) {
			t.Errorf("EnsureLUN of a disk that was whole once, and has no superblock left: %+v, %v", found, err)
		}
	}
}

// What programs wrote outlives the loss of the first superblock, which leaves data without a name.
func TestEnsureLUNRepairsALostSuperblock(t *testing.T) {
	for _, tt := range []struct {
		name string
		lost []int64 // bytes at which 4 KiB of backups are gone, too
		args string
	}{
		{"blocks of 1 KiB", nil, "-b 1024"},
		{"and the first backup", []int64{8193 << 10}, "-b 1024"},
		{"blocks of 4 KiB", nil, "-b 4096"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newLoopDisk(t, 512<<20)
			m := d.maker()
			m.E2fsck = "e2fsck"
			m.Mke2fs = tool(t, "exec mke2fs "+tt.args+` "$@"`)
			if _, err := m.EnsureLUN(t.Context(), d.dev, 512<<20); err != nil {
				t.Fatal(err)
			}
			mounted(t, d.dev, func(dir string) {
				if err := os.WriteFile(filepath.Join(dir, "x"), []byte("kept"), 0o600); err != nil {
					t.Error(err)
				}
			})
			for _, off := range append(tt.lost, 0) {
				put(t, d.dev, off, strings.Repeat("\x00", 4096))
			}
			if holds := identify(t, d.file); holds != Unknown {
				t.Fatalf("it holds %s, this tests nothing", holds)
			}
			found, err := m.EnsureLUN(t.Context(), d.dev, 512<<20)
			if err != nil || found.Made || !found.Repaired {
				t.Fatalf("EnsureLUN: %+v, %v", found, err)
			}
			if got, x, err := mountLUN(t, m, found, 512<<20); err != nil || got.Made || x != "kept" {
				t.Errorf("MountLUN: %+v, %q, %v", got, x, err)
			}
		})
	}
}

// nodeSize is the size of a node disk with backups of what its file system begins with.
const nodeSize = 256 << 20

// nodeDisk is a node disk with a file in it, and its maker, which uses the real tools.
func nodeDisk(t *testing.T) (*loopDisk, Maker, Found) {
	t.Helper()
	d := newLoopDisk(t, nodeSize)
	m := d.maker()
	m.E2fsck, m.Mke2fs = "e2fsck", tool(t, `exec mke2fs -b 4096 "$@"`)
	found, err := m.EnsureLUN(t.Context(), d.dev, nodeSize)
	if err != nil {
		t.Fatal(err)
	}
	mounted(t, d.dev, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "x"), []byte("kept"), 0o600); err != nil {
			t.Error(err)
		}
	})
	return d, m, Found{Path: found.Path}
}

// mountLUN is mount of a node disk.
func mountLUN(t *testing.T, m Maker, found Found, size int64) (Found, string, error) {
	t.Helper()
	return mountBy(t, func(dir string) (Found, error) { return m.MountLUN(t.Context(), found, size, dir) })
}

// What can be repaired is.
func TestMountLUNRepairs(t *testing.T) {
	for name, spoil := range map[string]func(path string){
		"the kernel met an error": func(path string) { run(t, "debugfs", "-w", "-R", "set_super_value state 3", path) },
		"it does not mount":       func(path string) { breakDescriptors(t, path) },
	} {
		_, m, found := nodeDisk(t)
		spoil(found.Path)
		if got, x, err := mountLUN(t, m, found, nodeSize); err != nil || got.Made || x != "kept" {
			t.Errorf("%s: %+v, %q, %v", name, got, x, err)
		}
		run(t, "e2fsck", "-f", "-n", found.Path)
	}
}

// A node disk that the server does not give all of is left as it is: it may do so later. An e2fsck that is told yes
// writes zeros in the place of what it does not get.
func TestMountLUNLeavesAloneWhatCannotBeRead(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(path string)
		lost  *superblock // where it is repaired before it is mounted
	}{
		{"the kernel met an error", func(path string) { run(t, "debugfs", "-w", "-R", "set_super_value state 3", path) }, nil},
		{"it does not mount", func(path string) { breakDescriptors(t, path) }, nil},
		{"it lost its superblock", func(path string) { put(t, path, 0, strings.Repeat("\x00", 4096)) }, &superblock{32768, 4096}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, m, found := nodeDisk(t)
			tt.spoil(d.dev)
			open := func() (got Found, x string, err error) {
				run(t, "blockdev", "--flushbufs", d.dev)
				if got = found; tt.lost != nil {
					got, err = m.restoreLUN(t.Context(), d.dev, *tt.lost)
				}
				if err == nil {
					got, x, err = mountLUN(t, m, got, nodeSize)
				}
				return got, x, err
			}
			run(t, "blockdev", "--flushbufs", d.dev)
			whole := filepath.Join(t.TempDir(), "whole")
			run(t, "cp", d.file, whole)
			run(t, "truncate", "-s", strconv.Itoa(32790*4096), d.file) // what is behind gives EIO: the journal, not the backups
			before := run(t, "sha256sum", d.file)
			for range 3 {
				got, _, err := open()
				if err == nil || errors.Is(err, ErrHolds) || got.Made || !strings.Contains(err.Error(), "cannot be read") {
					t.Errorf("while some of it is away: %+v, %v", got, err)
				}
			}
			if run(t, "sha256sum", d.file) != before {
				t.Error("it was written to")
			}
			run(t, "sh", "-c", `cat "$1" >"$0"`, d.file, whole)
			if got, x, err := open(); err != nil || got.Made || x != "kept" {
				t.Errorf("when it is back: %+v, %q, %v", got, x, err)
			}
		})
	}
}

// Only an e2fsck that read all and says that errors are left makes a node disk a new one.
func TestMountLUNMakesAnewOnlyWhatNothingRepairs(t *testing.T) {
	for _, script := range []string{
		"exit 0", "exit 1", "exit 8", "exit 9", `case $2 in -y) echo "Error reading block 7 (Input/output error).  Ignore error? yes"; exit 12; esac`,
	} {
		_, m, found := nodeDisk(t)
		breakDescriptors(t, found.Path)
		m.E2fsck = tool(t, script)
		before := run(t, "sha256sum", found.Path)
		for range 3 {
			if got, _, err := mountLUN(t, m, found, nodeSize); !errors.Is(err, ErrHolds) || got.Made {
				t.Errorf("%s: %+v, %v", script, got, err)
			}
		}
		if run(t, "sha256sum", found.Path) != before {
			t.Errorf("%s: it was written to", script)
		}
	}
	_, m, found := nodeDisk(t)
	breakDescriptors(t, found.Path)
	m.E2fsck = tool(t, "exit 4")
	got, x, err := mountLUN(t, m, found, nodeSize)
	if err != nil || !got.Made || x != "" || !strings.Contains(got.Note, "is lost") {
		t.Errorf("MountLUN: %+v, %q, %v", got, x, err)
	}
	run(t, "e2fsck", "-f", "-n", found.Path)
	if out := run(t, "dumpe2fs", "-h", found.Path); !strings.Contains(out, "Block count:              65280\n") { // of 4 KiB
		t.Errorf("it does not leave its last MiB free:\n%s", out)
	}
	if got, err := m.EnsureLUN(t.Context(), found.Path, nodeSize); err != nil || got != found {
		t.Errorf("EnsureLUN after that: %+v, %v", got, err)
	}
}

// An e2fsck that cannot do its work leaves everything as it is, and says so.
func TestEnsureLUNMakesNothingAnewWhereNothingRepairs(t *testing.T) {
	d := newLoopDisk(t, lunSize)
	m := d.maker()
	if _, err := m.EnsureLUN(t.Context(), d.dev, lunSize); err != nil {
		t.Fatal(err)
	}
	put(t, d.dev, 0, strings.Repeat("\x00", 4096))
	m.E2fsck = tool(t, "echo no memory; exit 8")
	if found, err := m.EnsureLUN(t.Context(), d.dev, lunSize); !errors.Is(err, ErrHolds) || !strings.Contains(err.Error(), "no memory") {
		t.Errorf("EnsureLUN: %+v, %v", found, err)
	}
	m.E2fsck = "e2fsck"
	if found, err := m.EnsureLUN(t.Context(), d.dev, lunSize); err != nil || !found.Repaired {
		t.Errorf("EnsureLUN with one that can: %+v, %v", found, err)
	}
}

func TestEnsureLUNOverwritesNothingWithAName(t *testing.T) {
	d := newLoopDisk(t, lunSize)
	writeTable(t, d.file, 512)
	before := identify(t, d.dev)
	if found, err := d.maker().EnsureLUN(t.Context(), d.dev, lunSize); !errors.Is(err, ErrHolds) {
		t.Errorf("EnsureLUN of a partition table: %+v, %v", found, err)
	}
	put(t, d.dev, 0, strings.Repeat("\x00", 1<<20))
	put(t, d.dev, -(1 << 20), strings.Repeat("\x00", 1<<20))
	put(t, d.dev, 4096, "what nobody knows")
	if found, err := d.maker().EnsureLUN(t.Context(), d.dev, lunSize); !errors.Is(err, ErrHolds) {
		t.Errorf("EnsureLUN of unknown data: %+v, %v", found, err)
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
