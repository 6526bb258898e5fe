package chunk

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
)

// ErrTooLarge is in the chain of errors about images with more chunks than an index may have.
var ErrTooLarge = errors.New("the image has too many chunks")

// Make writes pack and segments of the image that is the first size bytes of r, and gives their index.
func Make(r io.ReaderAt, size int64, pack, segs io.Writer) (*Index, error) {
	f, err := OpenForm(r, size)
	if err != nil {
		return nil, err
	}
	m := maker{form: f, r: r, pack: counter{w: pack, h: sha256.New()}, segs: counter{w: segs, h: sha256.New()}}
	// One thread, and no checksums: each chunk has its ID. The bytes do not depend on how many threads there are.
	if m.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithWindowSize(4<<20)); err != nil {
		return nil, err
	}
	defer m.zstd.Close()
	if err := m.make(); err != nil {
		return nil, fmt.Errorf("cutting an image into chunks: %w", err)
	}
	x := &Index{Data: size, Meta: f.meta, Pack: m.pack.blob(), Segments: m.segs.blob(), Pages: m.pages, Segs: m.segments}
	if len(m.chunks) > maxChunks || len(x.Bytes()) > MaxIndex || size > maxData {
		return nil, ErrTooLarge
	}
	return x, nil
}

// A counter notes what it passes on.
type counter struct {
	w io.Writer
	h hash.Hash
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	_, _ = c.h.Write(p[:n]) // a hash never returns an error
	c.n += int64(n)
	return n, err
}

func (c *counter) blob() Blob { return Blob{SHA256: [sha256.Size]byte(c.h.Sum(nil)), Size: c.n} }

type maker struct {
	form       *Form
	r          io.ReaderAt
	zstd       *zstd.Encoder
	pack, segs counter
	chunks     []Chunk
	pages      []Page
	segments   []Segment
}

func (m *maker) make() error {
	buf := make([]byte, 0, maxFrame)
	err := m.form.cut(func(b []byte) error {
		buf = m.zstd.EncodeAll(b, buf[:0])
		m.chunks = append(m.chunks, Chunk{ID: idOf(b), Raw: uint32(len(b)), Packed: uint32(len(buf))}) //nolint:gosec // bounded by MaxSize
		_, err := m.pack.Write(buf)
		return err
	})
	if err == nil {
		err = m.makePages()
	}
	if err == nil {
		err = m.makeSegments()
	}
	return err
}

func (m *maker) makePages() error {
	first := 0
	for i, c := range m.chunks {
		if !endsPage(c, i+1-first) && i+1 < len(m.chunks) {
			continue
		}
		b := appendPage(nil, m.chunks[first:i+1])
		p := Page{ID: idOf(b), Size: uint32(len(b))} //nolint:gosec // bounded by maxPage
		if _, err := m.pack.Write(b); err != nil {
			return err
		}
		m.pages, first = append(m.pages, p), i+1
	}
	return nil
}

func (m *maker) makeSegments() error {
	raw, related := make([]byte, maxSegment), make([]byte, maxSegment)
	var frame []byte
	var at int64
	first := 0
	for _, end := range segments(m.chunks, m.form.meta) {
		var n int64
		for _, c := range m.chunks[first:end] {
			n += int64(c.Raw)
		}
		if err := readFull(m.r, raw[:n], at); err != nil {
			return err
		}
		if err := readFull(m.form, related[:n], at); err != nil {
			return err
		}
		frame = m.zstd.EncodeAll(raw[:n], frame[:0])
		if _, err := m.segs.Write(frame); err != nil {
			return err
		}
		s := Segment{Size: uint32(len(frame)), Plain: bytes.Equal(raw[:n], related[:n])} //nolint:gosec // bounded by MaxSegmentFrame
		m.segments, first, at = append(m.segments, s), end, at+n
	}
	return nil
}

// readFull reads all of p at off.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}
