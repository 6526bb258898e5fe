package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/chunk"
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
	Source Source                            // a Ranger, too: else all travels whole
	Images []agentapi.Image                  // that come by their chunks, where they have an index
	Blobs  []agentapi.Blob                   // that come whole
	Rate   int64                             // bytes a second that may come over the network; 0: as many as come
	Keep   []digest.Digest                   // images that are in use, never evicted; neither are Images and Blobs
	Deltas []string                          // IDs of the node deltas that are in use or will be next, never evicted
	Report func(done, total int64)           // of all Images and Blobs, in bytes, several times a second at most; may be nil
	Retry  func(err error, in time.Duration) // is told of each failed try; may be nil
	// Rotten is told of bytes of an image in the cache that turned out to be broken; may be nil. What is fetched does not
	// need them.
	Rotten func(image digest.Digest, off, n int64)
}

// all are Images and Blobs.
func (f Fetch) all() []agentapi.Image {
	out := slices.Clone(f.Images)
	for _, b := range f.Blobs {
		out = append(out, plain(b))
	}
	return out
}

// Fetch brings into the cache what is missing, and returns how many bytes came over the network, also with an error.
// It tries again for as long as ctx lasts, each time from where the last try broke off; only what no further try can
// mend is an error: no space, and a disk that fails. Where nothing is missing, it makes room for a node delta that is not
// seeded yet all the same, as far as that goes: a change of node files, or back to images that are here, needs some, too.
// Where all is here, it evicts nothing, however full the disk is.
func (c *Cache) Fetch(ctx context.Context, f Fetch) (int64, error) {
	var missing []agentapi.Image
	var done, total, net int64
	for _, b := range f.all() {
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
	pace := &pace{rate: f.Rate}
	for _, b := range missing {
		t := transfer{c: c, f: f, image: b, before: done, total: total, pace: pace}
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
	image         agentapi.Image
	pace          *pace
	whole         bool  // its chunks are of no use
	best          int64 // bytes that were put together by chunks, at most
	vain          int   // tries in a row that brought bytes and got no further
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
		err := t.tryBest(ctx)
		var p permanent
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("fetching image %s: %w", t.image.Digest.Short(), ctx.Err())
		case errors.As(err, &p):
			return fmt.Errorf("fetching image %s: %w", t.image.Digest.Short(), p.error)
		}
		if t.net > before {
			tries.Reset()
		}
		d := tries.Next()
		t.c.log.Warn("an image did not come whole, trying again", "digest", t.image.Digest.Short(), "error", err, "in", d)
		if t.f.Retry != nil {
			t.f.Retry(fmt.Errorf("fetching image %s: %w", t.image.Digest.Short(), err), d)
		}
		if err := backoff.Sleep(ctx, d); err != nil {
			return fmt.Errorf("fetching image %s: %w", t.image.Digest.Short(), err)
		}
	}
}

// tryBest brings the image by its chunks where it can, and else whole. How many bytes a wrong index cost is known
// then, and the node has what it was told to have.
func (t *transfer) tryBest(ctx context.Context) error {
	from, ok := t.f.Source.(Ranger)
	if t.whole || !ok || t.image.Chunks == (agentapi.Blob{}) {
		return t.try(ctx)
	}
	net, best := t.net, t.best
	err := t.assemble(ctx, from)
	if t.vain++; t.net == net || t.best > best {
		t.vain = 0
	}
	var p permanent
	if err == nil || errors.As(err, &p) || ctx.Err() != nil || !isHopeless(err) && t.vain < maxVain {
		return err
	}
	t.whole = true
	t.c.log.Warn("an image cannot be fetched by its chunks, and is fetched whole", "image", t.image.Digest.Short(), "error", err)
	t.c.dropListing(t.image.Digest)
	if err := os.Remove(t.c.path("images/tmp", t.image.Digest.Hex())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return permanent{err}
	}
	return t.try(ctx)
}

// maxVain is how often in a row bytes may come of an image by its chunks that bring it no further.
const maxVain = 5

// isHopeless says whether err is about what the server has, and not about the way to it.
func isHopeless(err error) bool {
	var status *agentapi.StatusError
	if errors.As(err, &status) && status.Code == http.StatusRequestedRangeNotSatisfiable {
		return true
	}
	return errors.Is(err, chunk.ErrWrong) || errors.Is(err, agentapi.ErrRanges) || errors.Is(err, digest.ErrMismatch) || agentapi.NotFound(err)
}

// try goes on with the partial file, if there is one, up to the whole image.
func (t *transfer) try(ctx context.Context) error {
	path := t.c.path("images/tmp", t.image.Digest.Hex())
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return permanent{err}
	}
	defer file.Close()
	h := digest.NewHash()
	have, err := io.Copy(h, io.LimitReader(file, t.image.Size+1))
	if err != nil {
		return permanent{err}
	}
	if have > t.image.Size {
		if have, err = t.restart(file, &h); err != nil {
			return permanent{err}
		}
	}
	if have < t.image.Size {
		if err := t.receive(ctx, file, &h, have); err != nil {
			return err
		}
	}
	if got := h.Digest(); got != t.image.Digest {
		// Nothing of it can be trusted: it goes before the next try, so that this one does not return for ever.
		if err := os.Remove(path); err != nil {
			return permanent{err}
		}
		return fmt.Errorf("%w: got %s, want %s", digest.ErrMismatch, got, t.image.Digest)
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
	body, at, err := t.f.Source.Blob(ctx, t.image.Digest, have)
	if err != nil {
		return causeOf(ctx, err)
	}
	defer body.Close()
	if at != have { // a server without Range
		if have, err = t.restart(file, h); err != nil {
			return permanent{err}
		}
	}
	in := &meter{ctx: ctx, r: body, t: t, watch: watch}
	buf := make([]byte, 256<<10)
	var unsynced int64
	for {
		n, rerr := in.Read(buf)
		if n > 0 {
			have += int64(n)
			if have > t.image.Size {
				_, err := t.restart(file, h)
				return errors.Join(fmt.Errorf("%w: more than %d bytes", digest.ErrMismatch, t.image.Size), err)
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
		case have < t.image.Size:
			return fmt.Errorf("got %d bytes of %d: %w", have, t.image.Size, io.ErrUnexpectedEOF)
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
	if t.f.Report != nil && (time.Since(t.said) > 250*time.Millisecond || have == t.image.Size) {
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
	if err := os.Rename(path, t.c.Path(t.image.Digest)); err != nil {
		return permanent{err}
	}
	for _, dir := range []string{"images/sha256", "images/tmp"} {
		if err := atomicfile.SyncDir(t.c.path(dir)); err != nil {
			return permanent{err}
		}
	}
	return nil
}
