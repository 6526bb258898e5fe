package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// disk is the content of a disk: data that compresses and data that does not, zeros, and an end within a cluster.
func disk() []byte {
	rng := rand.New(rand.NewPCG(1, 2)) // the same disk each time
	b := make([]byte, 9<<20+1024)
	for i := 1 << 20; i < 3<<20; i++ {
		b[i] = byte(rng.Uint32())
	}
	for i := 5 << 20; i < 6<<20; i++ {
		b[i] = "all work and no play\n"[i%21]
	}
	copy(b[len(b)-600:], "the end")
	return b
}

// qemuImg runs qemu-img (Debian package qemu-utils) in dir.
func qemuImg(tb testing.TB, dir string, args ...string) {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), "qemu-img", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// read reads a whole image.
func read(b []byte) ([]byte, error) {
	img, err := Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, err
	}
	if img.Size() > 1<<30 {
		return nil, errors.New("a test's disk is small")
	}
	out := make([]byte, img.Size())
	end := int64(0)
	err = img.Extents(func(off int64, data []byte) error {
		if off < end || off+int64(len(data)) > img.Size() {
			return fmt.Errorf("%d bytes at %d, after %d", len(data), off, end)
		}
		end = off + int64(copy(out[off:], data))
		return nil
	})
	return out, err
}

func readFile(tb testing.TB, name string) []byte {
	tb.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestReadsWhatQEMUWrites(t *testing.T) {
	dir := t.TempDir()
	want := disk()
	if err := os.WriteFile(filepath.Join(dir, "raw"), want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, options string }{
		{"version 3", "compat=1.1"},
		{"version 2", "compat=0.10"},
		{"preallocated", "preallocation=metadata"},
		{"smallest clusters", "cluster_size=512"},
		{"largest clusters", "cluster_size=2M"},
		{"lazy reference counts", "lazy_refcounts=on,refcount_bits=1"},
		{"zlib", "compression_type=zlib -c"},
		{"zlib, version 2", "compat=0.10 -c"},
		{"zlib, smallest clusters", "cluster_size=512 -c"},
		{"zlib, largest clusters", "cluster_size=2M -c"},
		{"zstd", "compression_type=zstd -c"},
		{"zstd, smallest clusters", "compression_type=zstd,cluster_size=512 -c"},
		{"zstd, largest clusters", "compression_type=zstd,cluster_size=2M -c"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "image")
			options, compressed := strings.CutSuffix(tt.options, " -c")
			args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", options}
			if compressed {
				args = append(args, "-c")
			}
			qemuImg(t, dir, append(args, "raw", out)...)
			got, err := read(readFile(t, out))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("the disk has other bytes")
			}
		})
	}
}

// Zeros that are written, discarded and allocated again read as zeros, whatever lies in the file.
func TestZeroClusters(t *testing.T) {
	dir := t.TempDir()
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "image", "1M")
	cmd := exec.CommandContext(t.Context(), "qemu-io", "-c", "write -P 7 0 512k", "-c", "write -z 128k 128k", "-c", "discard 256k 64k", "image")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got, err := read(readFile(t, filepath.Join(dir, "image")))
	if err != nil {
		t.Fatal(err)
	}
	want := append(bytes.Repeat([]byte{7}, 512<<10), make([]byte, 512<<10)...)
	clear(want[128<<10 : 320<<10])
	if !bytes.Equal(got, want) {
		t.Error("the disk has other bytes")
	}
}

func TestRefusedImages(t *testing.T) {
	dir := t.TempDir()
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "below", "1M")
	for _, tt := range []struct {
		name, want string
		args       []string
	}{
		{"backing file", "lies over another image", []string{"-b", "below", "-F", "qcow2", "image"}},
		{"encrypted", "is encrypted", []string{"--object", "secret,id=s,data=1234567890", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "image", "1M"}},
		{"data file", "in another file", []string{"-o", "data_file=data", "image", "1M"}},
		{"subclusters", "extended L2", []string{"-o", "extended_l2=on", "image", "1M"}},
		{"too large", "more than 8796093022208", []string{"image", "9T"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			qemuImg(t, dir, "create", "-q", "-f", "qcow2", filepath.Join(dir, "below"), "1M")
			qemuImg(t, dir, append([]string{"create", "-q", "-f", "qcow2"}, tt.args...)...)
			refused(t, readFile(t, filepath.Join(dir, "image")), tt.want)
		})
	}
}

func refused(t *testing.T, image []byte, want string) {
	t.Helper()
	_, err := read(image)
	if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want one about %q", err, want)
	}
}

// small is an image with one compressed cluster and one that is not.
func small(tb testing.TB) []byte {
	tb.Helper()
	dir := tb.TempDir()
	raw := make([]byte, 4096)
	copy(raw, "one cluster")
	copy(raw[1024:], "another")
	if err := os.WriteFile(filepath.Join(dir, "raw"), raw, 0o600); err != nil {
		tb.Fatal(err)
	}
	qemuImg(tb, dir, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", "-c", "raw", "image")
	return readFile(tb, filepath.Join(dir, "image"))
}

func TestDamagedImages(t *testing.T) {
	good := small(t)
	be := binary.BigEndian
	l1 := int64(be.Uint64(good[40:]))
	l2 := int64(be.Uint64(good[l1:]) & offsetMask)
	for name, tt := range map[string]struct {
		damage func([]byte) []byte
		want   string
	}{
		"no bytes":                 {func([]byte) []byte { return nil }, "no header"},
		"another format":           {func(b []byte) []byte { copy(b, "KDMV"); return b }, "no header"},
		"half a header":            {func(b []byte) []byte { return b[:80] }, "header ends"},
		"version 4":                {func(b []byte) []byte { be.PutUint32(b[4:], 4); return b }, "version 4"},
		"huge clusters":            {func(b []byte) []byte { be.PutUint32(b[20:], 63); return b }, "63 cluster bits"},
		"no disk":                  {func(b []byte) []byte { be.PutUint64(b[24:], 0); return b }, "no bytes"},
		"negative disk":            {func(b []byte) []byte { be.PutUint64(b[24:], 1<<63); return b }, "more than"},
		"disk beyond its clusters": {func(b []byte) []byte { be.PutUint64(b[24:], MaxSize); return b }, "the L1 table would have"},
		"disk beyond its table":    {func(b []byte) []byte { be.PutUint64(b[24:], 1<<30); return b }, "an L1 table of"},
		"table beyond the file":    {func(b []byte) []byte { be.PutUint64(b[40:], 1<<60); return b }, "L1 table"},
		"corrupt":                  {func(b []byte) []byte { be.PutUint64(b[72:], featureCorrupt); return b }, "marked as corrupt"},
		"unknown feature":          {func(b []byte) []byte { be.PutUint64(b[72:], 1<<40); return b }, "not known"},
		"unknown compression":      {func(b []byte) []byte { b[104] = 7; return b }, "compression 7"},
		"L2 table beyond the file": {func(b []byte) []byte { be.PutUint64(b[l1:], 1<<50); return b }, "L2 table"},
		"cluster beyond the file":  {func(b []byte) []byte { be.PutUint64(b[l2:], 1<<50); return b }, "cluster"},
		"packed beyond the file":   {func(b []byte) []byte { be.PutUint64(b[l2:], flagCompressed|1<<50); return b }, "compressed data"},
		"packed rubbish":           {func(b []byte) []byte { be.PutUint64(b[l2:], flagCompressed|4); return b }, "compressed data"},
	} {
		t.Run(name, func(t *testing.T) { refused(t, tt.damage(bytes.Clone(good)), tt.want) })
	}
	t.Run("one table twice", func(t *testing.T) {
		b := bytes.Clone(good)
		be.PutUint64(b[24:], 33<<10) // a table of 512 bytes is for 32 KiB
		be.PutUint32(b[36:], 2)
		copy(b[l1+8:], b[l1:l1+8])
		refused(t, b, "the same L2 table")
	})
}

// Whatever the bytes, reading ends without a panic, and gives nothing outside of the disk.
func FuzzImage(f *testing.F) {
	good := small(f)
	f.Add(good)
	for _, bits := range []byte{9, 16, 21} {
		b := bytes.Clone(good)
		b[23] = bits
		f.Add(b)
	}
	f.Add(good[:headerV2])
	f.Fuzz(func(t *testing.T, b []byte) {
		if img, err := Open(bytes.NewReader(b), int64(len(b))); err != nil || img.Size() > 1<<20 {
			return // a large disk of zeros is none of our business, and takes long
		}
		_, _ = read(b)
	})
}
