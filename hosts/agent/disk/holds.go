package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// What Identify says of a device beside the names of file systems and the like.
const (
	Blank   = "blank"             // nothing at all: only zeros wherever a trace could be
	Unknown = "unknown data"      // something, that has no name here
	Troupe  = "troupe"            // our cache
	Damaged = "damaged troupe"    // our cache, as the record of its owner says; its superblock is gone
	Claimed = "unfinished troupe" // a disk that a Maker began to write to, and did not finish
)

// claimText lies in block 0 while a Maker writes the rest. One block is written whole or not at all.
const claimText = "troupe is making its cache on this disk\n"

// A magic is a place where a format says its name. A negative offset counts from the end of the device.
type magic struct {
	name   string
	offset int64
	bytes  string
}

// magics are the formats that are told apart, first match wins; offsets and bytes from the kernel's headers and from
// libblkid's probes. What is not listed is found all the same, as Unknown.
var magics = []magic{
	{Claimed, 0, claimText},
	{"gpt", 512, "EFI PART"},
	{"gpt", 4096, "EFI PART"},
	{"luks", 0, "LUKS\xba\xbe"},
	{"lvm", 0x018, "LVM2 001"},
	{"lvm", 0x218, "LVM2 001"},
	{"lvm", 0x418, "LVM2 001"},
	{"lvm", 0x618, "LVM2 001"},
	{"md raid", 0, "\xfc\x4e\x2b\xa9"},    // metadata 1.1
	{"md raid", 4096, "\xfc\x4e\x2b\xa9"}, // metadata 1.2
	{"bcache", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf7\x7f\x37\x1f\x8d\xce"},
	{"bcachefs", 4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"},
	{"ceph", 0, "bluestore block device"},
	{"xfs", 0, "XFSB"},
	{"btrfs", 65536 + 64, "_BHRfS_M"},
	{"zfs", 128<<10 + 1016, "\x0c\xb1\xba\x00"},
	{"zfs", 128 << 10, "\x0c\xb1\xba\x00"},
	{"zfs", 132 << 10, "\x0c\xb1\xba\x00"},
	{"zfs", 136 << 10, "\x0c\xb1\xba\x00"},
	{"ext4", 1024 + 56, "\x53\xef"},
	{"f2fs", 1024, "\x10\x20\xf5\xf2"},
	{"erofs", 1024, "\xe2\xe1\xf5\xe0"},
	{"swap", 4096 - 10, "SWAPSPACE2"},
	{"swap", 65536 - 10, "SWAPSPACE2"},
	{"swap", 4096 - 10, "S1SUSPEND"},
	{"squashfs", 0, "hsqs"},
	{"reiserfs", 65536 + 52, "ReIsEr"},
	{"jfs", 32768, "JFS1"},
	{"nilfs2", 1024 + 6, "\x34\x34"},
	{"gfs2", 65536, "\x01\x16\x19\x70"},
	{"ocfs2", 8192, "OCFSV2"},
	{"ocfs2", 4096, "OCFSV2"},
	{"ocfs2", 2048, "OCFSV2"},
	{"vmfs", 1 << 20, "\x0d\xd0\x01\xc0"},
	{"drbd", -4096 + 60, "\x83\x74\x02\x6d"},
	{"iso9660", 32769, "CD001"},
	{"udf", 32769, "NSR0"},
	{"ntfs", 3, "NTFS    "},
	{"exfat", 3, "EXFAT   "},
	{"vfat", 82, "FAT32   "},
	{"vfat", 54, "FAT16   "},
	{"vfat", 54, "FAT12   "},
	{"ufs", 8192 + 1372, "\x19\x01\x54\x19"},
	{"ufs", 65536 + 1372, "\x19\x01\x54\x19"},
	{"minix", 1024 + 16, "\x8f\x13"},
	{"minix", 1024 + 16, "\x78\x24"},
	// At the end of the device.
	{"md raid", -8192, "\xfc\x4e\x2b\xa9"}, // metadata 1.0
	{"gpt", -512, "EFI PART"},
	{"gpt", -4096, "EFI PART"},
	{"ddf raid", -512, "\xde\x11\xde\x11"},
	{"intel raid", -1024, "Intel Raid ISM"},
	{"zfs", -256<<10 + 128<<10, "\x0c\xb1\xba\x00"},
}

// headSize and tailSize are read whole, and must be zero on a blank device. 8 MiB takes in the second headers of LUKS2
// (the last one starts at 4 MiB), VMFS at 1 MiB, and whatever a boot loader left before the first partition.
const (
	headSize = 8 << 20
	tailSize = 1 << 20
	sample   = 4096
	samples  = 64
	// quickHead and quickTail have all of magics.
	quickHead = 1<<20 + 4096
	quickTail = 256 << 10
)

// copies are where formats keep copies of their superblock beyond the head: the first btrfs mirror, and the first
// backups of ext2-4 with blocks of 1, 2 and 4 KiB.
var copies = []int64{64 << 20, 8193 << 10, 16384 * 2048, 32768 * 4096, 256 << 30}

// Identify says what a device of size bytes holds: Blank, Troupe, the name of a format, or Unknown. Blank is said only
// where the first 8 MiB, the last 1 MiB, the places where known formats keep copies of their headers, and 64 blocks
// evenly over the rest are all zero. It only reads.
func Identify(r io.ReaderAt, size int64) (string, error) {
	p := probe{r: r, size: size}
	// What has a name is found in little: a machine with its cache need not read more at each boot.
	head := p.read(0, min(quickHead, size))
	tail := p.read(max(0, size-quickTail), min(quickTail, size))
	if p.err != nil {
		return "", p.err
	}
	if kind := named(head, tail, size); kind != "" {
		return kind, nil
	}
	head = p.read(0, min(headSize, size))
	tail = p.read(max(0, size-tailSize), min(tailSize, size))
	if p.err != nil {
		return "", p.err
	}
	if !zero(head) || !zero(tail) {
		return Unknown, nil
	}
	for _, off := range append(spread(size), copies...) {
		if off < 0 || off+sample > size {
			continue
		}
		if !zero(p.read(off, sample)) {
			return Unknown, p.err
		}
	}
	if p.err != nil {
		return "", p.err
	}
	return Blank, nil
}

type probe struct {
	r    io.ReaderAt
	size int64
	err  error
}

// read returns n bytes at off; after an error it returns nothing, which is zero: look at err in the end.
func (p *probe) read(off, n int64) []byte {
	if p.err != nil {
		return nil
	}
	b := make([]byte, n)
	if _, err := p.r.ReadAt(b, off); err != nil && !errors.Is(err, io.EOF) {
		p.err = fmt.Errorf("reading %d bytes at %d of %d: %w", n, off, p.size, err)
		return nil
	}
	return b
}

// spread are the offsets of the samples between head and tail.
func spread(size int64) []int64 {
	var out []int64
	step := (size - headSize - tailSize) / (samples + 1)
	for i := range int64(samples) {
		if step >= sample {
			out = append(out, (headSize+(i+1)*step)/sample*sample)
		}
	}
	return out
}

func named(head, tail []byte, size int64) string {
	for _, m := range magics {
		b, off := head, m.offset
		if off < 0 {
			b, off = tail, int64(len(tail))+off
		}
		if off >= 0 && off+int64(len(m.bytes)) <= int64(len(b)) && string(b[off:off+int64(len(m.bytes))]) == m.bytes {
			return refine(m.name, head)
		}
	}
	if md090(tail, size) {
		return "md raid"
	}
	if kind, ok := bootSector(head); ok {
		return kind
	}
	return ""
}

// refine looks closer at what has one magic for several formats.
func refine(kind string, head []byte) string {
	if kind != "ext4" || len(head) < 2048 {
		return kind
	}
	sb := head[1024:2048]
	const hasJournal, extents = 0x4, 0x40
	switch {
	case extLabel(sb) == Label:
		return Troupe
	case binary.LittleEndian.Uint32(sb[0x60:])&extents != 0:
		return "ext4"
	case binary.LittleEndian.Uint32(sb[0x5c:])&hasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

func extLabel(sb []byte) string { return string(bytes.TrimRight(sb[0x78:0x88], "\x00")) }

// md090 looks for Linux RAID metadata 0.90: at the last multiple of 64 KiB that leaves 64 KiB behind it.
func md090(tail []byte, size int64) bool {
	off := size&^(64<<10-1) - 64<<10 - (size - int64(len(tail)))
	if off < 0 || off+4 > int64(len(tail)) {
		return false
	}
	m := binary.LittleEndian.Uint32(tail[off:])
	return m == 0xa92b4efc || m == 0xfc4e2ba9
}

// bootSector knows a DOS partition table, and a boot sector without one.
func bootSector(head []byte) (string, bool) {
	if len(head) < 512 || head[510] != 0x55 || head[511] != 0xaa {
		return "", false
	}
	for i := range 4 {
		if e := head[446+16*i:][:16]; e[4] != 0 && (e[0] == 0 || e[0] == 0x80) {
			return "dos", true
		}
	}
	return "boot sector", true
}

func zero(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
