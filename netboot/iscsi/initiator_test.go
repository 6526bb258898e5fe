package iscsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/troupe-dev/troupe/internal/pipelisten"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	diskTarget = "iqn.2026-11.dev.troupe:disks"
	nodeName   = "iqn.2026-11.dev.troupe:n1:initiator"
	diskSize   = 2 << 20
)

// patience bounds what a test waits for that is bound to come.
const patience = 30 * time.Second

// A disk is a Medium in memory, at which a test can stand in the way.
type disk struct {
	mu   sync.Mutex
	data []byte
	// before, where it is set, is called with the name of the method and an offset, before it does something.
	before func(method string, off int64) error
}

// diskContent is what a disk has at first: each 8 bytes are different.
var diskContent = sync.OnceValue(func() []byte {
	b := make([]byte, diskSize)
	for i := 0; i < len(b); i += 8 {
		binary.BigEndian.PutUint64(b[i:], uint64(i)*0x9e3779b97f4a7c15)
	}
	return b
})

func newDisk() *disk { return &disk{data: bytes.Clone(diskContent())} }

func (d *disk) Size() int64    { return int64(len(d.data)) }
func (d *disk) ReadOnly() bool { return false }

func (d *disk) begin(method string, off int64) error {
	d.mu.Lock()
	before := d.before
	d.mu.Unlock()
	if before == nil {
		return nil
	}
	return before(method, off)
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.begin("read", off); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(p, d.data[off:]), nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.begin("write", off); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.data[off:], p), nil
}

func (d *disk) Sync() error { return d.begin("sync", 0) }

func (d *disk) Zero(off, n int64, _ bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	return nil
}

func (d *disk) Mapped(off int64) (int64, bool) { return d.Size() - off, true }

func (d *disk) hook(before func(method string, off int64) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.before = before
}

func (d *disk) bytes(off, n int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.data[off : off+n])
}

// A gate holds back whoever calls wait until it is opened, and tells who came.
type gate struct {
	came chan int64
	open chan struct{}
}

func newGate() *gate { return &gate{make(chan int64, 256), make(chan struct{})} }

// holding makes a hook that holds back one method.
func (g *gate) holding(method string) func(string, int64) error {
	return func(m string, off int64) error {
		if m == method {
			g.came <- off
			<-g.open
		}
		return nil
	}
}

// directory lets everybody use its one target.
type directory struct{ target *Target }

func (d directory) Discover(string) (*CHAP, []string) { return nil, []string{d.target.Name()} }

func (d directory) Open(_, name string) (*Target, *CHAP, error) {
	if name != d.target.Name() {
		return nil, nil, ErrNoTarget
	}
	return d.target, nil, nil
}

// A fixture is a server with one target, on LUN 0 of which lies disk.
type fixture struct {
	t      *testing.T
	srv    *Server
	target *Target
	disk   *disk
	addr   string
	stop   func() // returns when Serve has
}

func serve(t *testing.T, change func(*Config)) *fixture {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, l, change)
}

// servePipe is serve for one connection, that is no socket.
func servePipe(t *testing.T, change func(*Config)) (*fixture, *initiator) {
	t.Helper()
	l := pipelisten.New()
	f := serveOn(t, l, change)
	nc, err := l.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return f, &initiator{t: t, nc: nc}
}

func serveOn(t *testing.T, l net.Listener, change func(*Config)) *fixture {
	t.Helper()
	f := &fixture{t: t, target: NewTarget(diskTarget), disk: newDisk(), addr: l.Addr().String()}
	f.add(0, f.disk)
	cfg := Config{Directory: directory{f.target}}
	if change != nil {
		change(&cfg)
	}
	var err error
	if f.srv, err = NewServer(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.srv.Serve(ctx, l) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(f.stop)
	return f
}

func (f *fixture) add(lun LUN, m scsi.Medium) {
	f.t.Helper()
	u, err := scsi.NewUnit(m, scsi.Config{Serial: fmt.Sprint("test", lun)})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.target.Add(lun, u); err != nil {
		f.t.Fatal(err)
	}
}

// An initiator is the other end of a connection, one PDU at a time.
type initiator struct {
	t       *testing.T
	nc      net.Conn
	itt     uint32
	cmdSN   uint32
	exp     uint32 // the next StatSN
	tsih    uint16
	digests bool // both
	last    bhs  // the header that came last
}

// login is how an initiator logs in.
type loginOptions struct {
	name  string
	isid  uint64
	tsih  uint16
	cid   uint16
	cmdSN uint32
	keys  []string
}

// dial connects without a login.
func (f *fixture) dial() *initiator {
	f.t.Helper()
	nc, err := net.Dial("tcp", f.addr)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		f.t.Fatal(err)
	}
	return &initiator{t: f.t, nc: nc, itt: 100}
}

// login dials, logs in, and has the unit attention of LUN 0 behind it.
func (f *fixture) login(keys ...string) *initiator {
	f.t.Helper()
	i := f.dial()
	if status := i.login(loginOptions{keys: keys}); status != loginOK {
		f.t.Fatalf("login status %#04x", status)
	}
	i.ready()
	return i
}

// ready takes the unit attention of a new nexus.
func (i *initiator) ready() {
	i.t.Helper()
	if r := i.do(i.command(testUnitReady(), 0, nil)); r.status != byte(scsi.CheckCondition) || !strings.HasPrefix(r.sense, "6/29") {
		i.t.Fatalf("first command: status %#02x, sense %s, want a unit attention", r.status, r.sense)
	}
}

// login goes from the operational stage to the full feature phase in one request.
func (i *initiator) login(o loginOptions) (status uint16) {
	i.t.Helper()
	if o.name == "" {
		o.name = nodeName
	}
	if o.isid == 0 {
		o.isid = 0x800000000001
	}
	p := &pdu{}
	p.bhs[0] = opLogin | opImmediate
	p.bhs[1] = flagTransit | stageOperational<<2 | stageFullFeature
	p.setTSIH(o.tsih)
	p.setISID(o.isid)
	p.setCID(o.cid)
	p.setITT(i.itt)
	i.itt++
	i.cmdSN = o.cmdSN
	p.setStatSN(o.cmdSN) // CmdSN lies at the same place
	keys := []string{"InitiatorName=" + o.name, "TargetName=" + diskTarget}
	for _, k := range append(keys, o.keys...) {
		p.data = append(append(p.data, k...), 0)
		i.digests = i.digests || k == "DataDigest=CRC32C"
	}
	digests := i.digests
	i.digests = false
	i.send(p)
	r := i.recvAny()
	i.digests = digests
	if r == nil {
		return loginTargetError
	}
	if r.opcode() != opLoginResp {
		i.t.Fatalf("opcode %#02x answers a login", r.opcode())
	}
	i.exp, i.tsih = r.statSN()+1, r.tsih()
	return r.loginStatus()
}

func bothDigests() []string { return []string{"HeaderDigest=CRC32C", "DataDigest=CRC32C"} }

// send writes a PDU with its digests. What data is in it sets DataSegmentLength, if nothing else is there.
func (i *initiator) send(p *pdu) {
	i.t.Helper()
	if _, err := i.nc.Write(i.marshal(p)); err != nil {
		i.t.Fatalf("sending opcode %#02x: %v", p.opcode(), err)
	}
}

func (i *initiator) marshal(p *pdu) []byte {
	if p.dataLength() == 0 {
		p.setDataLength(len(p.data))
	}
	b := append(append([]byte{}, p.bhs[:]...), p.ahs...)
	if i.digests {
		b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	}
	if len(p.data) == 0 {
		return b
	}
	data := append(append([]byte{}, p.data...), make([]byte, padded(len(p.data))-len(p.data))...)
	b = append(b, data...)
	if i.digests {
		b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(data, castagnoli))
	}
	return b
}

// recv is the next PDU, whose digests and StatSN are right.
func (i *initiator) recv() *pdu {
	i.t.Helper()
	p := i.recvAny()
	if p == nil {
		i.t.Fatal("the connection is closed")
	}
	switch op := p.opcode(); {
	case op == opDataIn && p.flags()&flagStatus == 0:
	case op == opR2T || op == opNopIn && p.itt() == noTag:
		if p.statSN() != i.exp {
			i.t.Fatalf("opcode %#02x tells StatSN %d, the next is %d", op, p.statSN(), i.exp)
		}
	case p.statSN() != i.exp:
		i.t.Fatalf("opcode %#02x has StatSN %d, want %d", op, p.statSN(), i.exp)
	default:
		i.exp++
	}
	return p
}

// recvAny is the next PDU, or nil where the connection is closed.
func (i *initiator) recvAny() *pdu {
	i.t.Helper()
	p := &pdu{}
	if _, err := io.ReadFull(i.nc, p.bhs[:]); err != nil {
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			i.t.Fatalf("nothing came: %v", err)
		}
		return nil
	}
	i.last = p.bhs
	if i.digests {
		i.checkDigest("header", p.bhs[:])
	}
	if p.dataLength() == 0 {
		return p
	}
	data := make([]byte, padded(p.dataLength()))
	if _, err := io.ReadFull(i.nc, data); err != nil {
		i.t.Fatalf("reading the data of opcode %#02x: %v", p.opcode(), err)
	}
	if i.digests {
		i.checkDigest("data", data)
	}
	p.data = data[:p.dataLength()]
	return p
}

func (i *initiator) checkDigest(what string, b []byte) {
	i.t.Helper()
	var sum [digestLength]byte
	if _, err := io.ReadFull(i.nc, sum[:]); err != nil {
		i.t.Fatalf("reading the %s digest: %v", what, err)
	}
	if got, want := binary.LittleEndian.Uint32(sum[:]), crc32.Checksum(b, castagnoli); got != want {
		i.t.Fatalf("%s digest %#08x, want %#08x", what, got, want)
	}
}

// closed waits for the end of the connection; what comes before it is in the result.
func (i *initiator) closed() (before []*pdu) {
	i.t.Helper()
	for {
		p := i.recvAny()
		if p == nil {
			return before
		}
		before = append(before, p)
	}
}

// The opcodes of the CDBs used here.
func testUnitReady() []byte { return make([]byte, 6) }

func cdb10(op byte, lba uint32, blocks uint16) []byte {
	cdb := make([]byte, 10)
	cdb[0] = op
	binary.BigEndian.PutUint32(cdb[2:], lba)
	binary.BigEndian.PutUint16(cdb[7:], blocks)
	return cdb
}

func read10(lba uint32, blocks uint16) []byte  { return cdb10(0x28, lba, blocks) }
func write10(lba uint32, blocks uint16) []byte { return cdb10(0x2a, lba, blocks) }
func sync10() []byte                           { return cdb10(0x35, 0, 0) }

// command makes a SCSI Command with the next CmdSN: a read of expect bytes if that is not 0, a write with data as
// immediate data if there is some.
func (i *initiator) command(cdb []byte, expect int, data []byte) *pdu {
	p := &pdu{data: data}
	p.bhs[0], p.bhs[1] = opCommand, flagFinal|attrSimple
	if expect > 0 {
		p.bhs[1] |= flagRead
	}
	if data != nil {
		p.bhs[1] |= flagWrite
		expect = len(data)
	}
	p.setITT(i.itt)
	i.itt++
	p.setTTT(uint32(expect)) // EDTL lies at the same place
	p.setStatSN(i.cmdSN)     // CmdSN lies at the same place
	i.cmdSN++
	p.setExpCmdSN(i.exp) // ExpStatSN lies at the same place
	copy(p.bhs[32:], cdb)
	return p
}

// immediate makes a PDU one for immediate delivery, and gives its CmdSN back.
func (i *initiator) immediate(p *pdu) *pdu {
	p.bhs[0] |= opImmediate
	i.cmdSN--
	return p
}

// request makes a request that is no SCSI command.
func (i *initiator) request(op, flags byte) *pdu {
	p := &pdu{}
	p.bhs[0], p.bhs[1] = op, flagFinal|flags
	p.setITT(i.itt)
	i.itt++
	p.setStatSN(i.cmdSN)
	i.cmdSN++
	p.setExpCmdSN(i.exp)
	return p
}

// manage makes a Task Management Request, for immediate delivery.
func (i *initiator) manage(function byte, ref *pdu) *pdu {
	p := i.immediate(i.request(opTask, function))
	p.setTTT(noTag)
	if ref != nil {
		p.setTTT(ref.itt())
		p.setMaxCmdSN(ref.cmdSN()) // RefCmdSN lies at the same place
		p.setLUN(ref.lun())
	}
	return p
}

// dataOut makes a SCSI Data-Out.
func dataOut(cmd *pdu, ttt, sn uint32, off int, data []byte, final bool) *pdu {
	p := &pdu{data: data}
	p.bhs[0] = opDataOut
	if final {
		p.bhs[1] = flagFinal
	}
	p.setLUN(cmd.lun())
	p.setITT(cmd.itt())
	p.setTTT(ttt)
	p.setDataSN(sn)
	p.setBufferOff(uint32(off))
	return p
}

// A result is the outcome of a command, as the initiator sees it.
type result struct {
	status   byte
	sense    string // key/ASCASCQ
	data     []byte
	flags    byte // of the residual
	residual uint32
	dataIns  int
}

// do sends a command and waits for its outcome. It serves no R2T.
func (i *initiator) do(p *pdu) result {
	i.t.Helper()
	i.send(p)
	return i.outcome(p)
}

// outcome reads until the outcome of one command, and holds its Data-In against the rules.
func (i *initiator) outcome(cmd *pdu) (r result) {
	i.t.Helper()
	for {
		p := i.recv()
		if p.itt() != cmd.itt() {
			i.t.Fatalf("opcode %#02x of task %d, waiting for %d", p.opcode(), p.itt(), cmd.itt())
		}
		switch p.opcode() {
		case opDataIn:
			if int(p.dataSN()) != r.dataIns || int(p.bufferOff()) != len(r.data) {
				i.t.Fatalf("Data-In %d at %d, want %d at %d", p.dataSN(), p.bufferOff(), r.dataIns, len(r.data))
			}
			r.dataIns++
			r.data = append(r.data, p.data...)
			if p.flags()&flagStatus == 0 {
				continue
			}
			if !p.final() {
				i.t.Fatal("Data-In with status and without F")
			}
		case opResponse:
			if p.bhs[2] != 0 {
				i.t.Fatalf("SCSI Response %#02x", p.bhs[2])
			}
			r.sense = senseOf(p.data)
		default:
			i.t.Fatalf("opcode %#02x, waiting for the outcome of a command", p.opcode())
		}
		r.status = p.bhs[3]
		r.flags, r.residual = p.flags()&(flagOverflow|flagUnderflow), p.residual()
		return r
	}
}

func senseOf(data []byte) string {
	if len(data) < 2+14 {
		return ""
	}
	s := data[2:]
	const digits = "0123456789abcdef"
	return string([]byte{digits[s[2]&15], '/', digits[s[12]>>4], digits[s[12]&15], digits[s[13]>>4], digits[s[13]&15]})
}

// quiet proves that nothing is on its way: a ping that is sent now is what is answered next.
func (i *initiator) quiet() {
	i.t.Helper()
	p := i.immediate(i.request(opNopOut, 0))
	p.setTTT(noTag)
	i.send(p)
	if r := i.recv(); r.opcode() != opNopIn || r.itt() != p.itt() {
		i.t.Fatalf("opcode %#02x of task %d, waiting for the answer to a ping", r.opcode(), r.itt())
	}
}

// expectGood fails unless the result is that of a command that went well, with nothing left.
func (i *initiator) expectGood(r result) {
	i.t.Helper()
	if r.status != byte(scsi.Good) || r.residual != 0 || r.flags != 0 {
		i.t.Fatalf("status %#02x, sense %s, residual %d (flags %#02x), want GOOD and none", r.status, r.sense, r.residual, r.flags)
	}
}

// expectOpcode reads a PDU that must be of this kind.
func (i *initiator) expectOpcode(op byte) *pdu {
	i.t.Helper()
	p := i.recv()
	if p.opcode() != op {
		i.t.Fatalf("opcode %#02x, want %#02x", p.opcode(), op)
	}
	return p
}

// expectReject reads a Reject of that PDU.
func (i *initiator) expectReject(reason byte, of *pdu) {
	i.t.Helper()
	p := i.expectOpcode(opReject)
	if p.bhs[2] != reason || !bytes.Equal(p.data, of.bhs[:]) {
		i.t.Fatalf("Reject %#02x of %x, want %#02x of %x", p.bhs[2], p.data, reason, of.bhs)
	}
}

// pattern is data that tells where it is from.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>9) ^ byte(i) ^ seed
	}
	return b
}
