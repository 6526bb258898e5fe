package disk

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"unicode/utf16"
)

// A GPT (UEFI specification 2.10, section 5.3) as it lies on a disk of n blocks:
//
//	block 0          protective MBR: one partition of type 0xee over all
//	block 1          header
//	block 2 ff       128 entries of 128 bytes (16 KiB)
//	1 MiB ff         BIOS boot partition (3), EFI system partition (2), and the cache (1), which has the rest
//	before the last  the entries again
//	block n-1        header again, "my" and "other" address changed
const (
	gptEntries   = 128
	gptEntrySize = 128
	gptAlign     = 1 << 20 // bytes; where every partitioner since 2010 starts the first partition
)

// Types of partitions, in their order on disk.
var (
	// linuxData is 0FC63DAF-8483-4772-8E79-3D69D8477DE4.
	linuxData = [16]byte{0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4}
	// efiSystem is C12A7328-F81F-11D2-BA4B-00A0C93EC93B.
	efiSystem = [16]byte{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}
	// biosBoot is 21686148-6449-6E6F-744E-656564454649, of GRUB.
	biosBoot = [16]byte{0x48, 0x61, 0x68, 0x21, 0x49, 0x64, 0x6f, 0x6e, 0x74, 0x4e, 0x65, 0x65, 0x64, 0x45, 0x46, 0x49}
)

// Names of the partitions that a machine boots from by itself.
const (
	espLabel  = "troupe-esp"
	biosLabel = "troupe-bios"
)

// An Entry is one partition of a GPT.
type Entry struct {
	Number      int    // from 1
	Name        string // label of the partition
	ID          string // its GUID as it lies on disk, in hex
	First, Size int64  // bytes
}

// errNoGPT is the error for a disk without a valid partition table.
var errNoGPT = errors.New("no valid GPT")

// writer is what a GPT is written to.
type writer interface {
	io.WriterAt
	Sync() error
}

// A slice is a partition to be made.
type slice struct {
	number      int
	kind        [16]byte
	name        string
	first, size int64 // bytes
}

// layout says what a disk of size bytes in blocks of block bytes is parted into: the cache, named so, and before it, where
// there is room, what firmware boots. All machines get both of that: firmware may be set to another mode later.
func layout(size, block int64, name string) []slice {
	first := int64(gptAlign)
	var out []slice
	if esp := espSize(size, block); esp > 0 {
		out = []slice{
			{3, biosBoot, biosLabel, gptAlign, gptAlign},
			{2, efiSystem, espLabel, 2 * gptAlign, esp},
		}
		first = 2*gptAlign + esp
	}
	// The end is aligned too; 1 MiB holds the copy of the table.
	end := (size - gptAlign) / gptAlign * gptAlign
	return append(out, slice{1, linuxData, name, first, end - first})
}

// espSize is how many bytes the EFI system partition has; 0: there is none. Two kernels with their initramfs must fit, with
// all modules and firmware of a kernel for real hardware on a disk that is large enough; and FAT32 needs 65,525 clusters.
func espSize(size, block int64) int64 {
	switch {
	case size < 1<<30 || block > 512 && size < 8<<30:
		return 0
	case block > 512 || size >= 16<<30:
		return 512 << 20
	case size >= 4<<30:
		return 256 << 20
	}
	return 128 << 20
}

// writeGPT makes a table of the layout of a disk of size bytes in blocks of block bytes.
// Block 0 says whose disk it is until all the rest is there, and then becomes what makes the table one: each step is on
// the disk before the next is written, so that a crash leaves the disk claimed, or with this table.
func writeGPT(w writer, size, block int64, name string) error {
	n := size / block
	entryBlocks := int64(gptEntries*gptEntrySize) / block
	parts := layout(size, block, name)
	if cache := parts[len(parts)-1]; cache.size < gptAlign {
		return fmt.Errorf("disk of %d bytes is too small for a partition", size)
	}
	var guids [16 * 4]byte
	if _, err := rand.Read(guids[:]); err != nil {
		return fmt.Errorf("making the disk's GUID: %w", err)
	}
	entries := make([]byte, gptEntries*gptEntrySize)
	for i, p := range parts {
		p.put(entries[(p.number-1)*gptEntrySize:], block, guid(guids[16*(i+1):][:16]))
	}
	h := gptHeader{blocks: n, block: block, entryBlocks: entryBlocks, guid: guid(guids[:16]), crc: crc32.ChecksumIEEE(entries)}
	steps := []struct {
		at   int64
		data []byte
	}{
		{0, claimBlock(block)},
		{n - 1 - entryBlocks, entries},
		{n - 1, h.bytes(n-1, 1, n-1-entryBlocks)},
		{2, entries},
		{1, h.bytes(1, n-1, 2)},
		{0, protectiveMBR(n, block)},
	}
	for _, s := range steps {
		if _, err := w.WriteAt(s.data, s.at*block); err != nil {
			return fmt.Errorf("writing the partition table at block %d: %w", s.at, err)
		}
		if err := w.Sync(); err != nil {
			return fmt.Errorf("writing the partition table at block %d: %w", s.at, err)
		}
	}
	return nil
}

// put writes the entry of a partition.
func (p slice) put(entry []byte, block int64, id []byte) {
	copy(entry, p.kind[:])
	copy(entry[16:], id)
	putBlock(entry[32:], p.first/block)
	putBlock(entry[40:], (p.first+p.size)/block-1)
	for i, u := range utf16.Encode([]rune(p.name)) {
		if i < 36 {
			binary.LittleEndian.PutUint16(entry[56+2*i:], u)
		}
	}
}

// guid sets the bits of a random UUID (RFC 9562 section 5.4), in the mixed order that GPT has.
func guid(b []byte) []byte {
	b[7] = b[7]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return b
}

type gptHeader struct {
	blocks, block, entryBlocks int64
	guid                       []byte
	crc                        uint32
}

func (h gptHeader) bytes(my, other, entries int64) []byte {
	le := binary.LittleEndian
	b := make([]byte, h.block)
	copy(b, "EFI PART")
	le.PutUint32(b[8:], 0x00010000)
	le.PutUint32(b[12:], 92)
	putBlock(b[24:], my)
	putBlock(b[32:], other)
	putBlock(b[40:], 2+h.entryBlocks)
	putBlock(b[48:], h.blocks-h.entryBlocks-2)
	copy(b[56:], h.guid)
	putBlock(b[72:], entries)
	le.PutUint32(b[80:], gptEntries)
	le.PutUint32(b[84:], gptEntrySize)
	le.PutUint32(b[88:], h.crc)
	le.PutUint32(b[16:], crc32.ChecksumIEEE(b[:92]))
	return b
}

// putBlock writes the number of a block, which is never negative.
func putBlock(b []byte, n int64) {
	binary.LittleEndian.PutUint64(b, uint64(n)) //nolint:gosec // see above
}

func claimBlock(block int64) []byte {
	b := make([]byte, block)
	copy(b, claimText)
	return b
}

func protectiveMBR(blocks, block int64) []byte {
	b := make([]byte, block)
	e := b[446:]
	copy(e, []byte{0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0})
	binary.LittleEndian.PutUint32(e[12:], uint32(min(blocks-1, 0xffffffff))) //nolint:gosec // bounded on this line
	b[510], b[511] = 0x55, 0xaa
	return b
}

// readGPT reads the partitions of the disk; from the copy at its end where the table at its start is broken. Every
// number in it is taken for hostile: it came with the disk.
func readGPT(r io.ReaderAt, size, block int64) ([]Entry, error) {
	if block < 512 || size < 64*block {
		return nil, errNoGPT
	}
	entries, err := readTable(r, size, block, 1)
	if err != nil {
		entries, err = readTable(r, size, block, size/block-1)
	}
	return entries, err
}

func readTable(r io.ReaderAt, size, block, at int64) ([]Entry, error) {
	le := binary.LittleEndian
	h := make([]byte, block)
	if _, err := r.ReadAt(h, at*block); err != nil {
		return nil, fmt.Errorf("reading the partition table at block %d: %w", at, err)
	}
	length := le.Uint32(h[12:])
	if string(h[:8]) != "EFI PART" || length < 92 || int64(length) > block {
		return nil, errNoGPT
	}
	sum := le.Uint32(h[16:])
	le.PutUint32(h[16:], 0)
	if crc32.ChecksumIEEE(h[:length]) != sum {
		return nil, errNoGPT
	}
	start, count, esize := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if count > 1024 || esize < 128 || esize > 4096 || start > uint64(size/block) { //nolint:gosec // both are positive: see readGPT
		return nil, errNoGPT
	}
	table := make([]byte, int(count)*int(esize))
	if _, err := r.ReadAt(table, int64(start)*block); err != nil { //nolint:gosec // start is at most the disk's size
		return nil, fmt.Errorf("reading the partition table at block %d: %w", start, err)
	}
	if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
		return nil, errNoGPT
	}
	return parseEntries(table, int(esize), size, block), nil
}

func parseEntries(table []byte, esize int, size, block int64) []Entry {
	le := binary.LittleEndian
	var out []Entry
	for i := 0; (i+1)*esize <= len(table); i++ {
		e := table[i*esize:][:esize]
		if bytes.Equal(e[:16], make([]byte, 16)) {
			continue
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if last < first || last >= uint64(size/block) { //nolint:gosec // both are positive: see readGPT
			continue
		}
		units := make([]uint16, 36)
		for j := range units {
			units[j] = le.Uint16(e[56+2*j:])
		}
		name := string(utf16.Decode(units))
		if end := bytes.IndexByte([]byte(name), 0); end >= 0 {
			name = name[:end]
		}
		out = append(out, Entry{
			Number: i + 1, Name: name, ID: hex.EncodeToString(e[16:32]),
			First: int64(first) * block, Size: int64(last-first+1) * block, //nolint:gosec // both lie on the disk
		})
	}
	return out
}
