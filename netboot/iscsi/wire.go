package iscsi

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readSize is how much one read takes in. A read brings many commands, or the most of a burst of data.
const readSize = 64 << 10

// slowest is how many bytes a second a peer has to take on the whole.
const slowest = 64 << 10

// How long, and how much, a connection goes on to read when it has written its last.
const (
	lingerTime  = time.Second
	lingerBytes = 1 << 20
)

// maxStay is how long a read may wait in the kernel before it leaves the waiting to the runtime: for an initiator that has
// one command under way, and goes on at once.
const maxStay = time.Millisecond

// maxIOV is how many pieces one sendmsg takes (IOV_MAX).
const maxIOV = 1024

// A wire carries bytes over a connection. A read buffer is there only while something is in it: a connection that waits
// takes no memory for it.
//
// One goroutine reads, and one at a time writes.
type wire struct {
	nc       net.Conn
	raw      syscall.RawConn // nil where nc is no socket: then mapped memory must not be written
	pool     *buffers
	pipes    *pipes        // to lend memory through; nil: it is copied
	patience time.Duration // how long the peer may take no byte while we write

	// stay has the next read, where nothing has come, wait in the kernel for maxStay at most: to be woken through the runtime's
	// poller takes 50 µs more (measured: a server of sockets and nothing else, beside one that blocks). Meanwhile it keeps a
	// thread, so that stays bounds how many do.
	stay  bool
	stays chan struct{}

	// silence, where it is set, is called when a read deadline has passed; a read goes on unless it returns an error.
	silence func() error

	buf  *buffer // nil: nothing is buffered
	r, w int     // what is buffered: buf.b[r:w]

	// Of the raw.Read under way; kept here, so that it costs no allocation.
	readInto []byte
	readN    int
	readErr  error
	readFn   func(fd uintptr) bool

	// Of the raw.Write under way.
	iov      []unix.Iovec // what is left
	writeErr error
	since    time.Time // when the peer was first seen to take less than we write; zero: there is no write deadline
	taken    int64     // how much it took since
	lending  bool      // iov is lent
	more     bool      // more comes behind iov
	pipe     *pipe     // to lend through; nil: none is held
	piped    int       // how many bytes are in it: the first of iov, and those that were copied after all
	writeFn  func(fd uintptr) bool

	sent atomic.Uint64 // bytes that were written
}

func newWire(nc net.Conn, pool *buffers, pipes *pipes, stays chan struct{}, patience time.Duration) *wire {
	w := &wire{nc: nc, pool: pool, pipes: pipes, stays: stays, patience: patience}
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			w.raw = raw
		}
	}
	w.readFn, w.writeFn = w.tryRead, w.tryWrite
	return w
}

// fill reads until n bytes are buffered; n <= readSize.
func (w *wire) fill(n int) error {
	for w.w-w.r < n {
		if w.buf != nil && len(w.buf.b)-w.r < n {
			w.w = copy(w.buf.b, w.buf.b[w.r:w.w])
			w.r = 0
		}
		if err := w.readMore(); err != nil {
			return err
		}
	}
	return nil
}

// next is n bytes that fill has brought. They hold until the next fill.
func (w *wire) next(n int) []byte {
	b := w.buf.b[w.r : w.r+n]
	w.advance(n)
	return b
}

func (w *wire) advance(n int) {
	w.r += n
	if w.r == w.w {
		w.r, w.w = 0, 0
	}
}

func (w *wire) buffered() int { return w.w - w.r }

// readFull fills p: with what is buffered first, then straight from the connection.
func (w *wire) readFull(p []byte) error {
	if n := min(w.buffered(), len(p)); n > 0 {
		copy(p, w.buf.b[w.r:w.r+n])
		w.advance(n)
		p = p[n:]
	}
	for len(p) > 0 {
		n, err := w.read(p)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// readMore appends to the buffer what one read brings.
func (w *wire) readMore() error {
	var p []byte
	if w.buffered() > 0 {
		p = w.buf.b[w.w:]
	}
	n, err := w.read(p)
	w.w += n
	return err
}

// read reads into p, or into the read buffer where p is empty; that is got from the pool when there is something to read.
func (w *wire) read(p []byte) (int, error) {
	for {
		n, err := w.readOnce(p)
		if err == nil || w.silence == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		if err := w.silence(); err != nil {
			return 0, err
		}
	}
}

func (w *wire) readOnce(p []byte) (int, error) {
	if w.raw == nil {
		if len(p) == 0 {
			p = w.room()
		}
		n, err := w.nc.Read(p)
		if n > 0 {
			err = nil // comes again
		}
		return n, err
	}
	w.readInto = p
	err := w.raw.Read(w.readFn)
	w.readInto = nil
	if err != nil {
		return 0, err
	}
	return w.readN, w.readErr
}

// room is the whole read buffer, in which nothing is.
func (w *wire) room() []byte {
	if w.buf == nil {
		w.buf = w.pool.get(readSize)
	}
	return w.buf.b
}

// tryRead is called when the socket may have something; false means that it has not.
func (w *wire) tryRead(fd uintptr) bool {
	p := w.readInto
	if len(p) == 0 {
		p = w.room()
	}
	for {
		n, err := unix.Read(int(fd), p)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && w.stay && w.comesSoon(fd):
		case err == unix.EAGAIN:
			w.giveBack()
			return false
		case err != nil:
			w.readN, w.readErr = 0, os.NewSyscallError("read", err)
			return true
		case n == 0:
			w.readN, w.readErr = 0, io.EOF
			return true
		default:
			w.readN, w.readErr = n, nil
			return true
		}
	}
}

// comesSoon waits for something to read.
func (w *wire) comesSoon(fd uintptr) bool {
	w.stay = false
	select {
	case w.stays <- struct{}{}:
	default:
		return false
	}
	defer func() { <-w.stays }()
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd & 0x7fffffff), Events: unix.POLLIN}}, int(maxStay/time.Millisecond))
	return n > 0 && err == nil
}

// giveBack returns the read buffer to the pool if it is empty.
func (w *wire) giveBack() {
	if w.buf != nil && w.r == w.w {
		w.pool.put(w.buf)
		w.buf, w.r, w.w = nil, 0, 0
	}
}

// moved is how many bytes the peer's kernel took, and how many came from it, ever. Where nobody knows, the first is how many
// were written.
func (w *wire) moved() (taken, came uint64) {
	taken = w.sent.Load()
	if w.raw == nil {
		return taken, 0
	}
	// Of a closed connection nobody asks for long.
	_ = w.raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			taken, came = info.Bytes_acked, info.Bytes_received
		}
	})
	return taken, came
}

// finish tells the peer that nothing more is written, and reads for a moment what it still sends: closing a socket with
// unread input could cost the peer the last that was written.
func (w *wire) finish() {
	half, ok := w.nc.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	w.drop()
	w.silence = nil
	if w.nc.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	for n := 0; n < lingerBytes; n += w.buffered() {
		w.drop()
		if w.readMore() != nil {
			return
		}
	}
}

// drop returns the read buffer with what is in it.
func (w *wire) drop() {
	w.r, w.w = 0, 0
	w.giveBack()
}

// write writes all parts, and lends those that it may; iovs is room for it to work in, which it gives back empty, and larger
// where it needed more. The error has EFAULT in its chain where a part is mapped memory without a file below it, and
// os.ErrDeadlineExceeded where the peer took nothing for too long.
func (w *wire) write(parts [][]byte, lent []span, iovs []unix.Iovec) ([]unix.Iovec, error) {
	if w.raw == nil {
		return iovs, w.writeParts(parts)
	}
	defer w.returnPipe()
	for at := 0; at < len(parts); {
		end := len(parts)
		lend := len(lent) > 0 && at == lent[0].first
		switch {
		case lend && !w.havePipe():
			lend, lent = false, nil
		case lend:
			end, lent = lent[0].last, lent[1:]
		case len(lent) > 0:
			end = lent[0].first
		}
		w.lending = lend
		var err error
		if iovs, err = w.writeStretch(parts[at:end], end < len(parts), iovs); err != nil {
			return iovs, err
		}
		if lend && !w.lending {
			lent = nil // the kernel does not
		}
		at = end
	}
	return iovs, nil
}

// havePipe gets the pipe, if there is one.
func (w *wire) havePipe() bool {
	if w.pipe == nil {
		w.pipe = w.pipes.get()
	}
	return w.pipe != nil
}

func (w *wire) returnPipe() {
	if w.pipe != nil {
		w.pipes.put(w.pipe, w.piped)
		w.pipe, w.piped = nil, 0
	}
}

// writeStretch writes parts that are all lent, or all copied; more says that others follow.
func (w *wire) writeStretch(parts [][]byte, more bool, iovs []unix.Iovec) ([]unix.Iovec, error) {
	for len(parts) > 0 {
		iovs = iovs[:0]
		for len(parts) > 0 && len(iovs) < maxIOV {
			if p := parts[0]; len(p) > 0 {
				iovs = append(iovs, unix.Iovec{Base: &p[0], Len: uint64(len(p))})
			}
			parts = parts[1:]
		}
		w.iov, w.more = iovs, more || len(parts) > 0
		err := w.writeIOV()
		w.iov = nil
		clear(iovs) // the room is kept for long, and what was written is not
		if err != nil {
			return iovs[:0], err
		}
	}
	return iovs[:0], nil
}

// writeIOV writes w.iov whole.
func (w *wire) writeIOV() error {
	for len(w.iov) > 0 {
		w.writeErr = nil
		err := w.raw.Write(w.writeFn)
		if err == nil {
			err = w.writeErr
		}
		if err != nil {
			return err
		}
	}
	if !w.since.IsZero() {
		// The next write starts without a deadline. An error would say that the connection is closed, as the next write does.
		_ = w.nc.SetWriteDeadline(time.Time{})
		w.since, w.taken = time.Time{}, 0
	}
	return nil
}

// tryWrite is called when the socket may take something; false means that it does not.
func (w *wire) tryWrite(fd uintptr) bool {
	if w.lending && !w.lendOut(fd) {
		return false
	}
	// MSG_MORE keeps a header from going out before the data that is lent behind it.
	flags := 0
	if w.more {
		flags = unix.MSG_MORE
	}
	for len(w.iov) > 0 {
		m := unix.Msghdr{Iov: &w.iov[0]}
		m.SetIovlen(len(w.iov))
		n, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m)), uintptr(flags))
		switch errno {
		case 0:
			w.wrote(int(n)) //nolint:gosec // of what was written, which an int counted
		case unix.EINTR:
		case unix.EAGAIN:
			w.bePatient()
			return false
		default:
			w.writeErr = os.NewSyscallError("sendmsg", errno)
			return true
		}
	}
	return true
}

// bePatient sets the write deadline for a peer that does not take what we have for it: so much time, and more for what it
// takes meanwhile.
func (w *wire) bePatient() {
	if w.since.IsZero() {
		w.since, w.taken = time.Now(), 0
	}
	deadline := w.since.Add(w.patience + time.Duration(w.taken)*time.Second/slowest)
	_ = w.nc.SetWriteDeadline(deadline) // fails only where the wait that follows does
}

// wrote takes n bytes off w.iov.
func (w *wire) wrote(n int) {
	w.taken += int64(n)
	w.sent.Add(uint64(n)) //nolint:gosec // not negative
	for n > 0 {
		v := &w.iov[0]
		if uint64(n) < v.Len {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.Len -= uint64(n)
			return
		}
		n -= int(v.Len) //nolint:gosec // as above
		w.iov = w.iov[1:]
	}
}

// writeParts is write for what is no socket.
func (w *wire) writeParts(parts [][]byte) error {
	if err := w.nc.SetWriteDeadline(time.Now().Add(w.patience)); err != nil {
		return err
	}
	b := net.Buffers(parts)
	n, err := b.WriteTo(w.nc)
	w.sent.Add(uint64(n)) //nolint:gosec // as above
	return err
}
