// Package chunks keeps beside an image, in the store, what nodes fetch of it: the index, the pack and the segments of
// package internal/chunk. All three can be made again of the image at any time, and are then the same. A node that finds
// one of them missing fetches the image whole.
package chunks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/chunk"
	"github.com/troupe-dev/troupe/internal/digest"
)

// Make puts into the store what is made of the image, the first data bytes of r, and names its index. It is the zero
// Blob of an image with more chunks than an index may have, which is no error.
func Make(ctx context.Context, s *store.Store, r io.ReaderAt, data int64) (images.Blob, error) {
	pack, err := s.Create(ctx)
	if err != nil {
		return images.Blob{}, fmt.Errorf("cutting an image for transfers: %w", err)
	}
	defer func() { _ = pack.Abort() }() // does nothing after Commit
	segs, err := s.Create(ctx)
	if err != nil {
		return images.Blob{}, fmt.Errorf("cutting an image for transfers: %w", err)
	}
	defer func() { _ = segs.Abort() }()
	x, err := chunk.Make(r, data, pack, segs)
	if errors.Is(err, chunk.ErrTooLarge) {
		return images.Blob{}, nil // it travels whole
	}
	if err != nil {
		return images.Blob{}, fmt.Errorf("cutting an image for transfers: %w", err)
	}
	for _, w := range []*store.Writer{pack, segs} {
		if _, err := w.Commit(); err != nil {
			return images.Blob{}, fmt.Errorf("cutting an image for transfers: %w", err)
		}
	}
	return s.Put(ctx, x.Reader())
}

// Blobs are the files that are kept for transfers of img, as its index names them: none where it has no index. What goes
// with the image, and must not go before it, are these. An index that is not there is an error that wraps
// store.ErrNotFound; whether the others are there is not looked at.
func Blobs(ctx context.Context, s *store.Store, img images.Image) ([]images.Blob, error) {
	if img.Chunks == (images.Blob{}) {
		return nil, nil
	}
	x, err := index(ctx, s, img.Chunks)
	if err != nil {
		return nil, err
	}
	out := []images.Blob{img.Chunks}
	for _, b := range []chunk.Blob{x.Pack, x.Segments} {
		out = append(out, images.Blob{Digest: b.Digest(), Size: b.Size})
	}
	return out, nil
}

func index(ctx context.Context, s *store.Store, b images.Blob) (*chunk.Index, error) {
	r, err := s.Reader(ctx, b.Digest)
	if err != nil {
		return nil, fmt.Errorf("reading an index of chunks: %w", err)
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, chunk.MaxIndex+1))
	if err != nil {
		return nil, fmt.Errorf("reading an index of chunks: %w", err)
	}
	return chunk.Parse(text)
}

// A Keeper makes again what is missing. The zero value is ready for use.
type Keeper struct {
	mu   sync.Mutex
	none map[digest.Digest]bool // images of which another index came out than the one that is named
}

// Keep makes again what is missing of the files for transfers of img, and says whether it did. Another server may have made another
// index of it, with another version of troupe: then nothing can be done, and nodes fetch the image whole.
func (k *Keeper) Keep(ctx context.Context, s *store.Store, img images.Image) (bool, error) {
	if img.Chunks == (images.Blob{}) || k.isNone(img.Chunks.Digest) || isWhole(ctx, s, img) {
		return false, nil
	}
	f, err := s.Open(ctx, img.Digest)
	if err != nil {
		return false, fmt.Errorf("making the files for transfers of image %s again: %w", img.Digest.Short(), err)
	}
	defer f.Close()
	at, ok := f.(io.ReaderAt)
	if !ok {
		return false, fmt.Errorf("making the files for transfers of image %s again: the store cannot read at an offset", img.Digest.Short())
	}
	got, err := Make(ctx, s, at, img.Data)
	if err != nil {
		return false, err
	}
	if got != img.Chunks {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.none == nil {
			k.none = make(map[digest.Digest]bool)
		}
		k.none[img.Chunks.Digest] = true
		return false, fmt.Errorf("the files for transfers of image %s were made by another version of troupe: nodes fetch it whole", img.Digest.Short())
	}
	return true, nil
}

func (k *Keeper) isNone(d digest.Digest) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.none[d]
}

// isWhole says whether all files for transfers of img are there.
func isWhole(ctx context.Context, s *store.Store, img images.Image) bool {
	all, err := Blobs(ctx, s, img)
	for _, b := range all {
		if err == nil {
			_, err = s.Stat(ctx, b.Digest)
		}
	}
	return err == nil
}
