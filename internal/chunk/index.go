package chunk

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/troupe-dev/troupe/internal/digest"
)

// An ID names a chunk or a page by the first bytes of its SHA-256. It finds what is the same; that an image is right, the
// digest of the whole image says.
type ID [8]byte

func idOf(b []byte) ID {
	sum := sha256.Sum256(b)
	return ID(sum[:])
}

// A Chunk is a piece of an image in its related form.
type Chunk struct {
	ID     ID
	Raw    uint32 // bytes of it
	Packed uint32 // bytes of its frame in the pack; 0 where nobody knows
}

// A Page lists chunks that follow one another.
type Page struct {
	ID   ID
	Size uint32 // bytes of the page in the pack
}

// A Segment is a frame of the segments file.
type Segment struct {
	Size uint32 // bytes of the frame
	// Plain says that the image has the same bytes there in both forms, so that chunks can be taken from the segment.
	Plain bool
}

// A Blob is a file that the index is about.
type Blob struct {
	SHA256 [sha256.Size]byte
	Size   int64 // bytes
}

// An Index is the top of what is known of one image's chunks.
type Index struct {
	Data     int64 // bytes of the image
	Meta     int64 // where its metadata begin; Data where it is in one form only
	Pack     Blob
	Segments Blob
	Pages    []Page
	Segs     []Segment
}

const (
	magic = "troupe chunks 1\n"

	// MaxIndex bounds an index, in bytes.
	MaxIndex = 4 << 20
	// maxChunks bounds the chunks of an image, and with them the memory that they take.
	maxChunks = 4 << 20

	// MaxPages bounds all pages of an index, in bytes.
	MaxPages = maxChunks * leastEntry

	maxData = 1 << 40

	// A page ends after a chunk whose ID begins with six zero bits, and so where it ends depends on its chunks alone.
	pageMask      = 0xfc
	maxPageChunks = 512
	maxPage       = maxPageChunks * (len(ID{}) + 2*binary.MaxVarintLen32)
	leastEntry    = 8 + 2 // bytes of a chunk in a page: its ID, and two numbers

	// maxFrame bounds the frame of a chunk, which zstd may make longer than the chunk by some bytes.
	maxFrame = MaxSize + 256

	// SegmentSize is what a segment has of the image at least, but for the last one before the metadata and at the end; a chunk is never
	// in two of them.
	SegmentSize = 1 << 20
	maxSegment  = SegmentSize + MaxSize
	// MaxSegmentFrame bounds the frame of one, in bytes; that of a chunk is shorter.
	MaxSegmentFrame = maxSegment + maxSegment/64
)

// endsPage says whether a page ends after the chunk, of which it has count.
func endsPage(c Chunk, count int) bool { return c.ID[0]&pageMask == 0 || count == maxPageChunks }

// Bytes is the index as a file.
//
//	"troupe chunks 1\n"
//	32 SHA-256 of the pack, varint its size
//	32 SHA-256 of the segments, varint its size
//	varint bytes of the image, varint start of its metadata
//	varint count of pages, then each: 8 ID, varint size
//	varint count of segments, then each: varint 2*size, +1 if it is plain
func (x *Index) Bytes() []byte {
	b := append([]byte(magic), x.Pack.SHA256[:]...)
	b = number(b, x.Pack.Size)
	b = append(b, x.Segments.SHA256[:]...)
	b = number(b, x.Segments.Size)
	b = number(number(b, x.Data), x.Meta)
	b = number(b, int64(len(x.Pages)))
	for _, p := range x.Pages {
		b = append(b, p.ID[:]...)
		b = number(b, int64(p.Size))
	}
	b = number(b, int64(len(x.Segs)))
	for _, s := range x.Segs {
		n := 2 * int64(s.Size)
		if s.Plain {
			n++
		}
		b = number(b, n)
	}
	return b
}

func number(b []byte, n int64) []byte { return binary.AppendUvarint(b, uint64(n)) } //nolint:gosec // no size is negative

// A reader takes apart what a stranger sent. After its first error it gives zeros.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

func (r *reader) bytes(n int) []byte {
	if r.err == nil && len(r.b) < n {
		r.fail("it ends %d bytes early", n-len(r.b))
	}
	if r.err != nil {
		return make([]byte, n)
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

// number is a number from least up to most.
func (r *reader) number(what string, least, most int64) int64 {
	if r.err != nil {
		return least
	}
	v, n := binary.Uvarint(r.b)
	if n <= 0 || v > math.MaxInt64 || int64(v) < least || int64(v) > most {
		r.fail("%s is not between %d and %d", what, least, most)
		return least
	}
	r.b = r.b[n:]
	return int64(v)
}

// Parse reads an index. What it gives is consistent: sizes add up, and counts are within bounds.
func Parse(b []byte) (*Index, error) {
	x, rest, err := ParseFirst(b)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("reading an index of chunks: %d bytes are left over", len(rest))
	}
	return x, err
}

// ParseFirst is Parse of what b begins with, and gives the rest.
func ParseFirst(b []byte) (x *Index, rest []byte, err error) {
	r := &reader{b: b}
	x = r.index()
	if err = r.err; err == nil {
		err = x.check()
	}
	if size := len(b) - len(r.b); err == nil && size > MaxIndex {
		err = fmt.Errorf("it has %d bytes, more than %d", size, MaxIndex)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reading an index of chunks: %w", err)
	}
	return x, r.b, nil
}

func (r *reader) index() *Index {
	x := &Index{}
	if string(r.bytes(len(magic))) != magic {
		r.fail("it does not begin with %q", magic)
	}
	x.Pack = r.blob("the pack's size")
	x.Segments = r.blob("the segments' size")
	x.Data = r.number("the image's size", 0, maxData)
	x.Meta = r.number("the start of the metadata", 0, x.Data)
	// Every page and every segment takes some bytes here, so counts are bounded by them.
	for range r.number("the count of pages", 0, int64(len(r.b))/int64(len(ID{})+1)) {
		p := Page{ID: ID(r.bytes(len(ID{})))}
		p.Size = uint32(r.number("the size of a page", leastEntry, int64(maxPage))) //nolint:gosec // bounded
		x.Pages = append(x.Pages, p)
	}
	for range r.number("the count of segments", 0, int64(len(r.b))) {
		n := r.number("the size of a segment", 2, 2*MaxSegmentFrame+1)
		x.Segs = append(x.Segs, Segment{Size: uint32(n / 2), Plain: n%2 == 1}) //nolint:gosec // bounded
	}
	return x
}

func (r *reader) blob(what string) Blob {
	return Blob{SHA256: [sha256.Size]byte(r.bytes(sha256.Size)), Size: r.number(what, 0, 2*maxData)}
}

func (x *Index) check() error {
	segs := int64(0)
	for _, s := range x.Segs {
		segs += int64(s.Size)
	}
	pages := x.pages()
	switch {
	case pages > MaxPages:
		return fmt.Errorf("its pages come to %d bytes, more than %d", pages, MaxPages)
	case pages > x.Pack.Size:
		return fmt.Errorf("its pages come to %d bytes, more than the %d of the pack", pages, x.Pack.Size)
	case segs != x.Segments.Size:
		return fmt.Errorf("its segments come to %d bytes, and the file has %d", segs, x.Segments.Size)
	}
	return nil
}

// pages is how many bytes the pages have.
func (x *Index) pages() int64 {
	sum := int64(0)
	for _, p := range x.Pages {
		sum += int64(p.Size)
	}
	return sum
}

// PageRanges is where each page lies in the pack: behind all frames.
func (x *Index) PageRanges() []Range {
	at := x.Pack.Size - x.pages()
	out := make([]Range, 0, len(x.Pages))
	for _, p := range x.Pages {
		out = append(out, Range{at, int64(p.Size)})
		at += int64(p.Size)
	}
	return out
}

// A Range is bytes of a file.
type Range struct{ Off, Size int64 }

// appendPage is the page with these chunks: of each its ID, varint raw bytes, varint packed bytes.
func appendPage(b []byte, chunks []Chunk) []byte {
	for _, c := range chunks {
		b = append(b, c.ID[:]...)
		b = binary.AppendUvarint(b, uint64(c.Raw))
		b = binary.AppendUvarint(b, uint64(c.Packed))
	}
	return b
}

// ErrWrong is in the chain of errors about bytes of a server that are not what its index says.
var ErrWrong = errors.New("the server's chunks are not what its index says")

// Is says whether b is the page.
func (p Page) Is(b []byte) bool { return len(b) == int(p.Size) && idOf(b) == p.ID }

// Chunks reads all pages, which must be those of the index: Page.Is says so of each.
func (x *Index) Chunks(pages [][]byte) ([]Chunk, error) {
	var out []Chunk
	var raw, packed int64
	for _, b := range pages {
		for r := (&reader{b: b}); len(r.b) > 0; {
			c := Chunk{ID: ID(r.bytes(len(ID{})))}
			c.Raw = uint32(r.number("the size of a chunk", 1, MaxSize))            //nolint:gosec // bounded
			c.Packed = uint32(r.number("the packed size of a chunk", 1, maxFrame)) //nolint:gosec // bounded
			if r.err != nil {
				return nil, fmt.Errorf("%w: a page: %w", ErrWrong, r.err)
			}
			raw, packed = raw+int64(c.Raw), packed+int64(c.Packed)
			out = append(out, c)
		}
	}
	if frames := x.Pack.Size - x.pages(); raw != x.Data || packed != frames {
		return nil, fmt.Errorf("%w: its chunks come to %d bytes, packed to %d, and not to %d and %d", ErrWrong, raw, packed, x.Data, frames)
	}
	return out, nil
}

// segments cuts chunks into segments: [i] is the first chunk after segment i.
func segments(chunks []Chunk, meta int64) []int {
	var ends []int
	var at, n int64
	for i, c := range chunks {
		at, n = at+int64(c.Raw), n+int64(c.Raw)
		if n >= SegmentSize || at == meta || i+1 == len(chunks) {
			ends, n = append(ends, i+1), 0
		}
	}
	return ends
}

// Digest names the file.
func (b Blob) Digest() digest.Digest {
	return digest.Digest(digest.Prefix + hex.EncodeToString(b.SHA256[:]))
}

// Reader reads the index as a file.
func (x *Index) Reader() io.Reader { return bytes.NewReader(x.Bytes()) }
