package esp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/troupe-dev/troupe/internal/digest"
)

// A part is the content of one file.
type part struct {
	open   func() (io.ReadCloser, error)
	digest digest.Digest
	size   int64
}

func bytesOf(b []byte) part {
	return part{func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, digest.Of(b), int64(len(b))}
}

func fileOf(f File) part {
	return part{func() (io.ReadCloser, error) { return os.Open(f.Path) }, f.Digest, f.Size}
}

func firstOf(entry []byte) int64 {
	le := binary.LittleEndian
	return int64(le.Uint16(entry[20:]))<<16 | int64(le.Uint16(entry[26:]))
}

func sizeOf(entry []byte) int64 { return int64(binary.LittleEndian.Uint32(entry[28:])) }

func (e *ESP) placed(a area, parts []part) ([]run, error) {
	sizes := make([]int64, len(parts))
	for i, p := range parts {
		sizes[i] = p.size
	}
	return e.g.place(a, sizes)
}

// describes says whether directory and FAT say that these files lie there.
func (e *ESP) describes(d device, dir, parent int64, a area, names []string, runs []run) (bool, error) {
	sector := make([]byte, e.g.sector)
	if _, err := d.ReadAt(sector, e.g.at(dir)); err != nil {
		return false, fmt.Errorf("reading a directory of the EFI system partition: %w", err)
	}
	if !bytes.Equal(sector, e.g.directory(dir, parent, files(names, runs)...)) {
		return false, nil
	}
	return e.g.hasChains(d, a, e.g.chains(a, runs))
}

// has says whether an area has these files, named by their directory, byte for byte.
func (e *ESP) has(dir, parent int64, a area, names []string, parts []part) (bool, error) {
	runs, err := e.placed(a, parts)
	if err != nil {
		return false, err
	}
	has := false
	err = e.on(func(d device) error {
		if ok, err := e.describes(d, dir, parent, a, names, runs); err != nil || !ok {
			return err
		}
		has, err = e.hasBytes(d, parts, runs)
		return err
	})
	return has, err
}

func (e *ESP) hasBytes(d device, parts []part, runs []run) (bool, error) {
	for i, p := range parts {
		got, _, err := digest.FromReader(io.NewSectionReader(d, e.g.at(runs[i].first), p.size))
		if err != nil {
			return false, fmt.Errorf("reading the EFI system partition: %w", err)
		}
		if got != p.digest {
			return false, nil
		}
	}
	return true, nil
}

// put writes files to an area and reads them back; only then does their directory name them.
func (e *ESP) put(dir, parent int64, a area, names []string, parts []part) error {
	runs, err := e.placed(a, parts)
	if err != nil {
		return err
	}
	err = e.on(func(d device) error {
		for i, p := range parts {
			if err := e.writePart(d, p, runs[i]); err != nil {
				return fmt.Errorf("writing %s to the EFI system partition: %w", names[i], err)
			}
		}
		if err := e.g.writeChains(d, a, e.g.chains(a, runs)); err != nil {
			return err
		}
		return d.Sync()
	})
	if err != nil {
		return err
	}
	err = e.on(func(d device) error { // opened again: what the kernel still has of it is gone
		ok, err := e.hasBytes(d, parts, runs)
		if err == nil && ok {
			ok, err = e.g.hasChains(d, a, e.g.chains(a, runs))
		}
		if err == nil && !ok {
			err = fmt.Errorf("what was written to the EFI system partition %w", errNotWhole)
		}
		return err
	})
	if err != nil {
		return err
	}
	return e.on(func(d device) error {
		if _, err := d.WriteAt(e.g.directory(dir, parent, files(names, runs)...), e.g.at(dir)); err != nil {
			return fmt.Errorf("writing a directory of the EFI system partition: %w", err)
		}
		return d.Sync()
	})
}

// writePart copies a file to its clusters. What its source has must be what its digest says: nothing else is ever named.
func (e *ESP) writePart(d device, p part, r run) error {
	src, err := p.open()
	if err != nil {
		return err
	}
	defer src.Close()
	n, err := io.Copy(io.NewOffsetWriter(d, e.g.at(r.first)), digest.VerifyReader(src, p.digest, p.size))
	if err == nil && n != p.size {
		err = fmt.Errorf("%d bytes of %d: %w", n, p.size, io.ErrUnexpectedEOF)
	}
	return err
}
