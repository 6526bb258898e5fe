package iscsi

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A fakeDriver does what the kernel does until a session is used: it puts the login on the wire, with its own numbers in
// it, and tells what comes back.
type fakeDriver struct {
	incoming chan event
	wg       sync.WaitGroup

	mu       sync.Mutex
	sessions int
	live     bool
	conn     net.Conn
	cmdSN    uint32
	params   map[param]string
	stops    []uint32 // flags of stopConn
	starts   int
	handled  []kind
}

func newFakeDriver() *fakeDriver {
	return &fakeDriver{incoming: make(chan event, 64), cmdSN: 1000, params: map[param]string{}}
}

func (d *fakeDriver) events() <-chan event { return d.incoming }

func (d *fakeDriver) close() {
	d.drop()
	d.wg.Wait()
}

func (d *fakeDriver) drop() {
	d.mu.Lock()
	c := d.conn
	d.conn = nil
	d.mu.Unlock()
	if c != nil {
		c.Close()
	}
	d.wg.Wait()
}

func says(e event, i int) uint32 { return binary.NativeEndian.Uint32(e.raw[saysAt+4*i:]) }

func tells(k kind, words ...uint32) event {
	e := event{kind: k}
	for i, w := range words {
		binary.NativeEndian.PutUint32(e.raw[answerAt+4*i:], w)
	}
	return e
}

func (d *fakeDriver) call(e event) (event, error) {
	d.mu.Lock()
	d.handled = append(d.handled, e.kind)
	d.mu.Unlock()
	a := event{kind: e.kind, raw: e.raw}
	code := func(errno unix.Errno) event { return tells(e.kind, uint32(-int32(errno))) }
	switch e.kind {
	case createSession:
		d.mu.Lock()
		defer d.mu.Unlock()
		d.sessions++
		d.live = true
		return tells(e.kind, uint32(d.sessions), 2), nil
	case bindConn:
		fd, err := unix.FcntlInt(uintptr(binary.NativeEndian.Uint64(e.raw[saysAt+8:])), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return a, err
		}
		f := os.NewFile(uintptr(fd), "bound")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return a, err
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.conn != nil || !d.live {
			c.Close()
			return code(unix.EEXIST), nil
		}
		d.conn = c
		session := says(e, 0)
		d.wg.Go(func() { d.receive(c, session) })
	case setParam:
		d.mu.Lock()
		defer d.mu.Unlock()
		if n := says(e, 3); int(n) != len(e.data) || e.data[n-1] != 0 {
			return code(unix.EINVAL), nil
		}
		d.params[param(says(e, 2))] = string(e.data[:len(e.data)-1])
	case sendPDU:
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.conn == nil {
			return code(unix.ENOTCONN), nil
		}
		h := header(e.data[:headerSize])
		binary.BigEndian.PutUint32(h[24:], d.cmdSN)
		if err := writePDU(d.conn, h, e.data[headerSize:]); err != nil {
			return code(unix.EPIPE), nil
		}
	case startConn:
		d.mu.Lock()
		defer d.mu.Unlock()
		d.starts++
		d.cmdSN += 17 // commands that were sent
	case stopConn:
		d.mu.Lock()
		d.stops = append(d.stops, says(e, 4))
		d.mu.Unlock()
		d.drop()
	case destroySession:
		d.mu.Lock()
		defer d.mu.Unlock()
		d.live = false
	}
	return tells(e.kind, 0), nil
}

// receive tells what comes, and in the end that nothing more does.
func (d *fakeDriver) receive(c net.Conn, session uint32) {
	for {
		h, data, err := readPDU(c)
		d.mu.Lock()
		mine := d.conn == c
		d.mu.Unlock()
		if !mine {
			return
		}
		if err != nil {
			code := uint32(1011)
			if err == io.EOF { //nolint:errorlint // as it comes from a read
				code = 1020
			}
			d.incoming <- tells(connFailed, session, 0, code)
			return
		}
		e := tells(pduReceived, session, 0)
		e.data = append(append(e.data, h[:]...), append(data, 0, 0, 0)...) // netlink pads
		d.incoming <- e
	}
}
