package scsi

import (
	"bytes"
	"encoding/binary"
	"sync"
	"testing"
)

func compareAndWrite(flags byte, lba uint64, blocks byte) []byte {
	return append(binary.BigEndian.AppendUint64([]byte{opCompareAndWrite, flags}, lba), 0, 0, 0, blocks, 0, 0)
}

func TestCompareAndWrite(t *testing.T) {
	b := newBench(t)
	old, fresh := fill('A', 3*blockSize), fill('B', 3*blockSize)
	b.good(cdb10(opWrite10, 0, 7, 3), old)

	wrong := bytes.Clone(old)
	wrong[blockSize+5] = 'x'
	wantSense(t, b.do(compareAndWrite(0, 7, 3), append(wrong, fresh...)), senseMiscompare.information(blockSize+5))
	if got := b.read(b.good(cdb10(opRead10, 0, 7, 3), nil)); !bytes.Equal(got, old) {
		t.Error("a miscompare wrote")
	}
	b.good(compareAndWrite(0, 7, 3), append(bytes.Clone(old), fresh...))
	if got := b.read(b.good(cdb10(opRead10, 0, 7, 3), nil)); !bytes.Equal(got, fresh) {
		t.Error("not written")
	}
	if b.mem.syncs != 0 {
		t.Error("synced without FUA")
	}
	b.good(compareAndWrite(0x08, 7, 3), append(bytes.Clone(fresh), old...))
	if b.mem.syncs != 1 {
		t.Error("not synced with FUA")
	}
}

func TestCompareAndWriteRefusals(t *testing.T) {
	b := newBench(t)
	b.good(compareAndWrite(0, 0, 0), nil)
	wantSense(t, b.do(compareAndWrite(0x20, 0, 1), fill(0, 1024)), invalidCDB(1, 7))
	wantSense(t, b.do(compareAndWrite(0, blocksOfBench, 1), fill(0, 1024)), senseOutOfRange)
	wantSense(t, b.do(compareAndWrite(0, 1<<63, 1), fill(0, 1024)), senseOutOfRange)
	for _, n := range []int{0, 512, 2048} {
		wantSense(t, b.do(compareAndWrite(0, 0, 1), fill(0, n)), invalidCDB(13, -1))
	}
	wantSense(t, b.do(compareAndWrite(0, 0, 0), fill(0, 512*512)), invalidCDB(13, -1))
	c := &Command{CDB: compareAndWrite(0, 0, 1), Expected: 1024}
	b.nexus.Prepare(c)
	c.Out = make([]byte, 1023)
	b.nexus.Execute(c)
	wantSense(t, c, senseInformationUnit)
}

// Each goroutine adds one to a counter on the medium, in a loop of reading, comparing and writing, while others write to
// the stripe beside it. None is lost.
func TestCompareAndWriteIsAtomic(t *testing.T) {
	b := newBench(t)
	const workers, rounds = 4, 50
	var wg sync.WaitGroup
	for w := range workers {
		n := b.attach("iqn.2026-11.dev.troupe:" + string(rune('b'+w)) + ",i,0x1")
		wg.Go(func() {
			for done := 0; done < rounds; {
				block := make([]byte, 2*blockSize)
				if _, err := b.mem.ReadAt(block[:blockSize], 0); err != nil {
					t.Error(err)
					return
				}
				copy(block[blockSize:], block[:blockSize])
				binary.BigEndian.PutUint64(block[blockSize:], binary.BigEndian.Uint64(block)+1)
				if c := do(n, compareAndWrite(0, 0, 1), block); c.Status == Good {
					done++
				} else if c.Sense.Key != Miscompare {
					t.Errorf("sense %+v", c.Sense)
					return
				}
				do(n, cdb10(opWrite10, 0, 1, 1), block[:blockSize])
			}
		})
	}
	wg.Wait()
	if got := binary.BigEndian.Uint64(b.mem.data); got != workers*rounds {
		t.Errorf("counted to %d, want %d", got, workers*rounds)
	}
}

// Many ORWRITEs of one bit each, at once: all bits are there.
func TestOrWriteIsAtomic(t *testing.T) {
	b := newBench(t)
	var wg sync.WaitGroup
	for bit := range 64 {
		wg.Go(func() {
			block := make([]byte, blockSize)
			block[bit/8] = 1 << (bit % 8)
			do(b.nexus, cdb16(opOrWrite16, 0, 3, 1), block)
		})
	}
	wg.Wait()
	if got := binary.BigEndian.Uint64(b.mem.data[3*blockSize:]); got != 1<<64-1 {
		t.Errorf("bits %#x", got)
	}
}

func TestOrWrite(t *testing.T) {
	b := newBench(t)
	const n = 2*chunk/blockSize + 3
	b.good(cdb16(opWrite16, 0, 5, n), fill(0xa5, n*blockSize))
	b.good(cdb16(opOrWrite16, 0x08, 5, n), fill(0x5a, n*blockSize))
	if got := b.read(b.good(cdb16(opRead16, 0, 5, n), nil)); !bytes.Equal(got, fill(0xff, n*blockSize)) {
		t.Error("not all bits are set")
	}
	if b.mem.data[5*blockSize-1] != 0 || b.mem.data[(5+n)*blockSize] != 0 {
		t.Error("other blocks are written")
	}
	if b.mem.syncs != 1 {
		t.Error("not synced with FUA")
	}
	b.good(cdb16(opOrWrite16, 0, 0, 0), nil)
	wantSense(t, b.do(cdb16(opOrWrite16, 0, blocksOfBench, 0), nil), senseOutOfRange)
	wantSense(t, b.do(cdb16(opOrWrite16, 0x20, 0, 1), fill(1, 512)), invalidCDB(1, 7))
}

// verifies are the CDBs of VERIFY in their three lengths.
var verifies = map[string]func(check byte, lba uint32, n uint16) []byte{
	"10": func(k byte, l uint32, n uint16) []byte { return cdb10(opVerify10, k<<1, l, n) },
	"12": func(k byte, l uint32, n uint16) []byte { return cdb12(opVerify12, k<<1, l, uint32(n)) },
	"16": func(k byte, l uint32, n uint16) []byte { return cdb16(opVerify16, k<<1, uint64(l), uint32(n)) },
}

func TestVerify(t *testing.T) {
	for name, verify := range verifies {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			const n = chunk/blockSize + 9
			data := fill('A', n*blockSize)
			b.good(cdb16(opWrite16, 0, 2, n), data)
			b.good(verify(compareNothing, 2, n), nil)
			b.good(verify(compareAll, 2, n), data)
			b.good(verify(compareOne, 2, n), data[:blockSize])

			data[chunk+700] = 'x'
			wantSense(t, b.do(verify(compareAll, 2, n), data), senseMiscompare.information(2+(chunk+700)/blockSize))
			b.good(verify(compareAll, 2, n), data[:chunk])
			b.mem.data[(2+n)*blockSize-1] = 'y'
			wantSense(t, b.do(verify(compareOne, 2, n), data[:blockSize]), senseMiscompare.information(2+n-1))

			b.good(verify(compareAll, 0, 0), nil)
			wantSense(t, b.do(verify(2, 0, 1), fill(0, blockSize)), invalidCDB(1, 2))
			wantSense(t, b.do(verify(compareAll, blocksOfBench, 0), nil), senseOutOfRange)
			wantSense(t, b.do(verify(0x10, 0, 1), nil), invalidCDB(1, 7))
			wantSense(t, b.do(verify(compareOne, 0, 1), fill(0, 100)), senseInformationUnit)

			b.mem.err = ErrMedium
			wantSense(t, b.do(verify(compareNothing, 2, n), nil), senseReadError.information(2))
		})
	}
}

func TestVerifyIsBounded(t *testing.T) {
	u, err := NewUnit(vast{newMemory(blockSize)}, Config{Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	n := u.Attach(Port{Name: "a"}, func() {})
	wantSense(t, do(n, opTestUnitReady6(), nil), attentionPowerOn)
	wantSense(t, do(n, cdb16(opVerify16, 0, 0, maxVerify+1), nil), invalidCDB(10, -1))
	wantSense(t, do(n, cdb16(opVerify16, 2, 0, maxBlocks+1), nil), invalidCDB(10, -1))
}

func TestWriteAndVerify(t *testing.T) {
	for name, cdb := range map[string]func(check byte, lba uint32, n uint16) []byte{
		"10": func(k byte, l uint32, n uint16) []byte { return cdb10(opWriteVerify10, k<<1, l, n) },
		"12": func(k byte, l uint32, n uint16) []byte { return cdb12(opWriteVerify12, k<<1, l, uint32(n)) },
		"16": func(k byte, l uint32, n uint16) []byte { return cdb16(opWriteVerify16, k<<1, uint64(l), uint32(n)) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			for check := range byte(2) {
				data := fill('A'+check, 3*blockSize)
				b.good(cdb(check, 4, 3), data)
				if got := b.read(b.good(cdb10(opRead10, 0, 4, 3), nil)); !bytes.Equal(got, data) {
					t.Error("not written")
				}
			}
			b.good(cdb(1, 0, 0), nil)
			wantSense(t, b.do(cdb(2, 0, 1), fill(0, blockSize)), invalidCDB(1, 2))
			wantSense(t, b.do(cdb(3, 0, 1), fill(0, blockSize)), invalidCDB(1, 2))
			wantSense(t, b.do(cdb(0, blocksOfBench, 1), fill(0, blockSize)), senseOutOfRange)
			wantSense(t, b.do(cdb(0x20, 0, 1), fill(0, blockSize)), invalidCDB(1, 7))
		})
	}
}
