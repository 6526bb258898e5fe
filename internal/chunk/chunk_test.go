package chunk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
)

func randomBytes(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 2))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// cutAll are the lengths of the chunks of r.
func cutAll(t *testing.T, r io.Reader) (lengths []int, all []byte) {
	t.Helper()
	c := newCutter(r)
	for {
		b, err := c.next()
		if errors.Is(err, io.EOF) {
			return lengths, all
		}
		if err != nil {
			t.Fatal(err)
		}
		lengths, all = append(lengths, len(b)), append(all, b...)
	}
}

func TestChunksAreOfTheSizesThatAreSaid(t *testing.T) {
	content := randomBytes(4<<20, 1)
	lengths, all := cutAll(t, bytes.NewReader(content))
	if !bytes.Equal(all, content) {
		t.Fatal("the chunks are not the content")
	}
	for _, n := range lengths[:len(lengths)-1] {
		if n < MinSize || n > MaxSize {
			t.Errorf("a chunk has %d bytes", n)
		}
	}
	if avg := len(content) / len(lengths); avg < AvgSize*3/4 || avg > AvgSize*3/2 {
		t.Errorf("chunks have %d bytes on average, and should have some %d", avg, AvgSize)
	}
	// The boundaries must never change: what nodes have would be of no use.
	if diff := cmp.Diff([]int{1559, 5663, 6427, 4332, 2920, 5094}, lengths[:6]); diff != "" {
		t.Errorf("boundaries (-want +got):\n%s", diff)
	}
}

func TestChunksComeBackAfterAnInsertion(t *testing.T) {
	content := randomBytes(1<<20, 3)
	changed := slices.Concat(content[:300_000], []byte("a few more bytes"), content[300_000:])
	have := map[ID]bool{}
	for _, c := range chunksOf(t, content) {
		have[c.ID] = true
	}
	missing := 0
	for _, c := range chunksOf(t, changed) {
		if !have[c.ID] {
			missing += int(c.Raw)
		}
	}
	if missing > 3*MaxSize {
		t.Errorf("%d bytes are new", missing)
	}
}

func chunksOf(t *testing.T, b []byte) []Chunk {
	t.Helper()
	f, err := OpenForm(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	out, err := f.Chunks()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func FuzzCutDoesNotDependOnReads(f *testing.F) {
	f.Add(randomBytes(60_000, 5), uint16(7))
	f.Add(make([]byte, 100_000), uint16(1000))
	f.Fuzz(func(t *testing.T, b []byte, step uint16) {
		want, all := cutAll(t, bytes.NewReader(b))
		if !bytes.Equal(all, b) {
			t.Fatal("the chunks are not the content")
		}
		for _, r := range []io.Reader{iotest.HalfReader(bytes.NewReader(b)), iotest.DataErrReader(bytes.NewReader(b)), &stepReader{b, int(step) + 1}} {
			if got, _ := cutAll(t, r); !slices.Equal(got, want) {
				t.Fatalf("got %v, want %v", got, want)
			}
		}
	})
}

// A stepReader gives a few bytes at a time.
type stepReader struct {
	b    []byte
	step int
}

func (s *stepReader) Read(p []byte) (int, error) {
	if len(s.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), s.step)], s.b)
	s.b = s.b[n:]
	return n, nil
}

func TestACutterPassesErrorsOn(t *testing.T) {
	c := newCutter(io.MultiReader(bytes.NewReader(make([]byte, 10)), iotest.ErrReader(io.ErrUnexpectedEOF)))
	if _, err := c.next(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error %v", err)
	}
}

// image is an EROFS image with files of these names and of random contents, the same in each image.
func image(t *testing.T, names ...string) []byte {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	w := erofs.Create(file, erofs.WithTempDir(t.TempDir()), erofs.WithBuildTime(1, 0))
	dirs := map[string]bool{}
	for _, name := range names {
		if dir := filepath.Dir(name); !dirs[dir] {
			dirs[dir] = true
			if err := w.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		f, err := w.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		seed := uint64(0)
		for _, c := range []byte(name) {
			seed = seed*31 + uint64(c)
		}
		_, err = f.Write(randomBytes(4500+int(seed%5000), seed))
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func manyNames(n int) []string {
	var out []string
	for _, dir := range []string{"/bin", "/lib", "/usr", "/var"} { // directories with more and with less than a block
		for i := range n {
			out = append(out, fmt.Sprintf("%s/file-%04d", dir, 2*i))
		}
		n /= 5
	}
	return out
}

// TestOneMoreFileIsLittle adds a file to an image: the numbers of all blocks and inodes after it change.
func TestOneMoreFileIsLittle(t *testing.T) {
	names := manyNames(3000)
	before := image(t, names...)
	after := image(t, append(names, "/bin/file-0601")...)
	have := map[ID]bool{}
	for _, c := range chunksOf(t, before) {
		have[c.ID] = true
	}
	var missing, all int
	for _, c := range chunksOf(t, after) {
		if !have[c.ID] {
			missing += int(c.Raw)
		}
		all += int(c.Raw)
	}
	// The file itself, and around it: its inode, its name, the superblock, the end of the metadata.
	if most := 10_000 + 8*MaxSize; missing > most || all != len(after) {
		t.Errorf("%d bytes of %d are new", missing, all)
	}
}

func FuzzRelatedFormTurnsBack(f *testing.F) {
	f.Add(randomBytes(5000, 8), uint16(0))
	f.Add(bytes.Repeat([]byte{0, 0, 0, 0, 0xed, 0x41, 2, 0, 60, 0, 0, 0, 0, 0, 0, 0, 7}, 600), uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, at uint16) {
		start := int64(at) % (int64(len(b)) + 1)
		rel, err := relate(bytes.NewReader(b), start, int64(len(b)), false)
		if err != nil {
			return // an image whose directories lie over each other is taken as it is
		}
		related := bytes.Clone(b)
		for _, p := range append(rel.patches, patch{start, rel.tail}) {
			copy(related[p.off:], p.b)
		}
		file := memory(related)
		if err := Restore(file, start, int64(len(b))); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(file, b) {
			t.Error("the image did not come back")
		}
	})
}

type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) WriteAt(p []byte, off int64) (int, error) {
	return copy(m[off:], p), nil
}

// A made is an image with its three files.
type made struct {
	image, pack, segs []byte
	index             *Index
	chunks            []Chunk
}

func makeOf(t testing.TB, image []byte) made {
	t.Helper()
	var pack, segs bytes.Buffer
	x, err := Make(bytes.NewReader(image), int64(len(image)), &pack, &segs)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(x.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(x, again); diff != "" {
		t.Errorf("the index read back (-want +got):\n%s", diff)
	}
	m := made{image: image, pack: pack.Bytes(), segs: segs.Bytes(), index: x}
	var pages [][]byte
	for i, r := range x.PageRanges() {
		b := m.pack[r.Off : r.Off+r.Size]
		if !x.Pages[i].Is(b) {
			t.Fatalf("page %d is another one", i)
		}
		pages = append(pages, b)
	}
	if m.chunks, err = x.Chunks(pages); err != nil {
		t.Fatal(err)
	}
	return m
}

// assemble follows a plan, with old at hand, and gives the image and how many bytes of the three files that took.
func assemble(t *testing.T, m made, old []byte) ([]byte, int64) {
	t.Helper()
	here := map[ID][]byte{}
	if old != nil {
		form, err := OpenForm(bytes.NewReader(old), int64(len(old)))
		if err != nil {
			t.Fatal(err)
		}
		if err := form.cut(func(b []byte) error { here[idOf(b)] = bytes.Clone(b); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	steps, err := Plan(m.index, m.chunks, 0, func(id ID) bool { return here[id] != nil })
	if err != nil {
		t.Fatal(err)
	}
	u, err := NewUnpacker()
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	var out []byte
	var net int64
	put := func(b []byte, err error) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b...)
	}
	for _, s := range steps {
		net += s.Size
		off := s.Off
		for _, r := range s.Segs {
			put(u.Segment(m.chunks[r.First:r.Last], m.segs[off:off+r.Size]))
			off += r.Size
		}
		for _, c := range m.chunks[s.First:s.Last] {
			switch s.Kind {
			case Here:
				put(here[c.ID], nil)
			case Pack:
				b, err := u.Chunk(c, m.pack[off:off+int64(c.Packed)])
				put(b, err)
				off += int64(c.Packed)
			case Segs:
			}
		}
		at := 0
		for _, c := range m.chunks[:s.Last] { // what came is here from now on
			here[c.ID] = bytes.Clone(out[at : at+int(c.Raw)])
			at += int(c.Raw)
		}
	}
	file := memory(out)
	if err := Restore(file, m.index.Meta, m.index.Data); err != nil {
		t.Fatal(err)
	}
	return file, net
}

func TestAnImageComesTogether(t *testing.T) {
	names := manyNames(300)
	before, after := image(t, names...), image(t, append(names, "/lib/file-0001")...)
	m := makeOf(t, after)
	for _, tt := range []struct {
		name string
		old  []byte
		most int64
	}{
		{"from an older one", before, 30_000},
		{"from itself", after, 0},
		{"from nothing", nil, int64(len(after))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, net := assemble(t, m, tt.old)
			if !bytes.Equal(got, after) {
				t.Error("it is another image")
			}
			if net > tt.most {
				t.Errorf("%d bytes were fetched, at most %d should be", net, tt.most)
			}
		})
	}
}

// TestWhatIsThereTwiceComesOnce has a plan fetch the first of two chunks that are the same.
func TestWhatIsThereTwiceComesOnce(t *testing.T) {
	part := randomBytes(300_000, 20)
	twice := slices.Concat(part, part)
	got, net := assemble(t, makeOf(t, twice), nil)
	if !bytes.Equal(got, twice) || net > 320_000 {
		t.Errorf("%d bytes were fetched", net)
	}
}

func TestTheSameImageGivesTheSameFiles(t *testing.T) {
	img := image(t, manyNames(100)...)
	if diff := cmp.Diff(makeOf(t, img).index, makeOf(t, img).index); diff != "" {
		t.Error(diff)
	}
	empty := makeOf(t, nil)
	if len(empty.chunks) != 0 || len(empty.pack) != 0 {
		t.Errorf("of nothing: %+v", empty)
	}
}

func FuzzParse(f *testing.F) {
	x := Index{Data: 10, Meta: 10, Pack: Blob{Size: 100}, Segments: Blob{Size: 50}, Pages: []Page{{Size: 30}}, Segs: []Segment{{Size: 50, Plain: true}}}
	f.Add(x.Bytes(), []byte("12345678\x0a\x46"))
	f.Fuzz(func(t *testing.T, b, page []byte) {
		x, err := Parse(b)
		if err != nil {
			return
		}
		if !bytes.Equal(x.Bytes(), b) && len(x.Bytes()) > len(b) { // numbers may be written longer than need be
			t.Error("the index comes back longer")
		}
		chunks, err := x.Chunks([][]byte{page})
		if err != nil {
			return
		}
		steps, err := Plan(x, chunks, 0, func(ID) bool { return false })
		if err != nil {
			return
		}
		for _, s := range steps {
			size := x.Pack.Size
			if s.Kind == Segs {
				size = x.Segments.Size
			}
			if s.Off < 0 || s.Size < 0 || s.Off+s.Size > size {
				t.Errorf("step %+v of %d bytes", s, size)
			}
		}
	})
}

func TestUnpackingIsBounded(t *testing.T) {
	u, err := NewUnpacker()
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	zeros := make([]byte, 1<<20)
	m := makeOf(t, zeros)
	bomb := m.segs // a megabyte in some bytes
	if _, err := u.Chunk(Chunk{Raw: MaxSize}, bomb); !errors.Is(err, ErrWrong) {
		t.Errorf("a frame that is too large: %v", err)
	}
	if _, err := u.Segment(m.chunks[:3], bomb); !errors.Is(err, ErrWrong) {
		t.Errorf("a segment that is too large: %v", err)
	}
	if _, err := u.Chunk(m.chunks[0], m.pack[:m.chunks[0].Packed-1]); !errors.Is(err, ErrWrong) {
		t.Errorf("a frame that is cut off: %v", err)
	}
}
