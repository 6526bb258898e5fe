package initramfs

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/klauspost/compress/zstd"
)

// A File is one entry of an archive.
type File struct {
	Name  string
	Mode  fs.FileMode
	Data  []byte // content of a regular file, target of a link
	Major uint32 // of a device
	Minor uint32
}

// maxList bounds what List reads in all, in bytes after decompression.
const maxList = 2 << 30

// List reads initramfs archives that stand one after the other with nothing or zeros between them, each compressed with
// zstd, and gives all their entries in order. It is for looking at what Agent and Modules wrote.
func List(r io.Reader) ([]File, error) {
	b, err := readAtMost(r, maxList)
	if err != nil {
		return nil, err
	}
	frames, err := withoutZeros(b)
	if err != nil {
		return nil, fmt.Errorf("reading initramfs: %w", err)
	}
	z, err := zstd.NewReader(frames, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(1<<30))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	c := newCPIOReader(io.LimitReader(z, maxList))
	var files []File
	for {
		f, err := c.next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return files, fmt.Errorf("reading initramfs, entry %d: %w", len(files)+1, err)
		}
		files = append(files, f)
	}
}

// withoutZeros reads zstd frames (RFC 8878 section 3.1.1) without what stands between them.
func withoutZeros(b []byte) (io.Reader, error) {
	var frames []io.Reader
	for {
		b = bytes.TrimLeft(b, "\x00")
		if len(b) == 0 {
			return io.MultiReader(frames...), nil
		}
		n, err := frameLen(b)
		if err != nil {
			return nil, fmt.Errorf("archive %d: %w", len(frames)+1, err)
		}
		frames = append(frames, bytes.NewReader(b[:n]))
		b = b[n:]
	}
}

// frameLen is the length of the zstd frame that b starts with. Each of its blocks has a header of 3 bytes, little
// endian: 1 bit that says it is the last, 2 bits for its type, 21 bits for its size (RFC 8878 section 3.1.1.2).
func frameLen(b []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		return 0, err
	}
	at := h.HeaderSize
	for last := false; !last; {
		if len(b) < at+3 {
			return 0, io.ErrUnexpectedEOF
		}
		head := uint32(b[at]) | uint32(b[at+1])<<8 | uint32(b[at+2])<<16
		last = head&1 != 0
		size := int(head >> 3)
		if head>>1&3 == 1 { // one byte, repeated size times
			size = 1
		}
		at += 3 + size
	}
	if h.HasCheckSum {
		at += 4
	}
	if len(b) < at {
		return 0, io.ErrUnexpectedEOF
	}
	return at, nil
}

// A cpioReader reads entries of the newc format. The numbers in a header are 8 hex digits each:
//
//	0 magic (6 bytes)  1 ino  2 mode  3 uid  4 gid  5 nlink  6 mtime  7 filesize  8 major  9 minor
//	10 rmajor  11 rminor  12 namesize, with the NUL  13 check
type cpioReader struct {
	r   *bufio.Reader
	pos int64 // in the archive: entries are aligned to 4 bytes
}

func newCPIOReader(r io.Reader) *cpioReader { return &cpioReader{r: bufio.NewReader(r)} }

const (
	headerSize = 6 + 13*8
	magic      = "070701"
	trailer    = "TRAILER!!!"
)

// next gives the next entry, over the trailers of archives and the zeros between them; io.EOF after the last.
func (c *cpioReader) next() (File, error) {
	for {
		if err := c.skipZeros(); err != nil {
			return File{}, err
		}
		f, err := c.entry()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return File{}, err
		}
		if f.Name != trailer {
			return f, nil
		}
		c.pos = 0 // what follows is an archive of its own
	}
}

func (c *cpioReader) skipZeros() error {
	for {
		b, err := c.r.ReadByte()
		if err != nil {
			return err
		}
		if b != 0 {
			return c.r.UnreadByte()
		}
	}
}

func (c *cpioReader) entry() (File, error) {
	head, err := c.take(headerSize)
	if err != nil {
		return File{}, err
	}
	if string(head[:6]) != magic {
		return File{}, fmt.Errorf("magic %q, want %q", head[:6], magic)
	}
	num, err := numbers(head[6:])
	if err != nil {
		return File{}, err
	}
	if num[11] == 0 || num[11] > maxName || num[6] > maxFile {
		return File{}, fmt.Errorf("a name of %d bytes and a content of %d", num[11], num[6])
	}
	name, err := c.take(int64(num[11]))
	if err != nil {
		return File{}, err
	}
	if err := c.align(); err != nil {
		return File{}, err
	}
	data, err := c.take(int64(num[6]))
	if err != nil {
		return File{}, err
	}
	f := File{Name: string(bytes.TrimRight(name, "\x00")), Mode: fileMode(num[1]), Data: data, Major: num[9], Minor: num[10]}
	return f, c.align()
}

func numbers(b []byte) ([13]uint32, error) {
	var num [13]uint32
	var raw [13 * 4]byte
	if _, err := hex.Decode(raw[:], b); err != nil {
		return num, fmt.Errorf("header: %w", err)
	}
	for i := range num {
		num[i] = uint32(raw[4*i])<<24 | uint32(raw[4*i+1])<<16 | uint32(raw[4*i+2])<<8 | uint32(raw[4*i+3])
	}
	return num, nil
}

// take reads n bytes. A claimed size is not believed: memory grows with what is really there.
func (c *cpioReader) take(n int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(c.r, n))
	if err != nil {
		return nil, err
	}
	c.pos += int64(len(b))
	if int64(len(b)) != n {
		return nil, fmt.Errorf("%d bytes of %d: %w", len(b), n, io.ErrUnexpectedEOF)
	}
	return b, nil
}

func (c *cpioReader) align() error {
	_, err := c.take(-c.pos & 3)
	return err
}

// fileMode turns the mode of stat(2) into Go's.
func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	switch mode & 0o170000 {
	case 0o040000:
		m |= fs.ModeDir
	case 0o120000:
		m |= fs.ModeSymlink
	case 0o020000:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case 0o060000:
		m |= fs.ModeDevice
	}
	if mode&sticky != 0 {
		m |= fs.ModeSticky
	}
	return m
}
