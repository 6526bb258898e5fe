package chunk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A Form reads an image in its related form, with the same offsets. What differs is in memory.
type Form struct {
	r    io.ReaderAt
	size int64
	meta int64
	rel  related
}

// OpenForm reads the metadata of the image that is the first size bytes of r.
func OpenForm(r io.ReaderAt, size int64) (*Form, error) {
	meta, err := metaStart(r, size)
	if err != nil {
		return nil, err
	}
	f := &Form{r: r, size: size, meta: meta}
	if meta == size {
		return f, nil
	}
	if f.rel, err = relate(r, meta, size, false); err == nil {
		err = f.turnsBack()
	}
	if err != nil { // it is no image of ours, and is taken as it is
		f.meta, f.rel = size, related{}
	}
	return f, nil
}

// ImageSize is how many bytes of r are an image, by its own superblock: what stands behind is its hash tree.
func ImageSize(r io.ReaderAt) (int64, error) {
	var sb [128]byte
	if err := readFull(r, sb[:], superOffset); err != nil {
		return 0, fmt.Errorf("reading the superblock: %w", err)
	}
	if binary.LittleEndian.Uint32(sb[:]) != superMagic || sb[12] != 12 {
		return 0, errors.New("reading the superblock: it is no EROFS image with blocks of 4096 bytes")
	}
	return int64(binary.LittleEndian.Uint32(sb[36:])) * blockSize, nil
}

// turnsBack makes sure that the image comes out again.
func (f *Form) turnsBack() error {
	back, err := relate(f, f.meta, f.size, true)
	if err != nil {
		return err
	}
	for _, p := range append(back.patches, patch{f.meta, back.tail}) {
		want := make([]byte, len(p.b))
		if err := readFull(f.r, want, p.off); err != nil {
			return err
		}
		if !bytes.Equal(p.b, want) {
			return errors.New("the metadata cannot be turned back")
		}
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (f *Form) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > f.size {
		return 0, io.EOF
	}
	var short error
	if rest := f.size - off; int64(len(p)) > rest {
		p, short = p[:rest], io.EOF
	}
	n, err := f.r.ReadAt(p, off)
	if n == len(p) {
		err = short
	}
	for _, q := range f.rel.patches {
		q.over(p[:n], off)
	}
	(patch{f.meta, f.rel.tail}).over(p[:n], off)
	return n, err
}

// over puts what q has of the bytes at off over them.
func (q patch) over(p []byte, off int64) {
	if q.off >= off+int64(len(p)) || off >= q.off+int64(len(q.b)) {
		return
	}
	if q.off >= off {
		copy(p[q.off-off:], q.b)
	} else {
		copy(p, q.b[off-q.off:])
	}
}

// cut calls f with each chunk, in order. A chunk ends where the metadata begin.
func (f *Form) cut(each func(b []byte) error) error {
	for _, part := range [][2]int64{{0, f.meta}, {f.meta, f.size}} {
		c := newCutter(io.NewSectionReader(f, part[0], part[1]-part[0]))
		for {
			b, err := c.next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err == nil {
				err = each(b)
			}
			if err != nil {
				return err
			}
			part[0] += int64(len(b))
		}
		if part[0] != part[1] {
			return fmt.Errorf("reading byte %d of %d: %w", part[0], f.size, io.ErrUnexpectedEOF)
		}
	}
	return nil
}

// Chunks cuts the image, for who has no index of it: how the chunks are packed is not known then.
func (f *Form) Chunks() ([]Chunk, error) {
	var out []Chunk
	err := f.cut(func(b []byte) error {
		if len(out) == maxChunks {
			return ErrTooLarge
		}
		out = append(out, Chunk{ID: idOf(b), Raw: uint32(len(b))}) //nolint:gosec // bounded by MaxSize
		return nil
	})
	return out, err
}

// A File is an image on its way.
type File interface {
	io.ReaderAt
	io.WriterAt
}

// Restore turns f, the data bytes of an image in its related form with the metadata at meta, into the image itself. A
// Restore that broke off leaves neither of both.
func Restore(f File, meta, data int64) error {
	if meta == data {
		return nil
	}
	if meta < 0 || meta > data || data-meta > maxRelated {
		return fmt.Errorf("metadata from %d to %d are no image's", meta, data)
	}
	rel, err := relate(f, meta, data, true)
	if err != nil {
		return fmt.Errorf("turning an image back: %w", err)
	}
	for _, p := range append(rel.patches, patch{meta, rel.tail}) {
		if _, err := f.WriteAt(p.b, p.off); err != nil {
			return fmt.Errorf("turning an image back: %w", err)
		}
	}
	return nil
}
