package iscsi

import (
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A wire that has written refers to nothing of what it wrote, however many system calls that took.
func TestWireForgetsWhatItWrote(t *testing.T) {
	const size = 600
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	near, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = near.Close() }()
	w := newWire(near, &buffers{}, nil, nil, time.Minute)
	for name, n := range map[string]int{"one call": 3, "a full call and a short one": maxIOV + 3} {
		parts := make([][]byte, n)
		for i := range parts {
			parts[i] = make([]byte, size)
		}
		read := make(chan error, 1)
		go func() {
			_, err := io.CopyN(io.Discard, far, int64(n*size))
			read <- err
		}()
		iovs, err := w.write(parts, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-read; err != nil {
			t.Fatal(err)
		}
		left := 0
		for _, v := range iovs[:cap(iovs)] {
			if v != (unix.Iovec{}) {
				left++
			}
		}
		if left > 0 || w.iov != nil {
			t.Errorf("%s: %d parts are referred to, and iov has room for %d; want none", name, left, cap(w.iov))
		}
	}
}
