package initramfs

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
)

// sticky is S_ISVTX, as it stands in a mode of the archive.
const sticky = 0o1000

// maxName is the longest name that the kernel unpacks, in bytes with the final NUL (PATH_MAX); it skips longer ones
// without a word.
const maxName = 4096

// An archive is a set of files, by their paths without the first slash.
type archive struct {
	entries map[string]entry
}

// An entry is one file. Its content is read when it is written, so that one file at a time is in memory.
type entry struct {
	rec  cpio.Record
	load func() ([]byte, error) // of a regular file; nil for all else
}

// newArchive has the links of a usr-merged root, see the package comment.
func newArchive() *archive {
	a := &archive{entries: make(map[string]entry)}
	for _, d := range []string{"bin", "lib", "lib64", "sbin"} {
		a.dir("usr/"+d, 0o755)
		a.entries[d] = entry{rec: cpio.Symlink(d, "usr/"+d)}
	}
	return a
}

// merged is the path under which the file that is called name elsewhere is stored: without the first slash, in /usr.
func merged(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	switch first, _, _ := strings.Cut(name, "/"); first {
	case "bin", "lib", "lib64", "sbin":
		return "usr/" + name
	}
	return name
}

func (a *archive) dir(name string, mode uint64) {
	a.put(name, entry{rec: cpio.Directory(name, mode)})
}

func (a *archive) device(name string, mode, major, minor uint64) {
	a.put(name, entry{rec: cpio.CharDev(name, mode, major, minor)})
}

func (a *archive) bytes(name string, mode uint64, b []byte) {
	a.file(name, mode, func() ([]byte, error) { return b, nil })
}

func (a *archive) file(name string, mode uint64, load func() ([]byte, error)) {
	rec := cpio.Record{Info: cpio.Info{Name: name, Mode: cpio.S_IFREG | mode}}
	a.put(name, entry{rec: rec, load: load})
}

// put adds an entry, and the directories above it: the kernel makes none by itself, and drops what is in them.
func (a *archive) put(name string, e entry) {
	for d := path.Dir(name); d != "."; d = path.Dir(d) {
		if _, ok := a.entries[d]; !ok {
			a.entries[d] = entry{rec: cpio.Directory(d, 0o755)}
		}
	}
	a.entries[name] = e
}

func (a *archive) has(name string) bool {
	_, ok := a.entries[name]
	return ok
}

// writeTo writes the archive, compressed, and says how many bytes its files have. Sorted by name, a directory comes
// before what is in it. What is written is a multiple of align bytes long.
func (a *archive) writeTo(w io.Writer) (int64, error) {
	counted := &counter{w: w}
	total, err := a.compress(counted)
	if err != nil {
		return total, err
	}
	if over := counted.n % align; over != 0 {
		_, err = w.Write(make([]byte, align-over))
	}
	return total, err
}

// align is what the length of an archive must be a multiple of, in bytes: a UEFI boot loader hands several of them to
// the kernel's EFI stub, which puts them behind one another as they are, and the kernel skips zeros between two archives
// but looks for the second at multiples of 4 only (init/initramfs.c, unpack_to_rootfs).
const align = 4

// A counter counts what goes through it.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func (a *archive) compress(w io.Writer) (int64, error) {
	// One goroutine: the bytes must not depend on the machine.
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(true),
		zstd.WithWindowSize(window))
	if err != nil {
		return 0, err
	}
	total, err := a.write(z)
	return total, errors.Join(err, z.Close())
}

// write writes the archive as it is, and says how many bytes its files have.
func (a *archive) write(w io.Writer) (int64, error) {
	cw := cpio.Newc.Writer(w)
	var total int64
	var ino uint64
	for _, name := range slices.Sorted(maps.Keys(a.entries)) {
		ino++
		n, err := writeEntry(cw, name, a.entries[name], ino)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, cpio.WriteTrailer(cw)
}

func writeEntry(cw cpio.RecordWriter, name string, e entry, ino uint64) (int64, error) {
	rec := e.rec
	if e.load != nil {
		b, err := e.load()
		if err != nil {
			return 0, fmt.Errorf("reading %q: %w", name, err)
		}
		rec = cpio.StaticRecord(b, rec.Info)
	}
	rec = cpio.MakeReproducible(rec)
	rec.Ino = ino
	rec.NLink = 1
	// The format has 32 bits for a size, and pkg/cpio stores the low ones of a greater one without an error.
	if rec.FileSize > math.MaxUint32 {
		return 0, fmt.Errorf("%q has %d bytes: an initramfs holds files of less than 4 GiB", name, rec.FileSize)
	}
	if len(rec.Name) >= maxName {
		return 0, fmt.Errorf("%q: the name has %d bytes, the kernel takes %d", name[:64]+"…", len(rec.Name), maxName-1)
	}
	if err := cw.WriteRecord(rec); err != nil {
		return 0, fmt.Errorf("writing %q: %w", name, err)
	}
	return int64(rec.FileSize), nil
}

// Of the compressor. An archive is made once and sent at each boot: of Debian's cloud kernel the best level makes 5.3 MB
// in 1.5 s, the default one 6.0 MB in 0.25 s. A window of 32 MiB gains less than 1%, and the booting kernel, which would
// take up to 128 MiB (lib/decompress_unzstd.c), has to find memory for it.
const (
	level  = zstd.SpeedBestCompression
	window = 8 << 20
)
