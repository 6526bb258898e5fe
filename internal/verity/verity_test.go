package verity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// memory is a file in memory that grows as it is written.
type memory struct{ b []byte }

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if need := off + int64(len(p)); need > int64(len(m.b)) {
		m.b = append(m.b, make([]byte, need-int64(len(m.b)))...)
	}
	return copy(m.b[off:], p), nil
}

func content(blocks int64) []byte {
	b := make([]byte, blocks*BlockSize)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b) // never fails
	return b
}

// make writes an image with its tree.
func makeFile(t testing.TB, blocks int64) ([]byte, Root) {
	t.Helper()
	m := memory{b: content(blocks)}
	data := int64(len(m.b))
	root, err := Write(bytes.NewReader(bytes.Clone(m.b)), data, &m)
	if err != nil {
		t.Fatal(err)
	}
	if got := int64(len(m.b)) - data; got != Size(data) {
		t.Errorf("%d blocks: wrote %d bytes behind the data, Size says %d", blocks, got, Size(data))
	}
	return m.b, root
}

// sizes stand on both sides of each edge between numbers of blocks and of levels.
var sizes = []int64{1, 2, 3, 127, 128, 129, 255, 257, 128 * 128, 128*128 + 1}

func TestVeritysetupAgrees(t *testing.T) {
	for _, blocks := range sizes {
		t.Run(fmt.Sprint(blocks), func(t *testing.T) {
			b, root := makeFile(t, blocks)
			ours := filepath.Join(t.TempDir(), "ours")
			if err := os.WriteFile(ours, b, 0o600); err != nil {
				t.Fatal(err)
			}
			offset := fmt.Sprintf("--hash-offset=%d", blocks*BlockSize)
			run(t, "veritysetup", "verify", ours, ours, root.String(), offset)

			theirs := filepath.Join(t.TempDir(), "theirs")
			if err := os.WriteFile(theirs, b[:blocks*BlockSize], 0o600); err != nil {
				t.Fatal(err)
			}
			out := run(t, "veritysetup", "format", theirs, theirs, offset, "--salt=-", "--uuid=00000000-0000-0000-0000-000000000000")
			if !strings.Contains(out, root.String()) {
				t.Errorf("veritysetup has another root than %s:\n%s", root, out)
			}
			got, err := os.ReadFile(theirs)
			if err != nil {
				t.Fatal(err)
			}
			if want := append(got, make([]byte, len(b)-len(got))...); !bytes.Equal(b, want) {
				t.Error("veritysetup writes other bytes")
			}
		})
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

func check(t *testing.T, b []byte, blocks int64, root Root, from, to int64) []int64 {
	t.Helper()
	f, err := Open(bytes.NewReader(b), blocks*BlockSize, root)
	if err != nil {
		t.Fatal(err)
	}
	bad, err := f.Check(t.Context(), from, to)
	if err != nil {
		t.Fatal(err)
	}
	var out []int64
	for _, x := range bad {
		out = append(out, x.Block)
	}
	return out
}

// Whichever block has one bit wrong, that block is found, and no other one.
func TestEachBlockIsChecked(t *testing.T) {
	for _, blocks := range []int64{1, 2, 129, 300} {
		b, root := makeFile(t, blocks)
		all := int64(len(b)) / BlockSize
		if bad := check(t, b, blocks, root, 0, all); bad != nil {
			t.Fatalf("%d blocks: %v are said to be bad", blocks, bad)
		}
		for i := range all {
			at := i*BlockSize + (i*37)%BlockSize
			b[at] ^= 0x10
			if bad := check(t, b, blocks, root, 0, all); !slices.Equal(bad, []int64{i}) {
				t.Errorf("%d blocks: with block %d flipped, found %v", blocks, i, bad)
			}
			b[at] ^= 0x10
		}
	}
}

func TestARangeIsChecked(t *testing.T) {
	const blocks = 300
	b, root := makeFile(t, blocks)
	for _, i := range []int64{5, 140, 299} {
		b[i*BlockSize]++
	}
	for _, c := range []struct {
		from, to int64
		want     []int64
	}{
		{0, 5, nil},
		{0, 6, []int64{5}},
		{5, 6, []int64{5}},
		{6, 140, nil},
		{100, 300, []int64{140, 299}},
		{-5, 1 << 40, []int64{5, 140, 299}},
	} {
		if got := check(t, b, blocks, root, c.from, c.to); !slices.Equal(got, c.want) {
			t.Errorf("blocks %d to %d: found %v, want %v", c.from, c.to, got, c.want)
		}
	}
}

// Below a block of the tree that is bad, nothing is said; once it is mended, what is there shows.
func TestBadTreeHidesWhatIsBelow(t *testing.T) {
	const blocks = 300
	b, root := makeFile(t, blocks)
	good := bytes.Clone(b)
	l := newLayout(blocks * BlockSize)
	tree := l.levels[0].first + 1
	for _, i := range []int64{5, 140, tree} {
		b[i*BlockSize]++
	}
	all := int64(len(b)) / BlockSize
	if got := check(t, b, blocks, root, 0, all); !slices.Equal(got, []int64{5, tree}) {
		t.Errorf("found %v", got)
	}
	copy(b[tree*BlockSize:][:BlockSize], good[tree*BlockSize:])
	if got := check(t, b, blocks, root, 0, all); !slices.Equal(got, []int64{5, 140}) {
		t.Errorf("with the tree mended, found %v", got)
	}
}

// failing cannot read some blocks, as a disk with bad sectors.
type failing struct {
	io.ReaderAt
	bad map[int64]bool
}

var errSector = errors.New("bad sector")

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	for at := off; at < off+int64(len(p)); at += BlockSize {
		if f.bad[at/BlockSize] {
			return 0, errSector
		}
	}
	return f.ReaderAt.ReadAt(p, off)
}

func TestUnreadableBlocksAreFound(t *testing.T) {
	const blocks = 300
	b, root := makeFile(t, blocks)
	l := newLayout(blocks * BlockSize)
	want := []int64{7, 100, l.levels[0].first + 2}
	f, err := Open(failing{bytes.NewReader(b), map[int64]bool{want[0]: true, want[1]: true, want[2]: true}}, blocks*BlockSize, root)
	if err != nil {
		t.Fatal(err)
	}
	bad, err := f.Check(t.Context(), 0, f.Blocks())
	if err != nil {
		t.Fatal(err)
	}
	var got []int64
	for _, x := range bad {
		if got = append(got, x.Block); !errors.Is(x.Err, errSector) {
			t.Errorf("block %d: error %v", x.Block, x.Err)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("unreadable blocks (-want +got):\n%s", diff)
	}
}

func TestAShortFileIsBad(t *testing.T) {
	const blocks = 200
	b, root := makeFile(t, blocks)
	bad := check(t, b[:150*BlockSize+17], blocks, root, 0, 1<<40)
	// The tree is gone from its top on, so that it says nothing about the data.
	if l := newLayout(blocks * BlockSize); !slices.Contains(bad, l.levels[len(l.levels)-1].first) {
		t.Errorf("found %v", bad)
	}
}

func TestAnotherRootIsNeverRight(t *testing.T) {
	const blocks = 3
	b, root := makeFile(t, blocks)
	root[31] ^= 1
	if bad := check(t, b, blocks, root, 0, 3); len(bad) == 0 {
		t.Error("the data passes for that of another root")
	}
}

func TestCheckEndsWithItsContext(t *testing.T) {
	b, root := makeFile(t, 3)
	f, err := Open(bytes.NewReader(b), 3*BlockSize, root)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Check(ctx, 0, 3); !errors.Is(err, context.Canceled) {
		t.Errorf("Check: %v", err)
	}
}

func TestWriteRefuses(t *testing.T) {
	for _, size := range []int64{-4096, 0, 1, 4095, 4097, MaxData + BlockSize} {
		if _, err := Write(bytes.NewReader(nil), size, &memory{}); err == nil {
			t.Errorf("a tree was made for %d bytes", size)
		}
		if _, err := Open(bytes.NewReader(nil), size, Root{}); err == nil {
			t.Errorf("a tree was opened for %d bytes", size)
		}
	}
	if _, err := Write(bytes.NewReader(make([]byte, 100)), BlockSize, &memory{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("of data that ends too early: %v", err)
	}
}

func TestParseRoot(t *testing.T) {
	_, root := makeFile(t, 2)
	if got, err := ParseRoot(root.String()); err != nil || got != root {
		t.Errorf("%v, %v", got, err)
	}
	for _, s := range []string{"", "00", strings.Repeat("g", 64), strings.ToUpper(root.String()), root.String() + "00"} {
		if _, err := ParseRoot(s); err == nil {
			t.Errorf("%q passes for a root", s)
		}
	}
}

// FuzzParseSuperblock holds that only what Superblock makes is taken.
func FuzzParseSuperblock(f *testing.F) {
	f.Add(Superblock(BlockSize), uint16(0), byte(0))
	f.Add(Superblock(MaxData), uint16(72), byte(1))
	f.Add([]byte("verity\x00\x00"), uint16(3), byte(9))
	f.Fuzz(func(t *testing.T, b []byte, at uint16, x byte) {
		if len(b) > 0 {
			b[int(at)%len(b)] ^= x
		}
		data, err := ParseSuperblock(b)
		if err == nil && (checkData(data) != nil || !bytes.Equal(Superblock(data), b)) {
			t.Errorf("took %x as one of %d bytes", b, data)
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	data := content(16 << 10)
	tree := memory{b: make([]byte, int64(len(data))+Size(int64(len(data))))}
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := Write(bytes.NewReader(data), int64(len(data)), &tree); err != nil {
			b.Fatal(err)
		}
	}
}
