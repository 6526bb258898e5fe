// Package verity makes and checks the hash trees of dm-verity: the Merkle tree over an image by which the kernel, or
// anybody, can tell for each block that it reads whether it is what was built (Linux,
// Documentation/admin-guide/device-mapper/verity.rst; cryptsetup, "DMVerity" in its wiki for the superblock). Here it
// has one form: SHA-256, blocks of 4096 bytes, hash type 1, no salt, and a UUID of zeros, so that the tree is a function
// of the data and nothing else. A file with its tree looks like this:
//
//	data          a whole number of blocks
//	superblock    512 bytes, and zeros up to the end of the block
//	tree          the levels from the top one down to the one with the hashes of the data. A block of it has 128
//	              hashes of 32 bytes, each of the block below it; where there are fewer, zeros follow
//
// The hash of the top block is the root. Data of one block has no tree: its hash is the root.
package verity

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// BlockSize is the size in bytes of a block of data, and of one of the tree.
const BlockSize = 4096

// perBlock is how many hashes a block of the tree has.
const perBlock = BlockSize / sha256.Size

// MaxData is how many bytes of data a tree is made for at most, 16 TiB less a block: what ext4 takes as one file.
const MaxData = 1<<44 - BlockSize

// A Root is the hash that stands for all the data below it.
type Root [sha256.Size]byte

// String is the root as 64 lower-case hex digits.
func (r Root) String() string { return hex.EncodeToString(r[:]) }

// ParseRoot reads what String wrote, and nothing else.
func ParseRoot(s string) (Root, error) {
	var r Root
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(r) || hex.EncodeToString(b) != s {
		return Root{}, fmt.Errorf("%q is no root hash: want %d lower-case hex digits", s, 2*len(r))
	}
	copy(r[:], b)
	return r, nil
}

// Padded is size rounded up to whole blocks.
func Padded(size int64) int64 { return (size + BlockSize - 1) / BlockSize * BlockSize }

// checkData refuses a size of data that no tree can be made for.
func checkData(data int64) error {
	if data < BlockSize || data > MaxData || data%BlockSize != 0 {
		return fmt.Errorf("%d bytes of data: want a whole number of blocks of %d bytes, from one to %d bytes", data, BlockSize, int64(MaxData))
	}
	return nil
}

// Size is how many bytes superblock and tree take after data bytes of data, a whole number of blocks.
func Size(data int64) int64 { return newLayout(data).size() - data }

// A layout says where the blocks of a file with its tree are, counted in blocks from the start of the file.
type layout struct {
	data   int64   // blocks of data; the superblock is the next one
	levels []level // [0] has the hashes of the data, the last one is the top; none where data is one block
}

type level struct{ first, blocks int64 }

func newLayout(data int64) layout {
	l := layout{data: data / BlockSize}
	for n := l.data; n > 1; {
		n = (n + perBlock - 1) / perBlock
		l.levels = append(l.levels, level{blocks: n})
	}
	at := l.data + 1
	for i := len(l.levels) - 1; i >= 0; i-- {
		l.levels[i].first = at
		at += l.levels[i].blocks
	}
	return l
}

// size is the length of the file in bytes.
func (l layout) size() int64 {
	n := l.data + 1
	for _, v := range l.levels {
		n += v.blocks
	}
	return n * BlockSize
}

// Write reads data bytes, a whole number of blocks, from r, writes superblock and tree to w behind them (at the offset
// data and after it), and returns the root. It keeps one block of each level in memory, and no more.
func Write(r io.Reader, data int64, w io.WriterAt) (Root, error) {
	if err := checkData(data); err != nil {
		return Root{}, fmt.Errorf("making a verity tree: %w", err)
	}
	b := builder{layout: newLayout(data), w: w}
	b.open = make([]openBlock, len(b.levels))
	buf := make([]byte, 64*BlockSize)
	for left := data; left > 0; {
		part := buf[:min(int64(len(buf)), left)]
		if _, err := io.ReadFull(r, part); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return Root{}, fmt.Errorf("making a verity tree: reading the data: %w", err)
		}
		left -= int64(len(part))
		for ; len(part) > 0; part = part[BlockSize:] {
			if err := b.add(0, sha256.Sum256(part[:BlockSize])); err != nil {
				return Root{}, fmt.Errorf("making a verity tree: %w", err)
			}
		}
	}
	if err := b.finish(); err != nil {
		return Root{}, fmt.Errorf("making a verity tree: %w", err)
	}
	return b.root, nil
}

// A builder writes the levels as their blocks fill.
type builder struct {
	layout
	w    io.WriterAt
	open []openBlock // by level
	root Root
}

// An openBlock is the block of a level that hashes are being added to.
type openBlock struct {
	b    [BlockSize]byte
	n    int   // hashes in it
	done int64 // blocks of the level that were written
}

// add puts the next hash into level i; above the top one it is the root.
func (b *builder) add(i int, sum [sha256.Size]byte) error {
	if i == len(b.levels) {
		b.root = sum
		return nil
	}
	o := &b.open[i]
	copy(o.b[o.n*sha256.Size:], sum[:])
	if o.n++; o.n < perBlock {
		return nil
	}
	return b.flush(i)
}

func (b *builder) flush(i int) error {
	o := &b.open[i]
	if _, err := b.w.WriteAt(o.b[:], (b.levels[i].first+o.done)*BlockSize); err != nil {
		return fmt.Errorf("writing it: %w", err)
	}
	sum := sha256.Sum256(o.b[:])
	*o = openBlock{done: o.done + 1}
	return b.add(i+1, sum)
}

// finish writes what is not full, from the bottom up, and the superblock.
func (b *builder) finish() error {
	for i := range b.open {
		if b.open[i].n > 0 {
			if err := b.flush(i); err != nil {
				return err
			}
		}
	}
	if _, err := b.w.WriteAt(Superblock(b.data*BlockSize), b.data*BlockSize); err != nil {
		return fmt.Errorf("writing the superblock: %w", err)
	}
	return nil
}
