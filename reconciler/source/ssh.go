package source

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/transport"
	"golang.org/x/crypto/ssh"
)

// sshTimeout is for connecting and for the handshake.
const sshTimeout = 30 * time.Second

// newSSHRemote runs git-upload-pack over SSH. go-git's own transport is not used: its handshake heeds no context, so that a
// host that accepts and then says nothing would hold it for ever.
func newSSHRemote(cfg Config, ep *transport.Endpoint) (*wire, error) {
	addr := net.JoinHostPort(strings.Trim(ep.Host, "[]"), strconv.Itoa(cmp.Or(ep.Port, 22)))
	dial := func(ctx context.Context) (session, error) { return dialSSH(ctx, cfg, ep, addr) }
	return &wire{dial: dial, branch: plumbing.NewBranchReferenceName(cfg.Branch)}, nil
}

func dialSSH(ctx context.Context, cfg Config, ep *transport.Endpoint, addr string) (*sshSession, error) {
	config, release, err := sshConfig(ctx, cfg, ep, addr)
	if err != nil {
		return nil, err
	}
	defer release()
	dctx, cancel := context.WithTimeout(ctx, sshTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(dctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	// Closing the connection is what ends reads and writes when ctx ends.
	stopDial := context.AfterFunc(dctx, func() { _ = conn.Close() })
	c, chans, reqs, err := ssh.NewClientConn(conn, addr, config)
	if !stopDial() && err == nil {
		err = dctx.Err()
	}
	if err != nil {
		return nil, errors.Join(err, ignoreClosed(conn.Close()))
	}
	s := &sshSession{client: ssh.NewClient(c, chans, reqs)}
	s.stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
	if err := s.start("git-upload-pack " + quote(ep.Path)); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// quote makes s one word of a shell.
func quote(s string) string {
	return "'" + strings.NewReplacer("'", `'\''`, "!", `'\!'`).Replace(s) + "'"
}

// An sshSession is git-upload-pack running at the other end.
type sshSession struct {
	client *ssh.Client
	proc   *ssh.Session
	in     io.WriteCloser
	out    *bufio.Reader
	errs   lastText
	stop   func() bool
	end    sync.Once
}

func (s *sshSession) start(command string) error {
	var err error
	if s.proc, err = s.client.NewSession(); err != nil {
		return err
	}
	s.proc.Stderr = &s.errs
	if s.in, err = s.proc.StdinPipe(); err != nil {
		return err
	}
	out, err := s.proc.StdoutPipe()
	if err != nil {
		return err
	}
	s.out = bufio.NewReader(out)
	return s.proc.Start(command)
}

func (s *sshSession) AdvertisedReferencesContext(context.Context) (*packp.AdvRefs, error) {
	ar := packp.NewAdvRefs()
	err := ar.Decode(s.out)
	if errors.Is(err, packp.ErrEmptyAdvRefs) || err == nil && ar.IsEmpty() {
		_, werr := s.in.Write(pktline.FlushPkt) // nothing wanted
		return nil, errors.Join(transport.ErrEmptyRemoteRepository, werr)
	}
	if err != nil {
		return nil, s.explain(err)
	}
	transport.FilterUnsupportedCapabilities(ar.Capabilities)
	return ar, nil
}

func (s *sshSession) UploadPack(_ context.Context, req *packp.UploadPackRequest) (*packp.UploadPackResponse, error) {
	if err := req.Validate(); err != nil {
		return nil, err
	}
	err := errors.Join(req.UploadRequest.Encode(s.in), req.UploadHaves.Encode(s.in, true))
	if err == nil {
		err = pktline.NewEncoder(s.in).EncodeString("done\n")
	}
	if err == nil {
		err = s.in.Close()
	}
	if err != nil {
		return nil, s.explain(err)
	}
	res := packp.NewUploadPackResponse(req)
	if err := res.Decode(io.NopCloser(s.out)); err != nil {
		return nil, s.explain(err)
	}
	return res, nil
}

// explain adds what the remote wrote to its standard error: that is where it says what is wrong.
func (s *sshSession) explain(err error) error {
	s.finish()
	if text := s.errs.String(); text != "" {
		return fmt.Errorf("%w: the remote says %q", err, text)
	}
	return err
}

// Close ends the conversation; the remote may be in the midst of it.
func (s *sshSession) Close() error {
	s.finish()
	return nil
}

// finish ends the connection and waits until all that the remote wrote has been taken in, and no goroutine is left. How
// the remote's program ended does not matter: what counts is whether the bytes were whole.
func (s *sshSession) finish() {
	s.end.Do(func() {
		s.stop()
		if s.proc != nil {
			_ = s.proc.Close()
		}
		_ = s.client.Close()
		if s.proc != nil {
			_ = s.proc.Wait()
		}
		_ = s.client.Wait()
	})
}

// lastText keeps the first bytes written to it.
type lastText struct {
	mu sync.Mutex
	b  []byte
}

func (t *lastText) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if room := 500 - len(t.b); room > 0 {
		t.b = append(t.b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

func (t *lastText) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bounded(string(t.b), 500)
}
