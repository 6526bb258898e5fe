package lun

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(killDir); dir != "" {
		writeForEver(dir)
	}
	goleak.VerifyTestMain(m)
}

// A closer is a medium of this package.
type closer interface {
	scsi.Medium
	Close() error
}

// A subject is a medium of the suite: open opens it, again and again the same one, and want is what it begins with.
type subject struct {
	open func(t *testing.T) closer
	want []byte
}

// subjects are all media of this package. Sizes are chosen to end within clusters and within blocks, and to have more than
// one sector of a map.
func subjects(t *testing.T) map[string]subject {
	t.Helper()
	const size = 13<<20 + 4096 + 512
	base := randomBytes(size - 700)
	padded := append(bytes.Clone(base), make([]byte, 700)...)[:roundUp(int64(len(base)), BlockSize)]
	image := filepath.Join(t.TempDir(), "image")
	write(t, image, base)
	disk := filepath.Join(t.TempDir(), "disk")
	extended := append(bytes.Clone(padded), make([]byte, 8<<20)...)
	return map[string]subject{
		"image":                {opens(func() (closer, error) { return OpenImage(image) }), padded},
		"disk":                 {opens(func() (closer, error) { return OpenDisk(disk, size-size%512) }), make([]byte, size-size%512)},
		"delta":                {opensDelta(t, image, 0), padded},
		"delta, longer":        {opensDelta(t, image, int64(len(extended))), extended},
		"delta, without base":  {opensDelta(t, "", size-size%512), make([]byte, size-size%512)},
		"delta, without a map": {opensUnmapped(opensDelta(t, image, 0)), padded},
	}
}

// must is the value of a call, or the end of the test.
func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func openImageT(t *testing.T, path string) *Image {
	t.Helper()
	return must(OpenImage(path))(t)
}

// withBase is a Delta that closes its base with itself.
type withBase struct {
	*Delta
	base *Image
}

func (w withBase) Close() error { return errors.Join(w.Delta.Close(), w.base.Close()) }

func opens(open func() (closer, error)) func(t *testing.T) closer {
	return func(t *testing.T) closer {
		t.Helper()
		return must(open())(t)
	}
}

func opensDelta(t *testing.T, image string, size int64) func(t *testing.T) closer {
	t.Helper()
	path := filepath.Join(t.TempDir(), "delta")
	return func(t *testing.T) closer {
		t.Helper()
		if image == "" {
			return must(OpenDelta(nil, path, size, ""))(t)
		}
		base := openImageT(t, image)
		return withBase{must(OpenDelta(base, path, size, "sha256:of the image"))(t), base}
	}
}

func opensUnmapped(open func(t *testing.T) closer) func(t *testing.T) closer {
	return func(t *testing.T) closer {
		t.Helper()
		m := open(t)
		m.(scsi.Mapper).Unmapped()
		return m
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestMedia(t *testing.T) {
	for name, s := range subjects(t) {
		t.Run(name, func(t *testing.T) {
			m := s.open(t)
			checkAll(t, m, s.want)
			checkBounds(t, m)
			if m.ReadOnly() {
				checkReadOnly(t, m)
			} else {
				m = checkRandom(t, s, m)
				checkParallel(t, m)
				checkOverlapping(t, m)
				checkUnmap(t, m)
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// checkAll reads all of m, in pieces of random sizes, both ways.
func checkAll(t *testing.T, m scsi.Medium, want []byte) {
	t.Helper()
	if m.Size() != int64(len(want)) {
		t.Fatalf("Size() = %d, want %d", m.Size(), len(want))
	}
	for off := 0; off < len(want); {
		n := min(len(want)-off, BlockSize*(1+rand.IntN(800)))
		checkRange(t, m, off, want[off:off+n])
		off += n
	}
}

func checkRange(t *testing.T, m scsi.Medium, off int, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := m.ReadAt(got, int64(off)); n != len(want) || err != nil {
		t.Fatalf("ReadAt(%d bytes at %d) = %d, %v", len(want), off, n, err)
	}
	if at, same := firstDifference(got, want); !same {
		t.Fatalf("ReadAt(%d bytes at %d): differs first at %d", len(want), off, off+at)
	}
	mapper, ok := m.(scsi.Mapper)
	if !ok {
		return
	}
	segments, ok := mapper.Segments(nil, int64(off), len(want))
	if !ok {
		return
	}
	if at, same := firstDifference(sent(t, segments), want); !same {
		t.Fatalf("Segments(%d bytes at %d): differs first at %d", len(want), off, off+at)
	}
}

func firstDifference(got, want []byte) (at int, same bool) {
	if bytes.Equal(got, want) {
		return 0, true
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return i, false
		}
	}
	return min(len(got), len(want)), false
}

// sent is what the kernel finds in segments.
func sent(t *testing.T, segments [][]byte) []byte {
	t.Helper()
	fd, err := unix.MemfdCreate("sent", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "sent")
	defer f.Close()
	for len(segments) > 0 {
		part := segments[:min(len(segments), 1024)]
		want := 0
		for _, s := range part {
			want += len(s)
		}
		if n, err := unix.Writev(fd, part); n != want || err != nil {
			t.Fatalf("writev of %d bytes: %d, %v", want, n, err)
		}
		segments = segments[len(part):]
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func checkBounds(t *testing.T, m scsi.Medium) {
	t.Helper()
	size := m.Size()
	b := make([]byte, 1024)
	for _, off := range []int64{-512, size - 512, size, size + 512, -1 << 63, 1<<63 - 1} {
		if _, err := m.ReadAt(b, off); !errors.Is(err, errRange) {
			t.Errorf("ReadAt(%d bytes at %d of %d): %v, want %v", len(b), off, size, err, errRange)
		}
		if m.ReadOnly() {
			continue
		}
		if _, err := m.WriteAt(b, off); !errors.Is(err, errRange) {
			t.Errorf("WriteAt(%d bytes at %d of %d): %v, want %v", len(b), off, size, err, errRange)
		}
		if err := m.Zero(off, 1024, true); !errors.Is(err, errRange) {
			t.Errorf("Zero(%d bytes at %d of %d): %v, want %v", len(b), off, size, err, errRange)
		}
		if segments, ok := m.(scsi.Mapper).Segments(nil, off, len(b)); ok {
			t.Errorf("Segments(%d bytes at %d of %d) = %d segments", len(b), off, size, len(segments))
		}
	}
}

func checkReadOnly(t *testing.T, m scsi.Medium) {
	t.Helper()
	if _, err := m.WriteAt(make([]byte, 512), 0); !errors.Is(err, errReadOnly) {
		t.Errorf("WriteAt: %v, want %v", err, errReadOnly)
	}
	if err := m.Zero(0, 512, true); !errors.Is(err, errReadOnly) {
		t.Errorf("Zero: %v, want %v", err, errReadOnly)
	}
	if err := m.Sync(); err != nil {
		t.Errorf("Sync: %v", err)
	}
	if n, mapped := m.Mapped(512); n != m.Size()-512 || !mapped {
		t.Errorf("Mapped(512) = %d, %v", n, mapped)
	}
}

// checkRandom changes m and a model of it at random, opens it anew now and then, and compares.
func checkRandom(t *testing.T, s subject, m closer) closer {
	t.Helper()
	model := bytes.Clone(s.want)
	for i := range 800 {
		off, n := randomRange(len(model))
		switch rand.IntN(8) {
		case 0, 1:
			if err := m.Zero(int64(off), int64(n), rand.IntN(2) == 0); err != nil {
				t.Fatal(err)
			}
			clear(model[off : off+n])
		case 2:
			if err := m.Sync(); err != nil {
				t.Fatal(err)
			}
		default:
			fillRandom(model[off : off+n])
			if k, err := m.WriteAt(model[off:off+n], int64(off)); k != n || err != nil {
				t.Fatalf("WriteAt(%d bytes at %d) = %d, %v", n, off, k, err)
			}
		}
		checkRange(t, m, max(0, off-1024), model[max(0, off-1024):min(len(model), off+n+1024)])
		if i%200 == 199 {
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			m = s.open(t)
		}
	}
	checkAll(t, m, model)
	return m
}

// randomRange is some blocks, most often few, anywhere.
func randomRange(size int) (off, n int) {
	off = rand.IntN(size/BlockSize) * BlockSize
	n = BlockSize * (1 + rand.IntN(1<<rand.IntN(12)))
	return off, min(n, size-off)
}

func fillRandom(b []byte) {
	for i := 0; i+8 <= len(b); i += 8 {
		v := rand.Uint64()
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
}

// checkParallel has writers, each at blocks of its own, which share clusters, write, zero and sync at once.
func checkParallel(t *testing.T, m scsi.Medium) {
	t.Helper()
	const writers = 8
	blocks := int(m.Size() / BlockSize)
	var wg sync.WaitGroup
	models := make([]map[int][]byte, writers)
	for w := range writers {
		models[w] = map[int][]byte{}
		wg.Go(func() {
			for range 200 {
				block := rand.IntN(blocks/writers)*writers + w
				b := make([]byte, BlockSize)
				var err error
				switch rand.IntN(6) {
				case 0:
					err = m.Zero(int64(block)*BlockSize, BlockSize, true)
				case 1:
					if err := m.Sync(); err != nil {
						t.Error(err)
					}
					continue
				default:
					fillRandom(b)
					_, err = m.WriteAt(b, int64(block)*BlockSize)
				}
				if err != nil {
					t.Error(err)
					return
				}
				models[w][block] = b
			}
		})
	}
	wg.Wait()
	for _, model := range models {
		for block, want := range model {
			checkRange(t, m, block*BlockSize, want)
		}
	}
}

// checkOverlapping has writers write over each other: each block is then of one of them.
func checkOverlapping(t *testing.T, m scsi.Medium) {
	t.Helper()
	const writers, length = 4, 64 << 10
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for range 50 {
				off := rand.IntN(8) * BlockSize
				if _, err := m.WriteAt(bytes.Repeat([]byte{byte(w + 1)}, length), int64(off)); err != nil {
					t.Error(err)
				}
				if w == 0 {
					if err := errors.Join(m.Zero(4096, 8192, true), m.Sync()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	got := make([]byte, length)
	if _, err := m.ReadAt(got, 7*BlockSize); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(got); at += BlockSize {
		block := got[at : at+BlockSize]
		if block[0] > writers || !bytes.Equal(block, bytes.Repeat(block[:1], BlockSize)) {
			t.Fatalf("block %d begins with %d and is not of one writer", at/BlockSize, block[0])
		}
	}
}

// checkUnmap unmaps all and writes a little.
func checkUnmap(t *testing.T, m scsi.Medium) {
	t.Helper()
	size := m.Size()
	if err := m.Zero(0, size, true); err != nil {
		t.Fatal(err)
	}
	checkAll(t, m, make([]byte, size))
	if n, mapped := m.Mapped(0); n != size || mapped {
		t.Errorf("all unmapped: Mapped(0) = %d, %v, want %d, false", n, mapped, size)
	}
	written := bytes.Repeat([]byte{7}, 8192)
	if _, err := m.WriteAt(written, 1<<20); err != nil {
		t.Fatal(err)
	}
	type extent struct {
		n      int64
		mapped bool
	}
	var got []extent
	for off := int64(0); off < size; {
		n, mapped := m.Mapped(off)
		if n <= 0 {
			t.Fatalf("Mapped(%d) = %d", off, n)
		}
		got = append(got, extent{n, mapped})
		off += n
	}
	if want := []extent{{1 << 20, false}, {8192, true}, {size - 1<<20 - 8192, false}}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("8192 bytes written at 1 MiB: mapped %v, want %v", got, want)
	}
	if n, mapped := m.Mapped(1<<20 + 512); n != 8192-512 || !mapped {
		t.Errorf("Mapped within = %d, %v", n, mapped)
	}
	checkRange(t, m, 1<<20-4096, append(append(make([]byte, 4096), written...), make([]byte, 4096)...))
}
