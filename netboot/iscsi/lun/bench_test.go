package lun

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

const benchSize, benchOld = 1 << 30, 64 << 20

// plain is what tgt does with a sparse file: pwrite(2), then fdatasync(2), for each command.
type plain struct{ *os.File }

func (p plain) Sync() error { return unix.Fdatasync(int(p.Fd())) }

func (p plain) Zero(int64, int64, bool) error { panic("not asked for") }
func (p plain) Size() int64                   { return benchSize }

// BenchmarkWriteThrough writes 4 KiB at random places, and syncs after each: a write with FUA. New places were never written
// before, and old ones were: all the first 64 MiB. Run it with -count, and -benchtime of less than 100000x.
func BenchmarkWriteThrough(b *testing.B) {
	media := map[string]func(b *testing.B, dir string) mediumOf{
		"delta": func(b *testing.B, dir string) mediumOf {
			b.Helper()
			d, err := OpenDelta(nil, filepath.Join(dir, "delta"), benchSize, "")
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = d.Close() })
			return d
		},
		"disk": func(b *testing.B, dir string) mediumOf {
			b.Helper()
			d, err := OpenDisk(filepath.Join(dir, "disk"), benchSize)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = d.Close() })
			return d
		},
		"plain": func(b *testing.B, dir string) mediumOf {
			b.Helper()
			f, err := os.Create(filepath.Join(dir, "plain"))
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = f.Close() })
			if err := f.Truncate(benchSize); err != nil {
				b.Fatal(err)
			}
			return plain{f}
		},
	}
	for _, depth := range []int{1, 16} {
		for name, open := range media {
			b.Run(fmt.Sprintf("%s/depth=%d/new", name, depth), func(b *testing.B) {
				writeThrough(b, open(b, b.TempDir()), depth, benchSize)
			})
			b.Run(fmt.Sprintf("%s/depth=%d/old", name, depth), func(b *testing.B) {
				m := open(b, b.TempDir())
				if _, err := m.WriteAt(randomBytes(benchOld), 0); err != nil {
					b.Fatal(err)
				}
				writeThrough(b, m, depth, benchOld)
			})
		}
	}
}

func writeThrough(b *testing.B, m mediumOf, depth int, size int64) {
	b.Helper()
	places := rand.Perm(int(size / clusterSize))
	data := randomBytes(clusterSize)
	if err := m.Sync(); err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range depth {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= int64(b.N) {
					return
				}
				if _, err := m.WriteAt(data, int64(places[i%int64(len(places))])*clusterSize); err != nil {
					b.Error(err)
				}
				if err := m.Sync(); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkRead finds the memory of 4 KiB and of 256 KiB, and reads them, in a medium of which every third cluster was
// written.
func BenchmarkRead(b *testing.B) {
	const size = 64 << 20
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "base"), randomBytes(size), 0o600); err != nil {
		b.Fatal(err)
	}
	image, err := OpenImage(filepath.Join(dir, "base"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = image.Close() })
	deltas := map[string]*Delta{}
	for _, name := range []string{"delta unwritten", "delta written here and there", "delta written"} {
		d, err := OpenDelta(image, filepath.Join(dir, name), 0, "")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = d.Close() })
		deltas[name] = d
	}
	data := randomBytes(1 << 20)
	for off := int64(0); off < size; off += 1 << 20 {
		_, err = deltas["delta written"].WriteAt(data, off)
		if err != nil {
			b.Fatal(err)
		}
		_, err = deltas["delta written here and there"].WriteAt(data[:clusterSize], off)
		if err != nil {
			b.Fatal(err)
		}
	}
	for _, n := range []int64{4 << 10, 256 << 10} {
		benchRead(b, "image", image, n)
		for name, d := range deltas {
			benchRead(b, name, d, n)
		}
	}
}

func benchRead(b *testing.B, name string, m interface {
	ReadAt(p []byte, off int64) (int, error)
	Segments(dst [][]byte, off int64, n int) ([][]byte, bool)
	Size() int64
}, n int64,
) {
	b.Helper()
	b.Run(fmt.Sprintf("%s/Segments/%d", name, n), func(b *testing.B) {
		var dst [][]byte
		for b.Loop() {
			dst, _ = m.Segments(dst[:0], rand.Int64N(m.Size()/n)*n, int(n))
		}
	})
	b.Run(fmt.Sprintf("%s/ReadAt/%d", name, n), func(b *testing.B) {
		b.SetBytes(n)
		p := make([]byte, n)
		for b.Loop() {
			if _, err := m.ReadAt(p, rand.Int64N(m.Size()/n)*n); err != nil {
				b.Fatal(err)
			}
		}
	})
}
