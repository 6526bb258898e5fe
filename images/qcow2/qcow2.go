// Package qcow2 reads disk images in QEMU's format (docs/interop/qcow2.rst in QEMU's source): versions 2 and 3, with
// clusters compressed by zlib or zstd. An image that lies over another, is encrypted, or keeps its data or parts of clusters
// elsewhere is refused. Everything in a file is taken as hostile: no length is believed before it was compared with what the
// format, QEMU and the file's own size allow.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The header, all numbers big-endian. Version 2 ends after 72 bytes.
//
//	offset size
//	0      4    magic: "QFI" and 0xfb
//	4      4    version: 2 or 3
//	8      8    offset of the name of the image below; 0: none
//	16     4    length of that name
//	20     4    cluster bits: a cluster has 1<<bits bytes
//	24     8    size of the disk in bytes
//	32     4    encryption; 0: none
//	36     4    entries of the L1 table
//	40     8    offset of the L1 table
//	48     24   reference counts, snapshots: of no use to who reads
//	72     8    incompatible features
//	80     20   compatible and autoclear features, width of the reference counts
//	100    4    length of the header
//	104    1    compression, where the header is that long: 0 zlib, 1 zstd
const (
	magic       = "QFI\xfb"
	headerV2    = 72
	headerV3    = 104
	headerBytes = 105 // all that is read

	minClusterBits = 9  // bytes, as QEMU has it
	maxClusterBits = 21 // 2 MiB, as QEMU has it
	maxL1          = 32 << 20
)

// Incompatible features. An image that says it is dirty was not closed: its reference counts may be wrong, its data are not.
const (
	featureDirty        = 1 << 0
	featureCorrupt      = 1 << 1
	featureExternalData = 1 << 2
	featureCompression  = 1 << 3
	featureExtendedL2   = 1 << 4
)

// Entries of the tables.
const (
	offsetMask     = 0x00ff_ffff_ffff_fe00 // bits 9 to 55
	flagCompressed = 1 << 62
	flagZero       = 1 << 0 // version 3
	sector         = 512
)

// MaxSize bounds a disk, in bytes.
const MaxSize = 8 << 40

// ErrFormat is in the chain of the errors about images that are damaged, or that this package does not read.
var ErrFormat = errors.New("qcow2 image")

func badf(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrFormat, fmt.Errorf(format, args...))
}

// Is says whether a file that begins with head is a qcow2 image.
func Is(head []byte) bool { return len(head) >= len(magic) && string(head[:len(magic)]) == magic }

// An Image is an open disk image.
type Image struct {
	r    io.ReaderAt
	len  uint64 // of the file
	size int64

	version     uint32
	bits        uint
	zstd        bool
	l1          []uint64
	decompress  decompressor
	packed, buf []byte
}

// Open reads the header and the L1 table of the image in the first length bytes of r.
func Open(r io.ReaderAt, length int64) (*Image, error) {
	h := make([]byte, headerBytes)
	n, err := r.ReadAt(h, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the header: %w", err)
	}
	if !Is(h[:n]) || n < headerV2 {
		return nil, badf("there is no header")
	}
	img := &Image{r: r, len: uint64(max(length, 0))}
	if err := img.header(h[:n]); err != nil {
		return nil, err
	}
	if err := img.readL1(binary.BigEndian.Uint32(h[36:]), binary.BigEndian.Uint64(h[40:])); err != nil {
		return nil, err
	}
	return img, nil
}

// Size of the disk in bytes.
func (img *Image) Size() int64 { return img.size }

func (img *Image) cluster() int64 { return 1 << img.bits }

func (img *Image) header(h []byte) error {
	be := binary.BigEndian
	img.version = be.Uint32(h[4:])
	bits, size := be.Uint32(h[20:]), be.Uint64(h[24:])
	switch {
	case img.version != 2 && img.version != 3:
		return badf("version %d: want 2 or 3", img.version)
	case be.Uint64(h[8:]) != 0:
		return badf("it lies over another image, its backing file: make one file of both (qemu-img convert)")
	case be.Uint32(h[32:]) != 0:
		return badf("it is encrypted")
	case bits < minClusterBits || bits > maxClusterBits:
		return badf("%d cluster bits: want %d to %d", bits, minClusterBits, maxClusterBits)
	case size == 0:
		return badf("the disk has no bytes")
	case size > MaxSize:
		return badf("a disk of %d bytes: more than %d", size, int64(MaxSize))
	}
	img.bits, img.size = uint(bits), int64(size)
	if img.version == 2 {
		return nil
	}
	return img.features(h)
}

func (img *Image) features(h []byte) error {
	if len(h) < headerV3 {
		return badf("the header ends after %d bytes", len(h))
	}
	features := binary.BigEndian.Uint64(h[72:])
	switch {
	case features&featureCorrupt != 0:
		return badf("it is marked as corrupt: have it repaired (qemu-img check -r all)")
	case features&featureExternalData != 0:
		return badf("its data are in another file")
	case features&featureExtendedL2 != 0:
		return badf("it has subclusters (extended L2 entries): write it anew without (qemu-img convert)")
	case features&^(featureDirty|featureCompression) != 0:
		return badf("features %#x that are not known here", features)
	}
	length, kind := binary.BigEndian.Uint32(h[100:]), byte(0)
	if length > headerV3 && len(h) > headerV3 {
		kind = h[headerV3]
	}
	if kind > 1 || (kind == 1) != (features&featureCompression != 0) {
		return badf("compression %d, with features %#x", kind, features)
	}
	img.zstd = kind == 1
	return nil
}

// readL1 reads as much of the L1 table as the disk's size needs.
func (img *Image) readL1(entries uint32, offset uint64) error {
	perTable := img.cluster() / 8 * img.cluster() // bytes of the disk
	need := (img.size + perTable - 1) / perTable
	switch {
	case need*8 > maxL1:
		return badf("a disk of %d bytes in clusters of %d: the L1 table would have more than %d bytes", img.size, img.cluster(), maxL1)
	case int64(entries) < need:
		return badf("an L1 table of %d entries, and the disk needs %d", entries, need)
	}
	b := make([]byte, need*8)
	if err := img.read(b, offset, "L1 table"); err != nil {
		return err
	}
	img.l1 = make([]uint64, need)
	seen := make(map[uint64]bool, need)
	for i := range img.l1 {
		at := binary.BigEndian.Uint64(b[8*i:]) & offsetMask
		if at != 0 && seen[at] { // else a small file would be a disk without end
			return badf("two entries of the L1 table have the same L2 table, at %d", at)
		}
		seen[at], img.l1[i] = true, at
	}
	return nil
}

// read fills b from offset of the file.
func (img *Image) read(b []byte, offset uint64, what string) error {
	if offset > img.len || uint64(len(b)) > img.len-offset {
		return badf("%s: %d bytes at %d, and the file has %d", what, len(b), offset, img.len)
	}
	if _, err := img.r.ReadAt(b, int64(offset)); err != nil { //nolint:gosec // within the file, whose length is an int64
		return fmt.Errorf("reading the %s at %d: %w", what, offset, err)
	}
	return nil
}

// Extents calls do with the content of the disk in order, in pieces of up to one cluster, without those parts that are not
// in the file or marked as zeros. What do is given is its own until it returns. An error of do ends it.
func (img *Image) Extents(do func(off int64, data []byte) error) error {
	table := make([]byte, img.cluster())
	img.buf = make([]byte, img.cluster())
	defer img.decompress.close()
	for i, at := range img.l1 {
		if at == 0 {
			continue
		}
		if err := img.read(table, at, "L2 table"); err != nil {
			return err
		}
		first := int64(i) * (img.cluster() / 8)
		for j := range img.cluster() / 8 {
			off := (first + j) * img.cluster()
			if off >= img.size {
				return nil
			}
			data, err := img.data(binary.BigEndian.Uint64(table[8*j:]))
			if err != nil {
				return fmt.Errorf("the cluster at %d of the disk: %w", off, err)
			}
			if data == nil {
				continue
			}
			if err := do(off, data[:min(int64(len(data)), img.size-off)]); err != nil {
				return err
			}
		}
	}
	return nil
}

// data is the content of the cluster of an L2 entry; nil for zeros.
func (img *Image) data(entry uint64) ([]byte, error) {
	if entry&flagCompressed != 0 {
		return img.unpack(entry)
	}
	at := entry & offsetMask
	if at == 0 || img.version >= 3 && entry&flagZero != 0 {
		return nil, nil
	}
	return img.buf, img.read(img.buf, at, "cluster")
}

// unpack decompresses a cluster. Its entry has the offset in its low bits, of any alignment, and above that how many
// sectors the data go into after the first.
func (img *Image) unpack(entry uint64) ([]byte, error) {
	shift := 62 - (img.bits - 8)
	at := entry & (1<<shift - 1)
	sectors := entry >> shift & (1<<(img.bits-8) - 1)
	length := min((sectors+1)*sector-at%sector, img.len-min(at, img.len)) // the last one may end with the file
	if length == 0 {
		return nil, badf("compressed data at %d, and the file has %d bytes", at, img.len)
	}
	if uint64(cap(img.packed)) < length {
		img.packed = make([]byte, 2*img.cluster())
	}
	packed := img.packed[:length]
	if err := img.read(packed, at, "compressed cluster"); err != nil {
		return nil, err
	}
	if err := img.decompress.into(img.buf, packed, img.zstd); err != nil {
		return nil, badf("compressed data at %d: %w", at, err)
	}
	return img.buf, nil
}
