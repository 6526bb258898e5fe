package chunk

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// An Unpacker unpacks what a server sent. It is for one goroutine, and works in it.
type Unpacker struct {
	zstd *zstd.Decoder
	buf  []byte
}

// NewUnpacker makes one; Close it after the last use.
func NewUnpacker() (*Unpacker, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*maxSegment),
		zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, fmt.Errorf("unpacking chunks: %w", err)
	}
	return &Unpacker{zstd: d, buf: make([]byte, 0, maxSegment)}, nil
}

// Close lets go of its memory.
func (u *Unpacker) Close() { u.zstd.Close() }

// Is says whether b is the chunk.
func (c Chunk) Is(b []byte) bool { return len(b) == int(c.Raw) && idOf(b) == c.ID }

// Chunk unpacks the frame of c. What it gives is good until the next call.
func (u *Unpacker) Chunk(c Chunk, frame []byte) ([]byte, error) {
	b, err := u.zstd.DecodeAll(frame, u.buf[:0:MaxSize])
	if err != nil {
		return nil, fmt.Errorf("%w: unpacking a chunk: %w", ErrWrong, err)
	}
	if !c.Is(b) {
		return nil, fmt.Errorf("%w: a chunk of %d bytes is another one", ErrWrong, len(b))
	}
	return b, nil
}

// Segment unpacks the frame of a segment with these chunks. What it gives is good until the next call.
func (u *Unpacker) Segment(chunks []Chunk, frame []byte) ([]byte, error) {
	b, err := u.zstd.DecodeAll(frame, u.buf[:0])
	if err != nil {
		return nil, fmt.Errorf("%w: unpacking a segment: %w", ErrWrong, err)
	}
	rest := b
	for _, c := range chunks {
		if len(rest) < int(c.Raw) || !c.Is(rest[:c.Raw]) {
			return nil, fmt.Errorf("%w: a chunk in a segment is another one", ErrWrong)
		}
		rest = rest[c.Raw:]
	}
	if len(rest) > 0 {
		return nil, fmt.Errorf("%w: a segment is %d bytes too long", ErrWrong, len(rest))
	}
	return b, nil
}
