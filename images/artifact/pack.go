package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
)

const (
	// frameSize is how many bytes of an image one frame of its layer has: who wants some of it unpacks few of them.
	frameSize = 4 << 20
	// maxWindow bounds what unpacking takes of memory. Our own frames need no more than frameSize.
	maxWindow = 32 << 20
	// maxImage bounds an image in bytes; a disk of that size is sparse.
	maxImage = 1 << 46
)

// pack makes the layer of an image: the same bytes of the same image, for one version of the library.
func pack(ctx context.Context, s *store.Store, d digest.Digest) (images.Blob, error) {
	r, err := s.Reader(ctx, d)
	if err != nil {
		return images.Blob{}, err
	}
	defer r.Close()
	w, err := s.Create(ctx)
	if err != nil {
		return images.Blob{}, err
	}
	defer func() { _ = w.Abort() }() // does nothing after Commit
	if err := packTo(ctx, w, r); err != nil {
		return images.Blob{}, err
	}
	return w.Commit()
}

func packTo(ctx context.Context, w io.Writer, r io.Reader) error {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false)) // digests are on both sides
	if err != nil {
		return err
	}
	defer enc.Close()
	raw, packed := make([]byte, frameSize), []byte(nil)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, raw)
		if errors.Is(err, io.EOF) {
			return nil
		}
		last := errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return err
		}
		packed = enc.EncodeAll(raw[:n], packed[:0])
		if _, err := w.Write(packed); err != nil {
			return err
		}
		if last {
			return nil
		}
	}
}

// Restore makes the working copies that the store lacks of the layers of a manifest, or of all those that a release names. What
// a layer unpacks to must be what the manifest says.
func Restore(ctx context.Context, s *store.Store, desc ocispec.Descriptor) error {
	if desc.MediaType == ocispec.MediaTypeImageIndex {
		var index ocispec.Index
		if err := readJSON(ctx, s, desc, &index); err != nil {
			return err
		}
		for _, part := range index.Manifests {
			if part.MediaType != ocispec.MediaTypeImageManifest {
				continue // no release has such
			}
			if err := Restore(ctx, s, part); err != nil {
				return err
			}
		}
		return nil
	}
	m, err := readManifest(ctx, s, desc)
	if err != nil {
		return err
	}
	for _, l := range m.Layers {
		if err := restoreLayer(ctx, s, l); err != nil {
			return fmt.Errorf("unpacking layer %s of manifest %s: %w", l.Digest, desc.Digest, err)
		}
	}
	return nil
}

// WorkingCopy is what a layer unpacks to; ok is false for one that is kept as it is.
func WorkingCopy(l ocispec.Descriptor) (b images.Blob, ok bool, err error) {
	text, ok := l.Annotations[annotationDigest]
	if !ok {
		return images.Blob{}, false, nil
	}
	if b.Digest, err = digest.Parse(text); err != nil {
		return images.Blob{}, true, err
	}
	b.Size, err = strconv.ParseInt(l.Annotations[annotationSize], 10, 64)
	if err != nil || b.Size < 0 || b.Size > maxImage {
		return images.Blob{}, true, fmt.Errorf("a size of %q bytes", l.Annotations[annotationSize])
	}
	return b, true, nil
}

func restoreLayer(ctx context.Context, s *store.Store, l ocispec.Descriptor) error {
	want, ok, err := WorkingCopy(l)
	if err != nil || !ok {
		return err
	}
	if _, err := s.Stat(ctx, want.Digest); err == nil || !errors.Is(err, store.ErrNotFound) && !errors.Is(err, digest.ErrMismatch) {
		return err
	}
	r, err := s.Fetch(ctx, l)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := s.Create(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = w.Abort() }() // does nothing after Commit
	if err := unpackTo(ctx, w, r, want); err != nil {
		return err
	}
	_, err = w.Commit()
	return err
}

// unpackTo writes what want names, its zeros left out of the file.
func unpackTo(ctx context.Context, w *store.Writer, r io.Reader, want images.Blob) error {
	dec, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return err
	}
	defer dec.Close()
	in := digest.VerifyReader(io.LimitReader(dec, want.Size+1), want.Digest, want.Size)
	out := &sparse{ctx: ctx.Err, w: w}
	if _, err := io.CopyBuffer(out, in, make([]byte, 64<<10)); err != nil {
		return err
	}
	return w.Truncate(out.at)
}

// A sparse writes what is not zero, until its context ends.
type sparse struct {
	ctx func() error
	w   *store.Writer
	at  int64
}

func (s *sparse) Write(p []byte) (int, error) {
	if err := s.ctx(); err != nil {
		return 0, err
	}
	if len(bytes.Trim(p, "\x00")) > 0 {
		if _, err := s.w.WriteAt(p, s.at); err != nil {
			return 0, err
		}
	}
	s.at += int64(len(p))
	return len(p), nil
}
