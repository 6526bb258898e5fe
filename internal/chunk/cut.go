package chunk

import (
	"errors"
	"io"
)

// Sizes of chunks, in bytes. Every one but the last of a stream has MinSize at least, and none has more than MaxSize.
const (
	avgBits = 12

	MinSize = AvgSize / 4
	AvgSize = 1 << avgBits
	MaxSize = AvgSize * 4
)

// Normalised chunking: up to AvgSize a boundary is four times rarer than it would be at random, and from there on four
// times more frequent, so that most chunks are near the average. The tests look at the upper bits of the hash, on which
// many of the last 64 bytes have a say.
const (
	rareShift     = 64 - (avgBits + 2)
	frequentShift = 64 - (avgBits - 2)
)

// makeGear maps each byte to a random number, drawn by splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom
// Number Generators, OOPSLA 2014). What comes out must never change: the boundaries of all chunks hang on it.
func makeGear() *[256]uint64 {
	var table [256]uint64
	seed := uint64(0x74726f757065) // "troupe"
	for i := range table {
		seed += 0x9e3779b97f4a7c15
		z := seed
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		table[i] = z ^ z>>31
	}
	return &table
}

// A cutter cuts a stream into chunks.
type cutter struct {
	r          io.Reader
	gear       *[256]uint64
	buf        []byte
	start, end int // of what was read and not given yet
	err        error
}

func newCutter(r io.Reader) *cutter {
	return &cutter{r: r, gear: makeGear(), buf: make([]byte, 32*MaxSize)}
}

// next is the next chunk, good until the next call. After the last one the error is io.EOF. Where the boundaries are
// depends on the bytes alone, not on how the reader hands them out.
func (c *cutter) next() ([]byte, error) {
	if c.end-c.start < MaxSize && c.err == nil {
		c.fill()
	}
	if c.err != nil && !errors.Is(c.err, io.EOF) {
		return nil, c.err
	}
	if c.start == c.end {
		return nil, io.EOF
	}
	n := c.cut(c.buf[c.start:c.end])
	out := c.buf[c.start : c.start+n]
	c.start += n
	return out, nil
}

// fill reads until the buffer is full or the stream ends.
func (c *cutter) fill() {
	c.end = copy(c.buf, c.buf[c.start:c.end])
	c.start = 0
	for empty := 0; c.end < len(c.buf) && c.err == nil; {
		var n int
		n, c.err = c.r.Read(c.buf[c.end:])
		c.end += n
		if n > 0 {
			empty = 0
		} else if empty++; empty == 100 && c.err == nil {
			c.err = io.ErrNoProgress
		}
	}
}

// cut is the length of the first chunk of b, which holds MaxSize bytes, or all that there are.
func (c *cutter) cut(b []byte) int {
	b = b[:min(len(b), MaxSize)]
	if len(b) <= MinSize {
		return len(b)
	}
	var h uint64
	i := MinSize
	for end := min(len(b), AvgSize); i < end; i++ {
		if h = h<<1 + c.gear[b[i]]; h>>rareShift == 0 {
			return i + 1
		}
	}
	for ; i < len(b); i++ {
		if h = h<<1 + c.gear[b[i]]; h>>frequentShift == 0 {
			return i + 1
		}
	}
	return len(b)
}
