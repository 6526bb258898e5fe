package testbed

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"time"
)

// An uplink is an HTTP proxy (RFC 9110 sections 3.7 and 9.3.6) on the host's network. The lab's server fetches packages and repos through
// it; machines cannot reach it. Where the host itself needs a proxy, by the usual variables, the uplink uses that one.
type uplink struct {
	log       *slog.Logger
	server    http.Server
	forward   httputil.ReverseProxy
	transport *http.Transport // of forward
	proxy     func(*http.Request) (*url.URL, error)
	tunnels   connSet // they are not the server's connections any more
}

func newUplink(log *slog.Logger) *uplink {
	u := &uplink{log: log, proxy: http.ProxyFromEnvironment}
	u.transport = &http.Transport{
		Proxy: u.proxy, DisableCompression: true,
		DialContext: (&net.Dialer{Timeout: 30 * time.Second}).DialContext,
	}
	u.forward = httputil.ReverseProxy{
		Rewrite:       func(*httputil.ProxyRequest) {}, // the request names its target itself
		FlushInterval: -1,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			log.Warn("uplink", "url", r.URL.Redacted(), "err", err)
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
		Transport: u.transport,
	}
	u.server = http.Server{Handler: http.HandlerFunc(u.handle), ReadHeaderTimeout: time.Minute}
	return u
}

// serve answers until Close.
func (u *uplink) serve(l net.Listener) {
	if err := u.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		u.log.Error("uplink ended", "err", err)
	}
	u.tunnels.wait()
}

// Close ends the uplink with all that is under way.
func (u *uplink) Close() error {
	err := u.server.Close()
	u.tunnels.close()
	u.transport.CloseIdleConnections()
	return err
}

func (u *uplink) handle(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == http.MethodConnect:
		u.tunnel(w, r)
	case r.URL.IsAbs():
		u.forward.ServeHTTP(w, r)
	default:
		http.Error(w, "this is a proxy: ask for a whole URL", http.StatusBadRequest)
	}
}

// tunnel answers CONNECT.
func (u *uplink) tunnel(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	far, err := u.dial(ctx, r.Host)
	if err != nil {
		u.log.Warn("uplink", "connect", r.Host, "err", err)
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	near, err := accept(w)
	if err != nil {
		far.Close()
		u.log.Warn("uplink", "connect", r.Host, "err", err)
		return
	}
	u.tunnels.splice(near, far)
}

// dial connects to addr, through the host's own proxy for HTTPS where there is one.
func (u *uplink) dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	via, err := u.proxy(&http.Request{URL: &url.URL{Scheme: "https", Host: addr}})
	if err != nil || via == nil {
		return d.DialContext(ctx, "tcp", addr)
	}
	if via.Scheme != "http" {
		return nil, fmt.Errorf("the host's proxy %s: want http", via.Redacted())
	}
	host := via.Host
	if via.Port() == "" {
		host = net.JoinHostPort(via.Hostname(), "80")
	}
	c, err := d.DialContext(ctx, "tcp", host)
	if err != nil {
		return nil, fmt.Errorf("the host's proxy %s: %w", via.Redacted(), err)
	}
	header := http.Header{}
	if pass, ok := via.User.Password(); ok {
		header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(via.User.Username()+":"+pass)))
	}
	return connect(ctx, c, addr, header)
}

// connect asks the proxy at the other end of c for a tunnel to addr, and returns that.
func connect(ctx context.Context, c net.Conn, addr string, header http.Header) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: addr}, Host: addr, Header: header}
	err := req.Write(c)
	if err == nil {
		in := bufio.NewReader(c)
		var resp *http.Response
		if resp, err = http.ReadResponse(in, req); err == nil { //nolint:bodyclose // behind it is the tunnel, and c is closed
			if resp.StatusCode == http.StatusOK {
				return &tunnelConn{Conn: c, in: in}, nil
			}
			text, _ := in.Peek(min(in.Buffered(), 200))
			err = fmt.Errorf("%s: %s", resp.Status, text)
		}
	}
	c.Close()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return nil, fmt.Errorf("tunnel to %s: %w", addr, err)
}

// accept tells the asker of a CONNECT that the tunnel stands, and returns its connection.
func accept(w http.ResponseWriter) (net.Conn, error) {
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("taking the connection over: %w", err)
	}
	if _, err := c.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n")); err != nil {
		c.Close()
		return nil, err
	}
	return &tunnelConn{Conn: c, in: rw.Reader}, nil
}

// A tunnelConn reads first what came right behind the header of a CONNECT.
type tunnelConn struct {
	net.Conn
	in *bufio.Reader
}

func (t *tunnelConn) Read(p []byte) (int, error) { return t.in.Read(p) }

// CloseWrite passes on that no more bytes come.
func (t *tunnelConn) CloseWrite() error {
	if half, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return t.Close()
}
