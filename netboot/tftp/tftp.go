// Package tftp sends boot loaders to firmware by TFTP (RFC 1350) with the options blksize (RFC 2348) and tsize (RFC 2349).
// It takes no files, and it sends only what its Open knows by name.
package tftp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/pin/tftp/v3"
	"golang.org/x/sync/errgroup"

	"github.com/troupe-dev/troupe/internal/quiet"
)

// Port is where firmware asks; it knows no other.
const Port = 69

const (
	defaultTransfers = 512
	retransmitAfter  = time.Second
	retransmits      = 5
	maxName          = 255
)

var (
	errBusy  = errors.New("too many transfers, try again later")
	errEnded = errors.New("the server is shutting down")
)

// A Server sends files. Its fields must not change once Serve was called.
type Server struct {
	// Open returns a file by a name without any folder; an unknown name is fs.ErrNotExist. Required.
	Open func(name string) (io.ReadSeekCloser, error)
	// Observe is told of each file that was sent, or wasn't. It must not block. nil: nobody is told.
	Observe func(Transfer)

	Transfers int          // how many run at once, each with its own socket; more get an error. 0 is 512
	Log       *slog.Logger // nil: nothing is logged
}

// A Transfer is one file that a machine asked for.
type Transfer struct {
	Peer     netip.Addr
	Name     string // as it was looked for
	Bytes    int64  // sent
	Duration time.Duration
	Err      error // nil: the machine acknowledged the last block
}

// Serve sends files to who asks on conn until ctx ends, and then returns nil. It closes conn. A transfer that is under
// way when ctx ends is broken off, which takes up to six seconds when its machine has gone.
func (s *Server) Serve(ctx context.Context, conn net.PacketConn) error {
	run := s.runner(ctx.Done())
	srv := tftp.NewServer(run.send, nil)
	srv.SetTimeout(retransmitAfter)
	srv.SetRetries(retransmits)
	// The library waits at random, up to a second, before it sends a block again; it has waited for the answer already.
	srv.SetBackoff(func(int) time.Duration { return 0 })

	var g errgroup.Group
	served := make(chan struct{})
	g.Go(func() error {
		defer close(served)
		if err := srv.Serve(conn); err != nil {
			return fmt.Errorf("serving TFTP: %w", err)
		}
		return nil
	})
	select {
	case <-ctx.Done():
	case <-served:
	}
	srv.Shutdown()
	_ = conn.Close() // a Shutdown that came before Serve knew conn has not closed it
	return g.Wait()
}

func (s *Server) runner(stop <-chan struct{}) *runner {
	return &runner{Server: s, stop: stop, slots: make(chan struct{}, s.transfers()), log: quiet.New(s.Log)}
}

func (s *Server) transfers() int {
	if s.Transfers > 0 {
		return s.Transfers
	}
	return defaultTransfers
}

// A runner is a Server at work.
type runner struct {
	*Server
	stop  <-chan struct{} // closed when transfers must end; the library gives its handlers no context
	slots chan struct{}
	log   *slog.Logger
}

// send answers one read request. What it returns as an error goes to the machine as a TFTP error packet.
func (r *runner) send(asked string, to io.ReaderFrom) error {
	t := Transfer{Name: cleanName(asked)}
	out, ok := to.(tftp.OutgoingTransfer)
	if ok {
		a := out.RemoteAddr()
		t.Peer = a.AddrPort().Addr().Unmap()
	}
	start := time.Now()
	var probe bool
	probe, t.Bytes, t.Err = r.transfer(t.Name, to)
	t.Duration = time.Since(start)
	if probe {
		r.log.Debug("TFTP size asked", "peer", t.Peer, "file", t.Name)
		return t.Err
	}
	if t.Err != nil {
		r.log.Warn("TFTP", "peer", t.Peer, "asked", fmt.Sprintf("%q", asked[:min(len(asked), maxName)]), "err", t.Err)
	} else {
		r.log.Info("TFTP sent", "peer", t.Peer, "file", t.Name, "bytes", t.Bytes, "took", t.Duration)
	}
	if r.Observe != nil {
		r.Observe(t)
	}
	return t.Err
}

// transfer sends the file. Firmware asks twice: it breaks the first transfer off once it knows the size (tsize), before
// the first block. That is a probe, and nothing went wrong.
func (r *runner) transfer(name string, to io.ReaderFrom) (probe bool, n int64, err error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	default:
		return false, 0, errBusy
	}
	f, err := r.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, 0, fmt.Errorf("no file %q: %w", name, fs.ErrNotExist)
	}
	if err != nil {
		return false, 0, fmt.Errorf("opening %q: %w", name, err)
	}
	defer f.Close()
	src := &source{ReadSeeker: f, stop: r.stop}
	n, err = to.ReadFrom(src)
	var timeout net.Error
	if err != nil && !src.read && !errors.As(err, &timeout) {
		return true, 0, err
	}
	return false, n, err
}

// A source breaks a transfer off when stop is closed, and notes whether the machine wanted the first block.
type source struct {
	io.ReadSeeker
	stop <-chan struct{}
	read bool
}

func (s *source) Read(p []byte) (int, error) {
	s.read = true
	select {
	case <-s.stop:
		return 0, errEnded
	default:
		return s.ReadSeeker.Read(p)
	}
}

// cleanName takes off what firmware puts around a name: folders, in either direction (the file was named without one, so
// whatever the firmware added means nothing), and bytes after its end (0xff, from BIOS ROMs that copy option 67 whole).
func cleanName(s string) string {
	if len(s) > maxName {
		return ""
	}
	s = strings.TrimRightFunc(s, func(c rune) bool { return c <= ' ' || c > '~' })
	return s[strings.LastIndexAny(s, `/\`)+1:]
}
