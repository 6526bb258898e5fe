package artifact

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/errdef"

	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
)

// maxManifest bounds a manifest and a config in bytes. Registries take manifests of 4 MiB; the lock of a base with a
// thousand packages has some 50 KiB.
const maxManifest = 4 << 20

// Record writes the manifest of an artifact into the store, with the layers that it needs, and tags it. What is there
// already, and whole, is not made again.
func Record(ctx context.Context, s *store.Store, a Artifact, id digest.Digest, names ...string) (ocispec.Descriptor, error) {
	desc, err := record(ctx, s, a, id)
	if err == nil {
		err = tag(ctx, s, desc, id, names)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("recording the %s %s as an artifact: %w", a.Kind, id.Short(), err)
	}
	return desc, nil
}

func record(ctx context.Context, s *store.Store, a Artifact, id digest.Digest) (ocispec.Descriptor, error) {
	b, err := json.Marshal(a.Config)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config, err := s.PutBlob(ctx, configType(a.Kind), b)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if desc, ok := recorded(ctx, s, id, config); ok {
		return desc, nil
	}
	m := manifestOf(a.Kind, config)
	for _, l := range a.Layers {
		desc, err := layer(ctx, s, l)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("packing its %s: %w", l.Name, err)
		}
		m.Layers = append(m.Layers, desc)
	}
	return put(ctx, s, m.MediaType, m.ArtifactType, m)
}

// recorded finds the manifest that id has, where that has this config and all of it is there.
func recorded(ctx context.Context, s *store.Store, id digest.Digest, config ocispec.Descriptor) (ocispec.Descriptor, bool) {
	desc, err := s.Resolve(ctx, TagOf(id))
	if err != nil || desc.MediaType != ocispec.MediaTypeImageManifest || s.Complete(ctx, desc) != nil {
		return ocispec.Descriptor{}, false
	}
	m, err := readManifest(ctx, s, desc)
	return desc, err == nil && m.Config.Digest == config.Digest
}

func manifestOf(kind string, config ocispec.Descriptor) ocispec.Manifest {
	return ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: TypeOf(kind), Config: config,
		Layers: []ocispec.Descriptor{},
	}
}

// layer is the descriptor of a layer, which is in the store then.
func layer(ctx context.Context, s *store.Store, l Layer) (ocispec.Descriptor, error) {
	blob, err := s.Stat(ctx, l.Blob.Digest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	annotations := map[string]string{ocispec.AnnotationTitle: l.Name}
	if l.Pack {
		annotations[annotationDigest], annotations[annotationSize] = blob.Digest.String(), strconv.FormatInt(blob.Size, 10)
		if blob, err = pack(ctx, s, blob.Digest); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	desc := store.Describe(l.Type, blob)
	desc.Annotations = annotations
	return desc, nil
}

// put writes a manifest or an index.
func put(ctx context.Context, s *store.Store, mediaType, artifactType string, m any) (ocispec.Descriptor, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(b) > maxManifest {
		return ocispec.Descriptor{}, fmt.Errorf("its manifest has %d bytes, more than %d", len(b), maxManifest)
	}
	desc, err := s.PutBlob(ctx, mediaType, b)
	desc.ArtifactType = artifactType
	return desc, err
}

func tag(ctx context.Context, s *store.Store, desc ocispec.Descriptor, id digest.Digest, names []string) error {
	for _, name := range append([]string{TagOf(id)}, names...) {
		if err := s.Tag(ctx, desc, name); err != nil {
			return err
		}
	}
	return nil
}

// RecordRelease writes the index of a release. Its parts must have been recorded; parts are their recipes. The SBOM is a
// layer of the release's own manifest, so that it is copied with it by programs that follow no referrers.
func RecordRelease(
	ctx context.Context, s *store.Store, r Release, parts []digest.Digest, sbom []byte, names ...string,
) (ocispec.Descriptor, error) {
	desc, err := recordRelease(ctx, s, r, parts, sbom)
	if err == nil {
		err = tag(ctx, s, desc, r.ID, names)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("recording release %s as an artifact: %w", r.ID.Short(), err)
	}
	return desc, nil
}

func recordRelease(ctx context.Context, s *store.Store, r Release, parts []digest.Digest, sbom []byte) (ocispec.Descriptor, error) {
	var none ocispec.Descriptor
	b, err := json.Marshal(r)
	if err != nil {
		return none, err
	}
	config, err := s.PutBlob(ctx, configType(KindRelease), b)
	if err != nil {
		return none, err
	}
	m := manifestOf(KindRelease, config)
	packages, err := s.PutBlob(ctx, typeSBOM, sbom)
	if err != nil {
		return none, err
	}
	packages.Annotations = map[string]string{ocispec.AnnotationTitle: "sbom.spdx.json"}
	m.Layers = append(m.Layers, packages)
	own, err := put(ctx, s, m.MediaType, m.ArtifactType, m)
	if err != nil {
		return none, err
	}
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, ArtifactType: TypeOf(KindRelease),
		Manifests: []ocispec.Descriptor{own},
	}
	for _, part := range parts {
		desc, err := s.Resolve(ctx, TagOf(part))
		if err != nil {
			return none, fmt.Errorf("its part %s: %w", part.Short(), err)
		}
		index.Manifests = append(index.Manifests, desc)
	}
	return put(ctx, s, index.MediaType, index.ArtifactType, index)
}

// A Fetcher gives what a descriptor names: a store, a registry.
type Fetcher = content.Fetcher

func readManifest(ctx context.Context, from Fetcher, desc ocispec.Descriptor) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	return m, readJSON(ctx, from, desc, &m)
}

func readJSON(ctx context.Context, from Fetcher, desc ocispec.Descriptor, v any) error {
	if desc.Size > maxManifest {
		return fmt.Errorf("reading %s: it has %d bytes, more than %d", desc.Digest, desc.Size, maxManifest)
	}
	b, err := content.FetchAll(ctx, from, desc)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return fmt.Errorf("reading %s: %w", desc.Digest, err)
	}
	return nil
}

// ReadConfig reads the config of an artifact, of which it must be the kind, into v.
func ReadConfig(ctx context.Context, from Fetcher, desc ocispec.Descriptor, kind string, v any) error {
	m, err := Manifest(ctx, from, desc)
	if err != nil {
		return err
	}
	if m.ArtifactType != TypeOf(kind) {
		return fmt.Errorf("manifest %s is of type %q, not of a %s", desc.Digest, m.ArtifactType, kind)
	}
	return readJSON(ctx, from, m.Config, v)
}

// Manifest is the manifest of an artifact; of a release its own.
func Manifest(ctx context.Context, from Fetcher, desc ocispec.Descriptor) (ocispec.Manifest, error) {
	if desc.MediaType != ocispec.MediaTypeImageIndex {
		return readManifest(ctx, from, desc)
	}
	var index ocispec.Index
	if err := readJSON(ctx, from, desc, &index); err != nil {
		return ocispec.Manifest{}, err
	}
	if len(index.Manifests) == 0 || index.ArtifactType != TypeOf(KindRelease) {
		return ocispec.Manifest{}, fmt.Errorf("index %s is of type %q, not of a release", desc.Digest, index.ArtifactType)
	}
	return readManifest(ctx, from, index.Manifests[0])
}

// SBOM reads the SBOM of a release.
func SBOM(ctx context.Context, from Fetcher, desc ocispec.Descriptor) ([]byte, error) {
	m, err := Manifest(ctx, from, desc)
	if err != nil {
		return nil, err
	}
	for _, l := range m.Layers {
		if l.MediaType == typeSBOM && l.Size <= maxSBOM {
			return content.FetchAll(ctx, from, l)
		}
	}
	return nil, fmt.Errorf("manifest %s has no SBOM: %w", desc.Digest, errdef.ErrNotFound)
}

// maxSBOM bounds an SBOM in bytes: ten thousand packages have some 8 MiB.
const maxSBOM = 64 << 20

// IsNotFound says whether a registry or a layout has no such thing.
func IsNotFound(err error) bool { return errors.Is(err, errdef.ErrNotFound) }
