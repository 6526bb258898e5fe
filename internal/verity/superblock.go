package verity

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// The superblock, as cryptsetup has it (lib/verity/verity.c), numbers little-endian:
//
//	  0   8  "verity", two zeros
//	  8   4  version 1
//	 12   4  hash type 1
//	 16  16  UUID
//	 32  32  algorithm, zeros after it
//	 64   4  bytes of a block of data
//	 68   4  bytes of a block of the tree
//	 72   8  blocks of data
//	 80   2  bytes of salt
//	 82   6  zeros
//	 88 256  salt
//	344 168  zeros
const (
	magic     = "verity\x00\x00"
	algorithm = "sha256"
)

// Superblock is the block that stands between data bytes of data and their tree.
func Superblock(data int64) []byte {
	b := make([]byte, BlockSize)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], 1)
	binary.LittleEndian.PutUint32(b[12:], 1)
	copy(b[32:], algorithm)
	binary.LittleEndian.PutUint32(b[64:], BlockSize)
	binary.LittleEndian.PutUint32(b[68:], BlockSize)
	binary.LittleEndian.PutUint64(b[72:], uint64(data/BlockSize)) //nolint:gosec // it is not negative
	return b
}

// ParseSuperblock returns how many bytes of data the tree behind the superblock b is for. Whatever is not exactly what
// Superblock makes is an error: another form of tree has no place in an image.
func ParseSuperblock(b []byte) (data int64, err error) {
	if len(b) != BlockSize || !bytes.HasPrefix(b, []byte(magic)) {
		return 0, fmt.Errorf("%d bytes are no verity superblock", len(b))
	}
	blocks := binary.LittleEndian.Uint64(b[72:])
	if blocks < 1 || blocks > MaxData/BlockSize {
		return 0, fmt.Errorf("a verity superblock with %d blocks of data", blocks)
	}
	data = int64(blocks) * BlockSize
	if !bytes.Equal(b, Superblock(data)) {
		return 0, fmt.Errorf("a verity superblock of another form than SHA-256, blocks of %d bytes, no salt, no UUID", BlockSize)
	}
	return data, nil
}
