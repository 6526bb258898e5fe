package artifact

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/verity"
)

// A Verification is what a look at every byte of a store came to.
type Verification struct {
	Blobs     int       `json:"blobs"`     // that were hashed
	Bytes     int64     `json:"bytes"`     // of them
	Manifests int       `json:"manifests"` // whose parts were looked for
	Images    int       `json:"images"`    // whose dm-verity trees were computed
	Problems  []Problem `json:"problems"`  // none: all is well
}

// A Problem is something that is not as it should be.
type Problem struct {
	What  string `json:"what"`  // "blob", "manifest" or "image"
	Name  string `json:"name"`  // its digest, or the tag of a manifest
	Error string `json:"error"` // what is wrong
}

func (v *Verification) add(what, name string, err error) {
	v.Problems = append(v.Problems, Problem{What: what, Name: name, Error: err.Error()})
}

// Verify hashes every blob of a store again, looks for all that its manifests name, and checks the dm-verity tree of each image
// against the root that its artifact says. Only what keeps it from looking is an error.
func Verify(ctx context.Context, s *store.Store) (Verification, error) {
	v := Verification{Problems: []Problem{}}
	blobs, err := s.List(ctx)
	if err != nil {
		return v, err
	}
	for _, b := range blobs {
		err := s.Verify(ctx, b.Digest)
		switch {
		case ctx.Err() != nil:
			return v, ctx.Err()
		case errors.Is(err, store.ErrNotFound):
			continue // deleted since
		case err != nil:
			v.add("blob", b.Digest.String(), err)
		}
		v.Blobs++
		v.Bytes += b.Size
	}
	for _, m := range s.Manifests() {
		if err := verifyManifest(ctx, s, m, &v); err != nil {
			return v, err
		}
	}
	return v, nil
}

func verifyManifest(ctx context.Context, s *store.Store, m store.Manifest, v *Verification) error {
	v.Manifests++
	name := string(m.Digest)
	if len(m.Tags) > 0 {
		name = m.Tags[0]
	}
	if err := s.Complete(ctx, m.Descriptor); err != nil {
		v.add("manifest", name, err)
		return ctx.Err()
	}
	if m.MediaType != ocispec.MediaTypeImageManifest {
		return ctx.Err()
	}
	img, ok, err := imageOf(ctx, s, m.Descriptor)
	if err != nil {
		v.add("manifest", name, err)
	}
	if !ok {
		return ctx.Err()
	}
	v.Images++
	if err := CheckImage(ctx, s, img); err != nil {
		v.add("image", img.Digest.String(), err)
	}
	return ctx.Err()
}

// imageOf is the image that an artifact's config has; ok is false where it has none with a tree.
func imageOf(ctx context.Context, from Fetcher, desc ocispec.Descriptor) (img images.Image, ok bool, err error) {
	m, err := readManifest(ctx, from, desc)
	if err != nil {
		return img, false, err
	}
	var raw json.RawMessage
	if err := readJSON(ctx, from, m.Config, &raw); err != nil {
		return img, false, err
	}
	var config struct {
		Image images.Image `json:"image"`
	}
	if err := json.Unmarshal(raw, &config); err != nil {
		return img, false, fmt.Errorf("reading the config of manifest %s: %w", desc.Digest, err)
	}
	return config.Image, config.Image.Root != "", nil
}

// maxBad bounds the blocks of one image that are named.
const maxBad = 3

// CheckImage computes the dm-verity tree of an image of the store, and compares it with the one in the image and with its root.
func CheckImage(ctx context.Context, s *store.Store, img images.Image) error {
	root, err := verity.ParseRoot(img.Root)
	if err != nil {
		return err
	}
	r, err := s.Open(ctx, img.Digest)
	if err != nil {
		return err
	}
	defer r.Close()
	at, ok := r.(io.ReaderAt)
	if !ok {
		return errors.New("the store cannot read at an offset")
	}
	f, err := verity.Open(at, img.Data, root)
	if err != nil {
		return err
	}
	bad, err := f.Check(ctx, 0, f.Blocks())
	if err != nil || len(bad) == 0 {
		return err
	}
	return fmt.Errorf("%w: %d blocks are not what the root hash says, first %v", digest.ErrMismatch, len(bad), bad[:min(len(bad), maxBad)])
}
