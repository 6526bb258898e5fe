package verity

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
)

// A File is an image with its tree.
type File struct {
	r    io.ReaderAt
	root Root
	layout
}

// Open is for a file whose first data bytes, with superblock and tree behind them, have that root. It reads nothing.
func Open(r io.ReaderAt, data int64, root Root) (*File, error) {
	if err := checkData(data); err != nil {
		return nil, fmt.Errorf("opening a verity tree: %w", err)
	}
	return &File{r: r, root: root, layout: newLayout(data)}, nil
}

// Blocks is how many blocks the file has, those of the tree with them.
func (f *File) Blocks() int64 { return f.size() / BlockSize }

// A Bad is a block of the file that is not what it should be.
type Bad struct {
	Block int64 // from the start of the file
	Err   error // why it could not be read; nil where its bytes are wrong
}

// maxBad is how many bad blocks one check returns: who finds as many has no use for more.
const maxBad = 1 << 16

// Check reads the blocks of data from from up to, and without, to, with what of the tree stands above them, and
// returns those that are wrong or cannot be read, each once. Below a bad block of the tree nothing can be told: what is
// there is not among them, and whoever mends that block checks again. Where to is past the data, superblock and tree are
// checked, too: 0 and Blocks are for the whole file. The error is ctx's.
func (f *File) Check(ctx context.Context, from, to int64) ([]Bad, error) {
	c := checker{f: f, path: make([]cached, len(f.levels)), buf: make([]byte, batch*BlockSize)}
	from = max(from, 0)
	for at := from; at < min(to, f.data); {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("checking an image: %w", err)
		}
		n := min(batch, min(to, f.data)-at)
		c.data(at, n)
		at += n
		if len(c.bad) >= maxBad {
			return c.bad, nil
		}
	}
	if to > f.data {
		c.superblock()
		c.tree()
	}
	return c.bad, nil
}

// batch is how many blocks of data are read at once.
const batch = 64

// A checker walks along the data, and keeps the path from the block that it is at up to the root.
type checker struct {
	f    *File
	path []cached // by level
	buf  []byte
	bad  []Bad
}

// A cached block of the tree: the last one of its level.
type cached struct {
	index int64 // in its level, plus one; 0 for none
	ok    bool  // it is what the level above says
	b     [BlockSize]byte
}

// data checks n blocks from at on.
func (c *checker) data(at, n int64) {
	part := c.buf[:n*BlockSize]
	if _, err := c.f.r.ReadAt(part, at*BlockSize); err != nil {
		for i := range n { // which of them cannot be read shows one by one
			c.one(at + i)
		}
		return
	}
	for i := range n {
		want, ok := c.want(0, at+i)
		if ok && sha256.Sum256(part[i*BlockSize:][:BlockSize]) != want {
			c.bad = append(c.bad, Bad{Block: at + i})
		}
	}
}

func (c *checker) one(block int64) {
	want, ok := c.want(0, block)
	if !ok {
		return
	}
	b := c.buf[:BlockSize]
	if err := c.read(b, block); err != nil {
		c.bad = append(c.bad, Bad{Block: block, Err: err})
	} else if sha256.Sum256(b) != want {
		c.bad = append(c.bad, Bad{Block: block})
	}
}

// read reads a block; the end of the file is no end to it, but a block that is not there.
func (c *checker) read(b []byte, block int64) error {
	_, err := c.f.r.ReadAt(b, block*BlockSize)
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// want is the hash of what is below entry index of level i: a block of data under level 0, one of level i-1 else. It is
// false where the tree cannot tell.
func (c *checker) want(i int, index int64) ([sha256.Size]byte, bool) {
	if i == len(c.f.levels) {
		return c.f.root, true
	}
	p := c.node(i, index/perBlock)
	if !p.ok {
		return [sha256.Size]byte{}, false
	}
	return [sha256.Size]byte(p.b[index%perBlock*sha256.Size:][:sha256.Size]), true
}

// node is a block of the tree, checked against the one above it.
func (c *checker) node(i int, index int64) *cached {
	p := &c.path[i]
	if p.index == index+1 {
		return p
	}
	want, ok := c.want(i+1, index)
	p.index, p.ok = index+1, false
	if !ok {
		return p
	}
	block := c.f.levels[i].first + index
	err := c.read(p.b[:], block)
	if err == nil && sha256.Sum256(p.b[:]) == want {
		p.ok = true
		return p
	}
	c.bad = append(c.bad, Bad{Block: block, Err: err})
	return p
}

func (c *checker) superblock() {
	b := c.buf[:BlockSize]
	if err := c.read(b, c.f.data); err != nil {
		c.bad = append(c.bad, Bad{Block: c.f.data, Err: err})
	} else if !bytes.Equal(b, Superblock(c.f.data*BlockSize)) {
		c.bad = append(c.bad, Bad{Block: c.f.data})
	}
}

// tree looks at the blocks of the tree that no block of data led to, since the check began further on.
func (c *checker) tree() {
	seen := map[int64]bool{}
	for _, b := range c.bad {
		seen[b.Block] = true
	}
	n := len(c.bad)
	for index := range c.f.bottom() {
		c.node(0, index)
	}
	// What was found twice was on the way twice.
	found := c.bad[n:]
	c.bad = c.bad[:n]
	for _, b := range found {
		if !seen[b.Block] {
			seen[b.Block] = true
			c.bad = append(c.bad, b)
		}
	}
}

// bottom is how many blocks the level above the data has.
func (f *File) bottom() int64 {
	if len(f.levels) == 0 {
		return 0
	}
	return f.levels[0].blocks
}
