package iscsi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/quiet"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// The defaults of Config.
const (
	defaultSessions     = 4096
	extraConnections    = 1280 // in login, in discovery, or being replaced
	defaultMemory       = 256 << 20
	defaultLoginTimeout = 15 * time.Second
	defaultIdleTimeout  = 30 * time.Second
	defaultPingTimeout  = 15 * time.Second
)

// Bounds that need no setting.
const (
	// maxSessions is how many TSIHs there are.
	maxSessions = 1<<16 - 1
	// maxLogins is how many connections are in login at a time: many hosts may start at once. maxDiscoveries is how many are
	// in discovery sessions, which last discoveryLife at most.
	maxLogins      = 1024
	maxDiscoveries = 64
	discoveryLife  = time.Minute
	// memoryShare is which part of Config.MaxMemory one initiator may have at most.
	memoryShare = 4
	// maxWorkers is how many commands are in the hands of their Mediums at a time, of all connections; connWorkers is one
	// connection's share.
	maxWorkers  = 256
	connWorkers = 32
	// logoutGrace is how long initiators have to log out when the server stops.
	logoutGrace = 2 * time.Second
	// sendGrace is how long a peer may take nothing while data of a unit that is being removed waits for it.
	sendGrace = 3 * time.Second
)

// A Server is an iSCSI target node with as many targets as its Directory knows.
//
// Each connection has one goroutine that reads (conn.go), and for commands that may wait for a disk a few that work
// (task.go); a single one of these the reader executes itself (own.go). Whoever has an answer puts it into the connection's
// batch, and whoever finds nobody writing writes it (output.go). Serve waits for all of them.
type Server struct {
	cfg       Config
	log       *slog.Logger
	buffers   buffers
	memory    *semaphore.Weighted
	share     int64         // of memory, for one initiator
	workers   chan struct{} // has an element for each that works
	stays     chan struct{} // has an element for each reader that waits in the kernel
	pipes     *pipes
	residency residency
	sendGrace time.Duration

	discoveryLife time.Duration

	mu          sync.Mutex
	conns       map[*conn]struct{}
	logins      strangers           // of conns
	discoveries strangers           // of conns
	sessions    map[uint16]*session // by TSIH
	lastTSIH    uint16
}

// NewServer makes a server of cfg. It has no connections until Serve brings them.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Directory == nil {
		return nil, errors.New("iSCSI server without a Directory")
	}
	setDefault(&cfg.MaxSessions, defaultSessions)
	setDefault(&cfg.InitiatorSessions, max(1, cfg.MaxSessions/4))
	setDefault(&cfg.MaxConnections, cfg.MaxSessions+extraConnections)
	setDefault(&cfg.MaxMemory, defaultMemory)
	setDefault(&cfg.LoginTimeout, defaultLoginTimeout)
	setDefault(&cfg.IdleTimeout, defaultIdleTimeout)
	setDefault(&cfg.PingTimeout, defaultPingTimeout)
	switch {
	case cfg.MaxSessions < 0 || cfg.MaxSessions > maxSessions:
		return nil, fmt.Errorf("%d sessions: not between 1 and %d", cfg.MaxSessions, maxSessions)
	case cfg.MaxConnections < 0:
		return nil, fmt.Errorf("%d connections: less than one", cfg.MaxConnections)
	case cfg.MaxMemory < scsi.MaxTransfer:
		return nil, fmt.Errorf("memory of %d bytes: less than the %d of one command", cfg.MaxMemory, scsi.MaxTransfer)
	case cfg.LoginTimeout < 0 || cfg.IdleTimeout < 0 || cfg.PingTimeout < 0:
		return nil, errors.New("negative timeout")
	}
	return &Server{
		cfg:       cfg,
		log:       quiet.New(cfg.Log),
		memory:    semaphore.NewWeighted(cfg.MaxMemory),
		share:     max(cfg.MaxMemory/memoryShare, scsi.MaxTransfer),
		workers:   make(chan struct{}, maxWorkers),
		stays:     make(chan struct{}, runtime.GOMAXPROCS(0)/2),
		pipes:     newPipes(),
		residency: residency{start: time.Now()},
		sendGrace: sendGrace,

		discoveryLife: discoveryLife,

		conns:       map[*conn]struct{}{},
		logins:      strangers{room: maxLogins},
		discoveries: strangers{room: maxDiscoveries},
		sessions:    map[uint16]*session{},
	}, nil
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Serve answers the connections that l accepts, until ctx ends: then it asks the initiators to log out, gives them two
// seconds, and closes. It returns when each of its connections is closed and each goroutine has ended. A Server may serve
// several listeners at once. The error is that of a listener that broke.
func (srv *Server) Serve(ctx context.Context, l net.Listener) error {
	connCtx, closeAll := context.WithCancel(context.WithoutCancel(ctx))
	defer closeAll()
	stop := context.AfterFunc(ctx, func() {
		_ = l.Close() // Accept tells
	})
	defer stop()
	mine := &crowd{closing: connCtx.Done(), usual: unpace(l), conns: map[*conn]struct{}{}}
	err := srv.acceptAll(ctx, connCtx, l, mine)
	if ctx.Err() != nil {
		err = nil
	}
	_ = l.Close() // closed already, or broken
	mine.logout(logoutGrace)
	closeAll()
	mine.running.Wait()
	return err
}

// acceptAll accepts until ctx ends or l is broken; connCtx is that of the connections.
func (srv *Server) acceptAll(ctx, connCtx context.Context, l net.Listener, mine *crowd) error {
	for pause := 5 * time.Millisecond; ; {
		nc, err := l.Accept()
		if err == nil {
			pause = 5 * time.Millisecond
			srv.admit(connCtx, nc, mine)
			continue
		}
		if isBroken(err) || ctx.Err() != nil {
			return fmt.Errorf("accepting on %s: %w", l.Addr(), err)
		}
		srv.log.Warn("accepting an iSCSI connection", "err", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, time.Second)
	}
}

// admit starts a connection, if there is room for one or can be made by closing one that is in login.
func (srv *Server) admit(ctx context.Context, nc net.Conn, mine *crowd) {
	c := newConn(ctx, srv, nc, mine)
	victim, full := srv.enter(c)
	if full {
		srv.log.Warn("refusing an iSCSI connection: there are too many", "peer", c.peer, "connections", srv.cfg.MaxConnections)
		c.close()
		return
	}
	if victim != nil {
		victim.closeFor(errCrowded)
	}
	mine.add(c)
	mine.running.Go(func() {
		defer mine.remove(c)
		c.serve()
	})
}

// enter puts a connection on the list, and takes the victim off it.
func (srv *Server) enter(c *conn) (victim *conn, full bool) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if len(srv.conns) >= srv.cfg.MaxConnections {
		if len(srv.logins.conns) == 0 {
			return nil, true
		}
		victim = srv.logins.evict(c)
	}
	if v := srv.logins.add(c); v != nil {
		victim = v
	}
	delete(srv.conns, victim)
	srv.conns[c] = struct{}{}
	return victim, false
}

// prove notes that the peer is who it says, so that others make place before it; loggedIn, that its login is over.
func (srv *Server) prove(c *conn) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	c.proven = true
}

func (srv *Server) loggedIn(c *conn) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.logins.remove(c)
}

// forget takes a connection that ended off the lists.
func (srv *Server) forget(c *conn) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	delete(srv.conns, c)
	srv.logins.remove(c)
	srv.discoveries.remove(c)
}

// A crowd is the connections of one listener.
type crowd struct {
	running sync.WaitGroup
	closing <-chan struct{} // closed when all of them are to end
	usual   string          // what unpace says of the listener

	// Of the lookout (own.go).
	awake  atomic.Bool // there is one
	active atomic.Bool // a reader has executed something since it looked
	looks  atomic.Uint64

	mu    sync.Mutex
	conns map[*conn]struct{}
}

func (w *crowd) add(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[c] = struct{}{}
}

func (w *crowd) remove(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, c)
}

// logout asks all for a logout, and waits for that.
func (w *crowd) logout(grace time.Duration) {
	w.mu.Lock()
	conns := slices.Collect(maps.Keys(w.conns))
	w.mu.Unlock()
	deadline := time.NewTimer(grace)
	defer deadline.Stop()
	for _, c := range conns {
		w.running.Go(func() { c.requestLogout(grace) })
	}
	for _, c := range conns {
		select {
		case <-c.done:
		case <-deadline.C:
			return
		}
	}
}

// Sessions tells of the sessions in full feature phase that have a target, in the order of their TSIHs.
func (srv *Server) Sessions() []SessionInfo {
	var infos []SessionInfo
	for _, s := range srv.sessionList() {
		if s.target != nil {
			infos = append(infos, s.info())
		}
	}
	return infos
}

func (srv *Server) sessionList() []*session {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	list := slices.Collect(maps.Values(srv.sessions))
	slices.SortFunc(list, func(a, b *session) int { return int(a.tsih) - int(b.tsih) })
	return list
}

// Drop ends the sessions of an initiator. It returns when their connections are closed and none of their commands runs. A
// login under way goes on if the Directory still lets it: who is to stay away is taken out of that before.
func (srv *Server) Drop(initiator string) {
	for _, s := range srv.sessionList() {
		if s.initiator == initiator {
			s.kick()
			<-s.ended
		}
	}
}

// changed tells Config.Changed, where there is one.
func (srv *Server) changed() {
	if srv.cfg.Changed != nil {
		srv.cfg.Changed()
	}
}

// shareOf is the share of memory that the sessions of an initiator have together. It needs srv.mu.
func (srv *Server) shareOf(l *login) *semaphore.Weighted {
	for _, s := range srv.sessions {
		if l.target != nil && s.target != nil && s.initiator == l.initiator {
			return s.memory
		}
	}
	return semaphore.NewWeighted(srv.share)
}

// isBroken says that no Accept can go well any more. Of all else that accept(2) fails with, much is the network's or the
// peer's doing (ENETDOWN, EPROTO, EPERM by a firewall), or passes when files are closed.
func isBroken(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, unix.EBADF) || errors.Is(err, unix.EINVAL)
}
