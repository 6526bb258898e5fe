package scsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"testing"
)

// cdb6, cdb10, cdb12 and cdb16 are CDBs that have address and length where READ has.
func cdb6(op byte, lba uint32, n byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(op)<<24|lba&0x1fffff)
	return append(b, n, 0)
}

func cdb10(op, flags byte, lba uint32, n uint16) []byte {
	b := binary.BigEndian.AppendUint32([]byte{op, flags}, lba)
	return append(binary.BigEndian.AppendUint16(append(b, 0), n), 0)
}

func cdb12(op, flags byte, lba, n uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte{op, flags}, lba)
	return append(binary.BigEndian.AppendUint32(b, n), 0, 0)
}

func cdb16(op, flags byte, lba uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint64([]byte{op, flags}, lba)
	return append(binary.BigEndian.AppendUint32(b, n), 0, 0)
}

func TestReadGivesBackWhatWasWritten(t *testing.T) {
	for _, k := range []struct {
		name        string
		write, read func(lba uint32, n byte) []byte
	}{
		{"6", func(l uint32, n byte) []byte { return cdb6(opWrite6, l, n) }, func(l uint32, n byte) []byte { return cdb6(opRead6, l, n) }},
		{"10", func(l uint32, n byte) []byte { return cdb10(opWrite10, 0, l, uint16(n)) }, func(l uint32, n byte) []byte { return cdb10(opRead10, 0, l, uint16(n)) }},
		{"12", func(l uint32, n byte) []byte { return cdb12(opWrite12, 0, l, uint32(n)) }, func(l uint32, n byte) []byte { return cdb12(opRead12, 0, l, uint32(n)) }},
		{"16", func(l uint32, n byte) []byte { return cdb16(opWrite16, 0, uint64(l), uint32(n)) }, func(l uint32, n byte) []byte { return cdb16(opRead16, 0, uint64(l), uint32(n)) }},
	} {
		t.Run(k.name, func(t *testing.T) {
			b := newBench(t)
			for i, lba := range []uint32{0, 17, blocksOfBench - 3} {
				data := fill(byte('A'+i), 3*blockSize)
				b.good(k.write(lba, 3), data)
				if got := b.read(b.good(k.read(lba, 3), nil)); !bytes.Equal(got, data) {
					t.Errorf("at %d: other data than was written", lba)
				}
			}
			wantSense(t, b.do(k.write(blocksOfBench-1, 2), fill(0, 2*blockSize)), senseOutOfRange)
			wantSense(t, b.do(k.read(blocksOfBench-1, 2), nil), senseOutOfRange)
			wantSense(t, b.do(k.read(blocksOfBench, 1), nil), senseOutOfRange)
		})
	}
}

func TestZeroBlocks(t *testing.T) {
	b := newBench(t)
	for _, op := range []byte{opRead10, opWrite10} {
		b.good(cdb10(op, 0, 0, 0), nil)
		wantSense(t, b.do(cdb10(op, 0, blocksOfBench, 0), nil), senseOutOfRange)
		wantSense(t, b.do(cdb10(op, 0, 0xffffffff, 0), nil), senseOutOfRange)
	}
	if c := b.good(cdb6(opRead6, 0, 0), nil); c.Read.N != 256*blockSize {
		t.Errorf("READ (6) of length 0 reads %d bytes", c.Read.N)
	}
}

func TestProtectionInformationIsRefused(t *testing.T) {
	b := newBench(t)
	for protect := byte(1); protect < 8; protect++ {
		wantSense(t, b.do(cdb10(opRead10, protect<<5, 0, 1), nil), invalidCDB(1, 7))
		wantSense(t, b.do(cdb16(opWrite16, protect<<5, 0, 1), fill(0, blockSize)), invalidCDB(1, 7))
	}
}

func TestTransferLengthIsBounded(t *testing.T) {
	m := newMemory(MaxRead + MaxTransfer)
	b := benchOn(t, m, Config{Serial: "1"})
	c := &Command{CDB: cdb16(opWrite16, 0, 0, maxBlocks)}
	b.nexus.Prepare(c)
	if c.Done || c.OutLength != MaxTransfer {
		t.Errorf("done %v, takes %d bytes; want %d", c.Done, c.OutLength, MaxTransfer)
	}
	wantSense(t, b.do(cdb16(opWrite16, 0, 0, maxBlocks+1), nil), invalidCDB(10, -1))
	if c := b.good(cdb16(opRead16, 0, 0, MaxRead/blockSize), nil); c.Read.N != MaxRead {
		t.Errorf("reads %d bytes, want %d", c.Read.N, MaxRead)
	}
	wantSense(t, b.do(cdb16(opRead16, 0, 0, MaxRead/blockSize+1), nil), invalidCDB(10, -1))
	wantSense(t, b.do(cdb12(opRead12, 0, 0, MaxRead/blockSize+1), nil), invalidCDB(6, -1))
	wantSense(t, b.do(cdb16(opRead16, 0, 0xffffffffffffffff, 0xffffffff), nil), senseOutOfRange)
}

func TestForceUnitAccessSyncs(t *testing.T) {
	b := newBench(t)
	for _, s := range []struct {
		what string
		cdb  []byte
		want int
	}{
		{"WRITE", cdb10(opWrite10, 0, 0, 1), 0},
		{"WRITE with DPO", cdb10(opWrite10, 0x10, 0, 1), 0},
		{"WRITE with FUA", cdb10(opWrite10, 0x08, 0, 1), 1},
		{"READ with FUA", cdb10(opRead10, 0x08, 0, 1), 2},
		{"SYNCHRONIZE CACHE (10)", cdb10(opSyncCache10, 0, 0, 0), 3},
		{"SYNCHRONIZE CACHE (16)", cdb16(opSyncCache16, 0, 0, 0), 4},
	} {
		b.good(s.cdb, fill(1, blockSize))
		if b.mem.syncs != s.want {
			t.Errorf("after %s: %d syncs, want %d", s.what, b.mem.syncs, s.want)
		}
	}
}

// An initiator that sends less than its CDB says has that written, and no more.
func TestShortDataOut(t *testing.T) {
	for name, cdb := range map[string][]byte{
		"WRITE":            cdb10(opWrite10, 0, 0, 4),
		"WRITE AND VERIFY": cdb10(opWriteVerify10, 2, 0, 4),
		"ORWRITE":          cdb16(opOrWrite16, 0, 0, 4),
	} {
		for _, n := range []int{0, 1, 200, blockSize, blockSize + 100, 4*blockSize - 1} {
			b := newBench(t)
			copy(b.mem.data, fill(0x40, 8*blockSize))
			b.good(cdb, fill(0x41, n))
			want := append(fill(0x41, n), fill(0x40, 8*blockSize-n)...)
			if !bytes.Equal(b.mem.data[:8*blockSize], want) {
				t.Errorf("%s of %d bytes: something else is there", name, n)
			}
		}
	}
}

func TestReadOnly(t *testing.T) {
	m := newMemory(blocksOfBench * blockSize)
	m.readOnly = true
	b := benchOn(t, m, Config{Serial: "1"})
	wantSense(t, b.do(cdb10(opWrite10, 0, 0, 1), fill(1, blockSize)), senseWriteProtected)
	b.good(cdb10(opRead10, 0x08, 0, 1), nil)
	b.good(cdb10(opSyncCache10, 0, 0, 0), nil)
}

func TestMediumErrors(t *testing.T) {
	b := newBench(t)
	for _, k := range []struct {
		err  error
		want Sense
	}{
		{fmt.Errorf("block 3: %w", ErrMedium), senseWriteError.information(5)},
		{fmt.Errorf("writing: %w", syscall.ENOSPC), senseNoSpace.information(5)},
		{errors.New("no such thing"), senseInternal.information(5)},
	} {
		b.mem.err = k.err
		wantSense(t, b.do(cdb10(opWrite10, 0, 5, 1), fill(1, blockSize)), k.want)
	}
	b.mem.err = nil
	c := b.good(cdb10(opRead10, 0, 7, 1), nil)
	b.nexus.ReadFailed(c, ErrMedium)
	wantSense(t, c, senseReadError.information(7))
	if c.Read.N != 0 || c.In != nil {
		t.Error("a failed read has data")
	}
}

func TestReadAllocatesNothing(t *testing.T) {
	b := newBench(t)
	c := &Command{}
	cdb := cdb16(opRead16, 0, 3, 8)
	if n := testing.AllocsPerRun(100, func() {
		c.Reset()
		c.CDB = cdb
		b.nexus.Prepare(c)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	out, cdb := fill(1, 8*blockSize), cdb16(opWrite16, 0, 3, 8)
	if n := testing.AllocsPerRun(100, func() {
		c.Reset()
		c.CDB = cdb
		b.nexus.Prepare(c)
		c.Out = out
		b.nexus.Execute(c)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
