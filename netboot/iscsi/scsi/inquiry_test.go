package scsi

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

func inquiry(evpd, page byte, allocation uint16) []byte {
	return []byte{opInquiry, evpd, page, byte(allocation >> 8), byte(allocation), 0}
}

func TestInquiry(t *testing.T) {
	b := newBench(t)
	got := b.good(inquiry(0, 0, 255), nil).In
	want := unhex(t, `
		00 00 06 12 5b 00 00 02
		54524f555045 2020  5649525455414c2d4449534b 20202020  31202020
		00000000000000000000000000000000000000000000
		00a0 0960 0460 04c0 0000 0000 0000 0000
		00000000000000000000000000000000000000000000`)
	if !bytes.Equal(got, want) {
		t.Errorf("\n got % x\nwant % x", got, want)
	}
	if int(got[4])+5 != len(got) {
		t.Errorf("additional length %d, of %d bytes", got[4], len(got))
	}
}

func TestInquiryPages(t *testing.T) {
	b := newBench(t)
	for page, want := range map[byte]string{
		vpdSupported: "00 00 0006 00 80 83 b0 b1 b2",
		vpdSerial:    "00 80 000a 30313233343536373839",
		vpdIdentification: `00 83 0056
			02 01 00 12 54524f5550452020 30313233343536373839
			01 03 00 08 ` + b.naaHex() + `
			51 94 00 04 00000001
			53 98 00 28 69716e2e323032362d31312e6465762e74726f7570653a6469736b732c742c307830303031 000000`,
		vpdBlockLimits: `00 b0 003c 01 ff 0008 00004000 00000800 00000000 00100000 00000100
			00000008 80000000 000000000000fff8 0000000000000000 0000000000000000 00000000`,
		vpdCharacteristics: "00 b1 003c 0001" + strings.Repeat("00", 58),
		vpdProvisioning:    "00 b2 0004 00 e4 02 00",
	} {
		got := b.good(inquiry(1, page, 1024), nil).In
		if want := unhex(t, want); !bytes.Equal(got, want) {
			t.Errorf("page %02x\n got % x\nwant % x", page, got, want)
		}
	}
}

func (b *bench) naaHex() string {
	const digits = "0123456789abcdef"
	var s strings.Builder
	for _, v := range b.unit.naa() {
		s.WriteByte(digits[v>>4])
		s.WriteByte(digits[v&15])
	}
	if s.String()[0] != '3' {
		b.Errorf("NAA %s, want type 3", s.String())
	}
	return s.String()
}

func TestInquiryOfReadOnlyUnitHasNoProvisioning(t *testing.T) {
	m := newMemory(blocksOfBench * blockSize)
	m.readOnly = true
	b := benchOn(t, m, Config{Serial: "1", PhysicalBlock: 512})
	if got := b.good(inquiry(1, vpdProvisioning, 255), nil).In; !bytes.Equal(got, []byte{0, 0xb2, 0, 4, 0, 0, 0, 0}) {
		t.Errorf("provisioning % x", got)
	}
	if got := b.good(inquiry(1, vpdBlockLimits, 255), nil).In[20:36]; !bytes.Equal(got, make([]byte, 16)) {
		t.Errorf("limits of UNMAP % x", got)
	}
	if got := b.good(readCapacity16(32), nil).In[13:15]; !bytes.Equal(got, []byte{0, 0}) {
		t.Errorf("physical block and provisioning % x", got)
	}
}

func TestAllocationLengthCutsInquiry(t *testing.T) {
	b := newBench(t)
	whole := b.good(inquiry(0, 0, 512), nil).In
	for _, n := range []uint16{0, 5, 36, 95, 96, 255, 511} {
		if got := b.good(inquiry(0, 0, n), nil).In; !bytes.Equal(got, whole[:min(int(n), len(whole))]) {
			t.Errorf("allocation length %d: %d bytes", n, len(got))
		}
	}
}

func TestInquiryRefusals(t *testing.T) {
	b := newBench(t)
	wantSense(t, b.do(inquiry(0, 1, 255), nil), invalidCDB(2, -1))
	wantSense(t, b.do(inquiry(1, 0x42, 255), nil), invalidCDB(2, -1))
	wantSense(t, b.do(inquiry(2, 0, 255), nil), invalidCDB(1, 1))
}

func readCapacity16(allocation uint32) []byte {
	return cdb16(opServiceActionIn, actionReadCapacity, 0, allocation)
}

func TestReadCapacity(t *testing.T) {
	b := newBench(t)
	if got := b.good(cdb10(opReadCapacity10, 0, 0, 0), nil).In; !bytes.Equal(got, unhex(t, "00002002 00000200")) {
		t.Errorf("READ CAPACITY (10): % x", got)
	}
	want := unhex(t, "0000000000002002 00000200 00 03 c000"+strings.Repeat("00", 16))
	if got := b.good(readCapacity16(96), nil).In; !bytes.Equal(got, want) {
		t.Errorf("READ CAPACITY (16): % x", got)
	}
	if got := b.good(readCapacity16(15), nil).In; len(got) != 15 {
		t.Errorf("READ CAPACITY (16) into 15 bytes: %d", len(got))
	}
	wantSense(t, b.do(cdb10(opReadCapacity10, 0, 1, 0), nil), invalidCDB(2, -1))
	wantSense(t, b.do([]byte{opServiceActionIn, 0x1f, 15: 0}, nil), invalidCDB(1, 4))
}

// vast is a medium that is larger than 32 bits of addresses.
type vast struct{ *memory }

func (vast) Size() int64 { return 4 << 40 }

func TestReadCapacityOfVastMedium(t *testing.T) {
	u, err := NewUnit(vast{newMemory(blockSize)}, Config{Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	n := u.Attach(Port{Name: "a"}, func() {})
	if c := do(n, opTestUnitReady6(), nil); c.Status != CheckCondition {
		t.Fatal("no unit attention")
	}
	c := do(n, cdb10(opReadCapacity10, 0, 0, 0), nil)
	wantGood(t, c)
	if got := binary.BigEndian.Uint32(c.In); got != 0xffffffff {
		t.Errorf("last block %#x", got)
	}
	c = do(n, cdb16(opRead16, 0, 1<<33-1, 1), nil)
	wantGood(t, c)
	if c.Read.Off != 4<<40-512 || c.Read.N != 512 {
		t.Errorf("reads %+v", c.Read)
	}
}

func TestUnitRefusesBadConfig(t *testing.T) {
	for name, k := range map[string]struct {
		size int64
		c    Config
	}{
		"no serial number":      {blockSize, Config{}},
		"long serial number":    {blockSize, Config{Serial: strings.Repeat("1", 129)}},
		"long vendor":           {blockSize, Config{Serial: "1", Vendor: "123456789"}},
		"no ASCII":              {blockSize, Config{Serial: "1", Product: "Gerät"}},
		"odd physical block":    {blockSize, Config{Serial: "1", PhysicalBlock: 1000}},
		"tiny physical block":   {blockSize, Config{Serial: "1", PhysicalBlock: 256}},
		"part of a block":       {blockSize + 1, Config{Serial: "1"}},
		"medium without blocks": {0, Config{Serial: "1"}},
	} {
		if _, err := NewUnit(newMemory(k.size), k.c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func reportLUNs(what byte, allocation uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{opReportLUNs, 0, what, 0, 0, 0}, allocation)
}

func TestReportLUNs(t *testing.T) {
	luns := []uint16{0, 7, 255, 256, 16383}
	want := unhex(t, "00000028 00000000 0000000000000000 0007000000000000 00ff000000000000 4100000000000000 7fff000000000000")
	for _, k := range []struct {
		what       byte
		allocation uint32
		want       []byte
		refusal    Sense
	}{
		{what: 0, allocation: 1024, want: want},
		{what: 2, allocation: 1024, want: want},
		{what: 0, allocation: 20, want: want[:20]},
		{what: 1, allocation: 1024, want: make([]byte, 8)},
		{what: 3, allocation: 1024, refusal: invalidCDB(2, -1)},
		{what: 0, allocation: 15, refusal: invalidCDB(6, -1)},
	} {
		c := &Command{CDB: append(reportLUNs(k.what, k.allocation), 0, 0)}
		ReportLUNs(c, luns)
		if k.want == nil {
			wantSense(t, c, k.refusal)
			continue
		}
		wantGood(t, c)
		if !bytes.Equal(c.In, k.want) {
			t.Errorf("select %d, allocation %d\n got % x\nwant % x", k.what, k.allocation, c.In, k.want)
		}
	}
	c := &Command{CDB: []byte{opReportLUNs, 0}}
	ReportLUNs(c, luns)
	wantSense(t, c, senseInvalidOpcode)
}

func TestAbsentUnit(t *testing.T) {
	ask := func(cdb ...byte) *Command {
		c := &Command{CDB: cdb}
		Absent(c)
		return c
	}
	c := ask(inquiry(0, 0, 255)...)
	wantGood(t, c)
	if len(c.In) != 36 || c.In[0] != 0x7f || c.In[4] != 31 {
		t.Errorf("INQUIRY: % x", c.In)
	}
	wantSense(t, ask(inquiry(1, 0x80, 255)...), invalidCDB(1, 0))
	wantSense(t, ask(opTestUnitReady6()...), senseNotSupported)
	wantSense(t, ask(cdb10(opRead10, 0, 0, 1)...), senseNotSupported)
	wantSense(t, ask(), senseNotSupported)
	c = ask(opRequestSense, 0, 0, 0, 252, 0)
	wantGood(t, c)
	if !bytes.Equal(c.In, senseNotSupported.Append(nil)) {
		t.Errorf("REQUEST SENSE: % x", c.In)
	}
}
