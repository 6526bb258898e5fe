package iscsi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

func TestReadAndWrite(t *testing.T) {
	for name, keys := range map[string][]string{"no digests": nil, "digests": bothDigests()} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, nil)
			i := f.login(keys...)
			data := pattern(5*512, 7)
			i.expectGood(i.do(i.command(write10(3, 5), 0, data)))
			if !bytes.Equal(f.disk.bytes(3*512, len(data)), data) {
				t.Error("the disk has other bytes than were written")
			}
			r := i.do(i.command(read10(3, 5), len(data), nil))
			i.expectGood(r)
			if !bytes.Equal(r.data, data) {
				t.Error("other bytes are read than were written")
			}
			infos := f.srv.Sessions()
			if len(infos) != 1 {
				t.Fatalf("%d sessions, want 1", len(infos))
			}
			want := SessionInfo{
				Initiator: nodeName, Target: diskTarget, ISID: 0x800000000001, TSIH: i.tsih,
				Peer: i.nc.LocalAddr().String(), Since: infos[0].Since,
				Commands: 3, BytesIn: uint64(len(data)), BytesOut: uint64(len(data)),
			}
			if diff := cmp.Diff(want, infos[0]); diff != "" {
				t.Errorf("session (-want +got):\n%s", diff)
			}
		})
	}
}

// Data-In is cut by MaxRecvDataSegmentLength of the initiator, and F ends each MaxBurstLength.
func TestDataInSequences(t *testing.T) {
	f := serve(t, nil)
	i := f.login("MaxRecvDataSegmentLength=1024", "MaxBurstLength=2560", "FirstBurstLength=2560")
	cmd := i.command(read10(8, 12), 12*512, nil)
	i.send(cmd)
	type dataIn struct {
		Off, Length   int
		Final, Status bool
	}
	var got []dataIn
	var data []byte
	for len(data) < 12*512 {
		p := i.expectOpcode(opDataIn)
		got = append(got, dataIn{int(p.bufferOff()), len(p.data), p.final(), p.flags()&flagStatus != 0})
		data = append(data, p.data...)
	}
	want := []dataIn{
		{0, 1024, false, false},
		{1024, 1024, false, false},
		{2048, 512, true, false},
		{2560, 1024, false, false},
		{3584, 1024, false, false},
		{4608, 512, true, false},
		{5120, 1024, true, true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Data-In (-want +got):\n%s", diff)
	}
	if !bytes.Equal(data, f.disk.bytes(8*512, 12*512)) {
		t.Error("wrong data")
	}
	i.quiet()
}

// R2Ts keep to MaxBurstLength and MaxOutstandingR2T, and ask for what did not come as immediate or unsolicited data.
func TestR2T(t *testing.T) {
	f := serve(t, nil)
	i := f.login("InitialR2T=No", "ImmediateData=Yes", "FirstBurstLength=1536", "MaxBurstLength=2048", "MaxOutstandingR2T=2")
	data := pattern(16*512, 3)
	cmd := i.command(write10(100, 16), 0, data[:512])
	cmd.setTTT(uint32(len(data)))
	cmd.bhs[1] &^= flagFinal
	i.send(cmd)
	i.send(dataOut(cmd, noTag, 0, 512, data[512:1024], false))
	i.send(dataOut(cmd, noTag, 1, 1024, data[1024:1536], true))
	var asked [][2]uint32
	var open []*pdu
	next := func() {
		p := i.expectOpcode(opR2T)
		if int(p.dataSN()) != len(asked) {
			t.Fatalf("R2TSN %d, want %d", p.dataSN(), len(asked))
		}
		asked = append(asked, [2]uint32{p.bufferOff(), p.residual()})
		open = append(open, p)
	}
	next()
	next()
	i.quiet() // and no third one yet
	for len(open) > 0 {
		r := open[0]
		open = open[1:]
		off, end := int(r.bufferOff()), int(r.bufferOff()+r.residual())
		for sn := uint32(0); off < end; sn++ {
			n := min(1000, end-off)
			i.send(dataOut(cmd, r.ttt(), sn, off, data[off:off+n], off+n == end))
			off += n
		}
		if len(asked) < 4 {
			next()
		}
	}
	i.expectGood(i.outcome(cmd))
	want := [][2]uint32{{1536, 2048}, {3584, 2048}, {5632, 2048}, {7680, 512}}
	if diff := cmp.Diff(want, asked); diff != "" {
		t.Errorf("R2Ts, offset and length (-want +got):\n%s", diff)
	}
	if !bytes.Equal(f.disk.bytes(100*512, len(data)), data) {
		t.Error("the disk has other bytes than were written")
	}
}

// What of the data-out is against the rules ends the command with the sense of RFC 7143 section 11.4.7.2, and nothing is
// written.
func TestBadDataOut(t *testing.T) {
	keys := []string{"InitialR2T=No", "ImmediateData=Yes", "FirstBurstLength=1024"}
	data := pattern(8*512, 9)
	for _, tt := range []struct {
		name  string
		keys  []string
		sense string
		send  func(i *initiator, cmd *pdu)
	}{
		{"wrong DataSN", keys, "b/4705", func(i *initiator, cmd *pdu) {
			i.send(cmd)
			r := i.expectOpcode(opR2T)
			i.send(dataOut(cmd, r.ttt(), 1, 0, data, true))
		}},
		{"wrong offset", keys, "b/4705", func(i *initiator, cmd *pdu) {
			i.send(cmd)
			r := i.expectOpcode(opR2T)
			i.send(dataOut(cmd, r.ttt(), 0, 512, data, true))
		}},
		{"wrong TTT", keys, "b/4705", func(i *initiator, cmd *pdu) {
			i.send(cmd)
			r := i.expectOpcode(opR2T)
			i.send(dataOut(cmd, r.ttt()+1, 0, 0, data, true))
		}},
		{"F too early", keys, "b/0c0d", func(i *initiator, cmd *pdu) {
			i.send(cmd)
			r := i.expectOpcode(opR2T)
			i.send(dataOut(cmd, r.ttt(), 0, 0, data[:512], true))
		}},
		{"more than was asked for", keys, "b/0c0d", func(i *initiator, cmd *pdu) {
			i.send(cmd)
			r := i.expectOpcode(opR2T)
			i.send(dataOut(cmd, r.ttt(), 0, 0, append(data, data...), true))
		}},
		{"unsolicited in place of solicited", keys, "b/0c0c", func(i *initiator, cmd *pdu) {
			i.send(cmd)
			i.expectOpcode(opR2T)
			i.send(dataOut(cmd, noTag, 0, 0, data, true))
		}},
		{"more than FirstBurstLength", keys, "b/0c0d", func(i *initiator, cmd *pdu) {
			cmd.bhs[1] &^= flagFinal
			i.send(cmd)
			i.send(dataOut(cmd, noTag, 0, 0, data[:2048], false))
			i.send(dataOut(cmd, noTag, 1, 2048, data[2048:], true))
		}},
		{"unsolicited where InitialR2T is Yes", []string{"InitialR2T=Yes"}, "b/0c0c", func(i *initiator, cmd *pdu) {
			cmd.bhs[1] &^= flagFinal
			i.send(cmd)
			i.send(dataOut(cmd, noTag, 0, 0, data, true))
		}},
		{"immediate where ImmediateData is No", []string{"ImmediateData=No"}, "b/0c0c", func(i *initiator, cmd *pdu) {
			cmd.data = data
			i.send(cmd)
		}},
		{"immediate beyond FirstBurstLength", keys, "b/0c0d", func(i *initiator, cmd *pdu) {
			cmd.data = data
			i.send(cmd)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := serve(t, nil)
			i := f.login(tt.keys...)
			before := f.disk.bytes(0, diskSize)
			cmd := i.command(write10(0, 8), 0, []byte{})
			cmd.setTTT(8 * 512)
			tt.send(i, cmd)
			if r := i.outcome(cmd); r.status != byte(scsi.CheckCondition) || r.sense != tt.sense {
				t.Errorf("status %#02x, sense %s, want %s", r.status, r.sense, tt.sense)
			}
			if !bytes.Equal(before, f.disk.bytes(0, diskSize)) {
				t.Error("the disk was written to")
			}
			// What still comes of the data is ignored, and the session goes on.
			i.send(dataOut(cmd, 77, 0, 0, data, true))
			i.expectGood(i.do(i.command(testUnitReady(), 0, nil)))
		})
	}
}

func TestDigestErrors(t *testing.T) {
	flip := func(b []byte, at int) []byte {
		b[at] ^= 0x10
		return b
	}
	t.Run("of a Data-Out", func(t *testing.T) {
		i := serve(t, nil).login(bothDigests()...)
		cmd := i.command(write10(0, 1), 0, []byte{})
		cmd.setTTT(512)
		i.send(cmd)
		r := i.expectOpcode(opR2T)
		out := dataOut(cmd, r.ttt(), 0, 0, pattern(512, 1), true)
		b := i.marshal(out)
		if _, err := i.nc.Write(flip(b, len(b)-1)); err != nil {
			t.Fatal(err)
		}
		i.expectReject(rejectDataDigest, out)
		if r := i.outcome(cmd); r.sense != "b/4705" {
			t.Errorf("sense %s, want PROTOCOL SERVICE CRC ERROR", r.sense)
		}
	})
	t.Run("of immediate data", func(t *testing.T) {
		i := serve(t, nil).login(bothDigests()...)
		cmd := i.command(write10(0, 1), 0, pattern(512, 1))
		b := i.marshal(cmd)
		if _, err := i.nc.Write(flip(b, len(b)-9)); err != nil {
			t.Fatal(err)
		}
		i.expectReject(rejectDataDigest, cmd)
		// The command counts as not received: it may come again, with its CmdSN.
		i.expectGood(i.do(cmd))
	})
	t.Run("of a ping", func(t *testing.T) {
		i := serve(t, nil).login(bothDigests()...)
		p := i.immediate(i.request(opNopOut, 0))
		p.setTTT(noTag)
		p.data = []byte("ping")
		b := i.marshal(p)
		if _, err := i.nc.Write(flip(b, len(b)-1)); err != nil {
			t.Fatal(err)
		}
		i.expectReject(rejectDataDigest, p)
		i.quiet()
	})
	t.Run("of a header", func(t *testing.T) {
		i := serve(t, nil).login(bothDigests()...)
		if _, err := i.nc.Write(flip(i.marshal(i.command(testUnitReady(), 0, nil)), 20)); err != nil {
			t.Fatal(err)
		}
		if got := i.closed(); len(got) > 0 {
			t.Errorf("opcode %#02x answers a header whose digest is wrong", got[0].opcode())
		}
	})
}

func TestResiduals(t *testing.T) {
	i := serve(t, nil).login()
	for _, tt := range []struct {
		name     string
		cdb      []byte
		flags    byte
		edtl     int
		data     int // bytes read, or of immediate data
		overflow int // less than 0: underflow
	}{
		{"read of nothing", read10(0, 1), 0, 0, 0, 512},
		{"read of less", read10(0, 2), flagRead, 512, 512, 512},
		{"read of a part", read10(0, 1), flagRead, 200, 200, 312},
		{"read of more", read10(0, 1), flagRead, 10000, 512, -9488},
		{"read as a write", read10(0, 1), flagWrite, 512, 0, 512},
		{"write of nothing", write10(0, 1), flagWrite, 0, 0, 512},
		{"write of less", write10(0, 2), flagWrite, 512, 512, 512},
		{"write of a part", write10(0, 1), flagWrite, 200, 200, 312},
		{"write of more", write10(0, 1), flagWrite, 1536, 1536, -1024},
		{"no data", testUnitReady(), flagRead, 512, 0, -512},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i.t = t
			cmd := i.command(tt.cdb, 0, nil)
			cmd.bhs[1] |= tt.flags
			cmd.setTTT(uint32(tt.edtl))
			if tt.flags == flagWrite {
				cmd.data = make([]byte, tt.data)
			}
			r := i.do(cmd)
			want := result{status: byte(scsi.Good), flags: flagOverflow, residual: uint32(tt.overflow)}
			if tt.overflow < 0 {
				want.flags, want.residual = flagUnderflow, uint32(-tt.overflow)
			}
			read := len(r.data)
			r.data, r.dataIns = nil, 0
			if diff := cmp.Diff(want, r, cmp.AllowUnexported(result{})); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
			if tt.flags == flagRead && read != tt.data {
				t.Errorf("%d bytes read, want %d", read, tt.data)
			}
		})
	}
}

func TestBidirectionalIsRefused(t *testing.T) {
	i := serve(t, nil).login()
	cmd := i.command(write10(0, 1), 0, pattern(512, 0))
	cmd.bhs[1] |= flagRead
	if r := i.do(cmd); r.sense != "5/0e03" {
		t.Errorf("sense %s, want INVALID FIELD IN COMMAND INFORMATION UNIT", r.sense)
	}
	i.quiet()
}

func TestRejects(t *testing.T) {
	for _, tt := range []struct {
		name   string
		reason byte
		pdu    func(i *initiator) *pdu
		closes bool
	}{
		{"SNACK", rejectSNACK, func(i *initiator) *pdu { return i.immediate(i.request(opSNACK, 0)) }, false},
		{"opcode of no request", rejectUnsupported, func(i *initiator) *pdu { return i.immediate(i.request(0x1c, 0)) }, false},
		{"opcode of a target", rejectUnsupported, func(i *initiator) *pdu { return i.immediate(i.request(opNopIn, 0)) }, false},
		{"command without a tag", rejectProtocol, func(i *initiator) *pdu {
			p := i.immediate(i.command(testUnitReady(), 0, nil))
			p.setITT(noTag)
			return p
		}, false},
		{"reserved task attribute", rejectProtocol, func(i *initiator) *pdu {
			p := i.immediate(i.command(testUnitReady(), 0, nil))
			p.bhs[1] |= maskAttr
			return p
		}, false},
		{"AHS that is none", rejectInvalidField, func(i *initiator) *pdu {
			p := i.immediate(i.command(testUnitReady(), 0, nil))
			p.ahs = []byte{0, 200, ahsExtendedCDB, 0}
			p.bhs[4] = 1
			return p
		}, false},
		{"text that is none", rejectProtocol, func(i *initiator) *pdu {
			p := i.immediate(i.request(opText, 0))
			p.setTTT(noTag)
			p.data = []byte("no equals sign\x00")
			return p
		}, false},
		{"more text than there may be", rejectInvalidField, func(i *initiator) *pdu {
			p := i.immediate(i.request(opText, 0))
			p.setTTT(noTag)
			p.data = make([]byte, maxControl+4)
			return p
		}, false},
		{"answer to a ping, with a number", rejectProtocol, func(i *initiator) *pdu {
			p := i.request(opNopOut, 0)
			i.cmdSN--
			p.setITT(noTag)
			return p
		}, false},
		{"text without a tag", rejectProtocol, func(i *initiator) *pdu {
			p := i.immediate(i.request(opText, 0))
			p.setITT(noTag)
			return p
		}, false},
		{"logout for no reason", rejectInvalidField, func(i *initiator) *pdu { return i.immediate(i.request(opLogout, 9)) }, false},
		{"login", rejectProtocol, func(i *initiator) *pdu { return i.immediate(i.request(opLogin, 0)) }, true},
		{"too much data", rejectProtocol, func(i *initiator) *pdu {
			p := i.immediate(i.request(opNopOut, 0))
			p.setDataLength(ourMaxRecv + 1)
			return p
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := serve(t, nil).login()
			p := tt.pdu(i)
			i.send(p)
			i.expectReject(tt.reason, p)
			if !tt.closes {
				i.quiet()
				i.expectGood(i.do(i.command(testUnitReady(), 0, nil)))
				return
			}
			if got := i.closed(); len(got) > 0 {
				t.Errorf("opcode %#02x comes where the connection should end", got[0].opcode())
			}
		})
	}
}

// A command whose tag is taken is rejected, and its CmdSN counts as not received (section 11.17.1): the one that is sent
// with it next is done.
func TestTagInUse(t *testing.T) {
	f := serve(t, nil)
	g := newGate()
	f.disk.hook(g.holding("sync"))
	i := f.login()
	first := i.command(sync10(), 0, nil)
	i.send(first)
	<-g.came
	second := i.command(testUnitReady(), 0, nil)
	second.setITT(first.itt())
	i.send(second)
	i.expectReject(rejectInProgress, second)
	second.setITT(9999)
	i.expectGood(i.do(second))
	close(g.open)
	i.expectGood(i.outcome(first))
}

func TestCommandNumbers(t *testing.T) {
	t.Run("outside of the window", func(t *testing.T) {
		i := serve(t, nil).login()
		for _, wrong := range []uint32{i.last.expCmdSN() - 1, i.last.maxCmdSN() + 1, i.last.expCmdSN() + 1<<31} {
			p := i.command(testUnitReady(), 0, nil)
			i.cmdSN--
			p.setStatSN(wrong)
			i.send(p)
			q := i.request(opNopOut, 0)
			i.cmdSN--
			q.setStatSN(wrong)
			q.setTTT(noTag)
			i.send(q)
			i.quiet()
		}
		i.expectGood(i.do(i.command(testUnitReady(), 0, nil)))
	})
	t.Run("out of order", func(t *testing.T) {
		i := serve(t, nil).login()
		first := i.command(testUnitReady(), 0, nil)
		ping := i.request(opNopOut, 0)
		ping.setTTT(noTag)
		last := i.command(read10(0, 1), 512, nil)
		i.send(last)
		i.send(last) // a second time; it is not done twice
		i.send(ping)
		i.quiet()
		i.send(first)
		i.expectGood(i.outcome(first))
		if p := i.expectOpcode(opNopIn); p.itt() != ping.itt() {
			t.Errorf("answer to ping %d, want %d", p.itt(), ping.itt())
		}
		i.expectGood(i.outcome(last))
		i.quiet()
	})
	t.Run("wrap around", func(t *testing.T) {
		f := serve(t, nil)
		i := f.dial()
		if status := i.login(loginOptions{cmdSN: 0xfffffffd}); status != loginOK {
			t.Fatalf("login status %#04x", status)
		}
		i.ready()
		for range 10 {
			i.expectGood(i.do(i.command(testUnitReady(), 0, nil)))
		}
		if i.last.expCmdSN() != 8 {
			t.Errorf("ExpCmdSN %d, want 8", i.last.expCmdSN())
		}
	})
}

// The window closes while commands are under way, and opens as they end.
func TestWindow(t *testing.T) {
	f := serve(t, nil)
	g := newGate()
	f.disk.hook(g.holding("sync"))
	i := f.login()
	var sent []*pdu
	for !before(i.last.maxCmdSN(), i.cmdSN) {
		p := i.command(sync10(), 0, nil)
		i.send(p)
		sent = append(sent, p)
	}
	if len(sent) != window {
		t.Errorf("%d commands fit into the window, want %d", len(sent), window)
	}
	over := i.command(testUnitReady(), 0, nil)
	i.cmdSN--
	i.send(over)
	i.quiet()
	if got := i.last.maxCmdSN() - i.last.expCmdSN() + 1; got != 0 {
		t.Errorf("the window is open for %d, want none", got)
	}
	for range maxImmediate {
		p := i.immediate(i.command(sync10(), 0, nil))
		i.send(p)
		sent = append(sent, p)
	}
	p := i.immediate(i.command(sync10(), 0, nil))
	i.send(p)
	i.expectReject(rejectTooMany, p)
	close(g.open)
	for range sent {
		if p := i.expectOpcode(opResponse); p.bhs[3] != byte(scsi.Good) {
			t.Errorf("status %#02x", p.bhs[3])
		}
	}
	if got := i.last.maxCmdSN() - i.last.expCmdSN() + 1; got != window {
		t.Errorf("the window is open for %d, want %d", got, window)
	}
}

// An ordered command waits for those before it, and those behind it wait for it; head of queue waits for nobody.
func TestTaskAttributes(t *testing.T) {
	f := serve(t, nil)
	g := newGate()
	f.disk.hook(g.holding("sync"))
	i := f.login()
	attr := func(p *pdu, a byte) *pdu {
		p.bhs[1] = p.bhs[1]&^maskAttr | a
		return p
	}
	slow := i.command(sync10(), 0, nil)
	i.send(slow)
	<-g.came
	data := pattern(512, 1)
	ordered := attr(i.command(write10(0, 1), 0, data), attrOrdered)
	i.send(ordered)
	behind := i.command(read10(0, 1), 512, nil)
	i.send(behind)
	ordered2 := attr(i.command(testUnitReady(), 0, nil), attrOrdered)
	i.send(ordered2)
	gone := i.command(testUnitReady(), 0, nil)
	i.send(gone)
	i.quiet()
	i.expectGood(i.do(attr(i.command(testUnitReady(), 0, nil), attrHeadOfQueue)))
	i.send(i.manage(taskAbort, gone))
	if p := i.expectOpcode(opTaskResp); p.bhs[2] != taskComplete {
		t.Errorf("aborting a task that waits: %d", p.bhs[2])
	}
	close(g.open)
	i.expectGood(i.outcome(slow))
	i.expectGood(i.outcome(ordered))
	r := i.outcome(behind)
	i.expectGood(r)
	if !bytes.Equal(r.data, data) {
		t.Error("a read behind an ordered write did not see what it wrote")
	}
	i.expectGood(i.outcome(ordered2))
	i.quiet()
	if r := i.do(attr(i.command(testUnitReady(), 0, nil), attrACA)); r.sense != "5/4900" {
		t.Errorf("ACA without an ACA condition: sense %s, want INVALID MESSAGE ERROR", r.sense)
	}
}

func TestManyCommands(t *testing.T) {
	f := serve(t, nil)
	i := f.login("InitialR2T=No", "ImmediateData=Yes")
	const rows, blocks = 15, 32
	for row := range rows {
		var sent []*pdu
		var want []byte
		for n := range blocks {
			data := pattern(4096, byte(row*7+n))
			want = append(want, data...)
			p := i.command(write10(uint32((row*blocks+n)*8), 8), 0, data)
			sent = append(sent, p)
			i.send(p)
		}
		for range sent {
			if p := i.expectOpcode(opResponse); p.bhs[3] != byte(scsi.Good) {
				t.Fatalf("status %#02x", p.bhs[3])
			}
		}
		r := i.do(i.command(read10(uint32(row*blocks*8), blocks*8), blocks*4096, nil))
		i.expectGood(r)
		if !bytes.Equal(r.data, want) {
			t.Fatalf("row %d is not what was written", row)
		}
	}
}

func TestNopOut(t *testing.T) {
	i := serve(t, nil).login("MaxRecvDataSegmentLength=8192")
	for _, n := range []int{0, 1, 9, 512, 513, 8192, 20000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			i.t = t
			p := i.request(opNopOut, 0)
			p.setTTT(noTag)
			p.data = pattern(n, 4)
			i.send(p)
			r := i.expectOpcode(opNopIn)
			want := p.data[:min(n, 8192)]
			if r.itt() != p.itt() || r.ttt() != noTag || !bytes.Equal(r.data, want) {
				t.Errorf("answer with ITT %d, TTT %#x, %d bytes", r.itt(), r.ttt(), len(r.data))
			}
		})
	}
}

// The data of a ping is counted while it comes, and until its answer is written.
func TestMemoryOfPing(t *testing.T) {
	const size = 100_000
	f, i := servePipe(t, func(c *Config) { c.MaxMemory = scsi.MaxTransfer })
	if status := i.login(loginOptions{keys: []string{"MaxRecvDataSegmentLength=262144"}}); status != loginOK {
		t.Fatalf("login status %#04x", status)
	}
	c := f.connOf(i)
	taken := func() bool {
		if f.srv.memory.TryAcquire(scsi.MaxTransfer) {
			f.srv.memory.Release(scsi.MaxTransfer)
			return false
		}
		return true
	}
	p := i.request(opNopOut, 0)
	p.setTTT(noTag)
	p.data = pattern(size, 4)
	b := i.marshal(p)
	const header, some = bhsLength, 1000
	for _, piece := range [][]byte{b[:header], b[header:some], b[some : 2*some]} { // a pipe waits until it is read
		if _, err := i.nc.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	if !taken() {
		t.Error("no memory is taken while data comes")
	}
	if _, err := i.nc.Write(b[2*some:]); err != nil {
		t.Fatal(err)
	}
	if r := i.expectOpcode(opNopIn); !bytes.Equal(r.data, p.data) {
		t.Errorf("%d bytes come back, want %d", len(r.data), len(p.data))
	}
	c.until(t, "the memory is given back", func() bool { return !taken() })
	p.bhs[0] |= opImmediate
	if !f.srv.memory.TryAcquire(scsi.MaxTransfer) {
		t.Fatal("memory is taken")
	}
	i.send(p)
	if r := i.expectOpcode(opNopIn); len(r.data) > 0 {
		t.Errorf("%d bytes come back without memory", len(r.data))
	}
	f.srv.memory.Release(scsi.MaxTransfer)
	i.quiet()
	_ = i.nc.Close() // in place of a logout
}

// A request that comes before its turn brings little.
func TestDataBeforeItsTurn(t *testing.T) {
	for n, closes := range map[int]bool{512: false, 513: true} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			i := serve(t, nil).login()
			first := i.command(testUnitReady(), 0, nil)
			p := i.request(opNopOut, 0)
			p.setTTT(noTag)
			p.data = pattern(n, 4)
			i.send(p)
			if closes {
				i.closed()
				return
			}
			i.send(first)
			i.expectGood(i.outcome(first))
			if r := i.expectOpcode(opNopIn); !bytes.Equal(r.data, p.data) {
				t.Errorf("%d bytes come back, want %d", len(r.data), n)
			}
		})
	}
}

func TestSendTargetsInSession(t *testing.T) {
	f := serve(t, func(c *Config) { c.Portals = []string{"192.0.2.1:3260"} })
	i := f.login()
	p := i.request(opText, 0)
	p.setTTT(noTag)
	p.data = []byte("SendTargets=\x00MaxRecvDataSegmentLength=512\x00")
	i.send(p)
	r := i.expectOpcode(opTextResp)
	want := []string{"TargetName=" + diskTarget, "TargetAddress=192.0.2.1:3260,1"}
	got := untext(r.data)
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("text %q lacks %q", got, w)
		}
	}
	// The new MaxRecvDataSegmentLength holds.
	if r := i.do(i.command(read10(0, 4), 2048, nil)); r.dataIns != 4 {
		t.Errorf("%d Data-In, want 4", r.dataIns)
	}
}

func TestLogout(t *testing.T) {
	for _, tt := range []struct {
		name     string
		reason   byte
		cid      uint16
		response byte
		closes   bool
	}{
		{"session", logoutSession, 0, logoutDone, true},
		{"connection", logoutConnection, 0, logoutDone, true},
		{"another connection", logoutConnection, 5, logoutNoCID, false},
		{"for recovery", logoutRecovery, 0, logoutNoRecovery, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := serve(t, nil)
			i := f.login()
			p := i.request(opLogout, tt.reason)
			p.setCID(tt.cid)
			i.send(p)
			if r := i.expectOpcode(opLogoutResp); r.bhs[2] != tt.response || r.itt() != p.itt() {
				t.Errorf("response %d to %d, want %d to %d", r.bhs[2], r.itt(), tt.response, p.itt())
			}
			if !tt.closes {
				i.quiet()
				return
			}
			if got := i.closed(); len(got) > 0 {
				t.Errorf("opcode %#02x after a logout", got[0].opcode())
			}
		})
	}
}

// An initiator that goes away in the middle of its data is not told that the command went well.
func TestCutShort(t *testing.T) {
	cut := func(i *initiator, p *pdu) {
		b := i.marshal(p)
		if _, err := i.nc.Write(b[:len(b)-100]); err != nil {
			i.t.Fatal(err)
		}
		if err := i.nc.(*net.TCPConn).CloseWrite(); err != nil {
			i.t.Fatal(err)
		}
		if got := i.closed(); len(got) > 0 {
			i.t.Errorf("opcode %#02x, status %#02x for a command that has not come", got[0].opcode(), got[0].bhs[3])
		}
	}
	t.Run("immediate data", func(t *testing.T) {
		i := serve(t, nil).login()
		cut(i, i.command(write10(0, 1), 0, pattern(512, 1)))
	})
	t.Run("a Data-Out", func(t *testing.T) {
		i := serve(t, nil).login()
		cmd, r2t := i.waiting()
		cut(i, dataOut(cmd, r2t.ttt(), 0, 0, pattern(8*512, 1), true))
	})
}

// What fails while more R2Ts are outstanding is told when their data has come (section 7.8).
func TestBadDataOutOfMany(t *testing.T) {
	i := serve(t, nil).login("MaxBurstLength=512", "FirstBurstLength=512", "MaxOutstandingR2T=2")
	cmd := i.command(write10(0, 2), 0, []byte{})
	cmd.setTTT(1024)
	i.send(cmd)
	first, second := i.expectOpcode(opR2T), i.expectOpcode(opR2T)
	i.send(dataOut(cmd, first.ttt(), 9, 0, pattern(512, 1), true))
	i.quiet()
	i.send(dataOut(cmd, second.ttt(), 0, 512, pattern(512, 1), true))
	if r := i.outcome(cmd); r.sense != "b/4705" {
		t.Errorf("sense %s, want PROTOCOL SERVICE CRC ERROR", r.sense)
	}
}

// A read of more than there is memory for goes out in pieces, whether or not the file is mapped.
func TestLongRead(t *testing.T) {
	const blocks = scsi.MaxRead/512 - 5
	content := pattern(scsi.MaxRead, 8)
	for name, keys := range map[string][]string{
		"small segments": {"MaxBurstLength=3000", "MaxRecvDataSegmentLength=8192"},
		"large segments": {"MaxBurstLength=16776192", "MaxRecvDataSegmentLength=16777212"},
		"digests":        bothDigests(),
	} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, func(c *Config) { c.MaxMemory = scsi.MaxTransfer })
			f.add(1, &disk{data: content})
			f.image(2, content)
			i := f.login(keys...)
			for _, lun := range []LUN{1, 2} {
				i.do(i.on(lun, i.command(testUnitReady(), 0, nil)))
				cmd := make([]byte, 12)
				cmd[0] = 0xa8 // READ (12)
				binary.BigEndian.PutUint32(cmd[2:], 5)
				binary.BigEndian.PutUint32(cmd[6:], blocks)
				r := i.do(i.on(lun, i.command(cmd, blocks*512, nil)))
				i.expectGood(r)
				if !bytes.Equal(r.data, content[5*512:]) {
					t.Errorf("LUN %d: wrong data", lun)
				}
			}
		})
	}
}

// A disk that fails in the middle of a long read fails the read, though some of it went out.
func TestLongReadFails(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	f.disk.hook(func(method string, off int64) error {
		if off > 0 {
			return fmt.Errorf("%s at %d goes wrong", method, off)
		}
		return nil
	})
	cmd := i.command(read10(0, 4096), 4096*512, nil)
	i.send(cmd)
	r := i.outcome(cmd)
	if r.status != byte(scsi.CheckCondition) || len(r.data) != pieceSize {
		t.Errorf("status %#02x after %d bytes, want CHECK CONDITION after %d", r.status, len(r.data), pieceSize)
	}
}

// Writes whose data is there and reads that need memory do not wait for each other.
func TestMemoryAndWorkers(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxMemory = scsi.MaxTransfer })
	i := f.login("MaxBurstLength=1048576")
	data := pattern(1<<20, 1)
	open := map[uint32]*pdu{}
	begin := func(cmd *pdu) {
		cmd.setTTT(1 << 20)
		i.send(cmd)
		open[cmd.itt()] = cmd
	}
	var r2ts []*pdu
	for range scsi.MaxTransfer >> 20 {
		begin(i.command(write10(0, 2048), 0, []byte{}))
		r2ts = append(r2ts, i.expectOpcode(opR2T))
	}
	for range connWorkers + 8 {
		begin(i.command(read10(0, 2048), 1<<20, nil))
	}
	var out []byte
	for _, r := range r2ts {
		for off := 0; off < len(data); off += 1 << 17 {
			out = append(out, i.marshal(dataOut(open[r.itt()], r.ttt(), uint32(off>>17), off, data[off:off+1<<17], off+1<<17 == len(data)))...)
		}
	}
	sent := make(chan error, 1)
	go func() {
		_, err := i.nc.Write(out)
		sent <- err
	}()
	for len(open) > 0 {
		p := i.recv()
		if p.opcode() == opResponse || p.flags()&flagStatus != 0 {
			delete(open, p.itt())
		}
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}
