package iscsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

func FuzzCommandCDB(f *testing.F) {
	f.Add([]byte{0, 17, ahsExtendedCDB, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16})
	f.Add([]byte{0, 5, ahsBidiRead, 0, 0, 0, 2, 0})
	f.Add([]byte{0, 1, ahsExtendedCDB, 0})
	f.Add([]byte{0xff, 0xff, ahsExtendedCDB, 0})
	f.Fuzz(func(t *testing.T, ahs []byte) {
		p := &pdu{ahs: ahs}
		cdb, _, err := p.commandCDB()
		switch {
		case err != nil && !errors.Is(err, errCDB):
			t.Errorf("error of another kind: %v", err)
		case err == nil && (len(cdb) < 16 || len(cdb) > 16+len(ahs)):
			t.Errorf("CDB of %d bytes from an AHS of %d", len(cdb), len(ahs))
		}
	})
}

func FuzzLUN(f *testing.F) {
	for _, v := range []uint64{0, 255 << 48, 0x4000 << 48, 0x7fff << 48, 0x8000 << 48, 1, 1 << 56} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v uint64) {
		lun, ok := parseLUN(v)
		if !ok {
			return
		}
		if lun > maxLUN {
			t.Fatalf("LUN %d from %#x", lun, v)
		}
		if again, ok := parseLUN(formatLUN(lun)); !ok || again != lun {
			t.Errorf("LUN %d is formatted as that of %d", lun, again)
		}
	})
}

// FuzzConnection gives a connection arbitrary bytes, after a login or in place of one. Whatever they are, it ends when its
// initiator goes.
func FuzzConnection(f *testing.F) {
	i := &initiator{cmdSN: 1}
	var row []byte
	for _, p := range []*pdu{
		i.command(testUnitReady(), 0, nil), i.command(read10(0, 8), 4096, nil), i.command(write10(1, 1), 0, pattern(512, 0)),
		i.request(opNopOut, 0), i.request(opText, 0), i.manage(taskLUNReset, nil), i.request(opLogout, 0),
	} {
		f.Add(i.marshal(p), true)
		row = append(row, i.marshal(p)...)
	}
	f.Add(row, true)
	f.Add(row, false)
	f.Add([]byte("GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"), false)
	f.Fuzz(func(t *testing.T, b []byte, login bool) {
		f, i := servePipe(t, func(c *Config) { c.MaxMemory = scsi.MaxTransfer })
		if login && i.login(loginOptions{cmdSN: 1}) != loginOK {
			t.Fatal("no login")
		}
		gone := make(chan struct{})
		go func() {
			_, _ = io.Copy(io.Discard, i.nc) // until either end closes
			close(gone)
		}()
		_, _ = i.nc.Write(b) // the server may close before it has it all
		_ = i.nc.Close()
		<-gone
		for _, s := range f.srv.sessionList() {
			<-s.ended
		}
		f.stop()
		if !f.srv.memory.TryAcquire(scsi.MaxTransfer) {
			t.Error("memory was not given back")
		}
	})
}

// stormTime is how long the storm lasts; it takes a few times that of processor time.
const (
	stormTime        = 40 * time.Second
	stormTimeIfShort = 3 * time.Second
	stormInitiators  = 12
)

// Initiators that do what they like, on disks that fail now and then, with units that come and go and sessions that are
// dropped: at the end the server still works, and has let go of all.
func TestStorm(t *testing.T) {
	f := serve(t, func(c *Config) {
		c.MaxMemory, c.MaxSessions = scsi.MaxTransfer, 8
		c.LoginTimeout, c.IdleTimeout, c.PingTimeout = 2*time.Second, 200*time.Millisecond, 200*time.Millisecond
	})
	f.image(1, pattern(1<<20, 3))
	f.disk.hook(func(string, int64) error {
		if rand.N(50) == 0 {
			return scsi.ErrMedium
		}
		runtime.Gosched()
		return nil
	})
	duration := stormTime
	if testing.Short() {
		duration = stormTimeIfShort
	}
	ctx, cancel := context.WithTimeout(context.Background(), duration)
	defer cancel()
	var all sync.WaitGroup
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for n := range stormInitiators {
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(n)))
			for ctx.Err() == nil {
				stormOnce(ctx, f, r)
			}
		})
	}
	all.Go(func() { f.stormUnits(ctx) })
	all.Wait()
	f.disk.hook(nil)
	i := f.dial()
	if status := i.login(loginOptions{name: nodeName + ":last"}); status != loginOK && status != loginNoResources {
		t.Errorf("login status %#04x after the storm", status)
	}
	f.stop()
	if !f.srv.memory.TryAcquire(scsi.MaxTransfer) {
		t.Error("memory was not given back")
	}
	if n := len(f.srv.workers); n != 0 {
		t.Errorf("%d workers are left", n)
	}
}

// stormUnits adds and removes units, and drops sessions.
func (f *fixture) stormUnits(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		u, err := scsi.NewUnit(newDisk(), scsi.Config{Serial: "storm"})
		if err == nil {
			err = f.target.Add(2, u)
		}
		if err != nil {
			f.t.Error(err)
			return
		}
		pause(ctx, 5*time.Millisecond)
		if err := f.target.Remove(2); err != nil {
			f.t.Error(err)
			return
		}
		if n%20 == 0 {
			f.srv.Drop(nodeName)
			_ = f.srv.Sessions()
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// A stormy is one connection of the storm.
type stormy struct {
	*initiator
	srv *Server
	r   *rand.Rand
	mu  sync.Mutex
	ttt map[uint32]*pdu // R2Ts by ITT
}

// stormOnce is the life of one connection.
func stormOnce(ctx context.Context, f *fixture, r *rand.Rand) {
	nc, err := net.Dial("tcp", f.addr)
	if err != nil {
		f.t.Error(err)
		return
	}
	defer func() { _ = nc.Close() }()
	_ = nc.SetDeadline(time.Now().Add(patience)) // an error shows in the next write
	s := &stormy{initiator: &initiator{t: f.t, nc: nc, itt: 1}, srv: f.srv, r: r, ttt: map[uint32]*pdu{}}
	if r.IntN(10) == 0 { // no login, or none that is right
		_, _ = nc.Write(s.spoil(s.anything()))
		_, _ = nc.Write(s.spoil(s.loginPDU()))
		return
	}
	p := s.loginPDU()
	if _, err := nc.Write(s.marshal(p)); err != nil {
		return
	}
	resp := readPDU(nc, false)
	if resp == nil || resp.loginStatus() != loginOK {
		return
	}
	s.digests = bytes.Contains(p.data, []byte("DataDigest=CRC32C"))
	s.cmdSN = p.cmdSN()
	var reader sync.WaitGroup
	reader.Go(s.listen)
	s.talk(ctx)
	_ = nc.Close()
	reader.Wait()
}

// readPDU is nil at the end of a connection.
func readPDU(nc net.Conn, digests bool) *pdu {
	p := &pdu{}
	extra := 0
	if digests {
		extra = digestLength
	}
	h := make([]byte, bhsLength+extra)
	if _, err := io.ReadFull(nc, h); err != nil {
		return nil
	}
	copy(p.bhs[:], h)
	n := p.dataLength()
	if n == 0 {
		return p
	}
	p.data = make([]byte, padded(n)+extra)
	if _, err := io.ReadFull(nc, p.data); err != nil {
		return nil
	}
	return p
}

// listen takes what comes, and remembers the R2Ts.
func (s *stormy) listen() {
	for {
		p := readPDU(s.nc, s.digests)
		if p == nil {
			return
		}
		switch p.opcode() {
		case opR2T:
			s.mu.Lock()
			s.ttt[p.itt()] = p
			s.mu.Unlock()
		case opNopIn, opResponse, opTaskResp, opTextResp, opDataIn, opLogoutResp, opAsync, opReject:
		default:
			s.t.Errorf("opcode %#02x from a target", p.opcode())
			return
		}
	}
}

func (s *stormy) loginPDU() *pdu {
	p := &pdu{}
	p.bhs[0], p.bhs[1] = opLogin|opImmediate, flagTransit|stageOperational<<2|stageFullFeature
	p.setISID(uint64(s.r.IntN(6)))
	p.setStatSN(s.r.Uint32())
	if s.r.IntN(2) == 0 {
		p.setStatSN(uint32(s.r.IntN(3)) - 2)
	}
	keys := []string{"InitiatorName=" + nodeName, "TargetName=" + diskTarget}
	choice := []string{
		"HeaderDigest=CRC32C\x00DataDigest=CRC32C", "InitialR2T=No", "ImmediateData=No", "MaxBurstLength=1024",
		"FirstBurstLength=512", "MaxRecvDataSegmentLength=512", "MaxOutstandingR2T=4", "SessionType=Normal",
	}
	if sessions := s.srv.sessionList(); len(sessions) > 0 && s.r.IntN(3) == 0 {
		old := sessions[s.r.IntN(len(sessions))]
		p.setTSIH(old.tsih)
		p.setISID(old.isid)
		choice = choice[:1]
	}
	for _, k := range choice {
		if s.r.IntN(2) == 0 {
			keys = append(keys, k)
		}
	}
	for _, k := range keys {
		p.data = append(append(p.data, k...), 0)
	}
	return p
}

// talk sends PDUs, most of which make sense.
func (s *stormy) talk(ctx context.Context) {
	for range 20 + s.r.IntN(400) {
		if ctx.Err() != nil {
			return
		}
		b := s.marshal(s.anything())
		switch s.r.IntN(200) {
		case 0:
			b = s.spoil2(b)
		case 1:
			b = b[:s.r.IntN(len(b))]
		case 2:
			pause(ctx, time.Duration(s.r.IntN(400))*time.Millisecond)
		}
		if _, err := s.nc.Write(b); err != nil {
			return
		}
	}
}

func (s *stormy) spoil(p *pdu) []byte { return s.spoil2(s.marshal(p)) }

// spoil2 changes a few bits, most of them in the header.
func (s *stormy) spoil2(b []byte) []byte {
	for range 1 + s.r.IntN(4) {
		at := s.r.IntN(min(len(b), bhsLength))
		if s.r.IntN(4) == 0 {
			at = s.r.IntN(len(b))
		}
		b[at] ^= 1 << s.r.IntN(8)
	}
	return b
}

// anything makes a PDU.
func (s *stormy) anything() *pdu {
	var p *pdu
	switch s.r.IntN(16) {
	case 0:
		p = s.request(opNopOut, 0)
		p.setTTT(noTag)
		p.data = make([]byte, s.r.IntN(3000))
	case 1:
		p = s.manage(byte(1+s.r.IntN(6)), nil)
		p.setTTT(s.someTag())
		p.setMaxCmdSN(s.cmdSN - uint32(s.r.IntN(5)) + 2)
	case 2:
		p = s.request(opText, byte(s.r.IntN(4))<<5)
		p.setTTT(noTag)
		p.data = []byte("SendTargets=All\x00")
	case 3:
		p = s.request(byte(s.r.IntN(64)), byte(s.r.IntN(256)))
		for at := 8; at < bhsLength; at++ {
			p.bhs[at] = byte(s.r.Uint32())
		}
		s.cmdSN--
	case 4, 5, 6, 7:
		p = s.answerR2T()
	case 8, 9, 10:
		n := s.blocks()
		p = s.command(write10(uint32(s.r.IntN(100)), uint16(n)), 0, make([]byte, 512*min(n, s.r.IntN(3))))
		if s.r.IntN(4) == 0 {
			n = s.blocks()
		}
		p.setTTT(uint32(n * 512))
		if s.r.IntN(4) == 0 {
			p.bhs[1] &^= flagFinal
		}
	case 11:
		p = s.randomCommand()
	case 12:
		p = s.request(opLogout, byte(s.r.IntN(3)))
		if s.r.IntN(4) > 0 {
			p.setCID(5)
			p.bhs[1] = flagFinal | logoutConnection
		}
	default:
		p = s.command(read10(uint32(s.r.IntN(4000)), uint16(s.blocks())), s.blocks()*500, nil)
	}
	s.twist(p)
	return p
}

// blocks is how many a command moves: few as a rule, and now and then most of a disk.
func (s *stormy) blocks() int {
	if s.r.IntN(3) == 0 {
		return s.r.IntN(4000)
	}
	return s.r.IntN(20)
}

// twist gives a PDU another LUN, attribute, tag, CmdSN or immediacy.
func (s *stormy) twist(p *pdu) {
	switch s.r.IntN(12) {
	case 0:
		p.bhs[0] ^= opImmediate
	case 1:
		p.setStatSN(p.cmdSN() + uint32(s.r.IntN(7)) - 3)
	case 2:
		p.setITT(s.someTag())
	case 3:
		if p.opcode() == opCommand {
			p.bhs[1] = p.bhs[1]&^maskAttr | byte(s.r.IntN(5))
		}
	case 4, 5:
		p.setLUN(formatLUN(LUN(s.r.IntN(4))))
	}
}

func (s *stormy) someTag() uint32 { return s.itt - uint32(s.r.IntN(8)) }

// randomCommand is a CDB of any opcode, some of them with data.
func (s *stormy) randomCommand() *pdu {
	cdb := make([]byte, 16)
	for i := range cdb {
		if s.r.IntN(3) == 0 {
			cdb[i] = byte(s.r.Uint32())
		}
	}
	opcodes := []byte{0x00, 0x03, 0x12, 0x1a, 0x25, 0x28, 0x2f, 0x35, 0x41, 0x42, 0x55, 0x5e, 0x5f, 0x89, 0x8a, 0x93, 0x9e, 0xa0, 0xa3}
	cdb[0] = opcodes[s.r.IntN(len(opcodes))]
	p := s.command(cdb, s.r.IntN(2000), nil)
	if s.r.IntN(2) == 0 {
		p.data = make([]byte, s.r.IntN(600))
		p.bhs[1] |= flagWrite
	}
	if s.r.IntN(8) == 0 {
		p.ahs = binary.BigEndian.AppendUint32(nil, s.r.Uint32()&0x001f03ff)
		p.bhs[4] = 1
	}
	return p
}

// answerR2T sends a part of what was asked for, or something like it.
func (s *stormy) answerR2T() *pdu {
	s.mu.Lock()
	defer s.mu.Unlock()
	for itt, r := range s.ttt {
		n := int(r.residual())
		p := dataOut(r, r.ttt(), 0, int(r.bufferOff()), make([]byte, n), true)
		switch s.r.IntN(8) {
		case 0:
			p.data = p.data[:n/2]
		case 1:
			p.setBufferOff(p.bufferOff() + 512)
		case 2:
			p.setTTT(noTag)
		case 3:
			p.bhs[1] = 0
		default:
			delete(s.ttt, itt)
		}
		return p
	}
	return dataOut(&pdu{}, s.r.Uint32(), s.r.Uint32(), s.r.IntN(1000), make([]byte, s.r.IntN(600)), s.r.IntN(2) == 0)
}
