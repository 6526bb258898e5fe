package scsi

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func unmap(length uint16) []byte { return cdb10(opUnmap, 0, 0, length) }

// ranges is the parameter list of an UNMAP.
func ranges(extents ...extent) []byte {
	b := make([]byte, unmapHeader)
	for _, e := range extents {
		b = binary.BigEndian.AppendUint64(b, e.lba)
		b = binary.BigEndian.AppendUint32(b, uint32(e.blocks))
		b = append(b, 0, 0, 0, 0)
	}
	binary.BigEndian.PutUint16(b, uint16(len(b)-2))
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-8))
	return b
}

func (b *bench) unmap(extents ...extent) *Command {
	b.Helper()
	list := ranges(extents...)
	return b.do(unmap(uint16(len(list))), list)
}

func TestUnmap(t *testing.T) {
	b := newBench(t)
	b.good(cdb10(opWrite10, 0, 0, 64), fill('A', 64*blockSize))
	wantGood(t, b.unmap(extent{0, 8}, extent{17, 1}, extent{5, 0}, extent{blocksOfBench, 0}))
	want := fill('A', 64*blockSize)
	clear(want[:8*blockSize])
	clear(want[17*blockSize : 18*blockSize])
	if !bytes.Equal(b.mem.data[:64*blockSize], want) {
		t.Error("other blocks than those read as zeros")
	}
	if b.mem.mapped[0] || !b.mem.mapped[1] || !b.mem.mapped[2] {
		t.Errorf("mapped: %v", b.mem.mapped[:4])
	}
	b.good(unmap(0), nil)
	b.good(unmap(8), ranges())
}

func TestUnmapRefusals(t *testing.T) {
	b := newBench(t)
	b.good(cdb10(opWrite10, 0, 0, 8), fill('A', 8*blockSize))
	anchor := unmap(24)
	anchor[1] = 1
	wantSense(t, b.do(anchor, ranges(extent{0, 1})), invalidCDB(1, 0))
	wantSense(t, b.do(unmap(7), make([]byte, 7)), senseListLength)
	wantSense(t, b.do(unmap(24), make([]byte, 4)), senseListLength)
	wantSense(t, b.unmap(extent{0, 1}, extent{blocksOfBench, 1}), senseOutOfRange)
	wantSense(t, b.unmap(extent{0, 1}, extent{1<<64 - 1, 1}), senseOutOfRange)
	wantSense(t, b.unmap(extent{0, 1}, extent{1, 0xffffffff}), senseOutOfRange)
	wantSense(t, b.unmap(make([]extent, maxUnmapRanges+1)...), invalidParameter(2, -1))
	if b.mem.data[0] != 'A' {
		t.Error("a list that is refused unmaps")
	}
	// A last range that is cut off is none.
	list := ranges(extent{0, 1}, extent{1, 1})
	b.good(unmap(uint16(len(list)-1)), list[:len(list)-1])
	if b.mem.data[0] != 0 || b.mem.data[blockSize] != 'A' {
		t.Error("not the first range alone is unmapped")
	}
}

func TestUnmapIsBounded(t *testing.T) {
	u, err := NewUnit(vast{newMemory(blockSize)}, Config{Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	n := u.Attach(Port{Name: "a"}, func() {})
	wantSense(t, do(n, opTestUnitReady6(), nil), attentionPowerOn)
	list := ranges(extent{0, maxUnmap}, extent{maxUnmap, 1})
	wantSense(t, do(n, unmap(uint16(len(list))), list), invalidParameter(unmapHeader+16+8, -1))
}

func TestWriteSame(t *testing.T) {
	for name, cdb := range map[string]func(flags byte, lba uint32, n uint16) []byte{
		"10": func(f byte, l uint32, n uint16) []byte { return cdb10(opWriteSame10, f, l, n) },
		"16": func(f byte, l uint32, n uint16) []byte { return cdb16(opWriteSame16, f, uint64(l), uint32(n)) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			block := make([]byte, blockSize)
			for i := range block {
				block[i] = byte(i)
			}
			const n = chunk/blockSize + 5
			for _, flags := range []byte{0, sameUnmap} {
				clear(b.mem.data)
				b.good(cdb(flags, 3, n), block)
				if got := b.mem.data[3*blockSize : (3+n)*blockSize]; !bytes.Equal(got, bytes.Repeat(block, n)) {
					t.Errorf("flags %#x: other data", flags)
				}
				if !bytes.Equal(b.mem.data[:3*blockSize], make([]byte, 3*blockSize)) || b.mem.data[(3+n)*blockSize+1] != 0 {
					t.Errorf("flags %#x: other blocks", flags)
				}
			}
			b.good(cdb(0, 0, 8), make([]byte, blockSize))
			if !b.mem.mapped[0] {
				t.Error("unmapped without being asked to")
			}
			b.good(cdb(sameUnmap, 0, 8), make([]byte, blockSize))
			if b.mem.mapped[0] || !b.mem.mapped[1] {
				t.Errorf("mapped: %v", b.mem.mapped[:2])
			}

			last := cdb(0, 0, 1)
			lengthAt := uint16(7)
			if len(last) == 16 {
				lengthAt = 10
			}
			wantSense(t, b.do(cdb(0, 0, 0), block), invalidCDB(lengthAt, -1))
			wantSense(t, b.do(cdb(sameAnchor, 0, 1), block), invalidCDB(1, 4))
			wantSense(t, b.do(cdb(sameAnchor|sameUnmap, 0, 1), block), invalidCDB(1, 4))
			wantSense(t, b.do(cdb(2, 0, 1), block), invalidCDB(1, 2))
			wantSense(t, b.do(cdb(0x20, 0, 1), block), invalidCDB(1, 7))
			wantSense(t, b.do(cdb(0, blocksOfBench, 1), block), senseOutOfRange)
			wantSense(t, b.do(cdb(0, 0, 1), block[:256]), senseInformationUnit)
			wantSense(t, b.do(cdb(0, 0, 1), fill(0, 1024)), senseInformationUnit)
		})
	}
}

func TestWriteSameWithoutData(t *testing.T) {
	b := newBench(t)
	b.good(cdb10(opWrite10, 0, 0, 8), fill('A', 8*blockSize))
	b.good(cdb16(opWriteSame16, sameNoData|sameUnmap, 0, 8), nil)
	if b.mem.data[0] != 0 || b.mem.mapped[0] {
		t.Error("not unmapped")
	}
	wantSense(t, b.do(cdb16(opWriteSame16, sameNoData, 0, 8), fill(0, 512)), senseInformationUnit)
	wantSense(t, b.do(cdb10(opWriteSame10, sameNoData, 0, 8), nil), invalidCDB(1, 0))
	wantSense(t, b.do(cdb16(opWriteSame16, sameNoData, 0, 1<<31), nil), senseOutOfRange)
}

func lbaStatus(lba uint64, allocation uint32) []byte {
	return cdb16(opServiceActionIn, actionLBAStatus, lba, allocation)
}

func TestGetLBAStatus(t *testing.T) {
	b := newBench(t)
	b.good(cdb10(opWrite10, 0, 8, 16), fill('A', 16*blockSize))
	for _, k := range []struct {
		lba        uint64
		allocation uint32
		want       string
	}{
		{0, 24, "00000014 00000000 0000000000000000 00000008 01000000"},
		{3, 24, "00000014 00000000 0000000000000003 00000005 01000000"},
		{9, 40, "00000024 00000000 0000000000000009 0000000f 00000000 0000000000000018 00001feb 01000000"},
		{9, 12, "00000014 00000000 00000000"},
		{blocksOfBench - 1, 1 << 31, "00000014 00000000 0000000000002002 00000001 01000000"},
	} {
		if got := b.good(lbaStatus(k.lba, k.allocation), nil).In; !bytes.Equal(got, unhex(t, k.want)) {
			t.Errorf("from %d into %d bytes: % x", k.lba, k.allocation, got)
		}
	}
	for _, lba := range []uint64{blocksOfBench, blocksOfBench + 1, 1 << 63, 1<<64 - 1} {
		wantSense(t, b.do(lbaStatus(lba, 24), nil), senseOutOfRange)
	}
}

// patches is a medium that is mapped in every second piece of 700 bytes, so that no piece is of whole blocks.
type patches struct{ *memory }

func (patches) Mapped(off int64) (int64, bool) { return 700 - off%700, off/700%2 == 0 }

func TestGetLBAStatusIsBoundedAndMovesOn(t *testing.T) {
	u, err := NewUnit(patches{newMemory(blocksOfBench * blockSize)}, Config{Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	n := u.Attach(Port{Name: "a"}, func() {})
	wantSense(t, do(n, opTestUnitReady6(), nil), attentionPowerOn)
	c := do(n, lbaStatus(0, 1<<31), nil)
	wantGood(t, c)
	if len(c.In) != 8+16*maxExtents {
		t.Fatalf("%d bytes", len(c.In))
	}
	at := uint64(0)
	for b := c.In[8:]; len(b) > 0; b = b[16:] {
		blocks := uint64(binary.BigEndian.Uint32(b[8:]))
		if binary.BigEndian.Uint64(b) != at || blocks == 0 {
			t.Fatalf("at %d: % x", at, b[:16])
		}
		at += blocks
	}
}

func TestWriteSameIsBounded(t *testing.T) {
	u, err := NewUnit(vast{newMemory(blockSize)}, Config{Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	n := u.Attach(Port{Name: "a"}, func() {})
	wantSense(t, do(n, opTestUnitReady6(), nil), attentionPowerOn)
	wantSense(t, do(n, cdb16(opWriteSame16, sameUnmap, 0, maxWriteSame+1), make([]byte, 512)), invalidCDB(10, -1))
}
