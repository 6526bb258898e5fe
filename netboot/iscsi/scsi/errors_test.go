package scsi

import (
	"errors"
	"slices"
	"sync"
	"syscall"
	"testing"
)

// TestEachCommandTellsErrorsOfTheMedium has the medium fail under each command that touches it.
func TestEachCommandTellsErrorsOfTheMedium(t *testing.T) {
	block, two := fill(1, blockSize), fill(1, 2*blockSize)
	for _, k := range []struct {
		name string
		cdb  []byte
		out  []byte
		want Sense
	}{
		{"WRITE", cdb10(opWrite10, 0, 5, 1), block, senseWriteError.information(5)},
		{"READ with FUA", cdb10(opRead10, 0x08, 5, 1), nil, senseReadError.information(5)},
		{"SYNCHRONIZE CACHE", cdb10(opSyncCache10, 0, 0, 0), nil, senseWriteError},
		{"START STOP UNIT", []byte{opStartStop, 0, 0, 0, 0, 0}, nil, senseWriteError},
		{"VERIFY", cdb10(opVerify10, 0, 5, 1), nil, senseReadError.information(5)},
		{"WRITE AND VERIFY", cdb10(opWriteVerify10, 0, 5, 1), block, senseWriteError.information(5)},
		{"WRITE SAME", cdb10(opWriteSame10, 0, 5, 1), block, senseWriteError.information(5)},
		{"WRITE SAME of zeros", cdb10(opWriteSame10, 0, 5, 1), make([]byte, blockSize), senseWriteError.information(5)},
		{"UNMAP", unmap(24), ranges(extent{5, 1}), senseWriteError.information(5)},
		{"COMPARE AND WRITE", compareAndWrite(0, 5, 1), two, senseReadError.information(5)},
		{"ORWRITE", cdb16(opOrWrite16, 0, 5, 1), block, senseReadError.information(5)},
	} {
		t.Run(k.name, func(t *testing.T) {
			b := newBench(t)
			b.mem.err = errors.Join(ErrMedium, errors.New("sector 10"))
			wantSense(t, b.do(k.cdb, k.out), k.want)
			b.mem.err = nil
			b.good(opTestUnitReady6(), nil)
		})
	}
}

// stubborn is a medium that cannot be written, and says so only then.
type stubborn struct {
	*memory
	writes, syncs error
}

func (s stubborn) WriteAt(p []byte, off int64) (int, error) {
	if s.writes != nil {
		return 0, s.writes
	}
	return s.memory.WriteAt(p, off)
}

func (s stubborn) Sync() error { return s.syncs }

func TestWhatFailsAfterReading(t *testing.T) {
	for _, k := range []struct {
		name string
		m    stubborn
		cdb  []byte
		out  []byte
		want Sense
	}{
		{"COMPARE AND WRITE without space", stubborn{writes: syscall.ENOSPC}, compareAndWrite(0, 5, 1), fill(0, 1024), senseNoSpace.information(5)},
		{"ORWRITE without space", stubborn{writes: syscall.EDQUOT}, cdb16(opOrWrite16, 0, 5, 1), fill(1, 512), senseNoSpace.information(5)},
		{"WRITE with FUA", stubborn{syncs: ErrMedium}, cdb10(opWrite10, 0x08, 5, 1), fill(1, 512), senseWriteError.information(5)},
		{"READ with FUA without space", stubborn{syncs: errors.Join(ErrMedium, syscall.ENOSPC)}, cdb10(opRead10, 0x08, 5, 1), nil, senseReadError.information(5)},
		{"COMPARE AND WRITE with FUA", stubborn{syncs: ErrMedium}, compareAndWrite(0x08, 5, 1), fill(0, 1024), senseWriteError.information(5)},
		{"WRITE AND VERIFY without space", stubborn{writes: syscall.ENOSPC}, cdb16(opWriteVerify16, 0, 5, 1), fill(1, 512), senseNoSpace.information(5)},
	} {
		t.Run(k.name, func(t *testing.T) {
			k.m.memory = newMemory(blocksOfBench * blockSize)
			u, err := NewUnit(k.m, Config{Serial: "1"})
			if err != nil {
				t.Fatal(err)
			}
			if u.Medium() != Medium(k.m) {
				t.Error("another medium")
			}
			n := u.Attach(Port{Name: "a"}, func() {})
			wantSense(t, do(n, opTestUnitReady6(), nil), attentionPowerOn)
			wantSense(t, do(n, k.cdb, k.out), k.want)
		})
	}
}

func TestExecuteWithoutPrepare(t *testing.T) {
	b := newBench(t)
	c := &Command{CDB: cdb10(opSyncCache10, 0, 0, 0)}
	b.nexus.Execute(c)
	wantGood(t, c)
	if b.mem.syncs != 1 {
		t.Error("not synced")
	}
	c = &Command{CDB: []byte{0xff, 0, 0, 0, 0, 0}}
	b.nexus.Execute(c)
	wantSense(t, c, senseInvalidOpcode)
}

// A span that goes around the end of the stripes has all of its own, and no others.
func TestStripes(t *testing.T) {
	for _, k := range []struct {
		lba, blocks uint64
		want        []int
	}{
		{0, 0, nil},
		{0, 1, []int{0}},
		{stripeBlocks - 1, 2, []int{0, 1}},
		{63 * stripeBlocks, 2 * stripeBlocks, []int{0, 63}},
		{(64*5 + 62) * stripeBlocks, 3 * stripeBlocks, []int{0, 62, 63}},
	} {
		var s stripes
		s.lock(spanOf(k.lba, k.blocks))
		var got []int
		for i := range s {
			if !s[i].TryLock() {
				got = append(got, i)
			}
		}
		if !slices.Equal(got, k.want) {
			t.Errorf("%d blocks at %d: stripes %v, want %v", k.blocks, k.lba, got, k.want)
		}
	}
	if p := spanOf(7, 1<<30); p.count != stripeCount {
		t.Errorf("%d stripes for a large span", p.count)
	}
}

// Commands over overlapping spans around the end do not wait for one another forever.
func TestStripesDoNotDeadlock(t *testing.T) {
	var s stripes
	var wg sync.WaitGroup
	for w := range uint64(4) {
		wg.Go(func() {
			for i := range uint64(2000) {
				p := spanOf((60+w*2+i%8)*stripeBlocks, 6*stripeBlocks)
				if (i+w)%2 == 0 {
					s.lock(p)
					s.unlock(p)
				} else {
					s.share(p)
					s.unshare(p)
				}
			}
		})
	}
	wg.Wait()
}
