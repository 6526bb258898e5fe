package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// image is a new sparse file of size bytes.
func image(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func identify(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	kind, err := Identify(f, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	return kind
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func put(t *testing.T, path string, off int64, b string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if off < 0 {
		if off, err = f.Seek(off, io.SeekEnd); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt([]byte(b), off); err != nil {
		t.Fatal(err)
	}
}

// TestIdentifyWhatRealToolsMake runs the tools that people make disks with.
func TestIdentifyWhatRealToolsMake(t *testing.T) {
	for _, tt := range []struct {
		want string
		tool []string // the image's path is appended
	}{
		{"ext4", []string{"mke2fs", "-q", "-F", "-t", "ext4"}},
		{"ext3", []string{"mke2fs", "-q", "-F", "-t", "ext3"}},
		{"ext2", []string{"mke2fs", "-q", "-F", "-t", "ext2"}},
		{Troupe, []string{"mke2fs", "-q", "-F", "-t", "ext4", "-L", Label}},
		{"swap", []string{"mkswap", "-q"}},
		{"gpt", []string{"sh", "-c", `echo label: gpt | sfdisk -q "$0"`}},
		{"dos", []string{"sh", "-c", `printf 'label: dos\nsize=10M\n' | sfdisk -q "$0"`}},
		{"erofs", []string{"sh", "-c", `mkdir "$0.d" && mkfs.erofs --quiet "$0.e" "$0.d" && dd if="$0.e" of="$0" conv=notrunc status=none`}},
	} {
		t.Run(tt.want, func(t *testing.T) {
			path := image(t, 256<<20)
			run(t, tt.tool[0], append(tt.tool[1:], path)...)
			if got := identify(t, path); got != tt.want {
				t.Errorf("holds %q, want %q", got, tt.want)
			}
		})
	}
}

func TestIdentifyMagics(t *testing.T) {
	for i, m := range magics {
		t.Run(fmt.Sprintf("%d %s", i, m.name), func(t *testing.T) {
			path := image(t, 64<<20)
			put(t, path, m.offset, m.bytes)
			want := m.name
			if want == "ext4" {
				want = "ext2" // a superblock without features
			}
			if got := identify(t, path); got != want {
				t.Errorf("holds %q, want %q", got, want)
			}
		})
	}
	t.Run("md 0.90", func(t *testing.T) {
		path := image(t, 64<<20+5*512)
		put(t, path, 64<<20-64<<10, "\xfc\x4e\x2b\xa9")
		if got := identify(t, path); got != "md raid" {
			t.Errorf("holds %q", got)
		}
	})
	t.Run("boot sector", func(t *testing.T) {
		path := image(t, 64<<20)
		put(t, path, 510, "\x55\xaa")
		if got := identify(t, path); got != "boot sector" {
			t.Errorf("holds %q", got)
		}
	})
}

func TestBlankIsStrict(t *testing.T) {
	const size = 1 << 30
	if got := identify(t, image(t, size)); got != Blank {
		t.Fatalf("an empty disk holds %q", got)
	}
	for _, off := range []int64{0, 1<<20 + 77, 4 << 20, headSize - 1, 64<<20 + 100, 128<<20 + 56, -1, -1 << 20, -512} {
		path := image(t, size)
		put(t, path, off, "x")
		if got := identify(t, path); got == Blank {
			t.Errorf("a byte at %d was not seen", off)
		}
	}
	// A file system whose head was wiped is still no blank disk.
	path := image(t, size)
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", path)
	put(t, path, 0, strings.Repeat("\x00", headSize))
	if got := identify(t, path); got != Unknown {
		t.Errorf("a beheaded ext4 holds %q", got)
	}
	for _, tiny := range []int64{0, 512, 5000} {
		if got := identify(t, image(t, tiny)); got != Blank {
			t.Errorf("%d zero bytes hold %q", tiny, got)
		}
	}
}

func TestGPTPleasesOtherTools(t *testing.T) {
	for _, size := range []int64{64 << 20, 1 << 30, 5<<30 + 12345*512} {
		path := image(t, size)
		writeTable(t, path, 512)
		if out := run(t, "sgdisk", "-v", path); !strings.Contains(out, "No problems found") {
			t.Errorf("sgdisk on %d bytes:\n%s", size, out)
		}
		if out := run(t, "sfdisk", "--dump", path); !strings.Contains(out, `name="troupe-cache"`) || !strings.Contains(out, "start=        2048") ||
			strings.Contains(out, `name="troupe-esp"`) != (size >= 1<<30) {
			t.Errorf("sfdisk on %d bytes:\n%s", size, out)
		}
		if out := run(t, "sfdisk", "--verify", path); strings.Contains(out, "overlap") {
			t.Errorf("sfdisk --verify: %s", out)
		}
	}
}

func writeTable(t *testing.T, path string, block int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := writeGPT(f, fi.Size(), block, Label); err != nil {
		t.Fatal(err)
	}
}

func TestGPTReadsWhatOthersWrite(t *testing.T) {
	path := image(t, 256<<20)
	run(t, "sgdisk", "-n", "2:1M:+10M", "-c", "2:EFI ü", "-n", "5:0:+20M", "-c", "5:"+Label, path)
	check := func(what string) {
		t.Helper()
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		got, err := readGPT(f, 256<<20, 512)
		if err != nil || len(got) != 2 {
			t.Fatalf("%s: %v, %v", what, got, err)
		}
		if got[0].Number != 2 || got[0].Name != "EFI ü" || got[0].First != 1<<20 || got[0].Size != 10<<20 || got[1].Number != 5 || got[1].Name != Label {
			t.Errorf("%s: %+v", what, got)
		}
	}
	check("whole")
	put(t, path, 512+20, "broken")
	check("with a broken first header")
	put(t, path, -512+20, "broken")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := readGPT(f, 256<<20, 512); !errors.Is(err, errNoGPT) {
		t.Errorf("with both broken: %v", err)
	}
}

func FuzzReadGPT(f *testing.F) {
	var m memory
	if err := writeGPT(&m, 4<<20, 512, Label); err != nil {
		f.Fatal(err)
	}
	f.Add(m.b[:34*512])
	f.Add([]byte("EFI PART"))
	f.Fuzz(func(t *testing.T, head []byte) {
		if len(head) > 1<<20 {
			return
		}
		disk := make([]byte, 4<<20)
		copy(disk, head)
		entries, err := readGPT(bytes.NewReader(disk), int64(len(disk)), 512)
		if err != nil {
			return
		}
		for _, e := range entries {
			if e.First < 0 || e.Size <= 0 || e.First+e.Size > int64(len(disk)) {
				t.Errorf("entry outside the disk: %+v", e)
			}
		}
	})
}

type memory struct{ b []byte }

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if n := int(off) + len(p); n > len(m.b) {
		m.b = append(m.b, make([]byte, n-len(m.b))...)
	}
	return copy(m.b[off:], p), nil
}
func (m *memory) Sync() error { return nil }

// A loopDisk is a real block device over a file.
type loopDisk struct{ file, dev, name string }

func newLoopDisk(t *testing.T, size int64) *loopDisk {
	t.Helper()
	d := &loopDisk{file: image(t, size)}
	d.attach(t)
	t.Cleanup(func() { d.detach(t) })
	return d
}

func (d *loopDisk) attach(t *testing.T) {
	t.Helper()
	d.dev = strings.TrimSpace(run(t, "losetup", "-f", "--show", "-P", d.file))
	d.name = filepath.Base(d.dev)
}

func (d *loopDisk) detach(t *testing.T) {
	t.Helper()
	run(t, "losetup", "-d", d.dev)
}

func (d *loopDisk) maker() Maker {
	return Maker{
		Scanner: Scanner{Keep: func(n string) bool { return n == d.name }},
		Mke2fs:  "mke2fs", MinSize: 32 << 20, Log: slog.New(slog.DiscardHandler),
	}
}

// mounted mounts the cache, calls f and unmounts it again.
func mounted(t *testing.T, path string, f func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if err := Mount(path, dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	f(dir)
}

func TestEnsureMakesACacheOnABlankDiskAndFindsItAgain(t *testing.T) {
	d := newLoopDisk(t, 256<<20)
	m := d.maker()
	found, err := m.Ensure(t.Context(), agentapi.Disks{})
	if err != nil || !found.Made {
		t.Fatalf("Ensure: %+v, %v", found, err)
	}
	mounted(t, found.Path, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "x"), []byte("kept"), 0o600); err != nil {
			t.Error(err)
		}
		if _, err := claim(found.Path); !errors.Is(err, unix.EBUSY) {
			t.Errorf("a mounted disk was claimed: %v", err)
		}
	})
	d.detach(t)
	d.attach(t) // as after a reboot: the kernel knows no partition
	m = d.maker()
	found, err = m.Ensure(t.Context(), agentapi.Disks{})
	if err != nil || found.Made || found.Note != "" {
		t.Fatalf("Ensure again: %+v, %v", found, err)
	}
	mounted(t, found.Path, func(dir string) {
		if b, err := os.ReadFile(filepath.Join(dir, "x")); string(b) != "kept" {
			t.Errorf("the cache lost its content: %v", err)
		}
	})
	if out := run(t, "sgdisk", "-v", d.file); !strings.Contains(out, "No problems found") {
		t.Errorf("sgdisk:\n%s", out)
	}
	disks, err := m.Scanner.Scan()
	if err != nil || len(disks) != 1 || disks[0].Holds != Troupe {
		t.Errorf("Scan: %+v, %v", disks, err)
	}
}

// cut lets the first n writes through, and then the power goes.
type cut struct {
	*os.File
	left int
}

var errCut = errors.New("power cut")

func (c *cut) WriteAt(p []byte, off int64) (int, error) {
	if c.left == 0 {
		return 0, errCut
	}
	c.left--
	return c.File.WriteAt(p, off)
}

func TestEnsureFinishesWhatAPowerCutLeft(t *testing.T) {
	for writes := range 8 {
		t.Run(fmt.Sprintf("after %d writes", writes), func(t *testing.T) {
			d := newLoopDisk(t, 128<<20)
			f, err := os.OpenFile(d.dev, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			err = writeGPT(&cut{f, writes}, 128<<20, 512, Label)
			if writes < 6 && !errors.Is(err, errCut) || writes >= 6 && err != nil {
				t.Fatalf("writeGPT: %v", err)
			}
			if writes == 7 { // an mke2fs that had begun
				if _, err := f.WriteAt([]byte(strings.Repeat("inode table", 1000)), 5<<20); err != nil {
					t.Fatal(err)
				}
			}
			f.Close()
			found, err := d.maker().Ensure(t.Context(), agentapi.Disks{})
			if err != nil || !found.Made {
				t.Fatalf("Ensure: %+v, %v", found, err)
			}
			mounted(t, found.Path, func(string) {})
			if out := run(t, "sgdisk", "-v", d.file); !strings.Contains(out, "No problems found") {
				t.Errorf("sgdisk:\n%s", out)
			}
		})
	}
}

func TestEnsureLeavesOtherDisksAlone(t *testing.T) {
	d := newLoopDisk(t, 128<<20)
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "photos", d.dev)
	before := run(t, "sha256sum", d.dev)
	m := d.maker()
	_, err := m.Ensure(t.Context(), agentapi.Disks{})
	if !errors.Is(err, ErrNoDisk) || !strings.Contains(err.Error(), d.name+" holds ext4 and is left alone") {
		t.Errorf("Ensure: %v", err)
	}
	if _, err := m.Ensure(t.Context(), agentapi.Disks{Take: true, Device: "/dev/nosuch"}); !errors.Is(err, ErrNoDisk) {
		t.Errorf("Ensure on another disk: %v", err)
	}
	if after := run(t, "sha256sum", d.dev); after != before {
		t.Error("the disk was written to")
	}
	found, err := m.Ensure(t.Context(), agentapi.Disks{Take: true})
	if err != nil || !found.Made {
		t.Fatalf("Ensure with take: %v", err)
	}
	mounted(t, found.Path, func(string) {})
}

// TestEnsureForgetsThePartitionsOfADiskThatItTakes begins with a disk whose partitions the kernel knows: the cache must
// be as large as the disk, whatever lay at its start.
func TestEnsureForgetsThePartitionsOfADiskThatItTakes(t *testing.T) {
	for _, parts := range [][]string{
		{"-n", "1:1M:+40M"},
		{"-n", "1:1M:+1M", "-t", "1:ef02", "-n", "2:0:+100M"},
		{"-n", "1:2M:+30M", "-n", "3:0:+30M"},
	} {
		t.Run(strings.Join(parts, " "), func(t *testing.T) {
			d := newLoopDisk(t, 256<<20)
			run(t, "sgdisk", append(parts, d.dev)...)
			run(t, "partx", "-u", d.dev)
			found, err := d.maker().Ensure(t.Context(), agentapi.Disks{Take: true})
			if err != nil || !found.Made {
				t.Fatalf("Ensure: %+v, %v", found, err)
			}
			path := found.Path
			if known := d.maker().Scanner.withDefaults().kernelParts(d.name); len(known) != 1 || known[0].Path != path || known[0].Size != 254<<20 {
				t.Errorf("the kernel knows %+v, the cache is %s", known, path)
			}
			mounted(t, path, func(dir string) {
				var st unix.Statfs_t
				if err := unix.Statfs(dir, &st); err != nil || int64(st.Blocks)*st.Bsize < 200<<20 {
					t.Errorf("the cache has %d MiB of 256: %v", int64(st.Blocks)*st.Bsize>>20, err)
				}
			})
		})
	}
}

func TestEnsureWritesToNoDiskWithAPartitionInUse(t *testing.T) {
	d := newLoopDisk(t, 256<<20)
	run(t, "sgdisk", "-n", "1:1M:+40M", d.dev)
	run(t, "partx", "-u", d.dev)
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", d.dev+"p1")
	before := run(t, "sha256sum", d.dev)
	held, err := os.Open(d.dev + "p1")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if found, err := d.maker().Ensure(t.Context(), agentapi.Disks{Take: true}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Ensure: %+v, %v", found, err)
	}
	if run(t, "sha256sum", d.dev) != before {
		t.Error("the disk was written to")
	}
}

func TestEnsureUsesAPartitionMadeByHandAndNothingBeside(t *testing.T) {
	d := newLoopDisk(t, 128<<20)
	run(t, "sgdisk", "-n", "1:1M:+16M", "-c", "1:home", "-n", "2:0:+64M", "-c", "2:"+Label, d.dev)
	put(t, d.dev, 1<<20+4096, "precious")
	sum := func() string { return run(t, "sh", "-c", "head -c 17M "+d.dev+" | sha256sum") }
	before := sum()
	found, err := d.maker().Ensure(t.Context(), agentapi.Disks{})
	if err != nil || !found.Made || !strings.HasSuffix(found.Path, "p2") {
		t.Fatalf("Ensure: %+v, %v", found, err)
	}
	if sum() != before {
		t.Error("the partition before ours was written to")
	}
	mounted(t, found.Path, func(string) {})
}
