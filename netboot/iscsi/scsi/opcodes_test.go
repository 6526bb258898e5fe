package scsi

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func reportOpcodes(option, opcode byte, action uint16, allocation uint32) []byte {
	b := binary.BigEndian.AppendUint16([]byte{opMaintenanceIn, actionOpcodes, option, opcode}, action)
	return append(binary.BigEndian.AppendUint32(b, allocation), 0, 0)
}

func TestReportOpcodesDescribesEachRow(t *testing.T) {
	b := newBench(t)
	for _, timeouts := range []byte{0, reportTimeouts} {
		size := 8
		if timeouts != 0 {
			size = 20
		}
		all := b.good(reportOpcodes(timeouts|reportAll, 0, 0, 65535), nil).In
		if n := binary.BigEndian.Uint32(all); int(n) != len(all)-4 || int(n) != size*len(commands.rows) {
			t.Fatalf("length %d, of %d bytes for %d commands", n, len(all), len(commands.rows))
		}
		for d := all[4:]; len(d) > 0; d = d[size:] {
			option := byte(reportOpcode)
			if d[5]&hasAction != 0 {
				option = reportAction
			}
			action := binary.BigEndian.Uint16(d[2:])
			one := b.good(reportOpcodes(timeouts|option, d[0], action, 255), nil).In
			if one[1]&7 != supportedAsSPC || one[4] != d[0] || one[3] != d[7] {
				t.Errorf("%02x/%02x: % x", d[0], action, one)
			}
			if option == reportAction && one[5]&0x1f != byte(action) {
				t.Errorf("%02x/%02x: usage % x", d[0], action, one)
			}
			if want := 4 + int(one[3]) + (size - 8); len(one) != want || (one[1]&hasTimeoutsOfOp != 0) != (timeouts != 0) {
				t.Errorf("%02x/%02x: %d bytes, want %d", d[0], action, len(one), want)
			}
			wantSense(t, b.do(reportOpcodes(reportOpcode+reportAction-option, d[0], action, 255), nil), invalidCDB(2, 2))
			if got := b.good(reportOpcodes(reportEither, d[0], action, 255), nil).In; got[1]&7 != supportedAsSPC {
				t.Errorf("%02x/%02x: % x", d[0], action, got)
			}
		}
	}
}

func TestReportOpcodes(t *testing.T) {
	b := newBench(t)
	for _, k := range []struct {
		name string
		cdb  []byte
		want string
	}{
		{"READ (10)", reportOpcodes(reportOpcode, opRead10, 0, 255), "00 03 000a 28 18 ffffffff 00 ffff 00"},
		{"with times", reportOpcodes(0x80|reportOpcode, opTestUnitReady, 0, 255), "00 83 0006 000000000000 000a 00 00 00000000 00000000"},
		{"READ CAPACITY (16)", reportOpcodes(reportAction, opServiceActionIn, actionReadCapacity, 255), "00 03 0010 9e 10 0000000000000000 ffffffff 00 00"},
		{"unknown", reportOpcodes(reportOpcode, 0x04, 0, 255), "00 01 0000"},
		{"unknown action", reportOpcodes(reportAction, opServiceActionIn, 0x1f, 255), "00 01 0000"},
		{"action of what has none", reportOpcodes(reportEither, opRead10, 1, 255), "00 01 0000"},
		{"impossible action", reportOpcodes(reportAction, opServiceActionIn, 0x0110, 255), "00 01 0000"},
		{"cut", reportOpcodes(reportOpcode, opRead10, 0, 3), "00 03 00"},
	} {
		if got := b.good(k.cdb, nil).In; !bytes.Equal(got, unhex(t, k.want)) {
			t.Errorf("%s: % x", k.name, got)
		}
	}
	wantSense(t, b.do(reportOpcodes(4, opRead10, 0, 255), nil), invalidCDB(2, 2))
}

// The table itself: CDBs of the length that their group says, in rising order, and each row complete.
func TestTable(t *testing.T) {
	lengths := [8]int{6, 10, 10, 0, 16, 12}
	for i, r := range commands.rows {
		if want := lengths[r.opcode>>5]; len(r.usage)+1 != want {
			t.Errorf("%02x: CDB of %d bytes, want %d", r.opcode, len(r.usage)+1, want)
		}
		if r.prepare == nil {
			t.Errorf("%02x: no handler", r.opcode)
		}
		if i > 0 && (r.opcode < commands.rows[i-1].opcode || r.opcode == commands.rows[i-1].opcode && r.action <= commands.rows[i-1].action) {
			t.Errorf("%02x/%02x: out of order", r.opcode, r.action)
		}
	}
}

func TestStartStop(t *testing.T) {
	b := newBench(t)
	cdb := func(flags byte) []byte { return []byte{opStartStop, 0, 0, 0, flags, 0} }
	b.good(cdb(startStart), nil)
	if b.mem.syncs != 0 {
		t.Error("to start syncs")
	}
	b.good(cdb(0), nil)
	if b.mem.syncs != 1 {
		t.Error("to stop does not sync")
	}
	b.good(cdb(startNoFlush), nil)
	if b.mem.syncs != 1 {
		t.Error("to stop without flushing syncs")
	}
	b.good(opTestUnitReady6(), nil)
	wantSense(t, b.do(cdb(startEject), nil), invalidCDB(4, 1))
	wantSense(t, b.do(cdb(0x10), nil), invalidCDB(4, 7))
}

func TestPrefetch(t *testing.T) {
	b := newBench(t)
	b.good(cdb10(opPrefetch10, 2, 0, 0), nil)
	b.good(cdb16(opPrefetch16, 0, 0, blocksOfBench), nil)
	wantSense(t, b.do(cdb10(opPrefetch10, 0, blocksOfBench, 0), nil), senseOutOfRange)
	wantSense(t, b.do(cdb16(opPrefetch16, 0, 1, blocksOfBench), nil), senseOutOfRange)
}

func TestDefectsAndDiagnostic(t *testing.T) {
	b := newBench(t)
	if got := b.good([]byte{opReadDefects10, 0, 0x1d, 0, 0, 0, 0, 0, 8, 0}, nil).In; !bytes.Equal(got, []byte{0, 0x1d, 0, 0}) {
		t.Errorf("% x", got)
	}
	if got := b.good([]byte{opReadDefects12, 0x1d, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0}, nil).In; !bytes.Equal(got, []byte{0, 0x1d, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("% x", got)
	}
	b.good([]byte{opSendDiagnostic, 4, 0, 0, 0, 0}, nil)
	wantSense(t, b.do([]byte{opSendDiagnostic, 0x20, 0, 0, 0, 0}, nil), invalidCDB(1, 7))
	wantSense(t, b.do([]byte{opSendDiagnostic, 0, 0, 0, 8, 0}, nil), invalidCDB(3, -1))
}
