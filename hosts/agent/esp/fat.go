package esp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// The file system is FAT32 (Microsoft, "FAT: General Overview of On-Disk Format", 1.03), which UEFI asks for (2.10,
// section 13.3). Only troupe writes to it, and always the same files: so each has its place, and a place that is written
// shares no sector with one that must stay whole. A disk writes one sector whole or not at all: a file is changed by
// writing its new bytes elsewhere, and then the one sector of its directory. So a power cut leaves the old file or the
// new one, which FAT alone does not promise.
//
//	reserved   boot sector, FSInfo, and copies of both from sector 6 on
//	FAT, FAT   one sector of each has the clusters of one area only
//	clusters   2 and on: one for each directory, one for the file CURRENT; then the areas, each from a multiple
//	           of the clusters that a sector of the FAT has
const (
	reserved   = 32     // sectors, as mkfs.fat has it
	clusters   = 131072 // about: FAT32 begins at 65525
	mediaFixed = 0xf8
	endOfChain = 0x0fffffff
	attrDir    = 0x10
	attrLabel  = 0x08
	attrFile   = 0x20
	entrySize  = 32
	volume     = "TROUPE     " // the label, padded
)

// Mark is what a file system of this package begins with: a jump that nobody takes, and who made it.
const Mark = "\xeb\x58\x90troupe  "

// The clusters of directories, and of the file that is written in place.
const (
	rootDir = iota + 2
	efiDir
	bootDir   // /EFI/BOOT
	vendorDir // /EFI/TROUPE
	troupeDir // /TROUPE
	slotADir
	slotBDir
	currentFile
	firstFree
)

// loaderArea is the room of one copy of a boot loader, in bytes.
const loaderArea = 2 << 20

// Sizes that a partition for this may have, in bytes.
const (
	MinSize = 128 << 20
	MaxSize = 1 << 30
)

// device is what the file system lies on. Sync returns when all that was written is on the disk.
type device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// geometry is where everything is; it depends on the size of the partition and of a sector alone.
type geometry struct {
	sector  int64 // bytes
	cluster int64 // bytes
	fatSize int64 // sectors of one FAT
	count   int64 // clusters that there are
	total   int64 // sectors
}

func newGeometry(size, sector int64) (geometry, error) {
	if size < MinSize || size > MaxSize || sector < 512 || sector > 4096 || sector&(sector-1) != 0 {
		return geometry{}, fmt.Errorf("no EFI system partition of %d bytes in sectors of %d: %d to %d MiB in sectors of 512 to 4096 bytes",
			size, sector, MinSize>>20, MaxSize>>20)
	}
	g := geometry{sector: sector, cluster: sector, total: size / sector}
	for size/g.cluster > clusters*3/2 {
		g.cluster *= 2
	}
	// One FAT is made for all sectors there are: a few sectors too long, which is allowed.
	g.fatSize = (size/g.cluster+2)*4/sector + 1
	g.count = (g.total - reserved - 2*g.fatSize) * sector / g.cluster
	if g.count < 65525 {
		return geometry{}, fmt.Errorf("no EFI system partition of %d bytes in sectors of %d: FAT32 needs more of them", size, sector)
	}
	return g, nil
}

// at is where a cluster begins, in bytes.
func (g geometry) at(cluster int64) int64 {
	return (reserved+2*g.fatSize)*g.sector + (cluster-2)*g.cluster
}

// perSector is how many clusters one sector of the FAT tells of.
func (g geometry) perSector() int64 { return g.sector / 4 }

// An area is a run of clusters whose entries share no sector of the FAT with those of others.
type area struct{ first, count int64 }

func (a area) size(g geometry) int64 { return a.count * g.cluster }

// loader is the area of one of two copies of a boot loader's file.
func (g geometry) loader(file, version int) area {
	per := g.perSector()
	count := (loaderArea/g.cluster + per - 1) / per * per
	return area{(firstFree+per-1)/per*per + int64(2*file+version)*count, count}
}

// slot is the area of a slot: half of what the loaders leave.
func (g geometry) slot(i int) area {
	per := g.perSector()
	last := g.loader(1, 1)
	first := last.first + last.count
	count := (g.count + 2 - first) / 2 / per * per
	return area{first + int64(i)*count, count}
}

// A run is a file in an area, from a cluster of it on.
type run struct{ first, size int64 }

// place gives each file of these sizes its clusters, one after the other.
func (g geometry) place(a area, sizes []int64) ([]run, error) {
	next := a.first
	out := make([]run, len(sizes))
	for i, n := range sizes {
		need := (n + g.cluster - 1) / g.cluster
		if n <= 0 || next+need > a.first+a.count {
			return nil, fmt.Errorf("the EFI system partition has no room for %d bytes: %d MiB are there for all", n, a.size(g)>>20)
		}
		out[i] = run{next, n}
		next += need
	}
	return out, nil
}

// chains are the entries of the FAT of an area in which these files lie.
func (g geometry) chains(a area, runs []run) []byte {
	b := make([]byte, a.count*4)
	for _, r := range runs {
		end := r.first + (r.size+g.cluster-1)/g.cluster
		for c := r.first; c < end; c++ {
			next := uint32(c + 1) //nolint:gosec // there are 2^18 clusters at most
			if c == end-1 {
				next = endOfChain
			}
			binary.LittleEndian.PutUint32(b[(c-a.first)*4:], next)
		}
	}
	return b
}

// writeChains writes them to both FATs.
func (g geometry) writeChains(d device, a area, b []byte) error {
	for i := range int64(2) {
		if _, err := d.WriteAt(b, (reserved+i*g.fatSize)*g.sector+a.first*4); err != nil {
			return fmt.Errorf("writing file allocation table %d: %w", i+1, err)
		}
	}
	return nil
}

// hasChains says whether both FATs have them.
func (g geometry) hasChains(d device, a area, want []byte) (bool, error) {
	got := make([]byte, len(want))
	for i := range int64(2) {
		if _, err := d.ReadAt(got, (reserved+i*g.fatSize)*g.sector+a.first*4); err != nil {
			return false, fmt.Errorf("reading file allocation table %d: %w", i+1, err)
		}
		if !bytes.Equal(got, want) {
			return false, nil
		}
	}
	return true, nil
}

// entry is one entry of a directory. Times are those of no time: 1 January 1980.
func entry(name string, attr byte, first, size int64) []byte {
	b := make([]byte, entrySize)
	copy(b, shortName(name))
	b[11] = attr
	b[16], b[18], b[24] = 0x21, 0x21, 0x21
	binary.LittleEndian.PutUint16(b[20:], uint16(first>>16)) //nolint:gosec // there are 2^18 clusters at most
	binary.LittleEndian.PutUint16(b[26:], uint16(first))     //nolint:gosec // the lower half
	binary.LittleEndian.PutUint32(b[28:], uint32(size))      //nolint:gosec // a partition has 2^30 bytes at most
	return b
}

// shortName is a name of 8 and 3 characters as a directory has it.
func shortName(name string) string {
	if name == "." || name == ".." || name == volume {
		return fmt.Sprintf("%-11s", name)
	}
	base, ext, _ := strings.Cut(name, ".")
	return fmt.Sprintf("%-8s%-3s", base, ext)
}

// directory is the first sector of a directory below parent. The root has no dots: it has the label.
func (g geometry) directory(self, parent int64, entries ...[]byte) []byte {
	var b bytes.Buffer
	if self == rootDir {
		b.Write(entry(volume, attrLabel, 0, 0))
	} else {
		if parent == rootDir {
			parent = 0 // that is how the root is called there
		}
		b.Write(entry(".", attrDir, self, 0))
		b.Write(entry("..", attrDir, parent, 0))
	}
	for _, e := range entries {
		b.Write(e)
	}
	return append(b.Bytes(), make([]byte, g.sector-int64(b.Len()))...)
}

// files are the entries of files that lie in runs.
func files(names []string, runs []run) [][]byte {
	out := make([][]byte, len(names))
	for i, n := range names {
		out[i] = entry(n, attrFile, runs[i].first, runs[i].size)
	}
	return out
}

// bootSector is what makes it a FAT32; the same for each partition of that size.
func (g geometry) bootSector() []byte {
	le := binary.LittleEndian
	b := make([]byte, g.sector)
	copy(b, Mark)
	le.PutUint16(b[11:], uint16(g.sector)) //nolint:gosec // 4096 at most
	b[13] = byte(g.cluster / g.sector)     //nolint:gosec // 16 at most
	le.PutUint16(b[14:], reserved)
	b[16] = 2
	b[21] = mediaFixed
	le.PutUint16(b[24:], 32)
	le.PutUint16(b[26:], 64)
	le.PutUint32(b[32:], uint32(g.total))   //nolint:gosec // a partition has 2^30 bytes at most
	le.PutUint32(b[36:], uint32(g.fatSize)) //nolint:gosec // less than that
	le.PutUint32(b[44:], rootDir)
	le.PutUint16(b[48:], 1) // FSInfo
	le.PutUint16(b[50:], 6) // the copies
	b[64], b[66] = 0x80, 0x29
	copy(b[67:], "EPRT") // the volume's number
	copy(b[71:], volume)
	copy(b[82:], "FAT32   ")
	b[510], b[511] = 0x55, 0xaa
	return b
}

// fsInfo says nothing of how many clusters are free: nobody needs it.
func (g geometry) fsInfo() []byte {
	b := make([]byte, g.sector)
	copy(b, "RRaA")
	copy(b[484:], "rrAa\xff\xff\xff\xff\xff\xff\xff\xff")
	b[510], b[511] = 0x55, 0xaa
	return b
}

// hasFormat says whether the file system is there, whatever files it has.
func (g geometry) hasFormat(d device) (bool, error) {
	for _, w := range g.fixed() {
		got := make([]byte, len(w.data))
		if _, err := d.ReadAt(got, w.at); err != nil {
			return false, fmt.Errorf("reading the EFI system partition at %d: %w", w.at, err)
		}
		if !bytes.Equal(got, w.data) {
			return false, nil
		}
	}
	return true, nil
}

type piece struct {
	at   int64
	data []byte
}

// fixed is what never changes once it is made.
func (g geometry) fixed() []piece {
	own := make([]byte, g.sector)
	le := binary.LittleEndian
	le.PutUint32(own, 0x0fffff00|mediaFixed)
	for c := 1; c < firstFree; c++ {
		le.PutUint32(own[4*c:], endOfChain)
	}
	dir := func(self, parent int64, entries ...[]byte) piece {
		return piece{g.at(self), g.directory(self, parent, entries...)}
	}
	return []piece{
		{reserved * g.sector, own},
		{(reserved + g.fatSize) * g.sector, own},
		dir(rootDir, 0, entry("EFI", attrDir, efiDir, 0), entry("TROUPE", attrDir, troupeDir, 0)),
		dir(efiDir, rootDir, entry("BOOT", attrDir, bootDir, 0), entry("TROUPE", attrDir, vendorDir, 0)),
		dir(troupeDir, rootDir, entry("A", attrDir, slotADir, 0), entry("B", attrDir, slotBDir, 0), entry("CURRENT", attrFile, currentFile, envSize)),
		{6 * g.sector, g.bootSector()},
		{7 * g.sector, g.fsInfo()},
		{g.sector, g.fsInfo()},
		{0, g.bootSector()},
	}
}

// format makes the file system anew, without files. The boot sector comes last.
func (g geometry) format(d device) error {
	zeros := make([]byte, 1<<20)
	for at, end := int64(0), g.at(firstFree); at < end; at += int64(len(zeros)) {
		if _, err := d.WriteAt(zeros[:min(int64(len(zeros)), end-at)], at); err != nil {
			return fmt.Errorf("making the EFI system partition: %w", err)
		}
	}
	for i, dir := range []int64{bootDir, vendorDir, slotADir, slotBDir} {
		parent := []int64{efiDir, efiDir, troupeDir, troupeDir}[i]
		if _, err := d.WriteAt(g.directory(dir, parent), g.at(dir)); err != nil {
			return fmt.Errorf("making the EFI system partition: %w", err)
		}
	}
	if _, err := d.WriteAt(envBlock(0), g.at(currentFile)); err != nil {
		return fmt.Errorf("making the EFI system partition: %w", err)
	}
	pieces := g.fixed()
	for i, w := range pieces {
		if i == len(pieces)-1 {
			if err := d.Sync(); err != nil {
				return fmt.Errorf("making the EFI system partition: %w", err)
			}
		}
		if _, err := d.WriteAt(w.data, w.at); err != nil {
			return fmt.Errorf("making the EFI system partition: %w", err)
		}
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("making the EFI system partition: %w", err)
	}
	return nil
}

// envSize is the size of GRUB's environment block, in bytes.
const envSize = 1024

// envBlock is GRUB's environment block that names a slot (GRUB manual, "The GRUB environment block"). What differs between
// two of them lies in the first sector.
func envBlock(slot int) []byte {
	b := bytes.Repeat([]byte{'#'}, envSize)
	copy(b, "# GRUB Environment Block\nslot="+slotNames[slot]+"\n")
	return b
}

var errNotWhole = errors.New("is not what it should be")
