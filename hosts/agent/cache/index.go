package cache

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/chunk"
	"github.com/troupe-dev/troupe/internal/digest"
)

// indexPath is the file with the index of an image's chunks, and all of its pages behind it.
func (c *Cache) indexPath(image digest.Digest) string { return c.path("chunks", image.Hex()) }

// A listing is all that is known of an image's chunks.
type listing struct {
	index  *chunk.Index
	pages  [][]byte // of the index, one by one
	chunks []chunk.Chunk
}

// readListing reads what the cache keeps of an image's chunks. Nothing of it is believed: pages are compared with their IDs,
// and what is chunks is compared with theirs when it is used.
func (c *Cache) readListing(image digest.Digest) (*listing, error) {
	f, err := os.Open(c.indexPath(image))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() > maxListing {
		return nil, fmt.Errorf("the index of image %s has %d bytes", image.Short(), fi.Size())
	}
	all, err := io.ReadAll(io.LimitReader(f, maxListing))
	if err != nil {
		return nil, err
	}
	l := &listing{}
	rest := all
	if l.index, rest, err = chunk.ParseFirst(all); err != nil {
		return nil, err
	}
	for _, p := range l.index.Pages {
		if len(rest) < int(p.Size) || !p.Is(rest[:p.Size]) {
			return nil, fmt.Errorf("a page of the index of image %s is broken", image.Short())
		}
		l.pages, rest = append(l.pages, rest[:p.Size]), rest[p.Size:]
	}
	l.chunks, err = l.index.Chunks(l.pages)
	return l, err
}

// maxListing bounds a file with an index and its pages.
const maxListing = chunk.MaxIndex + chunk.MaxPages

// keepListing keeps it. Without it a later version of the image would be compared with the image cut anew.
func (c *Cache) keepListing(image digest.Digest, l *listing) error {
	b := l.index.Bytes()
	for _, p := range l.pages {
		b = append(b, p...)
	}
	if err := atomicfile.WriteFile(c.indexPath(image), b, 0o600); err != nil {
		return fmt.Errorf("keeping the index of image %s: %w", image.Short(), err)
	}
	return nil
}

// dropListing forgets it, with its image.
func (c *Cache) dropListing(image digest.Digest) {
	if err := os.Remove(c.indexPath(image)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("the index of an image cannot be removed, and takes room", "image", image.Short(), "error", err)
	}
}

// sweepListings forgets those of images that are neither there nor on their way.
func (c *Cache) sweepListings() error {
	entries, err := os.ReadDir(c.path("chunks"))
	if err != nil {
		return fmt.Errorf("listing the indexes of images: %w", err)
	}
	for _, e := range entries {
		d, err := digest.FromHex(e.Name())
		if err != nil {
			continue // atomicfile's, which Sweep removes
		}
		if _, err := os.Stat(c.path("images/tmp", d.Hex())); !c.Has(d, -1) && err != nil {
			c.dropListing(d)
		}
	}
	return nil
}

// A source is an image that is whole in the cache, to take chunks from.
type source struct {
	digest digest.Digest
	file   *os.File
	form   *chunk.Form
	rotten int // chunks that were not what they should be
}

// openSource opens an image. What it has is in the listing; where there is none, it is cut anew, which reads all of it.
func (c *Cache) openSource(image digest.Digest, l *listing) (*source, []chunk.Chunk, error) {
	f, err := os.Open(c.Path(image))
	if err != nil {
		return nil, nil, err
	}
	s := &source{digest: image, file: f}
	var data int64
	if l != nil {
		data = l.index.Data
	} else if data, err = chunk.ImageSize(f); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	if s.form, err = chunk.OpenForm(f, data); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	if l != nil {
		return s, l.chunks, nil
	}
	chunks, err := s.form.Chunks()
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return s, chunks, nil
}

// plain is a blob that travels whole.
func plain(b agentapi.Blob) agentapi.Image { return agentapi.Image{Blob: b} }
