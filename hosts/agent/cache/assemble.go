package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/chunk"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/verity"
)

const (
	// maxSources is how many cached images are compared with a new one, those that were fetched last.
	maxSources = 8
	// maxRotten is how many chunks of one cached image may turn out to be broken before nothing more is taken from it.
	maxRotten = 8
)

// errRotten says that a chunk of a cached image is not what it was; the plan is made anew without it.
var errRotten = errors.New("a chunk in the cache is broken")

// An assembly puts an image together, in order: from images in the cache, and from the server where they have not got it.
//
// The file holds the image in its related form (package internal/chunk) up to its last chunk, and only then becomes the image
// itself. After a cut, what is there is compared with the index, chunk by chunk, and the first one that is
// wrong is where it goes on.
type assembly struct {
	*listing
	t       *transfer
	from    Ranger
	file    *os.File
	offs    []int64 // of each chunk; and the end
	at      int     // chunks that the file has
	sources []*source
	refs    map[chunk.ID]ref   // chunks of the sources that are wanted
	own     map[chunk.ID]int64 // where each chunk is in this image, the first time
	unpack  *chunk.Unpacker
	watch   *time.Timer
	buf     []byte
	synced  int64 // up to where the file is on the disk
}

// A ref is where a chunk is in a source.
type ref struct {
	from *source
	off  int64
}

// assemble brings the image by its chunks. An error of chunk.ErrWrong, agentapi.ErrRanges or digest.ErrMismatch says that this
// is no way to get it.
func (t *transfer) assemble(ctx context.Context, from Ranger) error {
	path := t.c.path("images/tmp", t.image.Digest.Hex())
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return permanent{err}
	}
	defer file.Close()
	if ok, err := t.isWhole(file); err != nil {
		return permanent{err}
	} else if ok { // only its name is missing
		return t.commit(file, path)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(t.c.stall, func() { cancel(fmt.Errorf("no byte came for %v", t.c.stall)) })
	watch.Stop()
	defer watch.Stop()
	a := &assembly{t: t, from: from, file: file, watch: watch, buf: make([]byte, chunk.MaxSegmentFrame)}
	defer a.close()
	if err := a.prepare(ctx); err != nil {
		return causeOf(ctx, err)
	}
	for a.at < len(a.chunks) {
		if err := a.step(ctx); err != nil && !errors.Is(err, errRotten) {
			return causeOf(ctx, err)
		}
	}
	if err := a.finish(); err != nil {
		return err
	}
	return t.commit(file, path)
}

func (a *assembly) close() {
	for _, s := range a.sources {
		_ = s.file.Close() // it was only read
	}
	if a.unpack != nil {
		a.unpack.Close()
	}
}

// isWhole says whether the file is the image.
func (t *transfer) isWhole(file *os.File) (bool, error) {
	fi, err := file.Stat()
	if err != nil || fi.Size() != t.image.Size {
		return false, err
	}
	got, _, err := digest.FromReader(io.NewSectionReader(file, 0, t.image.Size))
	return got == t.image.Digest, err
}

// prepare gets the list of chunks, finds those that are here, and looks at what an earlier try left.
func (a *assembly) prepare(ctx context.Context) (err error) {
	if a.unpack, err = chunk.NewUnpacker(); err != nil {
		return permanent{err}
	}
	known := a.t.c.listings(a.t.image.Digest)
	if a.listing, err = a.t.c.readListing(a.t.image.Digest); err != nil {
		if a.listing, err = a.fetchListing(ctx, known); err != nil {
			return err
		}
		if err := a.t.c.keepListing(a.t.image.Digest, a.listing); err != nil {
			return permanent{err}
		}
	}
	if a.index.Data != a.t.image.Data {
		return fmt.Errorf("%w: it is of %d bytes, and the image has %d", chunk.ErrWrong, a.index.Data, a.t.image.Data)
	}
	a.own = make(map[chunk.ID]int64, len(a.chunks))
	a.offs = make([]int64, len(a.chunks)+1)
	for i, c := range a.chunks {
		if _, ok := a.own[c.ID]; !ok {
			a.own[c.ID] = a.offs[i]
		}
		a.offs[i+1] = a.offs[i] + int64(c.Raw)
	}
	a.findSources(known)
	return a.resume()
}

// A known is an image in the cache, with its listing where that is kept.
type known struct {
	image digest.Digest
	*listing
}

// listings are of the images that are in the cache, those that were fetched last first.
func (c *Cache) listings(but digest.Digest) []known {
	all, err := c.newest()
	if err != nil {
		c.log.Warn("nothing is taken from the images in the cache", "error", err)
	}
	var out []known
	for _, d := range all {
		if d == but || len(out) == maxSources {
			continue
		}
		l, err := c.readListing(d)
		if err != nil {
			l = nil // it is cut anew
		}
		out = append(out, known{d, l})
	}
	return out
}

// findSources opens the images that have chunks which are wanted.
func (a *assembly) findSources(all []known) {
	a.refs = make(map[chunk.ID]ref)
	for _, k := range all {
		s, chunks, err := a.t.c.openSource(k.image, k.listing)
		if err != nil {
			a.t.c.log.Debug("nothing can be taken from an image in the cache", "image", k.image.Short(), "error", err)
			continue
		}
		off, found := int64(0), false
		for _, c := range chunks {
			_, wanted := a.own[c.ID]
			if _, here := a.refs[c.ID]; wanted && !here {
				a.refs[c.ID], found = ref{s, off}, true
			}
			off += int64(c.Raw)
		}
		if !found {
			_ = s.file.Close() // it was only read
			continue
		}
		a.sources = append(a.sources, s)
	}
}

// resume keeps of the file what is right.
func (a *assembly) resume() error {
	for a.at < len(a.chunks) {
		b := a.buf[:a.chunks[a.at].Raw]
		if _, err := a.file.ReadAt(b, a.offs[a.at]); err != nil || !a.chunks[a.at].Is(b) {
			break
		}
		a.at++
	}
	if err := a.file.Truncate(a.offs[a.at]); err != nil {
		return permanent{err}
	}
	a.t.say(a.offs[a.at])
	return nil
}

func (a *assembly) has(id chunk.ID) bool {
	_, ok := a.refs[id]
	return ok
}

// step follows a plan from where the file ends, until all is there or the plan does not hold any more.
func (a *assembly) step(ctx context.Context) error {
	steps, err := chunk.Plan(a.index, a.chunks, a.at, a.has)
	if err != nil {
		return err
	}
	pack := &feed{a: a, digest: a.index.Pack.Digest()}
	segs := &feed{a: a, digest: a.index.Segments.Digest()}
	defer pack.close()
	defer segs.close()
	for _, s := range steps {
		switch s.Kind {
		case chunk.Pack:
			pack.ranges = append(pack.ranges, agentapi.Range{Off: s.Off, Size: s.Size})
		case chunk.Segs:
			segs.ranges = append(segs.ranges, agentapi.Range{Off: s.Off, Size: s.Size})
		case chunk.Here:
		}
	}
	for _, s := range steps {
		if err := a.follow(ctx, s, pack, segs); err != nil {
			return err
		}
	}
	return nil
}

func (a *assembly) follow(ctx context.Context, s chunk.Step, pack, segs *feed) error {
	for _, r := range s.Segs {
		frame := a.buf[:r.Size]
		if err := segs.read(ctx, frame); err != nil {
			return err
		}
		b, err := a.unpack.Segment(a.chunks[r.First:r.Last], frame)
		if err != nil {
			return err
		}
		if err := a.put(b, r.Last); err != nil {
			return err
		}
	}
	for i := a.at; i < s.Last; i++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := a.chunk(ctx, s.Kind, i, pack)
		if err != nil {
			return err
		}
		if err := a.put(b, i+1); err != nil {
			return err
		}
	}
	return nil
}

// chunk gets one chunk, from the pack or from here.
func (a *assembly) chunk(ctx context.Context, kind chunk.Kind, i int, pack *feed) ([]byte, error) {
	c := a.chunks[i]
	if kind == chunk.Pack {
		frame := a.buf[:c.Packed]
		if err := pack.read(ctx, frame); err != nil {
			return nil, err
		}
		return a.unpack.Chunk(c, frame)
	}
	b := a.buf[:c.Raw]
	r, ok := a.refs[c.ID]
	if !ok { // the same chunk came before
		if _, err := a.file.ReadAt(b, a.own[c.ID]); err != nil {
			return nil, permanent{err}
		}
		if !c.Is(b) {
			return nil, permanent{fmt.Errorf("the disk gives back other bytes than were written: %w", digest.ErrMismatch)}
		}
		return b, nil
	}
	if _, err := r.from.form.ReadAt(b, r.off); err == nil && c.Is(b) {
		return b, nil
	}
	a.distrust(r, c)
	return nil, errRotten
}

// distrust takes a broken chunk, or all of its source, out of what is here.
func (a *assembly) distrust(r ref, c chunk.Chunk) {
	a.t.c.log.Warn("a chunk of an image in the cache is broken and is fetched", "image", r.from.digest.Short(), "offset", r.off)
	if a.t.f.Rotten != nil {
		a.t.f.Rotten(r.from.digest, r.off, int64(c.Raw))
	}
	r.from.rotten++
	for id, other := range a.refs {
		if id == c.ID || other.from == r.from && r.from.rotten >= maxRotten {
			delete(a.refs, id)
		}
	}
}

// put writes the bytes that end before chunk next.
func (a *assembly) put(b []byte, next int) error {
	if _, err := a.file.WriteAt(b, a.offs[a.at]); err != nil {
		return permanent{err}
	}
	a.at = next
	a.t.best = max(a.t.best, a.offs[next])
	a.t.say(a.offs[next])
	if a.offs[next]-a.synced >= syncEvery {
		a.synced = a.offs[next]
		if err := a.file.Sync(); err != nil {
			return permanent{errors.Join(err, os.Remove(a.file.Name()))}
		}
	}
	return nil
}

// finish makes the image of the file, with its hash tree, and compares it with its digest.
func (a *assembly) finish() error {
	if err := chunk.Restore(a.file, a.index.Meta, a.index.Data); err != nil {
		return permanent{err}
	}
	img := a.t.image
	if img.Size > img.Data {
		if img.Size != img.Data+verity.Size(img.Data) {
			return fmt.Errorf("%w: %d bytes with a tree over %d", digest.ErrMismatch, img.Size, img.Data)
		}
		root, err := verity.Write(io.NewSectionReader(a.file, 0, img.Data), img.Data, a.file)
		if err != nil {
			return permanent{err}
		}
		if root.String() != img.Root {
			return fmt.Errorf("%w: the tree of image %s has another root", digest.ErrMismatch, img.Digest.Short())
		}
	}
	ok, err := a.t.isWhole(a.file)
	if err != nil {
		return permanent{err}
	}
	if !ok {
		return fmt.Errorf("%w: what was put together of image %s is another one", digest.ErrMismatch, img.Digest.Short())
	}
	return nil
}
