package agentapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/digest"
)

// The paths of the protocol, from the server's root.
const (
	PathHello      = "/node/v1/hello"
	PathAssignment = "/node/v1/assignment"
	PathReport     = "/node/v1/report"
	PathDelta      = "/node/v1/delta"
	PathBlobs      = "/blobs/sha256/"
)

// maxAnswer bounds a JSON answer: an assignment carries the files of one host, nothing larger.
const maxAnswer = 16 << 20

// callTimeout is how long one answer may take, beyond the time that a long poll asks for.
const callTimeout = 15 * time.Second

// Retry is how a Client's user waits for a server that is away or answers that it is not ready: never for longer than
// 5 s, so that a restart of the server costs a boot little. A node that runs reports as often anyway.
func Retry() backoff.Backoff {
	return backoff.Backoff{First: 500 * time.Millisecond, Limit: 5 * time.Second}
}

// A Client speaks for one machine to one server. It does not try again: that is for its user, who knows how long.
type Client struct {
	server string
	http   *http.Client
}

// NewClient speaks to the server at base ("http://10.77.0.1:8080"). A nil rt is a transport that gives up on a server
// which does not accept a connection or begin to answer, but lets a body take as long as it needs.
func NewClient(base string, rt http.RoundTripper) (*Client, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, fmt.Errorf("server address %q: %w", base, err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("server address %q: want http://HOST[:PORT]", base)
	}
	if rt == nil {
		rt = &http.Transport{
			DialContext:         (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 10 * time.Second}).DialContext,
			MaxIdleConnsPerHost: 4,
			IdleConnTimeout:     30 * time.Second,
			DisableCompression:  true, // images are counted and resumed in their own bytes
		}
	}
	u.Path, u.RawQuery, u.Fragment = "", "", ""
	return &Client{server: u.String(), http: &http.Client{Transport: rt}}, nil
}

// Server is the address that the client speaks to.
func (c *Client) Server() string { return c.server }

// CloseIdle lets go of connections that no call uses.
func (c *Client) CloseIdle() { c.http.CloseIdleConnections() }

// Hello tells the server what machine this is, and returns what it wants of it.
func (c *Client) Hello(ctx context.Context, h Hello) (Assignment, error) {
	var a Assignment
	err := c.call(ctx, http.MethodPost, PathHello, h, &a, callTimeout)
	return a, err
}

// Assignment asks for the assignment of the machine with that MAC. It returns at once if its version is not after, and
// else when it changes, or when wait (whole seconds; rounded up) is over.
func (c *Client) Assignment(ctx context.Context, mac, after string, wait time.Duration) (Assignment, error) {
	secs := int64((wait + time.Second - 1) / time.Second)
	q := url.Values{"mac": {mac}, "after": {after}, "wait": {strconv.FormatInt(secs, 10)}}
	var a Assignment
	err := c.call(ctx, http.MethodGet, PathAssignment+"?"+q.Encode(), nil, &a, wait+callTimeout)
	return a, err
}

// Report tells the server how the node is.
func (c *Client) Report(ctx context.Context, r Report) (ReportReply, error) {
	var reply ReportReply
	err := c.call(ctx, http.MethodPost, PathReport, r, &reply, callTimeout)
	return reply, err
}

// Delta answers what a ReportReply asked for.
func (c *Client) Delta(ctx context.Context, a DeltaAnswer) error {
	var none struct{}
	return c.call(ctx, http.MethodPost, PathDelta, a, &none, callTimeout)
}

func (c *Client) call(ctx context.Context, method, path string, in, out any, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encoding %s: %w", path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.server+path, body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req) //nolint:bodyclose // drain closes it
	if err != nil {
		return err // *url.Error: it has method, URL and cause
	}
	defer drain(resp.Body)
	if resp.StatusCode/100 != 2 {
		return statusError(resp)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return fmt.Errorf("reading the answer to %s %s: %w", method, path, err)
	}
	return nil
}

// drain reads the little that may be left, so that the connection serves again.
func drain(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 64<<10) // only a courtesy to the connection pool
	_ = body.Close()                          // nothing was written
}

// A StatusError is an answer of the server that is not what was asked for.
type StatusError struct {
	Code    int    // of HTTP
	Message string // the server's own words, where it had some
	Request string // method and path
	Troupe  bool   // it is of a troupe server, and not of a proxy or another host on the way
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: the server answered %d: %s", e.Request, e.Code, e.Message)
}

// NotFound says whether err is the server's word that it does not have what was asked for.
func NotFound(err error) bool {
	var se *StatusError
	return errors.As(err, &se) && se.Code == http.StatusNotFound
}

func statusError(resp *http.Response) error {
	se := &StatusError{Code: resp.StatusCode, Request: resp.Request.Method + " " + resp.Request.URL.Path}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // a body that breaks off still says something
	var e Error
	if json.Unmarshal(b, &e) == nil && e.Message != "" {
		se.Message, se.Troupe = e.Message, true
	} else if se.Message = string(bytes.TrimSpace(b)); se.Message == "" {
		se.Message = http.StatusText(resp.StatusCode)
	}
	return se
}

// Blob opens the bytes that d names, from offset on; the caller closes them, and verifies them: the client does not.
// The second result is the offset at which they really begin: offset, or 0 from a server without Range. An offset at or
// past the end is a StatusError with code 416.
func (c *Client) Blob(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.server+PathBlobs+d.Hex(), nil)
	if err != nil {
		return nil, 0, fmt.Errorf("asking for %s: %w", d, err)
	}
	if offset > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, 0, err
	}
	switch {
	case resp.StatusCode == http.StatusOK:
		return resp.Body, 0, nil
	case resp.StatusCode == http.StatusPartialContent && offset > 0:
		var first int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-", &first); err == nil && first == offset {
			return resp.Body, offset, nil
		}
		_ = resp.Body.Close() // it is of no use
		return nil, 0, fmt.Errorf("asking for %s from byte %d: answered with Content-Range %q", d, offset, resp.Header.Get("Content-Range"))
	}
	defer drain(resp.Body)
	return nil, 0, statusError(resp)
}
