package iscsi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// window is how many commands of a session may be under way; a session's queue is as deep in Linux and in Windows.
const window = 128

// A session (RFC 7143 section 4.4) is an I_T nexus with one connection. It ends with that connection, unless another one
// takes its place (section 6.3.4).
type session struct {
	srv       *Server
	initiator string
	isid      uint64
	tsih      uint16
	target    *Target // nil: a discovery session
	since     time.Time
	memory    *semaphore.Weighted // the initiator's share
	ended     chan struct{}       // closed when its connection is closed, no task runs and no unit knows it any more

	commands, bytesIn, bytesOut atomic.Uint64

	// mu guards what follows, and the state of its connection and its tasks.
	mu        sync.Mutex
	conn      *conn
	successor *conn // takes over when conn is done
	doomed    bool  // no connection takes over any more
	over      bool
	expCmdSN  uint32
	maxCmdSN  uint32
	params    params          // of the login that began it
	held      map[uint32]held // by CmdSN, those that came before their turn
	nexuses   map[LUN]*nexus
}

// A held request waits for its CmdSN. The zero one is only a number that is used up.
type held struct {
	task *task        // of a command
	do   func() error // of another request: what to do
}

// holds needs s.mu.
func (s *session) holds(cmdSN uint32) bool {
	_, ok := s.held[cmdSN]
	return ok
}

// A nexus is what a session has to do with one unit.
type nexus struct {
	*scsi.Nexus
	unit *unit

	// Guarded by session.mu.
	started int           // tasks whose turn has come and that are not done
	ordered *task         // of them, the ordered one
	waiting []*task       // in order, until the ordered ones before them are done
	orders  bool          // there was an ordered task
	lent    bool          // memory that may change was lent to the kernel
	probe   uint32        // the TTT of a ping that counts as started; 0: there is none
	since   uint32        // conn.ticks when it was sent
	uses    int           // tasks that may still touch the unit or its memory
	removed bool          // the unit was taken away
	unused  chan struct{} // closed when uses is 0; nil until somebody waits for that
}

// info is what Sessions tells.
func (s *session) info() SessionInfo {
	s.mu.Lock()
	peer := s.conn.peer
	s.mu.Unlock()
	return SessionInfo{
		Initiator: s.initiator,
		Target:    s.target.name,
		ISID:      s.isid,
		TSIH:      s.tsih,
		Peer:      peer,
		Since:     s.since,
		Commands:  s.commands.Load(),
		BytesIn:   s.bytesIn.Load(),
		BytesOut:  s.bytesOut.Load(),
	}
}

// kick closes the session's connection for good: none takes its place. s.ended tells when all is over.
func (s *session) kick() {
	s.mu.Lock()
	s.doomed = true
	c, next := s.conn, s.successor
	s.mu.Unlock()
	c.close()
	if next != nil {
		next.close()
	}
}

// begin gives a connection whose login went well its session, and returns the status to log in with: a new one
// (section 6.3.1), a new one in place of one of the same name (6.3.5), or the one that it takes over (6.3.4).
func (srv *Server) begin(ctx context.Context, c *conn, l *login, cmdSN uint32) uint16 {
	if l.tsih != 0 {
		return srv.resume(ctx, c, l)
	}
	for {
		old, status := srv.open(c, l, cmdSN)
		if old == nil {
			if status == loginOK && l.target != nil {
				srv.log.Debug("iSCSI session begins", "initiator", l.initiator, "target", l.target.name, "peer", c.peer)
			}
			return status
		}
		srv.log.Info("iSCSI session is replaced", "initiator", l.initiator, "peer", c.peer)
		old.kick()
		select {
		case <-old.ended:
		case <-ctx.Done():
			return loginUnavailable
		}
	}
}

// room says whether a login may have a session; old is one that has to be ended before. It needs srv.mu.
func (srv *Server) room(l *login) (old *session, status uint16) {
	all, own := 0, 0
	for _, o := range srv.sessions {
		switch {
		case o.target == nil:
			continue
		case o.initiator == l.initiator:
			if o.target == l.target && o.isid == l.isid {
				return o, 0
			}
			own++
		}
		all++
	}
	switch {
	case l.discovery && len(srv.sessions) < maxSessions:
		return nil, loginOK
	case own >= srv.cfg.InitiatorSessions:
		srv.log.Warn("refusing an iSCSI session: the initiator has too many", "initiator", l.initiator, "sessions", own)
	case all >= srv.cfg.MaxSessions || len(srv.sessions) >= maxSessions:
		srv.log.Warn("refusing an iSCSI session: there are too many", "initiator", l.initiator, "sessions", len(srv.sessions))
	default:
		return nil, loginOK
	}
	return nil, loginNoResources
}

// open makes a session, unless there is an old one to be ended before.
func (srv *Server) open(c *conn, l *login, cmdSN uint32) (old *session, status uint16) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if old, status = srv.room(l); old != nil || status != loginOK {
		return old, status
	}
	s := &session{
		srv:       srv,
		initiator: l.initiator,
		isid:      l.isid,
		tsih:      srv.newTSIH(),
		target:    l.target,
		since:     time.Now(),
		ended:     make(chan struct{}),
		memory:    srv.shareOf(l),
		conn:      c,
		params:    l.params,
		expCmdSN:  cmdSN,
		maxCmdSN:  cmdSN + window - 1,
		held:      map[uint32]held{},
		nexuses:   map[LUN]*nexus{},
	}
	c.join(s, l)
	srv.sessions[s.tsih] = s
	if s.target != nil {
		s.target.join(s)
	} else if victim := srv.discoveries.add(c); victim != nil {
		victim.close()
	}
	return nil, loginOK
}

// newTSIH needs srv.mu, and that not all are taken.
func (srv *Server) newTSIH() uint16 {
	for {
		srv.lastTSIH++
		if srv.lastTSIH != 0 && srv.sessions[srv.lastTSIH] == nil {
			return srv.lastTSIH
		}
	}
}

// resume puts c in the place of the connection of a session.
func (srv *Server) resume(ctx context.Context, c *conn, l *login) uint16 {
	srv.mu.Lock()
	s := srv.sessions[l.tsih]
	srv.mu.Unlock()
	if s == nil || s.target == nil || s.initiator != l.initiator || s.isid != l.isid || s.target != l.target {
		return loginNoSession
	}
	s.mu.Lock()
	old := s.conn
	switch {
	case s.over || s.doomed || s.successor != nil:
		s.mu.Unlock()
		return loginNoSession
	case old.cid != l.cid:
		s.mu.Unlock()
		return loginTooMany
	}
	s.successor = c
	s.mu.Unlock()
	srv.log.Info("iSCSI connection is replaced", "initiator", l.initiator, "peer", c.peer)
	old.close()
	select {
	case <-old.done:
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.successor = nil
	if !old.finished {
		return loginUnavailable // and old ends the session
	}
	l.params = s.params.carriedBy(l.params)
	c.join(s, l)
	s.conn = c
	clear(s.held)
	for _, n := range s.nexuses {
		n.unlend() // what the old connection had to say, nobody hears any more
	}
	return loginOK
}

// end is called when the last connection is done.
func (s *session) end() {
	s.mu.Lock()
	nexuses := s.nexuses
	s.nexuses = nil
	s.mu.Unlock()
	for _, n := range nexuses {
		n.Detach()
	}
	if s.target != nil {
		s.target.part(s)
	}
	s.srv.mu.Lock()
	delete(s.srv.sessions, s.tsih)
	s.srv.mu.Unlock()
	if s.target != nil {
		s.srv.changed()
	}
	close(s.ended)
}

// nexus is the one with the unit of that number, made when it is asked for first; nil where there is no such unit. Only
// the goroutine that reads the session's connection calls it.
func (s *session) nexus(lun LUN) *nexus {
	s.mu.Lock()
	n := s.nexuses[lun]
	s.mu.Unlock()
	if n != nil {
		return n
	}
	// Held until the nexus is known, so that Remove finds either the unit still there or this nexus.
	s.target.mu.RLock()
	defer s.target.mu.RUnlock()
	u := s.target.units[lun]
	if u == nil {
		return nil
	}
	n = &nexus{unit: u}
	n.Nexus = u.Attach(scsi.Port{
		Name:       fmt.Sprintf("%s,i,0x%012x", s.initiator, s.isid),
		Target:     fmt.Sprintf("%s,t,0x%04x", s.target.name, ourPortalGroup),
		RelativeID: 1,
	}, func() { s.abortOn(n) })
	s.mu.Lock()
	s.nexuses[lun] = n
	s.mu.Unlock()
	return n
}

// leave ends what the session has to do with a unit that was removed, and waits for that.
func (s *session) leave(u *unit) {
	s.mu.Lock()
	n := s.nexuses[u.lun]
	if n == nil || n.unit != u {
		s.mu.Unlock()
		return
	}
	delete(s.nexuses, u.lun)
	n.removed = true
	c := s.conn
	for _, t := range c.tasksOf(n) {
		if !t.running {
			c.stop(t, fateNoUnit)
		}
	}
	var unused chan struct{}
	if n.uses > 0 {
		unused = make(chan struct{})
		n.unused = unused
	}
	c.goOn(nil) // what was stopped has an answer
	s.mu.Unlock()
	if unused != nil {
		s.awaitUnused(n, unused)
	}
	n.Detach()
}

// errSlow is why awaitUnused closes a connection.
var errSlow = errors.New("initiator is slow to take data of a LUN that is being removed")

// awaitUnused waits until no task touches a unit. A peer that neither takes nor sends anything loses its connection: it can
// come again, and the unit cannot wait for it. What the medium itself is slow with is waited for.
func (s *session) awaitUnused(n *nexus, unused <-chan struct{}) {
	tick := time.NewTicker(s.srv.sendGrace)
	defer tick.Stop()
	for before := s.heed(n); ; {
		select {
		case <-unused:
			return
		case <-tick.C:
		}
		now := s.heed(n)
		if now.waits && now == before {
			now.c.closeFor(errSlow)
		}
		before = now
	}
}

// A heed is what a peer does about a unit that wants to be left.
type heed struct {
	c           *conn
	waits       bool   // tasks wait for the peer, not for the medium
	taken, came uint64 // bytes that the peer took and sent, of all
}

func (s *session) heed(n *nexus) heed {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := heed{c: s.conn}
	h.taken, h.came = h.c.wire.moved()
	left := n.uses
	for _, t := range slices.Concat(slices.Collect(maps.Values(h.c.tasks)), h.c.aborted) {
		if t.n == n && t.running {
			left--
		}
	}
	h.waits = left > 0
	return h
}

// abortOn ends all tasks of a nexus without a word, as PREEMPT AND ABORT of another one wants it (SPC-4 5.13.11.2.7). It
// waits for those that have begun to change the medium.
func (s *session) abortOn(n *nexus) {
	s.mu.Lock()
	c := s.conn
	waits := c.abort(c.tasksOf(n))
	s.mu.Unlock()
	waits.wait()
}

// use and unuse count the tasks that may touch the unit. They need s.mu.
func (n *nexus) use() { n.uses++ }

func (n *nexus) unuse() {
	n.uses--
	if n.uses == 0 && n.unused != nil {
		close(n.unused)
		n.unused = nil
	}
}

// before says that sequence number a comes before b (RFC 1982).
func before(a, b uint32) bool { return (a-b)>>31 != 0 }

// inWindow says whether a command may have this number. It needs s.mu.
func (s *session) inWindow(cmdSN uint32) bool {
	return !before(cmdSN, s.expCmdSN) && !before(s.maxCmdSN, cmdSN)
}

// openWindow lets as many commands in as have room beside those that are under way. The window never shrinks. It needs
// s.mu.
func (s *session) openWindow(underWay int) {
	if last := s.expCmdSN + uint32((window-underWay)&0xffffffff) - 1; before(s.maxCmdSN, last) {
		s.maxCmdSN = last
	}
}

// carriedBy is what holds in a session that goes on with a connection of parameters p: only those below are a connection's
// own (section 13).
func (s params) carriedBy(p params) params {
	s.headerDigest, s.dataDigest, s.maxRecv, s.maxSend = p.headerDigest, p.dataDigest, p.maxRecv, p.maxSend
	return s
}
