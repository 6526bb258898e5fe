package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/backoff"
)

const (
	// partPrefix begins the names of files that are being fetched. They outlive the build and the server.
	partPrefix = "part-"
	// keepPart is how old such a file may be at the start of the server.
	keepPart = 24 * time.Hour

	// stalled is how long a server may send nothing.
	stalled = time.Minute
	// maxTries is how often in a row a transfer may break off without having brought anything.
	maxTries = 8
	// tellEvery is how often it is told how far a transfer came.
	tellEvery = 5 * time.Second
)

// fetch gives the file of a disk image, whole as far as its source can be believed.
func (b *Builder) fetch(ctx context.Context, r images.DiskRecipe, u *url.URL, s *steps) (*os.File, error) {
	switch u.Scheme {
	case "file":
		return openLocal(u)
	case "http", "https":
	default:
		return nil, fmt.Errorf("fetching %s: want http, https or file", r.URL)
	}
	f, err := os.OpenFile(b.part(r), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	t := &transfer{url: r.URL, file: f, steps: s, room: room{dir: b.Dir}}
	if err := t.run(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("fetching %s: %w", u.Redacted(), err), f.Close())
	}
	return f, nil
}

func (b *Builder) part(r images.DiskRecipe) string {
	return filepath.Join(b.Dir, partPrefix+r.ID().Hex())
}

// forgetPart removes what was fetched for a recipe; it is of no more use.
func (b *Builder) forgetPart(r images.DiskRecipe) {
	if err := os.Remove(b.part(r)); err != nil && !errors.Is(err, os.ErrNotExist) {
		b.log().Error("removing a disk image that was fetched", "err", err)
	}
}

// isFreshPart says whether a file of the scratch directory is one that another try goes on with.
func isFreshPart(e os.DirEntry, now time.Time) bool {
	fi, err := e.Info()
	return err == nil && strings.HasPrefix(e.Name(), partPrefix) && now.Sub(fi.ModTime()) < keepPart
}

// A transfer fetches a file by HTTP, and goes on where it broke off (RFC 9110 section 14).
type transfer struct {
	url   string
	file  *os.File
	steps *steps
	room  room

	have, total int64  // bytes; total is 0 while it is not known
	etag        string // of what is there, if it names bytes; "" for none
	told        time.Time
}

// A statusError says that the server will not give the file, however often it is asked.
type statusError struct{ status string }

func (e *statusError) Error() string { return "the server says " + e.status }

func (t *transfer) run(ctx context.Context) error {
	have, err := t.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	t.have = have
	wait := backoff.Backoff{First: time.Second, Limit: 30 * time.Second}
	for try := 1; ; try++ {
		before := t.have
		err := t.once(ctx)
		var status *statusError
		var disk *os.PathError
		if err == nil || ctx.Err() != nil || errors.As(err, &status) || errors.As(err, &disk) || errors.Is(err, syscall.ENOSPC) {
			return err
		}
		if t.have != before {
			try = 1
			wait.Reset()
		}
		if try >= maxTries {
			return fmt.Errorf("broke off %d times: %w", try, err)
		}
		_, _ = fmt.Fprintf(t.steps, "at %d MiB: %v; trying again\n", t.have>>20, err)
		if err := wait.Wait(ctx); err != nil {
			return err
		}
	}
}

// client follows redirections, to http and https alone, and is never without an answer for long.
func client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment, ResponseHeaderTimeout: stalled, TLSHandshakeTimeout: stalled, ForceAttemptHTTP2: true,
		DisableCompression: true,
	}}
}

// once fetches what is missing, as far as it comes.
func (t *transfer) once(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url, nil)
	if err != nil {
		return err
	}
	if t.have > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", t.have))
		if t.etag != "" {
			req.Header.Set("If-Range", t.etag)
		}
	}
	c := client()
	defer c.CloseIdleConnections()
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	whole, err := t.begin(resp)
	if err != nil || whole {
		return err
	}
	watch := time.AfterFunc(stalled, func() { cancel(fmt.Errorf("nothing came for %s", stalled)) })
	defer watch.Stop()
	return errors.Join(t.copy(resp.Body, watch), context.Cause(ctx))
}

// begin sees what the server sends: the rest, or all of it again. whole says that nothing is missing.
func (t *transfer) begin(resp *http.Response) (whole bool, err error) {
	switch {
	case resp.StatusCode == http.StatusPartialContent:
		var first, last int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/%d", &first, &last, &t.total); err != nil || first != t.have {
			return false, t.restart(fmt.Errorf("it sends %q of the file, and bytes from %d on were asked for", resp.Header.Get("Content-Range"), t.have))
		}
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		var total int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes */%d", &total); err == nil && total == t.have {
			return true, nil
		}
		return false, t.restart(errors.New("it has another file than before"))
	case resp.StatusCode == http.StatusOK:
		if err := t.restart(nil); err != nil {
			return false, err
		}
		t.total = max(resp.ContentLength, 0)
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500:
		return false, fmt.Errorf("the server says %s", resp.Status)
	default:
		return false, &statusError{resp.Status}
	}
	if etag := resp.Header.Get("ETag"); strings.HasPrefix(etag, `"`) { // a weak one does not name bytes
		t.etag = etag
	}
	return false, nil
}

// restart throws away what is there, and returns why, or what went wrong in that.
func (t *transfer) restart(why error) error {
	if err := t.file.Truncate(0); err != nil {
		return err
	}
	t.have, t.total, t.etag = 0, 0, ""
	return why
}

func (t *transfer) copy(from io.Reader, watch *time.Timer) error {
	buf := make([]byte, 1<<20)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			watch.Reset(stalled)
			if werr := t.room.take(int64(n)); werr != nil {
				return werr
			}
			if _, werr := t.file.WriteAt(buf[:n], t.have); werr != nil {
				return werr
			}
			t.have += int64(n)
			t.tell()
		}
		switch {
		case errors.Is(err, io.EOF) && t.have < t.total:
			return fmt.Errorf("it ended after %d of %d bytes", t.have, t.total)
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// tell says now and then how far it came.
func (t *transfer) tell() {
	now := time.Now()
	if now.Sub(t.told) < tellEvery {
		return
	}
	t.told = now
	if t.total > 0 {
		_, _ = fmt.Fprintf(t.steps, "%d of %d MiB\n", t.have>>20, t.total>>20)
		return
	}
	_, _ = fmt.Fprintf(t.steps, "%d MiB\n", t.have>>20)
}
