package lun

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A baseBench is an image with a delta over it, and counts how much is read to know the image.
type baseBench struct {
	t           *testing.T
	base, delta string
	read        int64
}

func newBaseBench(t *testing.T) *baseBench {
	t.Helper()
	dir := t.TempDir()
	b := &baseBench{t: t, base: filepath.Join(dir, "base"), delta: filepath.Join(dir, "delta")}
	write(t, b.base, randomBytes(3<<20+700))
	return b
}

// open opens the delta over the image, as a process of its own would, and says whether the image was read for it.
func (b *baseBench) open(image string) (read bool, err error) {
	b.t.Helper()
	base := openImageT(b.t, image)
	defer base.Close()
	b.read = 0
	bases := Bases{Progress: func(_ string, done, _ int64) { b.read = done }}
	d, err := bases.OpenDelta(b.t.Context(), base, b.delta, 0)
	if err == nil {
		err = d.Close()
	}
	return b.read == base.Size(), err
}

func (b *baseBench) want(image string, read bool) {
	b.t.Helper()
	if got, err := b.open(image); got != read || err != nil {
		b.t.Errorf("opened: read the image %v, want %v; %v", got, read, err)
	}
}

// TestBaseIsReadOnce has an image be read when its delta is made, and when it may be another.
func TestBaseIsReadOnce(t *testing.T) {
	b := newBaseBench(t)
	b.want(b.base, true)
	b.want(b.base, false)

	moved := filepath.Join(t.TempDir(), "moved")
	write(t, moved, randomBytes(3<<20+700))
	b.want(moved, true)
	b.want(moved, false)

	if err := os.Chtimes(moved, time.Time{}, time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	b.want(moved, true)

	write(t, b.delta+".base", []byte("no digest\n"))
	b.want(moved, true)
	if err := os.Remove(b.delta + ".base"); err != nil {
		t.Fatal(err)
	}
	b.want(moved, true)
	b.want(moved, false)
}

// TestBaseThatChanged changes one byte of an image, anywhere, and puts back the time of that: its delta is no longer opened.
func TestBaseThatChanged(t *testing.T) {
	for _, at := range []int64{0, 1 << 20, 1<<20 + 4097, 3<<20 + 699} {
		b := newBaseBench(t)
		b.want(b.base, true)
		before, err := os.Stat(b.base)
		if err != nil {
			t.Fatal(err)
		}
		f := must(os.OpenFile(b.base, os.O_RDWR, 0))(t)
		var one [1]byte
		if _, err := f.ReadAt(one[:], at); err != nil {
			t.Fatal(err)
		}
		one[0]++
		if _, err := f.WriteAt(one[:], at); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Close(), os.Chtimes(b.base, time.Time{}, before.ModTime())); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := b.open(b.base); err == nil || !strings.Contains(err.Error(), "it belongs to another base") {
				t.Errorf("a byte changed at %d: %v", at, err)
			}
		}
	}
}

// TestBaseOfSeveralDeltas has one image be read once for two deltas that are made at the same start.
func TestBaseOfSeveralDeltas(t *testing.T) {
	b := newBaseBench(t)
	base := openImageT(t, b.base)
	defer base.Close()
	reads := 0
	bases := Bases{Progress: func(image string, done, of int64) {
		if image != b.base || of != base.Size() {
			t.Errorf("%q, %d bytes", image, of)
		}
		if done == of {
			reads++
		}
	}}
	for _, name := range []string{b.delta, b.delta + "2"} {
		if err := must(bases.OpenDelta(t.Context(), base, name, 0))(t).Close(); err != nil {
			t.Fatal(err)
		}
	}
	if reads != 1 {
		t.Errorf("read %d times, want 1", reads)
	}
}

// TestBaseIsNotReadToTheEnd has somebody lose patience, and somebody write to the image meanwhile: no delta is made.
func TestBaseIsNotReadToTheEnd(t *testing.T) {
	b := newBaseBench(t)
	base := openImageT(t, b.base)
	defer base.Close()
	ctx, cancel := context.WithCancel(t.Context())
	bases := Bases{Progress: func(string, int64, int64) { cancel() }}
	if _, err := bases.OpenDelta(ctx, base, b.delta, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	bases.Progress = func(string, int64, int64) {
		if err := os.Chtimes(b.base, time.Time{}, time.Unix(1e9, 0)); err != nil {
			t.Error(err)
		}
	}
	if _, err := bases.OpenDelta(t.Context(), base, b.delta, 0); err == nil || !strings.Contains(err.Error(), "somebody changes it") {
		t.Errorf("changed: %v", err)
	}
	for _, name := range []string{b.delta, b.delta + ".base"} {
		if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s was made (%v)", filepath.Base(name), err)
		}
	}
}
