package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// A Client speaks to a server's API for operators.
type Client struct {
	URL  string       // of the server, e.g. "http://127.0.0.1:8080"
	HTTP *http.Client // nil: http.DefaultClient. A Timeout of its own would end Watch and logs, too.
}

// An Error is an answer of the server that is not 2xx.
type Error struct {
	Status   int              `json:"-"` // of HTTP
	Message  string           `json:"error"`
	Problems []schema.Problem `json:"problems,omitempty"` // with a fleet that the request was about
}

func (e *Error) Error() string { return e.Message }

// NotFound says whether err is the server's word that what was asked for does not exist.
func NotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// maxAnswer bounds one JSON answer, in bytes: some 10 KB for each of 10,000 hosts.
const maxAnswer = 128 << 20

// Status gets whether the fleet is what its repo says.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return get[Status](ctx, c, "/api/v1/status", nil)
}

// Hosts lists the declared hosts by name, then the machines that no host declares; only the latter if unclaimed.
func (c *Client) Hosts(ctx context.Context, unclaimed bool) ([]Host, error) {
	q := url.Values{}
	if unclaimed {
		q.Set("unclaimed", "1")
	}
	return get[[]Host](ctx, c, "/api/v1/hosts", q)
}

// Host gets everything about one host, by its name or MAC.
func (c *Client) Host(ctx context.Context, key string) (HostDetail, error) {
	return get[HostDetail](ctx, c, "/api/v1/hosts/"+url.PathEscape(key), nil)
}

// LUNs lists the logical units of all hosts, by host and number.
func (c *Client) LUNs(ctx context.Context) ([]LUN, error) {
	return get[[]LUN](ctx, c, "/api/v1/luns", nil)
}

// Reset has a host begin with a disk as it was made first. It returns the host's target as it is then: where Resetting says
// so, the old disk is still in use.
func (c *Client) Reset(ctx context.Context, host string, force bool) (Target, error) {
	var t Target
	err := c.post(ctx, "/api/v1/hosts/"+url.PathEscape(host)+"/reset", ResetRequest{Force: force}, &t)
	return t, err
}

// Delta asks the node that a host runs on what it changed over its release.
func (c *Client) Delta(ctx context.Context, host string) (agentapi.DeltaDiff, error) {
	return get[agentapi.DeltaDiff](ctx, c, "/api/v1/hosts/"+url.PathEscape(host)+"/delta", nil)
}

// Drop has what a host wrote be dropped at its next boot, below some paths, or all of it.
func (c *Client) Drop(ctx context.Context, host string, paths []string) error {
	var done DropRequest
	return c.post(ctx, "/api/v1/hosts/"+url.PathEscape(host)+"/delta/drop", DropRequest{Paths: paths}, &done)
}

// Roles lists the declared roles by name.
func (c *Client) Roles(ctx context.Context) ([]Role, error) {
	return get[[]Role](ctx, c, "/api/v1/roles", nil)
}

// Images lists all recipes that were ever built or are being built, the newest first.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	return get[[]Image](ctx, c, "/api/v1/images", nil)
}

// Image gets everything about one image, by its name or the start of its recipe's or its own digest.
func (c *Client) Image(ctx context.Context, ref string) (ImageDetail, error) {
	return get[ImageDetail](ctx, c, "/api/v1/images/"+url.PathEscape(ref), nil)
}

// Releases lists all releases, the newest first.
func (c *Client) Releases(ctx context.Context) ([]Release, error) {
	return get[[]Release](ctx, c, "/api/v1/releases", nil)
}

// EventQuery chooses events. The zero value asks for the last 100.
type EventQuery struct {
	Subject string // "" for all
	Since   time.Time
	Limit   int // 0 for 100
}

// Events lists events, the newest last.
func (c *Client) Events(ctx context.Context, query EventQuery) ([]state.Event, error) {
	q := url.Values{}
	if query.Subject != "" {
		q.Set("subject", query.Subject)
	}
	if !query.Since.IsZero() {
		q.Set("since", query.Since.Format(time.RFC3339Nano))
	}
	if query.Limit > 0 {
		q.Set("limit", strconv.Itoa(query.Limit))
	}
	return get[[]state.Event](ctx, c, "/api/v1/events", q)
}

// Poke has the server look at the repo now.
func (c *Client) Poke(ctx context.Context) error {
	return c.post(ctx, "/api/v1/poke", nil, nil)
}

// Look has the server look at the repo now, and returns when it did: what is asked after that tells of what was pushed
// before.
func (c *Client) Look(ctx context.Context) error {
	r, err := c.do(ctx, http.MethodPost, "/api/v1/poke", url.Values{"wait": {"1"}}, nil)
	if err != nil {
		return err
	}
	return r.Body.Close()
}

// BuildImage has the server build an image or a role by name, also if its build failed and waits to be tried again. It
// returns what is built for that as soon as it is noted.
func (c *Client) BuildImage(ctx context.Context, name string) (Noted, error) {
	var noted Noted
	err := c.post(ctx, "/api/v1/images/"+url.PathEscape(name)+"/build", nil, &noted)
	return noted, err
}

// BuildLog reads the output of a recipe's last build; with follow, until the build ends. The caller closes it.
func (c *Client) BuildLog(ctx context.Context, recipe string, follow bool) (io.ReadCloser, error) {
	q := url.Values{}
	if follow {
		q.Set("follow", "1")
	}
	r, err := c.do(ctx, http.MethodGet, "/api/v1/builds/"+url.PathEscape(recipe)+"/log", q, nil)
	if err != nil {
		return nil, err
	}
	return r.Body, nil
}

func get[T any](ctx context.Context, c *Client, path string, q url.Values) (T, error) {
	var v T
	r, err := c.do(ctx, http.MethodGet, path, q, nil)
	if err != nil {
		return v, err
	}
	return v, decode(r, &v)
}

// post sends body (nil for none) as JSON and reads the answer into v (nil to ignore it).
func (c *Client) post(ctx context.Context, path string, body, v any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("encoding the request to %s: %w", path, err)
	}
	r, err := c.do(ctx, http.MethodPost, path, nil, bytes.NewReader(b))
	if err != nil {
		return err
	}
	if v == nil {
		return r.Body.Close()
	}
	return decode(r, v)
}

func decode(r *http.Response, v any) error {
	defer r.Body.Close()
	if err := json.NewDecoder(io.LimitReader(r.Body, maxAnswer)).Decode(v); err != nil {
		return fmt.Errorf("reading the answer from %s: %w", r.Request.URL, err)
	}
	return nil
}

// do makes one request. An answer that is not 2xx is an *Error.
func (c *Client) do(ctx context.Context, method, path string, q url.Values, body io.Reader) (*http.Response, error) {
	u := strings.TrimRight(c.URL, "/") + path
	if len(q) > 0 {
		u += "?" + q.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, fmt.Errorf("asking %s: %w", u, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	hc := c.HTTP
	if hc == nil {
		hc = http.DefaultClient
	}
	r, err := hc.Do(req)
	var failed *url.Error // says method and URL before what went wrong
	if errors.As(err, &failed) {
		err = failed.Err
	}
	if err != nil {
		return nil, fmt.Errorf("asking the server %s: %w", c.URL, err)
	}
	if r.StatusCode/100 != 2 {
		defer r.Body.Close()
		return nil, errorOf(r)
	}
	return r, nil
}

// errorOf reads the body of an answer that is not 2xx.
func errorOf(r *http.Response) error {
	e := &Error{Status: r.StatusCode}
	b, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20)) // what there is of it says more than why there is no more
	if json.Unmarshal(b, e) != nil || e.Message == "" {
		e.Message = fmt.Sprintf("%s answered %s", r.Request.URL, r.Status)
	}
	return e
}
