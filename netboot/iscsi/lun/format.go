package lun

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// The file of a Delta, version 2. All numbers are little-endian; offsets and lengths are in bytes.
//
//	   0  header, one page; never changes
//	4096  session, one page: which run of the kernel the live map is of
//	8192  map and live map, sectors of 512: page n has sectors 4n to 4n+3 of the map, then the same of the live map; zeros
//	      are behind the last. The map outlives a loss of power, the live map outlives this process
//	      data, from the next multiple of 1 MiB on: cluster n at n*4096, sparse
//
// A write and the sync after it change the same sector of both maps, and the kernel brings whole pages to storage: so that
// is one page for both.
//
// A header:
//
//	   0    8  "TRPDELTA"
//	   8    4  version, 2
//	  12    4  cluster size, 4096
//	  16    8  size of the medium
//	  24    8  size of the base; 0 where there is none
//	  32   16  seed: random, begins every other checksum of the file, so that no two deltas' parts are mixed up
//	  48    2  length of the base's id
//	  50       the base's id, then zeros
//	4092    4  CRC-32C of the 4092 before
//
// A file that begins with a page of "TRPBEGUN" and zeros is a delta that nobody has finished making: it may be made anew.
//
// A session:
//
//	 0    4  CRC-32C of the seed and the 508 after this
//	 4   64  boot id of the kernel (/proc/sys/kernel/random/boot_id), then zeros
//	68       zeros
//
// A sector of the map or of the live map. It is written whole, as disks write 512 bytes whole or not at all:
//
//	  0    4  CRC-32C of the seed and the 508 after this
//	  4    4  its number, from 0
//	  8    1  number of runs
//	  9    7  zeros
//	 16  384  2 bits for each of 1536 clusters, lowest first: 0 base, 1 delta, 2 zero
//	400   96  runs: 2 bytes first cluster, 2 bytes how many, 8 bytes sum of their data
//	496       zeros
//
// The data of a cluster is on stable storage before a sector says "delta" with its 2 bits. A run says it without that: it
// was written beside its data in one sync. Where the data has the sum, it is there; where not, the sync did not end,
// nobody was told that it had, and the 2 bits hold.
const (
	magic       = "TRPDELTA"
	version     = 2
	clusterSize = 4096
	pageSize    = 4096
	sectorSize  = 512

	sessionOff = pageSize
	mapsOff    = 2 * pageSize
	perPage    = pageSize / (2 * sectorSize) // sectors of each map
	dataUnit   = 1 << 20

	maxID   = 1024
	bootLen = 64

	perWord        = 32 // clusters of a uint64
	wordsPerSector = 48
	perSector      = wordsPerSector * perWord
	maxRuns        = 8
	wordsOff       = 16
	runsOff        = wordsOff + 8*wordsPerSector
	runLen         = 12

	// maxSize is what a medium may have: the files of ext4 end there, and the map in memory then takes 1 GiB.
	maxSize = 16 << 40
)

// What a cluster is. The lowest bit says that it lies in the delta.
const (
	stateBase  = 0
	stateDelta = 1 // on stable storage, and the map says so or may say so with its 2 bits
	stateZero  = 2
	stateNew   = 3 // in the delta, and the map on stable storage does not say so, or in a run; in memory only
)

// ErrFormat says that a delta's file is none that this program can read, though nothing is wrong with it.
var ErrFormat = errors.New("it has a format that this program does not know")

// ErrDelta says that a file that is to be read or written as it is is a delta.
var ErrDelta = errors.New("it is a delta, and no disk without its base")

// qcow2Magic begins the images of QEMU's formats qcow and qcow2 (QEMU, docs/interop/qcow2.txt).
const qcow2Magic = "QFI\xfb"

// refuseFormat fails where a file begins with one of these magics, and so is not the bytes of a disk as they are.
func refuseFormat(f io.ReaderAt, magics ...string) error {
	begin := make([]byte, len(magic))
	if n, err := f.ReadAt(begin, 0); errors.Is(err, io.EOF) {
		begin = begin[:n]
	} else if err != nil {
		return err
	}
	for _, m := range magics {
		switch {
		case !bytes.HasPrefix(begin, []byte(m)):
		case m == magic:
			return ErrDelta
		default:
			return errors.New("it is a qcow2 image, and its bytes are not those of the disk: make a raw one of it (qemu-img convert -O raw)")
		}
	}
	return nil
}

// errDamaged says that a part of a delta's file is not what was written.
var errDamaged = errors.New("it is damaged")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A header is what a delta's file says of itself.
type header struct {
	size, baseSize int64
	seed           [16]byte
	id             string
}

func (h *header) encode() []byte {
	b := make([]byte, 0, pageSize)
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint32(b, clusterSize)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.size))     //nolint:gosec // 0 or more
	b = binary.LittleEndian.AppendUint64(b, uint64(h.baseSize)) //nolint:gosec // 0 or more
	b = append(b, h.seed[:]...)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(h.id))) //nolint:gosec // maxID at most
	b = append(b, h.id...)
	return sealHeader(b[:pageSize])
}

// unfinished is the first page of a delta that is being made.
func unfinished() []byte { return append([]byte("TRPBEGUN"), make([]byte, pageSize-8)...) }

func sealHeader(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[pageSize-4:], crc32.Checksum(b[:pageSize-4], castagnoli))
	return b
}

// parseHeader reads a header from a page.
func parseHeader(b []byte) (*header, error) {
	if len(b) != pageSize || string(b[:8]) != magic {
		return nil, errors.New("it is no delta")
	}
	le := binary.LittleEndian
	if le.Uint32(b[pageSize-4:]) != crc32.Checksum(b[:pageSize-4], castagnoli) {
		return nil, fmt.Errorf("%w: wrong checksum of the header", errDamaged)
	}
	if v, c := le.Uint32(b[8:]), le.Uint32(b[12:]); v != version || c != clusterSize {
		return nil, fmt.Errorf("%w: version %d with clusters of %d bytes, not version %d with %d: open it with the program that made it, or remove it to begin anew without what was written to it",
			ErrFormat, v, c, version, clusterSize)
	}
	size, base, id := le.Uint64(b[16:]), le.Uint64(b[24:]), int(le.Uint16(b[48:]))
	if size == 0 || size > maxSize || size%BlockSize != 0 || base > maxSize || base > size || base%BlockSize != 0 || id > maxID {
		return nil, fmt.Errorf("%w: its size is %d, its base's %d, the length of the base's id %d", errDamaged, size, base, id)
	}
	h := &header{size: int64(size), baseSize: int64(base), id: string(b[50 : 50+id])}
	copy(h.seed[:], b[32:])
	return h, nil
}

// clusters is how many clusters the medium has; the last may be cut short.
func (h *header) clusters() int64 { return roundUp(h.size, clusterSize) / clusterSize }

func (h *header) sectors() int64 { return roundUp(h.clusters(), perSector) / perSector }

// mapsLen is how long the two maps are together.
func (h *header) mapsLen() int64 { return roundUp(h.sectors(), perPage) / perPage * pageSize }

func (h *header) dataOff() int64 { return roundUp(mapsOff+h.mapsLen(), dataUnit) }

// fileSize is how long the file is.
func (h *header) fileSize() int64 { return h.dataOff() + h.clusters()*clusterSize }

// checksum is that of a session or sector.
func (h *header) checksum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(h.seed[:], castagnoli), castagnoli, b[4:])
}

func (h *header) seal(b []byte) { binary.LittleEndian.PutUint32(b, h.checksum(b)) }

func (h *header) sealed(b []byte) bool {
	return binary.LittleEndian.Uint32(b) == h.checksum(b)
}

func (h *header) encodeSession(boot string) []byte {
	b := make([]byte, sectorSize)
	copy(b[4:4+bootLen], boot)
	h.seal(b)
	return b
}

// sessionIs says that the live map is of this run of the kernel. An empty boot id is of none.
func (h *header) sessionIs(b []byte, boot string) bool {
	return boot != "" && len(boot) <= bootLen && h.sealed(b) && bytes.Equal(b, h.encodeSession(boot))
}

// mapAt is where sector i of the map is.
func mapAt(i int64) int64 { return mapsOff + i/perPage*pageSize + i%perPage*sectorSize }

// liveAt is where sector i of the live map is.
func liveAt(i int64) int64 { return mapAt(i) + perPage*sectorSize }

// A sector is a sector of a map.
type sector struct {
	words [wordsPerSector]uint64
	runs  []run
}

// A run is some clusters of a sector, one after the other, whose data has this sum.
type run struct {
	first, n int // first counts from the sector's begin
	sum      uint64
}

func (r run) has(i int) bool { return i >= r.first && i < r.first+r.n }

func (s *sector) state(i int) uint64 { return s.words[i/perWord] >> (2 * (i % perWord)) & 3 }

func (s *sector) set(i int, state uint64) {
	shift := 2 * (i % perWord)
	s.words[i/perWord] = s.words[i/perWord]&^(3<<shift) | state<<shift
}

// pending says that cluster i is in a run.
func (s *sector) pending(i int) bool {
	for _, r := range s.runs {
		if r.has(i) {
			return true
		}
	}
	return false
}

// encodeSector appends sector number i to b. What is new is written as what it is in effect: delta.
func (h *header) encodeSector(b []byte, i int64, s *sector) []byte {
	from := len(b)
	b = append(b, make([]byte, sectorSize)...)
	out := b[from:]
	le := binary.LittleEndian
	le.PutUint32(out[4:], uint32(i)) //nolint:gosec // maxSize has far fewer
	out[8] = byte(len(s.runs))       //nolint:gosec // maxRuns at most
	for w, word := range s.words {
		le.PutUint64(out[wordsOff+8*w:], settled(word))
	}
	for r, run := range s.runs {
		at := out[runsOff+runLen*r:]
		le.PutUint16(at, uint16(run.first)) //nolint:gosec // perSector at most
		le.PutUint16(at[2:], uint16(run.n)) //nolint:gosec // perSector at most
		le.PutUint64(at[4:], run.sum)
	}
	h.seal(out)
	return b
}

// parseSector reads sector number i.
func (h *header) parseSector(b []byte, i int64) (*sector, error) {
	le := binary.LittleEndian
	if !h.sealed(b) || int64(le.Uint32(b[4:])) != i || int(b[8]) > maxRuns {
		return nil, fmt.Errorf("%w: wrong checksum of map sector %d, which has the %d bytes from %d on", errDamaged, i, perSector*clusterSize, i*perSector*clusterSize)
	}
	s := &sector{}
	for w := range s.words {
		s.words[w] = le.Uint64(b[wordsOff+8*w:])
		if s.words[w] != settled(s.words[w]) {
			return nil, fmt.Errorf("%w: map sector %d has a cluster of no known kind", errDamaged, i)
		}
	}
	have := min(perSector, int(h.clusters()-i*perSector))
	for r := range int(b[8]) {
		at := b[runsOff+runLen*r:]
		run := run{int(le.Uint16(at)), int(le.Uint16(at[2:])), le.Uint64(at[4:])}
		if run.n == 0 || run.first+run.n > have {
			return nil, fmt.Errorf("%w: map sector %d has a run of %d clusters from %d on, of %d", errDamaged, i, run.n, run.first, have)
		}
		s.runs = append(s.runs, run)
	}
	for c := have; c < perSector; c++ {
		if s.state(c) != stateBase {
			return nil, fmt.Errorf("%w: map sector %d has a cluster behind the end", errDamaged, i)
		}
	}
	return s, nil
}

// sum is what a run says of its data: two checksums of 32 bits with polynomials of their own, which are computed at the
// speed of memory.
func sum(s uint64, b []byte) uint64 {
	return uint64(crc32.Update(uint32(s>>32), castagnoli, b))<<32 | uint64(crc32.Update(uint32(s), crc32.IEEETable, b)) //nolint:gosec // halves
}
