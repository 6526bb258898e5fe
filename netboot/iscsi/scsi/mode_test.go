package scsi

import (
	"bytes"
	"testing"
)

func modeSense6(flags, page, subpage, allocation byte) []byte {
	return []byte{opModeSense6, flags, page, subpage, allocation, 0}
}

// modeSelect sends the pages after a header without a block descriptor.
func (b *bench) modeSelect(n *Nexus, pages ...byte) *Command {
	b.Helper()
	list := append(make([]byte, modeHeader6), pages...)
	return do(n, []byte{opModeSelect6, 0x10, 0, 0, byte(len(list)), 0}, list)
}

var (
	caching = []byte{pageCaching, 0x12, cachingWCE, 19: 0}
	control = []byte{pageControl, 0x0a, 0, 0x10, 0, 0, 0, 0, 0xff, 0xff, 0, 0}
)

// with gives the page with one byte changed.
func with(page []byte, at int, v byte) []byte {
	p := bytes.Clone(page)
	p[at] = v
	return p
}

func TestModeSense(t *testing.T) {
	b := newBench(t)
	recovery, exceptions := []byte{1, 0x0a, 11: 0}, []byte{0x1c, 0x0a, 8, 11: 0}
	descriptor := unhex(t, "00002003 00000200")
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for _, k := range []struct {
		name string
		cdb  []byte
		want []byte
	}{
		{"all", modeSense6(0, 0x3f, 0, 255), join([]byte{67, 0, 0x10, 8}, descriptor, recovery, caching, control, exceptions)},
		{"all with subpages", modeSense6(8, 0x3f, 0xff, 255), join([]byte{59, 0, 0x10, 0}, recovery, caching, control, exceptions)},
		{"cut", modeSense6(0, 0x3f, 0, 4), []byte{67, 0, 0x10, 8}},
		{"caching", modeSense6(8, 8, 0, 255), join([]byte{23, 0, 0x10, 0}, caching)},
		{"changeable", modeSense6(8, 0x40|0x0a, 0, 255), join([]byte{15, 0, 0x10, 0}, []byte{0x0a, 0x0a, 4, 0, 8, 11: 0})},
		{"default", modeSense6(8, 0x80|0x0a, 0, 255), join([]byte{15, 0, 0x10, 0}, control)},
		{"10", cdb10(opModeSense10, 0x08, 0x0a000000, 255), join([]byte{0, 18, 0, 0x10, 0, 0, 0, 0}, control)},
		{"10 with a long descriptor", cdb10(opModeSense10, 0x10, 0x0a000000, 255), join([]byte{0, 34, 0, 0x10, 1, 0, 0, 16}, unhex(t, "0000000000002003 00000000 00000200"), control)},
	} {
		t.Run(k.name, func(t *testing.T) {
			if got := b.good(k.cdb, nil).In; !bytes.Equal(got, k.want) {
				t.Errorf("\n got % x\nwant % x", got, k.want)
			}
		})
	}
	wantSense(t, b.do(modeSense6(0, 0x05, 0, 255), nil), invalidCDB(2, 5))
	wantSense(t, b.do(modeSense6(0, 0x0a, 1, 255), nil), invalidCDB(2, 5))
	wantSense(t, b.do(modeSense6(0, 0xc0|0x0a, 0, 255), nil), senseSavingParameters)
}

func TestSoftwareWriteProtect(t *testing.T) {
	b := newBench(t)
	other := b.attach("iqn.2026-11.dev.troupe:b,i,0x1")
	wantGood(t, b.modeSelect(b.nexus, with(control, 4, controlSWP)...))
	wantSense(t, do(other, opTestUnitReady6(), nil), attentionModeChanged)
	b.good(opTestUnitReady6(), nil)

	if got := b.good(modeSense6(8, 8, 0, 4), nil).In[2]; got != 0x90 {
		t.Errorf("device-specific parameter %#x", got)
	}
	wantSense(t, do(other, cdb10(opWrite10, 0, 0, 1), fill(1, blockSize)), senseSoftProtected)
	b.good(cdb10(opRead10, 0, 0, 1), nil)

	wantGood(t, b.modeSelect(b.nexus, control...))
	wantSense(t, do(other, opTestUnitReady6(), nil), attentionModeChanged)
	wantGood(t, do(other, cdb10(opWrite10, 0, 0, 1), fill(1, blockSize)))
}

func TestResetEndsWriteProtect(t *testing.T) {
	b := newBench(t)
	wantGood(t, b.modeSelect(b.nexus, with(control, 4, controlSWP)...))
	b.unit.Reset()
	wantSense(t, b.do(opTestUnitReady6(), nil), attentionReset)
	b.good(cdb10(opWrite10, 0, 0, 1), fill(1, blockSize))
}

func TestDescriptorSense(t *testing.T) {
	b := newBench(t)
	wantGood(t, b.modeSelect(b.nexus, with(control, 2, controlDSense)...))
	wantSense(t, b.do(cdb16(opRead16, 0, 1<<63, 1), nil), descriptors(senseOutOfRange))
	wantSense(t, b.do([]byte{0xff, 0, 0, 0, 0, 0}, nil), descriptors(senseInvalidOpcode))
	c := b.good(cdb10(opRead10, 0, 0, 1), nil)
	b.nexus.ReadFailed(c, ErrMedium)
	wantSense(t, c, descriptors(senseReadError.information(0)))
}

func TestWithoutWriteCacheEachWriteSyncs(t *testing.T) {
	b := newBench(t)
	wantGood(t, b.modeSelect(b.nexus, with(caching, 2, 0)...))
	before := b.mem.syncs
	if before == 0 {
		t.Error("what was in the cache is not synced")
	}
	b.good(cdb10(opWrite10, 0, 0, 1), fill(1, blockSize))
	b.good(cdb10(opWriteSame10, 0, 0, 1), fill(1, blockSize))
	if got := b.mem.syncs - before; got != 2 {
		t.Errorf("%d syncs for 2 writes", got)
	}
}

func TestModeSelectRefusals(t *testing.T) {
	b := newBench(t)
	for _, k := range []struct {
		name string
		c    *Command
		want Sense
	}{
		{"saving", b.do([]byte{opModeSelect6, 0x11, 0, 0, 16, 0}, make([]byte, 16)), invalidCDB(1, 0)},
		{"reverting", b.do([]byte{opModeSelect6, 0x12, 0, 0, 16, 0}, make([]byte, 16)), invalidCDB(1, 1)},
		{"another format", b.do([]byte{opModeSelect6, 0, 0, 0, 16, 0}, make([]byte, 16)), invalidCDB(1, 4)},
		{"cut header", b.do([]byte{opModeSelect6, 0x10, 0, 0, 3, 0}, make([]byte, 3)), senseListLength},
		{"unknown page", b.modeSelect(b.nexus, 0x05, 0), invalidParameter(4, 5)},
		{"subpage", b.modeSelect(b.nexus, 0x4a, 0x01), invalidParameter(4, 6)},
		{"length of a page", b.modeSelect(b.nexus, pageControl, 0x0b), invalidParameter(5, -1)},
		{"cut page", b.modeSelect(b.nexus, control[:11]...), senseListLength},
		{"cut page header", b.modeSelect(b.nexus, pageControl), senseListLength},
		{"what cannot be changed", b.modeSelect(b.nexus, with(control, 3, 0x30)...), invalidParameter(7, 5)},
		{"second page", b.modeSelect(b.nexus, append(bytes.Clone(caching), with(control, 9, 0xfe)...)...), invalidParameter(4+20+9, 0)},
		{"length of the block descriptor", b.do([]byte{opModeSelect6, 0x10, 0, 0, 16, 0}, []byte{3: 4, 15: 0}), invalidParameter(2, -1)},
		{"size of blocks", b.do([]byte{opModeSelect6, 0x10, 0, 0, 12, 0}, unhex(t, "00000008 00002003 00001000")), invalidParameter(8, -1)},
		{"number of blocks", b.do([]byte{opModeSelect6, 0x10, 0, 0, 12, 0}, unhex(t, "00000008 00002004 00000200")), invalidParameter(4, -1)},
	} {
		t.Run(k.name, func(t *testing.T) { wantSense(t, k.c, k.want) })
	}
	b.good([]byte{opModeSelect6, 0x10, 0, 0, 0, 0}, nil)
	b.good([]byte{opModeSelect6, 0x10, 0, 0, 12, 0}, unhex(t, "00000008 00002003 00000200"))
	b.good(cdb10(opModeSelect10, 0x10, 0, 8+16+12), append(unhex(t, "00000000 01000010 0000000000002003 00000000 00000200"), control...))
	wantSense(t, b.do(cdb10(opModeSelect10, 0x10, 0, 8+16+12), append(unhex(t, "00000000 01000010 0000000100002003 00000000 00000200"), control...)), invalidParameter(8, -1))
}
