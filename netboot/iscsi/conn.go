package iscsi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Why a connection ends, where it is not the network's doing.
var (
	errLogout     = errors.New("logged out")
	errDiscovered = errors.New("discovery session is old")
	errSilent     = errors.New("initiator is silent")
	errStalled    = errors.New("initiator began something and does not go on with it")
	errDigest     = errors.New("wrong header digest")
	errProtocol   = errors.New("against the protocol")
)

// A conn is a connection. Who owns what:
//
//	serve, the reader    wire's input, header, ahs, text, and each task that it has in hand
//	who has c.writing    wire's output, and the batch that it took
//	s.mu                 what is marked so below
//
// A task is in the hand of one goroutine at a time, or of none while it waits (task.go).
type conn struct {
	srv    *Server
	wire   *wire
	peer   string
	from   netip.Prefix    // where the peer is
	proven bool            // the peer has said who it is, and has proven it if it had to; guarded by srv.mu
	ctx    context.Context //nolint:containedctx // it is the connection's life, for waits that have no other end
	cancel context.CancelFunc
	quota  quota
	done   chan struct{} // closed when no task of it runs any more
	broken atomic.Bool   // nothing more is written

	// From the end of the login on they stay as they are, but for params.maxSend.
	params params
	cid    uint16
	s      *session
	ready  atomic.Pointer[session] // s, once the login response is out
	text   *textPhase

	header   bhs
	ahs      []byte
	midway   bool      // the PDU of this header has not been read to its end
	own      *task     // to be executed by the reader
	owned    uint64    // how many it executed
	ownAfter time.Time // until then it executes none
	short    bool      // there was no memory for data that came unasked, and is none since

	crowd   *crowd
	unread  atomic.Uint64 // while the reader executes: which execution that is
	readEnd chan error    // why there is nothing more to read, where the reader was relieved

	pending atomic.Int64 // bytes that were gathered and not written; changed with s.mu

	// Guarded by s.mu.
	statSN    uint32
	tasks     map[uint32]*task // by ITT; without those that were aborted
	aborted   []*task          // that were being executed then, and are not finished
	alive     int              // tasks that are not finished
	underWay  int              // of them, not immediate and in turn
	immediate int              // of them, immediate
	managing  int              // task management functions that wait for tasks
	out       *batch
	writing   bool
	changed   sync.Cond // a batch was written, or, once the connection is ending, a task ended
	ending    bool      // no task begins any more
	lastTTT   uint32
	workers   int
	backlog   []*task // ready for a worker
	parked    []*task // have data to send when less is pending
	finished  bool
	ticks     uint32 // read deadlines that have passed

	background sync.WaitGroup // workers, and others that end when the connection's tasks do

	watch watch
}

// A watch is what the reader remembers of how lively the initiator is.
type watch struct {
	pdus   uint64
	seen   uint64 // pdus at the last deadline
	data   uint64 // bytes of data segments
	pinged bool
	taken  uint64 // by the peer, when the ping was gathered, and at the last deadline since
	hole   uint32 // ExpCmdSN when something was first seen to wait for it
	since  uint32 // conn.ticks then; 0: nothing waits
}

func newConn(ctx context.Context, srv *Server, nc net.Conn, among *crowd) *conn {
	c := &conn{
		srv:     srv,
		crowd:   among,
		wire:    newWire(nc, &srv.buffers, srv.pipes, srv.stays, srv.cfg.PingTimeout),
		peer:    nc.RemoteAddr().String(),
		from:    networkOf(nc.RemoteAddr()),
		quota:   quota{all: srv.memory},
		done:    make(chan struct{}),
		readEnd: make(chan error, 1),
		tasks:   map[uint32]*task{},
	}
	c.ctx, c.cancel = context.WithCancel(ctx)
	return c
}

// close ends the connection from any goroutine; serve does the rest.
func (c *conn) close() {
	c.cancel()
	_ = c.wire.nc.Close() // a second time says that it is closed
}

// closeFor is close with a line for the log.
func (c *conn) closeFor(err error) {
	if c.ctx.Err() == nil {
		c.srv.log.Info("iSCSI connection ends", "peer", c.peer, "err", err)
	}
	c.close()
}

// serve is the life of a connection: login, full feature phase, end.
func (c *conn) serve() {
	stop := context.AfterFunc(c.ctx, c.close)
	defer stop()
	defer c.srv.forget(c)
	err := c.login()
	if c.s == nil {
		if c.ctx.Err() == nil {
			c.wire.finish()
		}
		c.closeFor(err)
		close(c.done)
		c.wire.drop()
		return
	}
	if err == nil {
		c.ready.Store(c.s)
		if c.s.target != nil {
			c.srv.changed()
		} else {
			life := time.AfterFunc(c.srv.discoveryLife, func() { c.closeFor(errDiscovered) })
			defer life.Stop()
		}
		err = c.fullFeature()
	} else if c.ctx.Err() == nil {
		c.wire.finish()
	}
	c.end(err)
}

// cease closes, and ends what can be ended at once; a second call does nothing.
func (c *conn) cease(err error) {
	s := c.s
	s.mu.Lock()
	ceased := c.ending
	c.ending = true
	s.mu.Unlock()
	if ceased {
		return
	}
	if errors.Is(err, errLogout) || errors.Is(err, io.EOF) {
		c.srv.log.Debug("iSCSI connection ends", "peer", c.peer, "err", err)
		c.close()
	} else {
		c.closeFor(err)
	}
	c.broken.Store(true)
	s.mu.Lock()
	c.abort(c.tasksOf(nil))
	s.mu.Unlock()
	c.flush() // of a broken connection: what was to go on when something is written is let go of
}

// end is cease, waits until no task runs, and ends the session if nobody takes it over.
func (c *conn) end(err error) {
	c.cease(err)
	s := c.s
	s.mu.Lock()
	for c.alive > 0 {
		c.changed.Wait()
	}
	s.mu.Unlock()
	c.background.Wait()
	c.drain()
	s.mu.Lock()
	c.finished = true
	last := s.successor == nil
	s.over = last
	s.mu.Unlock()
	c.wire.drop()
	if last {
		s.end()
	}
	close(c.done)
}

// login carries the login phase, which has a deadline for all of it.
func (c *conn) login() error {
	timeout := time.AfterFunc(c.srv.cfg.LoginTimeout, c.close)
	defer timeout.Stop()
	l := newLogin(loginConfig{directory: c.srv.cfg.Directory})
	for {
		req, err := c.loginRequest()
		if err != nil {
			if c.ctx.Err() != nil {
				return fmt.Errorf("login of %q does not come to an end", l.initiator)
			}
			return err
		}
		resp, done := l.step(req)
		if done && l.ok {
			c.beginSession(l, req, resp)
		}
		if err := c.loginResponse(req, resp); err != nil {
			return err
		}
		if done {
			return l.err
		}
	}
}

// beginSession ends a login that went well with a session, or with an error after all. The Directory is asked before, so that
// who may no longer log in ends no other session, and after: whoever takes an initiator out of the Directory and then calls
// Drop either finds the session, or has it refused here.
func (c *conn) beginSession(l *login, req, resp *pdu) {
	defer c.srv.loggedIn(c)
	err := l.confirm()
	if err == nil {
		c.srv.prove(c)
		if status := c.srv.begin(c.ctx, c, l, req.cmdSN()); status != loginOK {
			l.ok = false
			l.err = fmt.Errorf("login of %q: status %#04x", l.initiator, status)
			failLogin(resp, status)
			return
		}
		err = l.confirm()
	}
	if err != nil {
		l.ok = false
		l.err = fmt.Errorf("login of %q: %w", l.initiator, err)
		failLogin(resp, loginStatus(err))
		return
	}
	resp.setTSIH(c.s.tsih)
}

// join gives the connection its session, and what the login agreed on, before others know of it.
func (c *conn) join(s *session, l *login) {
	c.s, c.changed.L = s, &s.mu
	c.quota.own = s.memory
	c.params, c.cid = l.params, l.cid
	portals := c.srv.cfg.Portals
	if len(portals) == 0 {
		portals = []string{portalOf(c.wire.nc.LocalAddr())}
	}
	c.text = newTextPhase(l, portals)
}

// portalOf is an address as others may be told it: the zone of an IPv6 address is this machine's own.
func portalOf(a net.Addr) string {
	p, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port()).String()
}

func (c *conn) loginRequest() (*pdu, error) {
	p := &pdu{}
	if err := c.wire.readFull(p.bhs[:]); err != nil {
		return nil, fmt.Errorf("reading a login request: %w", err)
	}
	if p.ahsLength() > 0 || p.dataLength() > defaultSegment {
		return nil, fmt.Errorf("%w: login request with an AHS of %d and data of %d bytes", errProtocol, p.ahsLength(), p.dataLength())
	}
	data := make([]byte, padded(p.dataLength()))
	if err := c.wire.readFull(data); err != nil {
		return nil, fmt.Errorf("reading a login request: %w", err)
	}
	p.data = data[:p.dataLength()]
	return p, nil
}

// loginResponse numbers and sends. The window is that of the session, as far as there is one.
func (c *conn) loginResponse(req, resp *pdu) error {
	if resp.loginStatus() == loginOK {
		resp.setStatSN(c.statSN)
		c.statSN++
		resp.setExpCmdSN(req.cmdSN())
		resp.setMaxCmdSN(req.cmdSN() + window - 1)
		if s := c.s; s != nil {
			s.mu.Lock()
			c.windowInto(&resp.bhs)
			s.mu.Unlock()
		}
	}
	resp.setDataLength(len(resp.data))
	out := append(resp.bhs[:], resp.data...)
	out = append(out, make([]byte, padded(len(resp.data))-len(resp.data))...)
	if _, err := c.wire.write([][]byte{out}, nil, nil); err != nil {
		return fmt.Errorf("writing a login response: %w", err)
	}
	return nil
}

// fullFeature answers PDUs until the connection ends. It never returns nil.
func (c *conn) fullFeature() error {
	c.wire.silence = c.silent
	c.wire.keepNear(nearRTT, c.crowd.usual)
	if err := c.wire.nc.SetReadDeadline(time.Now().Add(c.srv.cfg.IdleTimeout)); err != nil {
		return err
	}
	err := c.read()
	if errors.Is(err, errRelieved) {
		err = <-c.readEnd
	}
	return err
}

// read is fullFeature, but also ends with errRelieved.
func (c *conn) read() error {
	for {
		if err := c.readHeader(); err != nil {
			return err
		}
		c.watch.pdus++
		c.midway = true
		if err := c.handle(); err != nil {
			c.drain()
			if c.ctx.Err() == nil {
				c.wire.finish()
			}
			return err
		}
		c.midway = false
		if c.own != nil {
			if err := c.executeOwn(); err != nil {
				return err
			}
		}
		c.ease()
	}
}

// fill is wire.fill, but never waits with answers in hand.
func (c *conn) fill(n int) error {
	if c.wire.buffered() >= n {
		return nil
	}
	c.flush()
	return c.wire.fill(n)
}

// readHeader reads header and AHS and checks their digest. Without that the length of what follows is not known, so that
// a wrong one ends the connection (section 7.7).
func (c *conn) readHeader() error {
	if err := c.fill(bhsLength); err != nil {
		return err
	}
	h := &c.header
	copy(h[:], c.wire.next(bhsLength))
	c.ahs = c.ahs[:0]
	rest := h.ahsLength()
	if c.params.headerDigest {
		rest += digestLength
	}
	if rest == 0 {
		return nil
	}
	if err := c.fill(rest); err != nil {
		return err
	}
	b := c.wire.next(rest)
	c.ahs = append(c.ahs, b[:h.ahsLength()]...)
	if c.params.headerDigest {
		sum := crc32.Update(crc32.Checksum(h[:], castagnoli), castagnoli, c.ahs)
		if sum != binary.LittleEndian.Uint32(b[h.ahsLength():]) {
			return errDigest
		}
	}
	return nil
}

// readData reads the data segment of the PDU at hand. What does not fit into dst is thrown away. bad says that its
// digest is wrong.
func (c *conn) readData(dst []byte) (bad bool, err error) {
	n := c.header.dataLength()
	if n == 0 {
		return false, nil
	}
	c.watch.data += uint64(n) //nolint:gosec // of 24 bits
	if c.wire.buffered() < padded(n) {
		c.flush()
	}
	dst = dst[:min(n, len(dst))]
	if err := c.wire.readFull(dst); err != nil {
		return false, err
	}
	var sum uint32
	if c.params.dataDigest {
		sum = crc32.Checksum(dst, castagnoli)
	}
	for left := padded(n) - len(dst); left > 0; {
		if err := c.fill(1); err != nil {
			return false, err
		}
		p := c.wire.next(min(left, c.wire.buffered()))
		left -= len(p)
		if c.params.dataDigest {
			sum = crc32.Update(sum, castagnoli, p)
		}
	}
	if !c.params.dataDigest {
		return false, nil
	}
	if err := c.fill(digestLength); err != nil {
		return false, err
	}
	return sum != binary.LittleEndian.Uint32(c.wire.next(digestLength)), nil
}

// readSmall is readData into memory of its own, for a data segment of most bytes at most; of a longer one the rest is
// thrown away.
func (c *conn) readSmall(most int) (data []byte, bad bool, err error) {
	if n := min(most, c.header.dataLength()); n > 0 {
		data = make([]byte, n)
	}
	bad, err = c.readData(data)
	return data, bad, err
}

// silent is called when a read deadline has passed, which it sets anew, busy or not. An error ends the connection: the
// initiator did not answer a ping, or left a PDU or a data-out unfinished for longer than IdleTimeout.
func (c *conn) silent() error {
	w := &c.watch
	idle := w.seen == w.pdus
	w.seen = w.pdus
	switch {
	case idle && (c.midway || c.wire.buffered() > 0):
		return fmt.Errorf("%w: a PDU", errStalled)
	case c.stalled():
		return fmt.Errorf("%w: data-out, or a command that others wait for", errStalled)
	case !idle:
		w.pinged = false
	case w.pinged && !c.taking():
		return errSilent
	default:
		if !w.pinged {
			w.pinged = true
			w.taken, _ = c.wire.moved()
			c.ping()
		}
		return c.wire.nc.SetReadDeadline(time.Now().Add(c.srv.cfg.PingTimeout))
	}
	return c.wire.nc.SetReadDeadline(time.Now().Add(c.srv.cfg.IdleTimeout))
}

// taking says whether the initiator took more than the ping since somebody looked: then the ping may be behind data that it
// takes, if slowly (bePatient bounds that).
func (c *conn) taking() bool {
	w := &c.watch
	taken, _ := c.wire.moved()
	more := taken - w.taken
	w.taken = taken
	return more > bhsLength+digestLength
}

// ping sends a NOP-In that wants an answer (section 11.19).
func (c *conn) ping() {
	c.s.mu.Lock()
	c.putPing(0)
	c.s.mu.Unlock()
	c.flush()
}

// putPing gathers what ping sends, about a LUN. It needs s.mu.
func (c *conn) putPing(lun LUN) (ttt uint32) {
	p := &pdu{}
	p.bhs[0], p.bhs[1] = opNopIn, flagFinal
	p.setLUN(formatLUN(lun))
	p.setITT(noTag)
	ttt = c.newTTT()
	p.setTTT(ttt)
	c.put(p, false)
	return ttt
}

// newTTT is a target transfer tag that was not used for long, and never 0, which is no probe's (queue.go). It needs s.mu.
func (c *conn) newTTT() uint32 {
	c.lastTTT++
	if c.lastTTT == noTag {
		c.lastTTT = 1
	}
	return c.lastTTT
}

// requestLogout asks the initiator to log out within so much time (section 11.9).
func (c *conn) requestLogout(within time.Duration) {
	if c.ready.Load() == nil {
		c.close()
		return
	}
	p := &pdu{}
	p.bhs[0], p.bhs[1] = opAsync, flagFinal
	p.setITT(noTag)
	p.bhs[36] = asyncLogout
	binary.BigEndian.PutUint16(p.bhs[42:], uint16(within/time.Second&0xffff))
	c.send(p)
	c.flush()
}
