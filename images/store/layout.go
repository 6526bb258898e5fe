package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/errdef"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// maxIndex bounds index.json in bytes: some hundred thousand names.
const maxIndex = 64 << 20

// An index is what index.json says: the manifests of the layout, and their tags. It is guarded by Store.indexMu, which
// is held while the file is written, so that what is on the disk is what was last written to memory.
type index struct {
	manifests map[digest.Digest]ocispec.Descriptor // without annotations
	tags      map[string]digest.Digest
}

func newIndex() index {
	return index{manifests: map[digest.Digest]ocispec.Descriptor{}, tags: map[string]digest.Digest{}}
}

func (x index) clone() index {
	return index{manifests: maps.Clone(x.manifests), tags: maps.Clone(x.tags)}
}

// bytes are those of index.json: one entry for each tag, and one for each manifest without. The same index has the same
// bytes.
func (x index) bytes() ([]byte, error) {
	file := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	tagged := map[digest.Digest]bool{}
	for _, tag := range slices.Sorted(maps.Keys(x.tags)) {
		d := x.tags[tag]
		desc := x.manifests[d]
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
		file.Manifests = append(file.Manifests, desc)
		tagged[d] = true
	}
	for _, d := range slices.Sorted(maps.Keys(x.manifests)) {
		if !tagged[d] {
			file.Manifests = append(file.Manifests, x.manifests[d])
		}
	}
	return json.Marshal(file)
}

// parseIndex reads index.json. What it has of other tools' making stays.
func parseIndex(b []byte) (index, error) {
	var file ocispec.Index
	if err := json.Unmarshal(b, &file); err != nil {
		return index{}, err
	}
	if file.SchemaVersion != 2 {
		return index{}, fmt.Errorf("has schema version %d, want 2", file.SchemaVersion)
	}
	x := newIndex()
	for _, desc := range file.Manifests {
		d, err := digest.Parse(string(desc.Digest))
		if err != nil {
			return index{}, err
		}
		tag := desc.Annotations[ocispec.AnnotationRefName]
		desc.Annotations = nil
		x.manifests[d] = desc
		if tag != "" {
			x.tags[tag] = d
		}
	}
	return x, nil
}

func (s *Store) indexFile() string { return filepath.Join(s.dir, ocispec.ImageIndexFile) }

// openLayout makes the directory an OCI image layout, or reads what it has as one. An index that cannot be read is set
// aside: the names in it are those of records, and are written anew by whoever keeps these.
func (s *Store) openLayout() error {
	version, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	name := filepath.Join(s.dir, ocispec.ImageLayoutFile)
	if b, err := os.ReadFile(name); err != nil || !json.Valid(b) {
		if err := atomicfile.WriteFile(name, version, 0o644); err != nil {
			return err
		}
	}
	s.index, err = s.readIndex()
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		if rerr := os.Rename(s.indexFile(), filepath.Join(s.corruptDir(), ocispec.ImageIndexFile)); rerr != nil {
			return errors.Join(err, rerr)
		}
		s.tell(Damage{Name: ocispec.ImageIndexFile, Err: err})
	}
	s.index = newIndex()
	return s.writeIndex(s.index)
}

func (s *Store) readIndex() (index, error) {
	fi, err := os.Stat(s.indexFile())
	if err != nil {
		return index{}, err
	}
	if fi.Size() > maxIndex {
		return index{}, fmt.Errorf("%q has %d bytes, more than %d", s.indexFile(), fi.Size(), maxIndex)
	}
	b, err := os.ReadFile(s.indexFile())
	if err != nil {
		return index{}, err
	}
	x, err := parseIndex(b)
	if err != nil {
		return index{}, fmt.Errorf("reading %q: %w", s.indexFile(), err)
	}
	return x, nil
}

func (s *Store) writeIndex(x index) error {
	b, err := x.bytes()
	if err != nil {
		return fmt.Errorf("encoding %q: %w", s.indexFile(), err)
	}
	return atomicfile.WriteFile(s.indexFile(), b, 0o644)
}

// changeIndex writes a changed index, and takes it up when it is on stable storage. change returns false for no change.
func (s *Store) changeIndex(change func(index) bool) error {
	s.indexMu.Lock()
	defer s.indexMu.Unlock()
	next := s.index.clone()
	if !change(next) {
		return nil
	}
	if err := s.writeIndex(next); err != nil {
		return err
	}
	s.index = next
	return nil
}

// isTag says whether s is a tag as the distribution specification has it ("Pulling manifests").
var isTag = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`).MatchString

// Tag names a manifest of the store: another one that had the name loses it. The name is on stable storage when it
// returns.
func (s *Store) Tag(ctx context.Context, desc ocispec.Descriptor, tag string) error {
	if !isTag(tag) {
		return fmt.Errorf("tagging %s as %q: %w: no tag of OCI has that form", desc.Digest, tag, errdef.ErrInvalidReference)
	}
	d := digest.Digest(desc.Digest)
	if _, err := s.Stat(ctx, d); err != nil {
		return fmt.Errorf("tagging %s as %q: %w", desc.Digest, tag, asOCI(err))
	}
	err := s.changeIndex(func(x index) bool {
		before, known := x.manifests[d]
		plain := plainDescriptor(desc)
		if before.ArtifactType != "" && plain.ArtifactType == "" {
			plain.ArtifactType = before.ArtifactType
		}
		same := known && x.tags[tag] == d && sameDescriptor(before, plain)
		x.manifests[d], x.tags[tag] = plain, d
		return !same
	})
	if err != nil {
		return fmt.Errorf("tagging %s as %q: %w", desc.Digest, tag, err)
	}
	return nil
}

// plainDescriptor is what the index keeps of a descriptor.
func plainDescriptor(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, ArtifactType: d.ArtifactType}
}

func sameDescriptor(a, b ocispec.Descriptor) bool {
	return a.MediaType == b.MediaType && a.Digest == b.Digest && a.Size == b.Size && a.ArtifactType == b.ArtifactType
}

// Untag takes a name away. One that is not there is no error.
func (s *Store) Untag(_ context.Context, tag string) error {
	err := s.changeIndex(func(x index) bool {
		_, had := x.tags[tag]
		delete(x.tags, tag)
		return had
	})
	if err != nil {
		return fmt.Errorf("taking the tag %q away: %w", tag, err)
	}
	return nil
}

// Resolve finds a manifest by its tag or its whole digest.
func (s *Store) Resolve(_ context.Context, ref string) (ocispec.Descriptor, error) {
	s.indexMu.RLock()
	defer s.indexMu.RUnlock()
	d, ok := s.index.tags[ref]
	if !ok {
		d = digest.Digest(ref)
	}
	desc, ok := s.index.manifests[d]
	if !ok {
		return ocispec.Descriptor{}, fmt.Errorf("resolving %q: %w", ref, errdef.ErrNotFound)
	}
	return desc, nil
}

// Tags calls fn once with the tags behind last, sorted.
func (s *Store) Tags(_ context.Context, last string, fn func(tags []string) error) error {
	s.indexMu.RLock()
	tags := slices.Sorted(maps.Keys(s.index.tags))
	s.indexMu.RUnlock()
	return fn(slices.DeleteFunc(tags, func(t string) bool { return t <= last }))
}

// Manifests are the manifests of the index with their tags, by digest.
func (s *Store) Manifests() []Manifest {
	s.indexMu.RLock()
	defer s.indexMu.RUnlock()
	tags := map[digest.Digest][]string{}
	for tag, d := range s.index.tags {
		tags[d] = append(tags[d], tag)
	}
	all := make([]Manifest, 0, len(s.index.manifests))
	for d, desc := range s.index.manifests {
		slices.Sort(tags[d])
		all = append(all, Manifest{Descriptor: desc, Tags: tags[d]})
	}
	slices.SortFunc(all, func(a, b Manifest) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return all
}

// A Manifest is one that the index of a layout names.
type Manifest struct {
	ocispec.Descriptor
	Tags []string // sorted
}

// Forget takes manifests, with their tags, out of the index. Their blobs stay until Sweep.
func (s *Store) Forget(_ context.Context, gone map[digest.Digest]bool) error {
	err := s.changeIndex(func(x index) bool {
		had := len(x.manifests) + len(x.tags)
		maps.DeleteFunc(x.manifests, func(d digest.Digest, _ ocispec.Descriptor) bool { return gone[d] })
		maps.DeleteFunc(x.tags, func(_ string, d digest.Digest) bool { return gone[d] })
		return len(x.manifests)+len(x.tags) != had
	})
	if err != nil {
		return fmt.Errorf("taking manifests out of the index: %w", err)
	}
	return nil
}
