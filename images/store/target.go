package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	godigest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
)

// A Store is what oras copies from and to.
var _ oras.GraphTarget = (*Store)(nil)

// maxDepth bounds how deep manifests may lie in one another.
const maxDepth = 8

// IsManifest says whether a blob of that media type names others.
func IsManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == ocispec.MediaTypeImageIndex
}

// asOCI has an error about a blob that is not there, or not good, be what oras takes for that.
func asOCI(err error) error {
	if errors.Is(err, ErrNotFound) || errors.Is(err, digest.ErrMismatch) {
		return fmt.Errorf("%w: %w", errdef.ErrNotFound, err)
	}
	return err
}

// Exists says whether the store has a blob whole and, of a manifest, all that it names: what oras finds on the other side it does
// not copy, nor what is below it.
func (s *Store) Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	err := s.complete(ctx, desc, 0)
	if errors.Is(err, ErrNotFound) || errors.Is(err, digest.ErrMismatch) {
		return false, nil
	}
	return err == nil, err
}

// Complete is nil where the store has a blob whole and, of a manifest, all that it names; else the error wraps ErrNotFound or
// digest.ErrMismatch, or says why it cannot be told.
func (s *Store) Complete(ctx context.Context, desc ocispec.Descriptor) error {
	return s.complete(ctx, desc, 0)
}

func (s *Store) complete(ctx context.Context, desc ocispec.Descriptor, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("manifest %s lies %d deep in others", desc.Digest, depth)
	}
	b, err := s.Stat(ctx, digest.Digest(desc.Digest))
	if err != nil {
		return err
	}
	if b.Size != desc.Size {
		return fmt.Errorf("blob %s: %w: it has %d bytes, its descriptor says %d", desc.Digest, digest.ErrMismatch, b.Size, desc.Size)
	}
	if !IsManifest(desc.MediaType) {
		return nil
	}
	parts, err := content.Successors(ctx, s, desc)
	if err != nil {
		return err
	}
	for _, part := range parts {
		if err := s.complete(ctx, part, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// Fetch reads a blob from its start to its end; where its bytes are wrong the last Read says so, with digest.ErrMismatch.
func (s *Store) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	r, err := s.Reader(ctx, digest.Digest(desc.Digest))
	if err != nil {
		return nil, asOCI(err)
	}
	return r, nil
}

// Push takes the blob that desc names, and no other bytes. It is on stable storage when Push returns. The error wraps
// errdef.ErrAlreadyExists where the store has it. A manifest with a subject is listed in the index, so that Predecessors finds it.
func (s *Store) Push(ctx context.Context, desc ocispec.Descriptor, r io.Reader) error {
	d, err := digest.Parse(string(desc.Digest))
	if err != nil {
		return fmt.Errorf("taking a blob: %w", err)
	}
	if b, err := s.Stat(ctx, d); err == nil && b.Size == desc.Size {
		s.use(d)
		return fmt.Errorf("taking blob %s: %w", d, errdef.ErrAlreadyExists)
	}
	if desc.Size < 0 {
		return fmt.Errorf("taking blob %s: a size of %d bytes", d, desc.Size)
	}
	if _, err := s.Put(ctx, digest.VerifyReader(io.LimitReader(r, desc.Size+1), d, desc.Size)); err != nil {
		return fmt.Errorf("taking blob %s: %w", d, err)
	}
	if !IsManifest(desc.MediaType) {
		return nil
	}
	return s.list(ctx, desc)
}

// list enters a manifest into the index that has a subject.
func (s *Store) list(ctx context.Context, desc ocispec.Descriptor) error {
	subject, err := s.subject(ctx, desc)
	if err != nil || subject == nil {
		return err
	}
	return s.changeIndex(func(x index) bool {
		d := digest.Digest(desc.Digest)
		_, had := x.manifests[d]
		x.manifests[d] = plainDescriptor(desc)
		return !had
	})
}

// subject is what a manifest says that it is about; nil where it says nothing.
func (s *Store) subject(ctx context.Context, desc ocispec.Descriptor) (*ocispec.Descriptor, error) {
	b, err := content.FetchAll(ctx, s, desc)
	if err != nil {
		return nil, err
	}
	var m struct {
		Subject *ocispec.Descriptor `json:"subject"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("reading manifest %s: %w", desc.Digest, err)
	}
	return m.Subject, nil
}

// PutBlob makes a blob of bytes, and gives its descriptor.
func (s *Store) PutBlob(ctx context.Context, mediaType string, b []byte) (ocispec.Descriptor, error) {
	desc := content.NewDescriptorFromBytes(mediaType, b)
	err := s.Push(ctx, desc, bytes.NewReader(b))
	if err != nil && !errors.Is(err, errdef.ErrAlreadyExists) {
		return ocispec.Descriptor{}, err
	}
	return desc, nil
}

// Describe is the descriptor of a blob.
func Describe(mediaType string, b images.Blob) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: godigest.Digest(b.Digest), Size: b.Size}
}

// Predecessors are the manifests of the index that name node: as a part, or as their subject.
func (s *Store) Predecessors(ctx context.Context, node ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	var found []ocispec.Descriptor
	for _, m := range s.Manifests() {
		parts, err := content.Successors(ctx, s, m.Descriptor)
		if err != nil {
			if errors.Is(err, errdef.ErrNotFound) || errors.Is(err, digest.ErrMismatch) {
				continue // its own reader is told; it names nothing any more
			}
			return nil, fmt.Errorf("looking for what names %s: %w", node.Digest, err)
		}
		for _, part := range parts {
			if part.Digest == node.Digest {
				found = append(found, m.Descriptor)
				break
			}
		}
	}
	return found, nil
}
