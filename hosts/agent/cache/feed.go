package cache

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/chunk"
	"github.com/troupe-dev/troupe/internal/digest"
)

// A Ranger is a Source that has parts of files. tap sees all that comes over the network.
type Ranger interface {
	Ranges(ctx context.Context, d digest.Digest, ranges []agentapi.Range, tap func(io.Reader) io.Reader) (io.ReadCloser, error)
}

// A feed reads ranges of a file of the server one behind the other, many with one request.
type feed struct {
	a      *assembly
	digest digest.Digest
	ranges []agentapi.Range
	body   io.ReadCloser
	left   int64 // of body
}

// read fills p. Where p ends, a range may end, and nowhere else within it.
func (f *feed) read(ctx context.Context, p []byte) error {
	if f.left == 0 {
		if err := f.open(ctx); err != nil {
			return err
		}
	}
	if _, err := io.ReadFull(f.body, p); err != nil {
		return fmt.Errorf("reading %s: %w", f.digest.Short(), err)
	}
	f.left -= int64(len(p))
	return nil
}

func (f *feed) open(ctx context.Context) error {
	f.close()
	n := min(len(f.ranges), agentapi.MaxRanges)
	batch := f.ranges[:n]
	f.a.watch.Reset(f.a.t.c.stall)
	body, err := f.a.from.Ranges(ctx, f.digest, batch, func(r io.Reader) io.Reader {
		return &meter{ctx: ctx, r: r, t: f.a.t, watch: f.a.watch}
	})
	f.a.watch.Stop()
	if err != nil {
		return err
	}
	f.body, f.ranges = body, f.ranges[n:]
	for _, r := range batch {
		f.left += r.Size
	}
	return nil
}

func (f *feed) close() {
	if f.body != nil {
		_ = f.body.Close() // it was only read
		f.body = nil
	}
}

// fetchListing gets the index of the image, and of its pages those that no other image has.
func (a *assembly) fetchListing(ctx context.Context, known []known) (*listing, error) {
	top, err := a.fetchIndex(ctx)
	if err != nil {
		return nil, err
	}
	l := &listing{}
	if l.index, err = chunk.Parse(top); err != nil {
		return nil, fmt.Errorf("%w: %w", chunk.ErrWrong, err)
	}
	have := make(map[chunk.ID][]byte)
	for _, k := range known {
		if k.listing == nil {
			continue
		}
		for i, p := range k.index.Pages {
			have[p.ID] = k.pages[i]
		}
	}
	l.pages = make([][]byte, len(l.index.Pages))
	pages := &feed{a: a, digest: l.index.Pack.Digest()}
	defer pages.close()
	var missing []int
	for i, r := range l.index.PageRanges() {
		if b := have[l.index.Pages[i].ID]; l.index.Pages[i].Is(b) {
			l.pages[i] = b
			continue
		}
		if n := len(pages.ranges); n > 0 && pages.ranges[n-1].Off+pages.ranges[n-1].Size == r.Off {
			pages.ranges[n-1].Size += r.Size
		} else {
			pages.ranges = append(pages.ranges, agentapi.Range(r))
		}
		missing = append(missing, i)
	}
	for _, i := range missing {
		b := make([]byte, l.index.Pages[i].Size)
		if err := pages.read(ctx, b); err != nil {
			return nil, err
		}
		if !l.index.Pages[i].Is(b) {
			return nil, fmt.Errorf("%w: page %d is another one", chunk.ErrWrong, i)
		}
		l.pages[i] = b
	}
	if l.chunks, err = l.index.Chunks(l.pages); err != nil {
		return nil, err
	}
	return l, nil
}

// fetchIndex gets the index and checks it against its digest.
func (a *assembly) fetchIndex(ctx context.Context) ([]byte, error) {
	want := a.t.image.Chunks
	if want.Size > chunk.MaxIndex {
		return nil, fmt.Errorf("%w: an index of %d bytes", chunk.ErrWrong, want.Size)
	}
	a.watch.Reset(a.t.c.stall)
	body, at, err := a.t.f.Source.Blob(ctx, want.Digest, 0)
	a.watch.Stop()
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if at != 0 {
		return nil, fmt.Errorf("%w: it begins at byte %d", agentapi.ErrRanges, at)
	}
	m := &meter{ctx: ctx, r: body, t: a.t, watch: a.watch}
	b, err := io.ReadAll(digest.VerifyReader(io.LimitReader(m, want.Size+1), want.Digest, want.Size))
	if err != nil {
		return nil, fmt.Errorf("reading the index of image %s: %w", a.t.image.Digest.Short(), err)
	}
	return slices.Clip(b), nil
}
