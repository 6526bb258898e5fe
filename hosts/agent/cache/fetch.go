package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/digest"
)

// syncEvery is how many bytes of a transfer a power cut may lose: until then they are only in memory.
const syncEvery = 32 << 20

// A Source has images.
type Source interface {
	// Blob opens the bytes that d names from offset on, or from the start: the second result says which.
	Blob(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, int64, error)
}

// A Fetch is one transfer of what is missing of some images.
type Fetch struct {
	Source Source
	Blobs  []agentapi.Blob
	Keep   []digest.Digest                   // images that are in use, never evicted; Blobs are none the less
	Deltas []string                          // IDs of the node deltas that are in use or will be next, never evicted
	Report func(done, total int64)           // of all Blobs, in bytes, several times a second at most; may be nil
	Retry  func(err error, in time.Duration) // is told of each failed try; may be nil
}

// Fetch brings into the cache what is missing, and returns how many bytes came over the network, also with an error.
// It tries again for as long as ctx lasts, each time from where the last try broke off; only what no further try can
// mend is an error: no space, and a disk that fails. Where nothing is missing, it makes room for a node delta that is not
// seeded yet all the same, as far as that goes: a change of node files, or back to images that are here, needs some, too.
// Where all is here, it evicts nothing, however full the disk is.
func (c *Cache) Fetch(ctx context.Context, f Fetch) (int64, error) {
	var missing []agentapi.Blob
	var done, total, net int64
	for _, b := range f.Blobs {
		if b.Digest.Hex() == "" || b.Size < 0 {
			return 0, fmt.Errorf("fetching an image: no digest or size: %+v", b)
		}
		total += b.Size
		if c.Has(b.Digest, b.Size) {
			done += b.Size
		} else if !slices.Contains(missing, b) {
			missing = append(missing, b)
		} else {
			total -= b.Size
		}
	}
	if len(missing) == 0 {
		if !slices.ContainsFunc(f.Deltas, func(id string) bool { return !c.isSeeded(id) }) {
			return 0, nil
		}
		if err := c.makeRoom(nil, f); err != nil {
			c.log.Warn("the node delta may not find the room that it needs", "error", err)
		}
		return 0, nil
	}
	if err := c.makeRoom(missing, f); err != nil {
		return 0, err
	}
	for _, b := range missing {
		t := transfer{c: c, f: f, blob: b, before: done, total: total}
		err := t.run(ctx)
		net += t.net
		if err != nil {
			return net, err
		}
		done += b.Size
	}
	return net, nil
}

// A transfer brings one image.
type transfer struct {
	c             *Cache
	f             Fetch
	blob          agentapi.Blob
	before, total int64 // of the whole Fetch
	net           int64 // bytes that came over the network
	said          time.Time
}

// permanent marks an error that no further try mends.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

func (t *transfer) run(ctx context.Context) error {
	tries := agentapi.Retry()
	for {
		before := t.net
		err := t.try(ctx)
		var p permanent
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("fetching image %s: %w", t.blob.Digest.Short(), ctx.Err())
		case errors.As(err, &p):
			return fmt.Errorf("fetching image %s: %w", t.blob.Digest.Short(), p.error)
		}
		if t.net > before {
			tries.Reset()
		}
		d := tries.Next()
		t.c.log.Warn("an image did not come whole, trying again", "digest", t.blob.Digest.Short(), "error", err, "in", d)
		if t.f.Retry != nil {
			t.f.Retry(fmt.Errorf("fetching image %s: %w", t.blob.Digest.Short(), err), d)
		}
		if err := backoff.Sleep(ctx, d); err != nil {
			return fmt.Errorf("fetching image %s: %w", t.blob.Digest.Short(), err)
		}
	}
}

// try goes on with the partial file, if there is one, up to the whole image.
func (t *transfer) try(ctx context.Context) error {
	path := t.c.path("images/tmp", t.blob.Digest.Hex())
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return permanent{err}
	}
	defer file.Close()
	h := digest.NewHash()
	have, err := io.Copy(h, io.LimitReader(file, t.blob.Size+1))
	if err != nil {
		return permanent{err}
	}
	if have > t.blob.Size {
		if have, err = t.restart(file, &h); err != nil {
			return permanent{err}
		}
	}
	if have < t.blob.Size {
		if err := t.receive(ctx, file, &h, have); err != nil {
			return err
		}
	}
	if got := h.Digest(); got != t.blob.Digest {
		// Nothing of it can be trusted: it goes before the next try, so that this one does not return for ever.
		if err := os.Remove(path); err != nil {
			return permanent{err}
		}
		return fmt.Errorf("%w: got %s, want %s", digest.ErrMismatch, got, t.blob.Digest)
	}
	return t.commit(file, path)
}

// restart begins the file anew.
func (t *transfer) restart(file *os.File, h *digest.Hash) (int64, error) {
	*h = digest.NewHash()
	if err := file.Truncate(0); err != nil {
		return 0, err
	}
	_, err := file.Seek(0, io.SeekStart)
	return 0, err
}

func (t *transfer) receive(ctx context.Context, file *os.File, h *digest.Hash, have int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(t.c.stall, func() { cancel(fmt.Errorf("no byte came for %v", t.c.stall)) })
	defer watch.Stop()
	body, at, err := t.f.Source.Blob(ctx, t.blob.Digest, have)
	if err != nil {
		return causeOf(ctx, err)
	}
	defer body.Close()
	if at != have { // a server without Range
		if have, err = t.restart(file, h); err != nil {
			return permanent{err}
		}
	}
	buf := make([]byte, 256<<10)
	var unsynced int64
	for {
		n, rerr := body.Read(buf)
		if n > 0 {
			watch.Reset(t.c.stall)
			t.net += int64(n)
			have += int64(n)
			if have > t.blob.Size {
				_, err := t.restart(file, h)
				return errors.Join(fmt.Errorf("%w: more than %d bytes", digest.ErrMismatch, t.blob.Size), err)
			}
			if _, err := file.Write(buf[:n]); err != nil {
				return permanent{err}
			}
			_, _ = h.Write(buf[:n]) // a hash never returns an error
			t.say(have)
			if unsynced += int64(n); unsynced >= syncEvery {
				unsynced = 0
				if err := file.Sync(); err != nil {
					return permanent{errors.Join(err, os.Remove(file.Name()))}
				}
			}
		}
		switch {
		case rerr == nil:
		case !errors.Is(rerr, io.EOF):
			return causeOf(ctx, rerr)
		case have < t.blob.Size:
			return fmt.Errorf("got %d bytes of %d: %w", have, t.blob.Size, io.ErrUnexpectedEOF)
		default:
			return nil
		}
	}
}

// causeOf prefers why the context ended to the error that this led to.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

func (t *transfer) say(have int64) {
	if t.f.Report != nil && (time.Since(t.said) > 250*time.Millisecond || have == t.blob.Size) {
		t.said = time.Now()
		t.f.Report(t.before+have, t.total)
	}
}

// commit gives the file its name, once its bytes are on the disk.
func (t *transfer) commit(file *os.File, path string) error {
	if err := file.Sync(); err != nil {
		// After a failed fsync nobody knows what is on the disk: the next try must not believe the page cache.
		return permanent{errors.Join(err, os.Remove(path))}
	}
	if err := os.Rename(path, t.c.Path(t.blob.Digest)); err != nil {
		return permanent{err}
	}
	for _, dir := range []string{"images/sha256", "images/tmp"} {
		if err := atomicfile.SyncDir(t.c.path(dir)); err != nil {
			return permanent{err}
		}
	}
	return nil
}
