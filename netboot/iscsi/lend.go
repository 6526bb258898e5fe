package iscsi

import (
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Much mapped memory is lent to the kernel, page by page, in place of being copied into its buffers: vmsplice(2) puts the
// pages into a pipe, and splice(2) from there to the socket. What is sent over loopback is then copied once, by the one
// who reads it, and what is sent by a network card not at all.
//
// It is looked at when it is sent, sent again, or read at the other end of loopback: long after the write, so that a later
// write may still change it. Of an image nothing changes. Elsewhere a read may show what was written until the initiator
// has its data, and so after its task is done here: only an ordered task of the same session must not be seen so (queue.go).
const (
	// lendSize is from how many bytes of a data segment on it is worth two system calls more.
	lendSize = 128 << 10
	// maxPipes is how many connections lend at a time; others copy. The kernel allows a user without privileges 128 pipes of
	// this size, all processes together (pipe(7), pipe-user-pages-soft).
	maxPipes = 64
	pipeSize = 512 << 10
)

// A span is some of the parts of a batch: from the first, before the last.
type span struct{ first, last int }

// pipes are what memory is lent through. A nil pipes has none.
type pipes struct {
	places chan struct{} // has an element for each that is in use
	idle   sync.Pool
}

func newPipes() *pipes { return &pipes{places: make(chan struct{}, maxPipes)} }

// A pipe is in use by one wire, or by nobody and then empty.
type pipe struct {
	r, w  int
	close runtime.Cleanup
}

// get is nil where all are in use, or there is none to be had.
func (ps *pipes) get() *pipe {
	if ps == nil {
		return nil
	}
	select {
	case ps.places <- struct{}{}:
	default:
		return nil
	}
	if p, ok := ps.idle.Get().(*pipe); ok {
		return p
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		<-ps.places
		return nil
	}
	if _, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize); err != nil { //nolint:gosec // descriptors are not negative
		closePipe(fds) // copying is faster than a pipe of two pages
		<-ps.places
		return nil
	}
	p := &pipe{r: fds[0], w: fds[1]}
	p.close = runtime.AddCleanup(p, closePipe, fds)
	return p
}

// put takes back what get gave. Where something is left in it, nobody gets it again.
func (ps *pipes) put(p *pipe, left int) {
	if left == 0 {
		ps.idle.Put(p)
	} else {
		p.close.Stop()
		runtime.KeepAlive(p) // Stop stops nothing else
		closePipe([2]int{p.r, p.w})
	}
	<-ps.places
}

func closePipe(fds [2]int) {
	_ = unix.Close(fds[0]) // nobody waits for what is in it
	_ = unix.Close(fds[1])
}

// lendOut lends what w.iov has, when the socket may take something; false means that it does not. Where the kernel does not
// lend, w.lending says so, and what is left is still in w.iov: copying it says what is wrong with it, if anything is.
func (w *wire) lendOut(fd uintptr) bool {
	left := 0
	for _, v := range w.iov {
		left += int(v.Len) //nolint:gosec // they are all in memory
	}
	for left > 0 {
		if w.piped == 0 && !w.fillPipe() {
			w.lending = false
			return true
		}
		flags := unix.SPLICE_F_NONBLOCK
		if w.more || w.piped < left { // without more to come it would be kept back for 200 ms
			flags |= unix.SPLICE_F_MORE
		}
		n, err := unix.Splice(w.pipe.r, nil, int(fd), nil, w.piped, flags)
		switch {
		case err == nil && n > 0:
			w.piped, left = w.piped-int(n), left-int(n)
			w.wrote(int(n))
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			w.bePatient()
			return false
		default:
			w.lending = false
			return true
		}
	}
	return true
}

// fillPipe puts the first of w.iov into the pipe, which is empty, as much as goes in.
func (w *wire) fillPipe() bool {
	n, _, errno := unix.Syscall6(unix.SYS_VMSPLICE, uintptr(w.pipe.w), uintptr(unsafe.Pointer(&w.iov[0])), uintptr(len(w.iov)), unix.SPLICE_F_NONBLOCK, 0, 0) //nolint:gosec // as above
	if errno != 0 {
		return false
	}
	w.piped = int(n) //nolint:gosec // no more than the pipe takes
	return n > 0
}
