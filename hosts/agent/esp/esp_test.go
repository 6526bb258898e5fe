package esp

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/internal/digest"
)

// blank is a partition without anything on it.
func blank(t *testing.T, size int64) (string, *ESP) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "esp")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	e, err := Open(path, 0, size, 512)
	if err != nil {
		t.Fatal(err)
	}
	return path, e
}

// noise are bytes that no two names share.
func noise(name string, n int) []byte {
	var out []byte
	for i := 0; len(out) < n; i++ {
		s := sha256.Sum256(fmt.Append(nil, name, i))
		out = append(out, s[:]...)
	}
	return out[:n]
}

func file(t *testing.T, name string, n int) File {
	t.Helper()
	b := noise(name, n)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return File{path, digest.Of(b), int64(n)}
}

// bootOf has three files whose bytes depend on name.
func bootOf(t *testing.T, name string) Boot {
	t.Helper()
	return Boot{
		Kernel: file(t, name+" kernel", 70_000), Agent: file(t, name+" agent", 30_004), Modules: file(t, name+" modules", 300_000),
		Args: []string{"quiet", "role=" + name},
	}
}

func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func ensure(t *testing.T, e *ESP, loader []byte, b Boot) []string {
	t.Helper()
	rep, err := e.Ensure(loader, b)
	if err != nil {
		t.Fatal(err)
	}
	return rep.Written
}

// fromFAT is a file as mtools finds it.
func fromFAT(t *testing.T, path, name string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "mcopy", "-n", "-i", path, "::"+name, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestOtherToolsReadIt(t *testing.T) {
	for _, size := range []int64{MinSize, 256 << 20, 512 << 20, MaxSize} {
		path, e := blank(t, size)
		loader, one := noise("loader", 600_000), bootOf(t, "one")
		want := []string{"file system", "BOOTX64.EFI", "GRUBX64.EFI", "slot b", "choice of the slot", "slot a"}
		if d := cmp.Diff(want, ensure(t, e, loader, one)); d != "" {
			t.Errorf("%d MiB: written (-want +got):\n%s", size>>20, d)
		}
		tool(t, "fsck.fat", "-n", path)
		for name, want := range map[string][]byte{
			"/EFI/BOOT/BOOTX64.EFI": loader, "/EFI/TROUPE/GRUBX64.EFI": loader, "/TROUPE/CURRENT": envBlock(1),
			"/TROUPE/A/MODULES": noise("one modules", 300_000), "/TROUPE/B/KERNEL": noise("one kernel", 70_000),
		} {
			if !bytes.Equal(fromFAT(t, path, name), want) {
				t.Errorf("%d MiB: mtools reads something else as %s", size>>20, name)
			}
		}
	}
}

func TestWhatIsRightIsNotWritten(t *testing.T) {
	path, e := blank(t, MinSize)
	loader, one, two := noise("loader", 600_000), bootOf(t, "one"), bootOf(t, "two")
	ensure(t, e, loader, one)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := ensure(t, e, loader, one); got != nil {
		t.Errorf("written again: %v", got)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("something was written")
	}
	steps := []struct {
		boot Boot
		want []string
	}{
		{two, []string{"slot a", "choice of the slot"}}, // the boot before stays in b
		{one, []string{"choice of the slot"}},           // and back
		{two, []string{"choice of the slot"}},
	}
	for i, s := range steps {
		if d := cmp.Diff(s.want, ensure(t, e, loader, s.boot)); d != "" {
			t.Errorf("step %d: written (-want +got):\n%s", i, d)
		}
	}
	if d := cmp.Diff([]string{"BOOTX64.EFI", "GRUBX64.EFI"}, ensure(t, e, noise("new", 500_000), two)); d != "" {
		t.Errorf("a new loader: written (-want +got):\n%s", d)
	}
	tool(t, "fsck.fat", "-n", path)
}

func TestAFlippedByteIsFoundAndMended(t *testing.T) {
	path, e := blank(t, MinSize)
	loader, one, two := noise("loader", 600_000), bootOf(t, "one"), bootOf(t, "two")
	ensure(t, e, loader, one)
	ensure(t, e, loader, two)
	g := e.g
	for name, at := range map[string]int64{
		"boot sector": 13, "FSInfo": 512 + 484, "FAT": reserved*512 + 5, "second FAT": (reserved + g.fatSize) * 512, "a chain": reserved*512 + g.slot(0).first*4,
		"root": g.at(rootDir) + 33, "directory of a slot": g.at(slotBDir) + 70, "loader": g.at(g.loader(1, 0).first) + 599_999,
		"kernel": g.at(g.slot(0).first) + 69_999, "modules of the other slot": g.at(g.slot(1).first) + 100_000, "choice": g.at(currentFile) + 30,
	} {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		_, err = f.ReadAt(b, at)
		b[0] ^= 4
		_, werr := f.WriteAt(b, at)
		if err := errors.Join(err, werr, f.Close()); err != nil {
			t.Fatal(err)
		}
		if got := ensure(t, e, loader, two); len(got) == 0 {
			t.Errorf("%s: the byte was not found", name)
		}
		if got := ensure(t, e, loader, two); got != nil {
			t.Errorf("%s: not mended at once, then written: %v", name, got)
		}
		tool(t, "fsck.fat", "-n", path)
	}
}

// bootable says which boots a loader finds on a partition, the first one first, as grub.cfg looks for them.
func bootable(t *testing.T, e *ESP, boots map[string]Boot) []string {
	t.Helper()
	current, err := e.current()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, slot := range []int{current, 1 - current} {
		for name, b := range boots {
			if has, err := e.slotHas(slot, b); err != nil {
				t.Fatal(err)
			} else if has {
				out = append(out, name)
			}
		}
	}
	return out
}

func TestAPowerCutLeavesOneThatBoots(t *testing.T) {
	path, e := blank(t, MinSize)
	loader, boots := noise("loader", 60_000), map[string]Boot{"one": bootOf(t, "one"), "two": bootOf(t, "two"), "three": bootOf(t, "three")}
	ensure(t, e, loader, boots["one"])
	ensure(t, e, loader, boots["two"])
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var writes []piece
	e.open = func(p string) (opened, error) {
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		return &collector{f, &writes}, err
	}
	newLoader := noise("new loader", 70_000)
	ensure(t, e, newLoader, boots["three"])
	e.open = openDevice
	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for n, w := range writes {
		for _, data := range [][]byte{w.data[:len(w.data)/1024*512], w.data} { // first only some sectors of it come to the disk
			if _, err := f.WriteAt(data, w.at); err != nil {
				t.Fatal(err)
			}
			if len(bootable(t, e, boots)) == 0 {
				t.Fatalf("after %d bytes of write %d of %d nothing boots", len(data), n, len(writes))
			}
			for i, dir := range []int64{bootDir, vendorDir} {
				if !hasLoader(t, e, i, dir, loader) && !hasLoader(t, e, i, dir, newLoader) {
					t.Fatalf("after %d bytes of write %d of %d %s is broken", len(data), n, len(writes), loaderNames[i])
				}
			}
		}
	}
	ensure(t, e, newLoader, boots["three"])
	if got := bootable(t, e, boots); got[0] != "three" {
		t.Errorf("in the end %v", got)
	}
}

// hasLoader says whether the loader's file is whole.
func hasLoader(t *testing.T, e *ESP, file int, dir int64, content []byte) bool {
	t.Helper()
	for version := range 2 {
		has, err := e.has(dir, efiDir, e.g.loader(file, version), loaderNames[file:file+1], []part{bytesOf(content)})
		if err != nil {
			t.Fatal(err)
		}
		if has {
			return true
		}
	}
	return false
}

// A collector keeps what is written.
type collector struct {
	*os.File
	writes *[]piece
}

func (c *collector) WriteAt(b []byte, at int64) (int, error) {
	*c.writes = append(*c.writes, piece{at, bytes.Clone(b)})
	return c.File.WriteAt(b, at)
}

func TestASourceThatIsBrokenIsNotNamed(t *testing.T) {
	_, e := blank(t, MinSize)
	loader, one, bad := noise("loader", 60_000), bootOf(t, "one"), bootOf(t, "bad")
	ensure(t, e, loader, one)
	if err := os.WriteFile(bad.Kernel.Path, noise("something else", 70_000), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Ensure(loader, bad); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("got %v", err)
	}
	if d := cmp.Diff([]string{"one"}, bootable(t, e, map[string]Boot{"one": one, "bad": bad})); d != "" {
		t.Error(d)
	}
}

func TestArgumentsThatGRUBChangesAreRefused(t *testing.T) {
	for _, a := range []string{`a"b`, `a'b`, `a\b`, "", "a\nb"} {
		if _, err := bootCfg("a", []string{a}); err == nil {
			t.Errorf("%q is taken", a)
		}
	}
	got, err := bootCfg("a", []string{"quiet", "x=a b", "y=$z;"})
	want := "linux $esp/troupe/a/kernel 'quiet' 'x=a b' 'y=$z;'\ninitrd $esp/troupe/a/agent $esp/troupe/a/modules\nboot\n"
	if err != nil || string(got) != want {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestBIOSIsWrittenBesideTheTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	disk := noise("disk", 8<<20)
	if err := os.WriteFile(path, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	boot := append(noise("boot", 510), 0x55, 0xaa)
	core := func(name string, n int) []byte {
		b := noise(name, n)
		binary.LittleEndian.PutUint16(b[blockLen:], uint16((n+511)/512-1))
		return b
	}
	b := BIOS{Disk: path, First: 2 << 20, Size: 1 << 20, Sector: 512}
	for i, c := range [][]byte{core("one", 100_001), core("two", 90_000), core("three", 512*200)} {
		for _, want := range []bool{true, false} {
			if wrote, err := b.Ensure(boot, c); err != nil || wrote != want {
				t.Fatalf("core %d: written %v, %v; want %v", i, wrote, err, want)
			}
		}
		now, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		at := int64(binary.LittleEndian.Uint64(now[kernelSector:])) * 512
		if at != b.at(i%2) || !bytes.Equal(now[at:][:len(c)], b.patched(i%2, c)) {
			t.Errorf("core %d: the first sector names %d", i, at)
		}
		if !bytes.Equal(now[tableAt:tableEnd], disk[tableAt:tableEnd]) || !bytes.Equal(now[512:2<<20], disk[512:2<<20]) || !bytes.Equal(now[3<<20:], disk[3<<20:]) {
			t.Errorf("core %d: something beside it was written", i)
		}
	}
	if _, err := b.Ensure(boot[:100], core("x", 1000)); err == nil {
		t.Error("what is no first sector is taken")
	}
	if _, err := b.Ensure(boot, core("x", 600_000)); err == nil {
		t.Error("what has no room is taken")
	}
}
