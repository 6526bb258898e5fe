package lun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// TestDeltaRefused has each delta that cannot be opened say why, and what to do.
func TestDeltaRefused(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write(t, path("base"), randomBytes(1<<20))
	write(t, path("other"), randomBytes(2<<20))
	write(t, path("text"), []byte("no delta\n"))
	write(t, path("blank"), make([]byte, 1<<20))
	write(t, path("empty"), nil)
	write(t, path("qcow2"), append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 504)...))
	if err := unix.Mkfifo(path("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	base, other := openImageT(t, path("base")), openImageT(t, path("other"))
	defer base.Close()
	defer other.Close()
	if err := must(OpenDelta(base, path("delta"), 0, "one"))(t).Close(); err != nil {
		t.Fatal(err)
	}
	earlier := must(os.ReadFile(path("delta")))(t)[:pageSize]
	binary.LittleEndian.PutUint32(earlier[8:], 1)
	write(t, path("earlier"), sealHeader(earlier))
	for name, tt := range map[string]struct {
		open func() error
		want string
	}{
		"another base":                 {opening(base, path("delta"), 0, "two"), `it belongs to another base ("one", 1048576 bytes), not to this one ("two", 1048576 bytes): open it over its own, or remove it to begin anew without what was written to it`},
		"a longer base":                {opening(other, path("delta"), 0, "one"), `it belongs to another base ("one", 1048576 bytes), not to this one ("one", 2097152 bytes)`},
		"no base":                      {opening(nil, path("delta"), 1<<20, "one"), `it belongs to another base ("one", 1048576 bytes), not to this one (none)`},
		"another size":                 {opening(base, path("delta"), 4<<20, "one"), "it has 1048576 bytes, not 4194304: its size cannot change: leave out the size"},
		"no size":                      {opening(nil, path("new"), 0, ""), "without a base its size must be given"},
		"a size too small":             {opening(base, path("new"), 4096, ""), "size 4096 is too small, the base has 1048576: say at least so many, or leave out the size to have as many"},
		"an odd size":                  {opening(nil, path("new"), 4097, ""), "size 4097: want a multiple of 512"},
		"too large":                    {opening(nil, path("new"), maxSize+512, ""), "17592186044416 at most"},
		"a long id":                    {opening(base, path("new"), 0, strings.Repeat("x", 1025)), "the base's id has 1025 bytes, want 1024 at most"},
		"no delta":                     {opening(base, path("text"), 0, "one"), "it is no delta"},
		"an earlier version":           {opening(base, path("earlier"), 0, "one"), "it has a format that this program does not know: version 1 with clusters of 4096 bytes, not version 2 with 4096: open it with the program that made it, or remove it to begin anew without what was written to it"},
		"zeros":                        {opening(base, path("blank"), 0, "one"), "it is no delta"},
		"a directory":                  {opening(base, dir, 0, "one"), "is a directory"},
		"a pipe":                       {opening(base, path("pipe"), 0, "one"), "want a plain file"},
		"no directory":                 {opening(base, path("none/delta"), 0, "one"), "no such file or directory"},
		"no image":                     {func() error { _, err := OpenImage(path("none")); return err }, "no such file or directory"},
		"an empty image":               {func() error { _, err := OpenImage(path("empty")); return err }, "it is empty"},
		"a pipe as image":              {func() error { _, err := OpenImage(path("pipe")); return err }, "want a plain file"},
		"no disk":                      {func() error { _, err := OpenDisk(path("none"), 0); return err }, "no such file or directory"},
		"an empty disk":                {func() error { _, err := OpenDisk(path("empty"), 0); return err }, "it is empty: say how large it is to be"},
		"an odd disk":                  {func() error { _, err := OpenDisk(path("text"), 0); return err }, "lengthen it to 512"},
		"a disk of a size":             {func() error { _, err := OpenDisk(path("blank"), 512); return err }, "it has 1048576 bytes, not 512: leave out the size"},
		"a disk of a larger size":      {func() error { _, err := OpenDisk(path("blank"), 2<<20); return err }, "it has 1048576 bytes, not 2097152: leave out the size, or lengthen the file first (truncate -s 2097152)"},
		"a delta as image":             {func() error { _, err := OpenImage(path("delta")); return err }, "it is a delta, and no disk without its base"},
		"an earlier delta as image":    {func() error { _, err := OpenImage(path("earlier")); return err }, "it is a delta"},
		"a delta as disk":              {func() error { _, err := OpenDisk(path("delta"), 0); return err }, "it is a delta, and no disk without its base"},
		"a delta as disk of a size":    {func() error { _, err := OpenDisk(path("delta"), 1<<20); return err }, "it is a delta"},
		"an earlier delta as disk":     {func() error { _, err := OpenDisk(path("earlier"), 0); return err }, "it is a delta"},
		"a qcow2 image":                {func() error { _, err := OpenImage(path("qcow2")); return err }, "it is a qcow2 image, and its bytes are not those of the disk: make a raw one of it (qemu-img convert -O raw)"},
		"a disk that is read as image": {func() error { _, err := OpenDisk(path("base"), 0); return err }, "in use by this or another process"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tt.open()
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	if _, err := os.Stat(path("new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what could not be made was left: %v", err)
	}
}

func opening(base *Image, path string, size int64, id string) func() error {
	return func() error {
		_, err := OpenDelta(base, path, size, id)
		return err
	}
}

func TestOneOpener(t *testing.T) {
	dir := t.TempDir()
	for name, open := range map[string]func() (closer, error){
		"disk":  func() (closer, error) { return OpenDisk(filepath.Join(dir, "disk"), 1<<20) },
		"delta": func() (closer, error) { return OpenDelta(nil, filepath.Join(dir, "delta"), 1<<20, "") },
	} {
		t.Run(name, func(t *testing.T) {
			first, err := open()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := open(); !errors.Is(err, ErrInUse) {
				t.Errorf("the second: %v, want %v", err, ErrInUse)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			again, err := open()
			if err != nil {
				t.Fatalf("after the first is closed: %v", err)
			}
			if err := again.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOneMaker has many open a delta that is not there: one makes it and has it, until it closes it.
func TestOneMaker(t *testing.T) {
	path := filepath.Join(t.TempDir(), "delta")
	type outcome struct {
		d   *Delta
		err error
	}
	const many = 16
	outcomes := make(chan outcome)
	for range many {
		go func() {
			d, err := OpenDelta(nil, path, 1<<20, "")
			outcomes <- outcome{d, err}
		}()
	}
	var have []*Delta
	for range many {
		switch o := <-outcomes; {
		case o.err == nil:
			have = append(have, o.d)
		case !errors.Is(o.err, ErrInUse):
			t.Error(o.err)
		}
	}
	if len(have) > 1 {
		t.Errorf("%d have it", len(have))
	}
	for _, d := range have {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestMadeThroughLink makes media at a link: the link stays one.
func TestMadeThroughLink(t *testing.T) {
	for name, open := range makers {
		for _, there := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, a file is there %v", name, there), func(t *testing.T) {
				file, link := filepath.Join(t.TempDir(), "file"), filepath.Join(t.TempDir(), "link")
				if there {
					write(t, file, nil)
				}
				if err := os.Symlink(file, link); err != nil {
					t.Fatal(err)
				}
				want := randomBytes(4096)
				m := must(open(link, 1<<20))(t)
				if _, err := m.WriteAt(want, 0); err != nil {
					t.Fatal(err)
				}
				if err := m.Close(); err != nil {
					t.Fatal(err)
				}
				m = must(open(file, 1<<20))(t)
				checkRange(t, m, 0, want)
				if err := m.Close(); err != nil {
					t.Fatal(err)
				}
				if to, err := os.Readlink(link); to != file {
					t.Errorf("the link leads to %q (%v), want %q", to, err, file)
				}
			})
		}
	}
}

// makers open media without a base, and make them.
var makers = map[string]func(path string, size int64) (closer, error){
	"disk":  func(path string, size int64) (closer, error) { return OpenDisk(path, size) },
	"delta": func(path string, size int64) (closer, error) { return OpenDelta(nil, path, size, "") },
}

// TestNotMade has media that cannot be made leave what was there before.
func TestNotMade(t *testing.T) {
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 1 << 20, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
			t.Error(err)
		}
	}()
	for name, open := range makers {
		for _, tt := range []struct {
			size int64
			want string
		}{{4 << 40, ": file too large"}, {1000, "size 1000: want a multiple of 512"}, {-512, "size -512: want a multiple of 512"}} {
			t.Run(fmt.Sprintf("%s of %d", name, tt.size), func(t *testing.T) {
				dir := t.TempDir()
				empty, none, link := filepath.Join(dir, "empty"), filepath.Join(dir, "none"), filepath.Join(dir, "link")
				write(t, empty, nil)
				if err := os.Symlink(none, link); err != nil {
					t.Fatal(err)
				}
				for _, path := range []string{empty, none, link} {
					_, err := open(path, tt.size)
					if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
						t.Errorf("%v, want %q", err, tt.want)
					}
				}
				left, err := os.ReadDir(dir)
				if err != nil {
					t.Fatal(err)
				}
				if fi, err := os.Stat(empty); err != nil || fi.Size() > 0 || len(left) != 2 {
					t.Errorf("left: %v", left)
				}
			})
		}
	}
}

// TestMakingIsKilled makes a delta of what a process left that was killed while it made one.
func TestMakingIsKilled(t *testing.T) {
	for name, left := range map[string][]byte{
		"at first":     unfinished(),
		"later":        append(unfinished(), make([]byte, 1<<20)...),
		"with a map":   append(unfinished(), randomBytes(1<<20)...),
		"with no size": nil,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "delta")
			write(t, path, left)
			for range 2 {
				d := must(OpenDelta(nil, path, 8<<20, ""))(t)
				checkAll(t, d, make([]byte, 8<<20))
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if files, err := os.ReadDir(dir); len(files) != 1 {
				t.Errorf("in the directory: %v (%v)", files, err)
			}
		})
	}
}

// TestTruncated cuts files short while they are open: reading says so, and sending what was mapped does too.
func TestTruncated(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write(t, path, randomBytes(1<<20))
	image := openImageT(t, path)
	delta := must(OpenDelta(image, filepath.Join(dir, "delta"), 0, ""))(t)
	defer delta.Close()
	defer image.Close()
	if _, err := delta.WriteAt(randomBytes(8192), 512<<10); err != nil {
		t.Fatal(err)
	}
	disk := must(OpenDisk(filepath.Join(dir, "disk"), 1<<20))(t)
	defer disk.Close()
	for _, name := range []string{"file", "disk"} {
		if err := os.Truncate(filepath.Join(dir, name), 4096); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(filepath.Join(dir, "delta"), 3*pageSize); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		m   scsi.Mapper
		off int64
	}{"image": {image, 512 << 10}, "disk": {disk, 512 << 10}, "delta": {delta, 512 << 10}, "delta, base": {delta, 0 + 8192}} {
		t.Run(name, func(t *testing.T) {
			segments, ok := tt.m.Segments(nil, tt.off, 8192)
			if ok { // not after another medium of this file failed
				pipe := make([]int, 2)
				if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
					t.Fatal(err)
				}
				defer unix.Close(pipe[0])
				defer unix.Close(pipe[1])
				if n, err := unix.Writev(pipe[1], segments); !errors.Is(err, unix.EFAULT) {
					t.Errorf("writev of what is no longer there: %d, %v, want %v", n, err, unix.EFAULT)
				}
			}
			tt.m.Unmapped()
			if _, ok := tt.m.Segments(nil, 0, 512); ok {
				t.Error("there are segments after Unmapped")
			}
			_, err := tt.m.ReadAt(make([]byte, 8192), tt.off)
			if !errors.Is(err, scsi.ErrMedium) || !strings.Contains(err.Error(), "cut short") {
				t.Errorf("ReadAt: %v", err)
			}
		})
	}
}

// TestCutShortIsFinal cuts the file of a medium short: once that was noticed, nothing is written behind its end, which
// would make zeros of what it has lost.
func TestCutShortIsFinal(t *testing.T) {
	const size = 1 << 20
	for medium, open := range map[string]func(path string) (closer, error){
		"disk":  func(path string) (closer, error) { return OpenDisk(path, size) },
		"delta": func(path string) (closer, error) { return OpenDelta(nil, path, size, "") },
	} {
		for how, notice := range map[string]func(m closer) error{
			"read": func(m closer) error { _, err := m.ReadAt(make([]byte, 512), 0); return err },
			"sync": func(m closer) error { return m.Sync() },
			"sent": func(m closer) error { m.(scsi.Mapper).Unmapped(); return scsi.ErrMedium },
		} {
			t.Run(medium+", "+how, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "file")
				m := must(open(path))(t)
				if _, err := m.WriteAt(randomBytes(size), 0); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(m.Sync(), os.Truncate(path, 0)); err != nil {
					t.Fatal(err)
				}
				if err := notice(m); !errors.Is(err, scsi.ErrMedium) {
					t.Errorf("noticed: %v", err)
				}
				_, writing := m.WriteAt(make([]byte, 512), size-512)
				if err := os.Truncate(path, size<<4); err != nil { // somebody means well
					t.Fatal(err)
				}
				for what, err := range map[string]error{"WriteAt": writing, "Zero": m.Zero(0, 4096, true), "Sync": m.Sync(), "Close": m.Close()} {
					if !errors.Is(err, scsi.ErrMedium) || !strings.Contains(err.Error(), "the file was cut short, it had") {
						t.Errorf("%s: %v", what, err)
					}
				}
			})
		}
	}
}

// TestHolesStayHoles looks at all of a sparse disk through its mapping.
func TestHolesStayHoles(t *testing.T) {
	d := must(OpenDisk(filepath.Join(t.TempDir(), "disk"), 8<<20))(t)
	defer d.Close()
	before := d.Allocated()
	checkAll(t, d, make([]byte, 8<<20))
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	if after := d.Allocated(); after != before {
		t.Errorf("reading 8 MiB of holes took %d bytes", after-before)
	}
}

// TestSpaceIsGivenBack writes to media and unmaps what was written.
func TestSpaceIsGivenBack(t *testing.T) {
	dir := t.TempDir()
	for name, m := range map[string]interface {
		closer
		Allocated() int64
	}{
		"disk":  must(OpenDisk(filepath.Join(dir, "disk"), 8<<20))(t),
		"delta": must(OpenDelta(nil, filepath.Join(dir, "delta"), 8<<20, ""))(t),
	} {
		t.Run(name, func(t *testing.T) {
			empty := m.Allocated()
			if _, err := m.WriteAt(randomBytes(4<<20), 1<<20); err != nil {
				t.Fatal(err)
			}
			if err := m.Sync(); err != nil {
				t.Fatal(err)
			}
			full := m.Allocated()
			if err := errors.Join(m.Zero(1<<20, 4<<20, true), m.Sync()); err != nil {
				t.Fatal(err)
			}
			freed := m.Allocated()
			if full-empty < 4<<20 || full-freed < 4<<20 {
				t.Errorf("empty %d, written %d, unmapped %d bytes", empty, full, freed)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDamage changes each sector of a delta's file that is not data: what is read after that is right, or an error.
func TestDamage(t *testing.T) {
	l := newLife(t)
	for range 100 {
		if err := l.history.random(l.d, 3); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.history.sync(l.d); err != nil {
		t.Fatal(err)
	}
	left := l.f.now
	inUse := 8 + l.h.sectors() // of the header and the map
	for boot, inUse := range map[string]int64{l.boot: inUse + l.h.sectors(), "another": inUse} {
		noticed := int64(0)
		for i := range (mapsOff + l.h.mapsLen()) / sectorSize {
			for kind, damage := range damages(left[i]) {
				f := recorded(onDisk(left), l.h.fileSize())
				f.now.set(i, damage)
				f.stable.set(i, damage)
				switch err := l.reopen(f, boot); {
				case errors.Is(err, errDamaged) || err != nil && strings.Contains(err.Error(), "it is no delta"):
					noticed++
				case err != nil:
					t.Errorf("boot %q, sector %d %s: %v", boot, i, kind, err)
				}
			}
		}
		// A session that is damaged is one of another run of the kernel, and the rest is unused.
		if noticed != inUse*3 {
			t.Errorf("boot %q: %d damages noticed, want %d", boot, noticed, inUse*3)
		}
	}
}

// damages are what may become of a sector.
func damages(b []byte) map[string][]byte {
	if b == nil {
		b = make([]byte, sectorSize)
	}
	flipped, torn := bytes.Clone(b), bytes.Clone(b)
	flipped[rand.IntN(len(b))] ^= 1 << rand.IntN(8)
	fillRandom(torn[256:])
	return map[string][]byte{"flipped": flipped, "torn": torn, "of another": bytes.Repeat([]byte{0xa5}, sectorSize)}
}

// reopen opens what is left in f and checks that all that was synced is right.
func (l *life) reopen(f *recorder, boot string) error {
	page := make([]byte, pageSize)
	if _, err := f.ReadAt(page, 0); err != nil {
		return err
	}
	h, err := parseHeader(page)
	if err != nil {
		return err
	}
	d, err := newDelta("damaged", f, h, l.base, boot)
	if err != nil {
		return err
	}
	return l.history.check(d, hot(h.size), crash{l.f.done(), true})
}

// TestFullDisk has the file system be full now and then: nothing is lost, and it goes on.
func TestFullDisk(t *testing.T) {
	l := newLife(t)
	for range 10 {
		l.f.fault = func(o op) error {
			if !o.isSync() && o.data != nil && rand.IntN(3) == 0 {
				return syscall.ENOSPC
			}
			return nil
		}
		for range 15 {
			if err := l.history.random(l.d, 5, syscall.ENOSPC); err != nil {
				t.Fatal(err)
			}
		}
		l.f.fault = nil
		for range 5 {
			if err := l.history.random(l.d, 5); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.history.check(l.d, hot(l.h.size), crash{op: l.f.done()}); err != nil {
			t.Fatal(err)
		}
	}
	l.replay(4)
}

// TestFullDiskIsSaid has a write find no room for all of it: the error says so, and what it took is given back.
func TestFullDiskIsSaid(t *testing.T) {
	l := newLife(t)
	before := maps.Clone(l.f.now)
	l.f.fault = func(o op) error {
		if o.data == nil {
			return nil
		}
		return syscall.ENOSPC
	}
	_, err := l.d.WriteAt(randomBytes(1<<20), 0)
	if !errors.Is(err, scsi.ErrMedium) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("WriteAt: %v", err)
	}
	if took := len(l.f.now) - len(before); took != 0 {
		t.Errorf("a write that failed took %d blocks", took)
	}
}

// TestFaults has each operation of the file fail once, in a history of its own: what was acknowledged is there.
func TestFaults(t *testing.T) {
	for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
		for fail := range 40 {
			t.Run(fmt.Sprintf("%v at %d", errno, fail), func(t *testing.T) {
				t.Parallel()
				l := newLife(t)
				n := 0
				l.f.fault = func(op) error {
					n++
					if n == fail+1 {
						return errno
					}
					return nil
				}
				for range 50 {
					_ = l.history.random(l.d, 6) // what failed is in the history
				}
				if n <= fail {
					t.Fatalf("only %d operations", n)
				}
				c := crash{op: l.f.done()}
				if err := l.history.check(l.d, hot(l.h.size), c); err != nil {
					t.Fatal(err)
				}
				// After a failed sync only what was synced before it is believed, as after a loss of power.
				c.power = l.d.lost.err() != nil
				l.check(c, l.f.disk, l.boot, 0)
				l.replay(1)
			})
		}
	}
}

// TestFailedSyncIsFinal has a sync fail: the kernel may have dropped what it could not write, so no later one succeeds.
func TestFailedSyncIsFinal(t *testing.T) {
	l := newLife(t)
	if err := l.history.write(l.d, 0, 8); err != nil {
		t.Fatal(err)
	}
	l.f.fault = func(o op) error {
		if o.isSync() {
			return syscall.EIO
		}
		return nil
	}
	if err := l.d.Sync(); !errors.Is(err, syscall.EIO) || !errors.Is(err, scsi.ErrMedium) {
		t.Errorf("Sync: %v", err)
	}
	l.f.fault = nil
	_, err := l.d.WriteAt(make([]byte, 512), 0)
	for what, err := range map[string]error{"Sync": l.d.Sync(), "WriteAt": err, "Zero": l.d.Zero(0, 4096, true)} {
		// Not what the sync said: space, for one, is not what is missing now.
		if !errors.Is(err, scsi.ErrMedium) || errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "an earlier sync failed") {
			t.Errorf("%s after that: %v", what, err)
		}
	}
	l.open()
	if err := errors.Join(l.history.write(l.d, 0, 8), l.d.Sync()); err != nil {
		t.Errorf("opened anew: %v", err)
	}
}

// TestFailedSyncDropsPages has a sync fail after which the kernel has pages that storage has not, and takes them for clean.
// Whoever opens the delta next, with the kernel running on, finds what storage has.
func TestFailedSyncDropsPages(t *testing.T) {
	for name, tt := range map[string]struct{ before, n int64 }{ // blocks
		"of what is new":             {0, 64},
		"of what was written before": {64, 64},
		"of more than is summed":     {0, 8 * (maxQuick + 1)},
		"beside what has a sum":      {8, 64},
	} {
		t.Run(name, func(t *testing.T) {
			for fail := range 3 {
				l := newLife(t)
				if err := errors.Join(l.history.write(l.d, 16, tt.before), l.history.sync(l.d)); err != nil {
					t.Fatal(err)
				}
				if err := l.history.write(l.d, 16, tt.n); err != nil {
					t.Fatal(err)
				}
				left := fail
				l.f.fault = func(o op) error {
					if o.isSync() {
						left--
					}
					if o.isSync() && left < 0 {
						return syscall.EIO
					}
					return nil
				}
				err := l.history.sync(l.d)
				l.check(crash{l.f.done(), err != nil}, l.f.disk, l.boot, 0)
			}
		})
	}
}

// TestFailedSyncIsNoticedWhenOpened has the kernel fail to write something when nobody has the delta open: whoever opens
// it is told, and from then on only what storage has is believed.
func TestFailedSyncIsNoticedWhenOpened(t *testing.T) {
	l := newLife(t)
	if err := l.history.write(l.d, 0, 8); err != nil {
		t.Fatal(err)
	}
	failed := false
	l.f.fault = func(o op) error {
		if o.isSync() && !failed {
			failed = true
			return syscall.EIO
		}
		return nil
	}
	if _, err := newDelta("recorded", l.f, l.h, l.base, l.boot); !errors.Is(err, syscall.EIO) {
		t.Errorf("opened with %v, want %v", err, syscall.EIO)
	}
	l.d.lost.note(syscall.EIO)
	l.check(crash{l.f.done(), true}, l.f.disk, l.boot, 0)
}

// TestForget has pages of a file no longer be in memory, so that what is read comes from storage.
func TestForget(t *testing.T) {
	f := osFile{must(os.Create(filepath.Join(t.TempDir(), "file")))(t)}
	defer f.Close()
	if f.onTmpfs() {
		return // there is no storage
	}
	b := randomBytes(1 << 20)
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if !cached(t, f.File, 512<<10) {
		t.Fatal("what was just written is not in memory")
	}
	if err := errors.Join(f.Sync(), f.Forget()); err != nil {
		t.Fatal(err)
	}
	if cached(t, f.File, 512<<10) {
		t.Error("it is in memory still")
	}
}

// cached says whether the page at off is in the page cache. A read with RWF_NOWAIT does not: it begins to read ahead, and
// may find what that brings.
func cached(t *testing.T, f *os.File, off int64) bool {
	t.Helper()
	m, err := unix.Mmap(int(f.Fd()), off, pageSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	var in byte
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), pageSize, uintptr(unsafe.Pointer(&in))); errno != 0 {
		t.Fatal(errno)
	}
	return in&1 == 1
}

// TestSyncsOfFUA counts what a write through the cache costs: one fdatasync(2), also for what was never written before.
func TestSyncsOfFUA(t *testing.T) {
	l := newLife(t)
	syncs := func(do func()) (n int) {
		from := l.f.done()
		do()
		for _, o := range l.f.ops[from:] {
			if o.isSync() {
				n++
			}
		}
		return n
	}
	through := func(off, n int) func() {
		return func() {
			if _, err := l.d.WriteAt(randomBytes(n), int64(off)); err != nil {
				t.Fatal(err)
			}
			if err := l.d.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, tt := range []struct {
		what string
		do   func()
		want int
	}{
		{"the first cluster", through(0, 4096), 1},
		{"the next", through(4096, 4096), 1},
		{"256 KiB", through(1<<20, 256<<10), 1},
		{"a part of a cluster", through(8192, 512), 1},
		{"what was synced with a sum", through(8192, 4096), 2},
		{"that again", through(8192, 4096), 1},
		{"two clusters and half a MiB", through(2<<20+2048, 512<<10), 1},
		{"more than is read again", through(3<<20, 2<<20), 2},
		{"nothing", func() { _ = l.d.Sync() }, 0},
	} {
		if got := syncs(tt.do); got != tt.want {
			t.Errorf("%s: %d syncs, want %d", tt.what, got, tt.want)
		}
	}
}

// TestPagesOfFUA counts what that one fdatasync(2) brings to storage: a page of data, and one of the maps.
func TestPagesOfFUA(t *testing.T) {
	l := newLife(t)
	for _, cluster := range hot(l.h.size) {
		l.d.streams.list = [8]stream{} // nothing is in sequence
		if pages := l.through(cluster); pages != 2 {
			t.Fatalf("cluster %d: %d pages, want 2", cluster, pages)
		}
	}
}

// through writes a cluster through the cache, and counts the pages that this brings to storage.
func (l *life) through(cluster int64) (pages int) {
	l.t.Helper()
	from := l.f.done()
	n := min(clusterSize, l.h.size-cluster*clusterSize)
	if err := l.history.write(l.d, cluster*8, n/BlockSize); err != nil {
		l.t.Fatal(err)
	}
	if err := l.history.sync(l.d); err != nil {
		l.t.Fatal(err)
	}
	seen := map[int64]bool{}
	for _, o := range l.f.ops[from:] {
		o.eachBlock(func(i int64, _ []byte) { seen[i/blocksPerPage] = true })
	}
	return len(seen)
}

// TestLargeMaps has maps that are read and written in several pieces, and what is where in them is found again.
func TestLargeMaps(t *testing.T) {
	h := must(wanted{base: nothing{}, size: 1100 * perSector * clusterSize}.newHeader())(t)
	f := newRecorder(t, h)
	d := must(newDelta("recorded", f, h, nothing{}, "first"))(t)
	written := map[int64][]byte{}
	writeAll := func(sectors ...int64) {
		for _, i := range sectors {
			c := i*perSector + i%perSector
			written[c] = randomBytes(clusterSize)
			if _, err := d.WriteAt(written[c], c*clusterSize); err != nil {
				t.Fatal(err)
			}
		}
	}
	check := func(d *Delta) {
		t.Helper()
		for c := range d.h.clusters() {
			if state := d.m.state(c); (state == stateBase) != (written[c] == nil) {
				t.Fatalf("cluster %d of sector %d is %d", c, c/perSector, state)
			}
		}
		for c, want := range written {
			checkRange(t, d, int(c*clusterSize), want)
		}
	}
	writeAll(0, 1, 2, 3, 4, 5, 8, 1022, 1023, 1024, 1025, 1099) // some of them side by side
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	later := recorded(onDisk(f.stable), h.fileSize())
	check(must(newDelta("after a loss of power", later, h, nothing{}, "second"))(t))
	check(must(newDelta("after the next", recorded(onDisk(later.stable), h.fileSize()), h, nothing{}, "third"))(t))
	writeAll(6, 7, 1026, 1027, 1098)
	killed := recorded(f.disk, h.fileSize())
	check(must(newDelta("after a kill", killed, h, nothing{}, "first"))(t))
	check(must(newDelta("after a kill and a loss of power", recorded(onDisk(killed.stable), h.fileSize()), h, nothing{}, "second"))(t))
}

func TestKeepFile(t *testing.T) {
	k := KeepFile(filepath.Join(t.TempDir(), "reservations"))
	if b, err := k.Load(); b != nil || err != nil {
		t.Errorf("nothing kept: %q, %v", b, err)
	}
	for _, want := range []string{"one", "two, longer", "3"} {
		if err := k.Save([]byte(want)); err != nil {
			t.Fatal(err)
		}
		if b, err := k.Load(); string(b) != want || err != nil {
			t.Errorf("%q, %v, want %q", b, err, want)
		}
	}
	if err := KeepFile(filepath.Join(t.TempDir(), "none", "x")).Save(nil); err == nil {
		t.Error("saved in a directory that is not there")
	}
}

// TestKeptIsDamaged cuts a file of reservations short, anywhere, and damages its first line: to begin without them would let
// those write whom they keep out.
func TestKeptIsDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "reservations")
	medium := must(OpenDisk(path+".disk", 512))(t)
	defer medium.Close()
	for _, making := range []string{"file 123 of 1764000000.000000001", "delta " + strings.Repeat("0f", 16)} {
		keep := func() scsi.Keeper {
			return KeepFileOf(path, making, func(string) { t.Errorf("ignored what is of %q", making) })
		}
		kept := `{"registrations":[{"initiator":"iqn.a","key":1}],"type":1}`
		if err := keep().Save([]byte(kept)); err != nil {
			t.Fatal(err)
		}
		whole := must(os.ReadFile(path))(t)
		damage := map[string][]byte{
			"not of anything": []byte(kept), "none": nil, "another word": bytes.Replace(whole, []byte("of "), []byte("0f "), 1),
		}
		for n := range whole {
			damage[fmt.Sprintf("the first %d bytes", n)] = whole[:n]
		}
		for name, b := range damage {
			write(t, path, b)
			_, err := scsi.NewUnit(medium, scsi.Config{Serial: "1", Keep: keep()})
			if want := "the reservations in " + path + " are damaged ("; err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "remove it to begin without them") {
				t.Errorf("%s: %v, want %q, and what to do", name, err, want)
			}
		}
		write(t, path, whole)
		ignored := ""
		other := KeepFileOf(path, "delta "+strings.Repeat("1e", 16), func(path string) { ignored = path })
		if b, err := other.Load(); b != nil || err != nil || ignored != path {
			t.Errorf("of another: %q, %v, ignored %q", b, err, ignored)
		}
	}
}
