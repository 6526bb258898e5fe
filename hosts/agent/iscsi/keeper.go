package iscsi

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/troupe-dev/troupe/internal/backoff"
)

// A keeper holds one session for as long as it lives.
//
//	connect ─▶ bind ─▶ log in ─▶ start ─▶ watch: until the kernel or the target ends the connection
//	   ▲                  │                  │
//	   └── backoff ◀── stop ◀────────────────┘
//
// Before the first login a session is taken away again after an error, so that nothing hangs on one that never was.
// After it, it stays: the disks are its own.
type keeper struct {
	log    *slog.Logger
	driver driver
	load   func() (Config, error)
	tell   func(Status)  // is told how it is; called by one goroutine
	online func(Status)  // brings disks back that were given up meanwhile; called after each login, in a goroutine of its own
	limit  time.Duration // of the pauses between tries; 0 means maxPause
	login  time.Duration // how long a login may take; 0 means loginTime

	patience func() time.Duration // how long a session that was up may be refused without a break
	gone     func(time.Duration)  // hears that it was, for that long; called by the goroutine of run

	status   Status
	refusals refusals
	beside   sync.WaitGroup
	exists   bool // in the kernel
	stopped  bool // stopConn was the last that the kernel was told of the connection
}

// maxPause is the longest pause between two tries: a server that is back is used at once.
const maxPause = 2 * time.Second

// Limits of one try.
const (
	connectTime = 2 * time.Second // a lost SYN is sent again after 1 s
	loginTime   = 15 * time.Second
	logoutTime  = 3 * time.Second
)

// Queues (drivers/scsi/libiscsi.c). The first is a power of 2.
const (
	maxCommands = 128
	queueDepth  = 64
)

// run goes on until ctx is done, or until the session was taken away by somebody else. A session that was never logged in
// to, or whose disks are not used, is then closed with closeSession.
func (k *keeper) run(ctx context.Context) error {
	if k.limit == 0 {
		k.limit = maxPause
	}
	if k.login == 0 {
		k.login = loginTime
	}
	tries := backoff.Backoff{First: 100 * time.Millisecond, Limit: k.limit}
	for {
		err := k.logIn(ctx)
		if err == nil {
			st := k.status
			k.beside.Go(func() { k.online(st) }) // the kernel reads a disk that it uses again, and so may wait for the next login
			k.log.Info("iSCSI session is up", "logins", k.status.Logins)
			since := time.Now()
			if err = k.watch(ctx); time.Since(since) > k.limit { // one that breaks at once each time is not tried at once
				tries.Reset()
			}
		}
		if errors.Is(err, errDestroyed) {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		k.down(err)
		if err := tries.Wait(ctx); err != nil {
			return err
		}
	}
}

// adopt goes on with a session whose keeper is gone. How its connection is, nobody knows: it begins anew.
func (k *keeper) adopt(st Status) error {
	k.status, k.exists = st, true
	k.status.Up, k.status.Error = false, "its keeper was gone"
	k.tell(k.status)
	return k.stop()
}

// down notes why the session is not up, and ends the connection.
func (k *keeper) down(why error) {
	if k.status.Up || k.status.Error != why.Error() {
		k.log.Warn("iSCSI session is down, logging in again", "error", why)
	}
	k.status.Up, k.status.Error, k.status.Refused = false, why.Error(), isRefusal(why)
	k.tell(k.status)
	if err := k.stop(); err != nil {
		k.log.Error("the iSCSI connection does not stop", "error", err)
	}
	if k.status.Logins > 0 { // else nothing stands on the session yet
		k.weigh(why)
	}
}

// weigh looks whether a try that failed was one of too many refusals.
func (k *keeper) weigh(why error) {
	now, limit := time.Now(), k.patience()
	since := k.refusals.add(why, now)
	switch {
	case since.IsZero():
	case now.Sub(since) >= limit:
		k.refusals = refusals{}
		k.gone(now.Sub(since))
	case since.Equal(now):
		k.log.Warn("the target has no disk for this machine any more; where it says nothing else, the machine reboots", "in", limit)
	}
}

// stop ends the connection: for good where there was no login yet.
func (k *keeper) stop() error {
	switch {
	case !k.exists:
		return nil
	case k.status.Logins == 0:
		return k.closeSession()
	case k.stopped:
		return nil
	}
	_, err := ask(k.driver, "stopping the connection", stopRequest(k.status.Session, stopRecover))
	k.stopped = err == nil
	return err
}

// closeSession takes the session out of the kernel, with its disks. So whatever waits for one of these ends.
func (k *keeper) closeSession() error {
	if !k.exists {
		return nil
	}
	defer k.beside.Wait()
	id := k.status.Session
	_, err1 := ask(k.driver, "stopping the connection", stopRequest(id, stopTerminate))
	_, err2 := ask(k.driver, "removing the connection", request(destroyConn, id, 0))
	_, err3 := ask(k.driver, "removing the session", request(destroySession, id))
	k.exists = false
	return errors.Join(err1, err2, err3)
}

// logIn is one try, from the connect to the start.
func (k *keeper) logIn(ctx context.Context) error {
	cfg, err := k.load()
	if err != nil {
		return err
	}
	portal := cfg.Portal
	const maxMoves = 4
	for range maxMoves {
		err := k.logInAt(ctx, cfg, portal)
		var moved *movedError
		if !errors.As(err, &moved) {
			return err
		}
		portal = moved.to
		if err := k.stop(); err != nil {
			return err
		}
	}
	return fmt.Errorf("login: sent on more than %d times, last to %s", maxMoves, portal)
}

func (k *keeper) logInAt(ctx context.Context, cfg Config, portal netip.AddrPort) error {
	dialer := net.Dialer{Timeout: connectTime}
	conn, err := dialer.DialContext(ctx, "tcp", portal.String())
	if err != nil {
		return err
	}
	defer conn.Close() // the kernel has its own hold on the socket
	if err := k.bind(conn); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, k.login)
	defer cancel()
	k.drain()
	l := login{cfg: cfg, wire: kernelWire{k.driver, k.status.Session}, rand: rand.Reader}
	a, err := l.run(ctx)
	if err != nil {
		return err
	}
	return k.start(cfg, a)
}

// bind gives the socket to the kernel.
func (k *keeper) bind(conn net.Conn) error {
	if err := k.create(); err != nil {
		return err
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return errors.New("binding the connection: it is no socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var askErr error
	err = raw.Control(func(fd uintptr) {
		k.stopped = false
		_, askErr = ask(k.driver, "binding the connection", bindRequest(k.status.Session, fd))
	})
	return errors.Join(err, askErr)
}

// create makes the session in the kernel, once.
func (k *keeper) create() error {
	if k.exists {
		return nil
	}
	a, err := ask(k.driver, "creating a session", createSessionRequest(maxCommands, queueDepth))
	if err != nil {
		return err
	}
	k.status.Session, k.status.Host = a.word(0), a.word(1)
	if _, err := ask(k.driver, "creating a connection", request(createConn, k.status.Session, 0)); err != nil {
		_, undo := ask(k.driver, "removing the session", request(destroySession, k.status.Session))
		return errors.Join(err, undo)
	}
	k.exists = true
	return nil
}

// drain forgets what was said of the connection before.
func (k *keeper) drain() {
	for {
		select {
		case <-k.driver.events():
		default:
			return
		}
	}
}

// start tells the kernel what was agreed on, and lets it use the session.
func (k *keeper) start(cfg Config, a agreed) error {
	for _, e := range parameters(k.status.Session, cfg, a) {
		if _, err := ask(k.driver, "setting a parameter of the session", e); err != nil {
			return err
		}
	}
	if _, err := ask(k.driver, "starting the connection", request(startConn, k.status.Session, 0)); err != nil {
		return err
	}
	k.status.Up, k.status.Error, k.status.Refused = true, "", false
	k.status.Logins++
	k.tell(k.status)
	return nil
}

// parameters are all that the kernel is told. Times are in seconds. The kernel sends a NOP after 5 s without a word of
// the target, and gives the connection up 5 s after that: long before the 30 s after which SCSI begins to abort commands.
func parameters(session uint32, cfg Config, a agreed) []event {
	b := func(v bool) uint64 {
		if v {
			return 1
		}
		return 0
	}
	return []event{
		numberRequest(session, paramMaxRecv, maxRecvData),
		numberRequest(session, paramMaxXmit, a.maxXmit),
		numberRequest(session, paramHeaderDigest, 1),
		numberRequest(session, paramDataDigest, 1),
		numberRequest(session, paramInitialR2T, b(a.initialR2T)),
		numberRequest(session, paramMaxR2T, a.maxR2T),
		numberRequest(session, paramImmediate, b(a.immediate)),
		numberRequest(session, paramFirstBurst, a.firstBurst),
		numberRequest(session, paramMaxBurst, a.maxBurst),
		numberRequest(session, paramPDUInOrder, 1),
		numberRequest(session, paramDataInOrder, 1),
		numberRequest(session, paramERL, 0),
		paramRequest(session, paramTarget, cfg.Target),
		paramRequest(session, paramInitiator, cfg.Initiator),
		numberRequest(session, paramTPGT, a.tpgt),
		paramRequest(session, paramAddress, cfg.Portal.Addr().String()),
		numberRequest(session, paramPort, uint64(cfg.Portal.Port())),
		paramRequest(session, paramRecovery, "-1"), // for ever
		numberRequest(session, paramFastAbort, 1),
		numberRequest(session, paramAbort, 15),
		numberRequest(session, paramLUReset, 30),
		numberRequest(session, paramTargetReset, 30),
		numberRequest(session, paramPing, 5),
		numberRequest(session, paramRecv, 5),
	}
}

// watch waits for the end of the connection, and returns why it came.
func (k *keeper) watch(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-k.driver.events():
			switch {
			case !ok:
				return errNoEvents
			case e.kind == 0: // what was lost may be the end
				return errors.New("events of the kernel were lost")
			case e.session() != k.status.Session:
				continue
			}
			if err := k.ended(ctx, e); err != nil {
				return err
			}
		}
	}
}

// ended says why an event ends the connection; nil: it does not.
func (k *keeper) ended(ctx context.Context, e event) error {
	switch e.kind {
	case connFailed:
		return connError(e.word(2))
	case sessionDestroyed:
		return errDestroyed
	case pduReceived:
		h, _, err := e.pdu()
		if err != nil || h.opcode() != opAsync {
			return err
		}
		switch h.asyncEvent() {
		case asyncLogout, asyncRenegotiation:
			k.logOut(ctx)
			return errors.New("the target asked for a logout")
		case asyncDropsOne, asyncDropsAll:
			return errors.New("the target ends the connection")
		}
	}
	return nil
}

// logOut tells the target, which asked for it, that nothing more comes. A target that does not answer ends the connection
// by itself.
func (k *keeper) logOut(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, logoutTime)
	defer cancel()
	w := kernelWire{k.driver, k.status.Session}
	if h, _, err := w.exchange(ctx, logoutRequest(), nil); err != nil || h.opcode() != opLogoutResponse {
		k.log.Warn("the target does not answer a logout", "error", err)
	}
}
