package iscsi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A driver is the kernel's side of all sessions.
type driver interface {
	// call sends one request and returns its answer.
	call(e event) (event, error)
	// events are what the kernel says by itself. One with kind 0 says that some were lost.
	events() <-chan event
}

// replyTime is how long the kernel may take for an answer, beyond what it does before the request is taken.
const replyTime = 5 * time.Second

// A netlinkDriver asks over one socket and listens on another, so that no answer is looked for among events.
type netlinkDriver struct {
	handle   uint64 // of the transport "tcp"
	requests int
	listener *os.File
	incoming chan event
	log      *slog.Logger
	wg       sync.WaitGroup

	mu       sync.Mutex // held for a request and its answer
	sequence uint32
}

// groupISCSID is the multicast group of events (ISCSI_NL_GRP_ISCSID).
const groupISCSID = 1

// openDriver talks to the module iscsi_tcp, which is loaded. Sys is the directory of sysfs.
func openDriver(sys *os.Root, log *slog.Logger) (*netlinkDriver, error) {
	text, err := sys.ReadFile("class/iscsi_transport/tcp/handle")
	if err != nil {
		return nil, fmt.Errorf("the kernel's iSCSI initiator is not there: %w", err)
	}
	handle, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("reading the handle of iscsi_tcp: %w", err)
	}
	d := &netlinkDriver{handle: handle, incoming: make(chan event, 16), log: log}
	if d.requests, err = netlinkSocket(0, 0); err != nil {
		return nil, err
	}
	tv := unix.NsecToTimeval(int64(replyTime))
	listener, err := netlinkSocket(unix.SOCK_NONBLOCK, 1<<(groupISCSID-1))
	if err := errors.Join(err, unix.SetsockoptTimeval(d.requests, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)); err != nil {
		return nil, errors.Join(err, unix.Close(d.requests))
	}
	d.listener = os.NewFile(uintptr(listener), "NETLINK_ISCSI")
	d.wg.Go(d.listen)
	return d, nil
}

func netlinkSocket(flags int, groups uint32) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, unix.NETLINK_ISCSI)
	if err != nil {
		return -1, fmt.Errorf("opening a netlink socket to the iSCSI initiator: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return -1, errors.Join(fmt.Errorf("binding a netlink socket: %w", err), unix.Close(fd))
	}
	return fd, nil
}

func (d *netlinkDriver) close() error {
	err := errors.Join(d.listener.Close(), unix.Close(d.requests))
	for range d.incoming { // until listen has ended
	}
	d.wg.Wait()
	return err
}

func (d *netlinkDriver) events() <-chan event { return d.incoming }

// maxMessage is the most that one message of the kernel has, in bytes: a PDU of a login, or of an event.
const maxMessage = 64 << 10

// listen hands on what the kernel says, until the socket is closed.
func (d *netlinkDriver) listen() {
	defer close(d.incoming)
	buf := make([]byte, maxMessage)
	for {
		n, err := d.listener.Read(buf)
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case err != nil: // ENOBUFS where the kernel said more than the socket holds
			d.log.Error("some of the kernel's iSCSI events are lost", "error", err)
			d.incoming <- event{}
			continue
		}
		events, err := decodeEvents(buf[:n])
		if err != nil {
			d.log.Warn("an iSCSI event is not understood", "error", err)
		}
		for _, e := range events {
			d.incoming <- e
		}
	}
}

func (d *netlinkDriver) call(e event) (event, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sequence++
	err := unix.Sendto(d.requests, e.encode(d.handle, d.sequence), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err != nil {
		return event{}, fmt.Errorf("asking the iSCSI initiator: %w", err)
	}
	buf := make([]byte, nlHeader+eventSize+maxMessage)
	for {
		n, _, err := unix.Recvfrom(d.requests, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return event{}, fmt.Errorf("waiting for the iSCSI initiator: %w", err)
		}
		answers, err := decodeEvents(buf[:n])
		if err != nil {
			return event{}, err
		}
		for _, a := range answers {
			if a.kind == e.kind || a.kind == requestFailed {
				return a, nil
			}
		}
	}
}

// ask is call, with whatever went wrong as an error.
func ask(d driver, what string, e event) (event, error) {
	a, err := d.call(e)
	if err != nil {
		return a, fmt.Errorf("%s: %w", what, err)
	}
	code := int32(0)
	switch {
	case a.kind == requestFailed:
		code = int32(a.error) //nolint:gosec // the kernel's own conversion
	case e.kind != createSession && e.kind != createConn && e.kind != destroySession:
		code = a.code()
	}
	if code != 0 {
		return a, fmt.Errorf("%s: %w", what, unix.Errno(max(code, -code)))
	}
	return a, nil
}

// A kernelWire exchanges PDUs of a login through the kernel.
type kernelWire struct {
	driver  driver
	session uint32
}

func (w kernelWire) exchange(ctx context.Context, h header, data []byte) (header, []byte, error) {
	if _, err := ask(w.driver, "sending a PDU", pduRequest(w.session, h, data)); err != nil {
		return header{}, nil, err
	}
	for {
		select {
		case <-ctx.Done():
			return header{}, nil, fmt.Errorf("waiting for the target's answer: %w", ctx.Err())
		case e, ok := <-w.driver.events():
			switch {
			case !ok:
				return header{}, nil, errNoEvents
			case e.kind == 0:
				return header{}, nil, errors.New("events of the kernel were lost")
			case e.session() != w.session:
			case e.kind == connFailed:
				return header{}, nil, connError(e.word(2))
			case e.kind == sessionDestroyed:
				return header{}, nil, errDestroyed
			case e.kind == pduReceived:
				return e.pdu()
			}
		}
	}
}

var (
	errNoEvents  = errors.New("the kernel's iSCSI events have ended")
	errDestroyed = errors.New("somebody else took the session away, and its disks with it")
)

// A connError is why the kernel gave up a connection (enum iscsi_err).
type connError uint32

func (e connError) Error() string {
	text := map[connError]string{
		1007: "malformed lengths", 1008: "protocol error", 1011: "connection lost", 1013: "session lost", 1014: "header digest",
		1015: "data digest", 1019: "transport is down", 1020: "connection closed", 1022: "no answer to a NOP",
	}[e]
	return strings.TrimSpace(fmt.Sprintf("the kernel gave up the connection with %d %s", uint32(e), text))
}
