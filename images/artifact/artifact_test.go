package artifact_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cuelabs.dev/go/oci/ociregistry/ocimem"
	"cuelabs.dev/go/oci/ociregistry/ociserver"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
)

func openStore(t *testing.T) (*store.Store, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s, dir
}

func put(t *testing.T, s *store.Store, b []byte) images.Blob {
	t.Helper()
	blob, err := s.Put(t.Context(), bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return blob
}

// content is text that compresses, n bytes of it.
func content(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, n)
	for i := range b {
		b[i] = "abcdefgh"[r.IntN(8)]
	}
	return b
}

// testBase is a base whose image has more than one frame, and ends within one.
func testBase(t *testing.T, s *store.Store) images.Base {
	t.Helper()
	b := images.Base{
		Recipe: digest.Of([]byte("base recipe")), Arch: "amd64", Kernel: put(t, s, []byte("kernel")), Modules: put(t, s, []byte("modules")),
		Version: "6.1", Packages: []string{"libc6=2.36-9", "zlib1g=1:1.2"},
	}
	image := put(t, s, content(1, 5<<20+5))
	b.Image.Digest, b.Image.Size = image.Digest, image.Size
	return b
}

func record(t *testing.T, s *store.Store, a artifact.Artifact, id digest.Digest, names ...string) ocispec.Descriptor {
	t.Helper()
	desc, err := artifact.Record(t.Context(), s, a, id, names...)
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

func TestBaseIsMadeAgainOfItsManifest(t *testing.T) {
	s, _ := openStore(t)
	base := testBase(t, s)
	desc := record(t, s, artifact.OfBase(base), base.Recipe, artifact.NamesOf("debian", artifact.KindBase, base.Image.Digest)...)
	to, _ := openStore(t)
	if _, err := artifact.Copy(t.Context(), s, "debian.base", to, artifact.TagOf(base.Recipe)); err != nil {
		t.Fatal(err)
	}
	if _, err := to.Stat(t.Context(), base.Image.Digest); !errors.Is(err, store.ErrNotFound) {
		t.Fatalf("the image was copied as it is: %v", err)
	}
	got, err := to.Resolve(t.Context(), artifact.TagOf(base.Recipe))
	if err != nil || got.Digest != desc.Digest {
		t.Fatalf("the copy is %s, %v; want %s", got.Digest, err, desc.Digest)
	}
	if err := artifact.Restore(t.Context(), to, got); err != nil {
		t.Fatal(err)
	}
	var copied images.Base
	if err := artifact.ReadConfig(t.Context(), to, got, artifact.KindBase, &copied); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(base, copied); d != "" {
		t.Errorf("the base (-want +got):\n%s", d)
	}
	for _, d := range []digest.Digest{base.Image.Digest, base.Kernel.Digest, base.Modules.Digest} {
		if _, err := to.Stat(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
	if err := artifact.ReadConfig(t.Context(), to, got, artifact.KindDelta, &images.Delta{}); err == nil {
		t.Error("a base was read as a delta")
	}
}

func TestSameBytesSameManifest(t *testing.T) {
	var first digest.Digest
	for range 2 {
		s, _ := openStore(t)
		base := testBase(t, s)
		desc := record(t, s, artifact.OfBase(base), base.Recipe)
		if first != "" && digest.Digest(desc.Digest) != first {
			t.Errorf("manifest %s, and before that %s", desc.Digest, first)
		}
		first = digest.Digest(desc.Digest)
	}
}

// A layer that is lost is made again of the image, and the image of its layer.
func TestEachSideMendsTheOther(t *testing.T) {
	s, dir := openStore(t)
	base := testBase(t, s)
	desc := record(t, s, artifact.OfBase(base), base.Recipe)
	m, err := artifact.Manifest(t.Context(), s, desc)
	if err != nil {
		t.Fatal(err)
	}
	packed := digest.Digest(m.Layers[0].Digest)
	if m.Layers[0].Size >= base.Image.Size {
		t.Errorf("the layer has %d bytes, the image %d", m.Layers[0].Size, base.Image.Size)
	}
	for _, d := range []digest.Digest{packed, base.Image.Digest} {
		if err := os.Truncate(filepath.Join(dir, "blobs/sha256", d.Hex()), 1000); err != nil {
			t.Fatal(err)
		}
		if again := record(t, s, artifact.OfBase(base), base.Recipe); again.Digest != desc.Digest {
			t.Errorf("recorded again as %s, before that %s", again.Digest, desc.Digest)
		}
		if err := artifact.Restore(t.Context(), s, desc); err != nil {
			t.Error(err)
		}
		if err := errors.Join(s.Verify(t.Context(), d), s.Complete(t.Context(), desc)); err != nil {
			t.Error(err)
		}
	}
}

// A layer that is whole zstd, and unpacks to something else than its manifest says, or ends early, leaves nothing.
func TestLayerThatLies(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	good := content(2, 300_000)
	packed := enc.EncodeAll(good, nil)
	for name, layer := range map[string][]byte{
		"other bytes": enc.EncodeAll(content(3, 300_000), nil), "more": enc.EncodeAll(append(bytes.Clone(good), 'x'), nil),
		"less": enc.EncodeAll(good[:1000], nil), "cut": packed[:len(packed)-50], "no zstd": []byte("not a frame"), "empty": {},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := openStore(t)
			b := put(t, s, good)
			desc := record(t, s, artifact.OfDelta(deltaOf(b)), digest.Of([]byte("recipe")))
			if err := s.Delete(t.Context(), b.Digest); err != nil {
				t.Fatal(err)
			}
			m, err := artifact.Manifest(t.Context(), s, desc)
			if err != nil {
				t.Fatal(err)
			}
			bad := store.Describe(m.Layers[0].MediaType, put(t, s, layer))
			bad.Annotations = m.Layers[0].Annotations
			before, _ := s.List(t.Context())
			if err := artifact.RestoreLayer(t.Context(), s, bad); err == nil {
				t.Error("it was taken")
			}
			after, _ := s.List(t.Context())
			if d := cmp.Diff(before, after); d != "" {
				t.Errorf("blobs (-before +after):\n%s", d)
			}
		})
	}
}

func deltaOf(b images.Blob) images.Delta {
	d := images.Delta{Recipe: digest.Of([]byte("recipe"))}
	d.Image.Digest, d.Image.Size = b.Digest, b.Size
	return d
}

func TestDiskStaysSparse(t *testing.T) {
	s, _ := openStore(t)
	w, err := s.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.WriteAt(content(4, 4096), 20<<20)
	if err = errors.Join(err, w.Truncate(64<<20)); err != nil {
		t.Fatal(err)
	}
	b, err := w.Commit()
	if err != nil {
		t.Fatal(err)
	}
	disk := images.Disk{Recipe: digest.Of([]byte("disk"))}
	disk.Image.Digest, disk.Image.Size = b.Digest, b.Size
	desc := record(t, s, artifact.OfDisk(disk), disk.Recipe)
	if err := s.Delete(t.Context(), b.Digest); err != nil {
		t.Fatal(err)
	}
	if err := artifact.Restore(t.Context(), s, desc); err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(s.Path(b.Digest), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 64<<20 || st.Blocks*512 > 1<<20 {
		t.Errorf("a disk of %d bytes takes %d", st.Size, st.Blocks*512)
	}
}

func TestReleaseComesWithItsParts(t *testing.T) {
	s, _ := openStore(t)
	base := testBase(t, s)
	delta := deltaOf(put(t, s, []byte("delta")))
	record(t, s, artifact.OfBase(base), base.Recipe)
	record(t, s, artifact.OfDelta(delta), delta.Recipe)
	rel := artifact.Release{ID: digest.Of([]byte("release")), BaseRecipe: base.Recipe, DeltaRecipe: delta.Recipe}
	_, err := artifact.RecordRelease(t.Context(), s, rel, []digest.Digest{base.Recipe, delta.Recipe}, []byte(`{"spdxVersion":"SPDX-2.3"}`), "web.release")
	if err != nil {
		t.Fatal(err)
	}
	registry := startRegistry(t)
	to, err := artifact.Open(registry + "/fleet")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := artifact.Copy(t.Context(), s, "web.release", to, ""); err != nil {
		t.Fatal(err)
	}
	back, _ := openStore(t)
	from, err := artifact.Source(t.Context(), registry+"/fleet")
	if err != nil {
		t.Fatal(err)
	}
	desc, err := artifact.Copy(t.Context(), from, "web.release", back, artifact.TagOf(rel.ID))
	if err != nil {
		t.Fatal(err)
	}
	if err := artifact.Restore(t.Context(), back, desc); err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{base.Image.Digest, base.Kernel.Digest, delta.Image.Digest} {
		if _, err := back.Stat(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
	var got artifact.Release
	if err := artifact.ReadConfig(t.Context(), back, desc, artifact.KindRelease, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(rel, got); d != "" {
		t.Errorf("the release (-want +got):\n%s", d)
	}
	if sbom, err := artifact.SBOM(t.Context(), back, desc); err != nil || !strings.Contains(string(sbom), "SPDX-2.3") {
		t.Errorf("the SBOM: %s, %v", sbom, err)
	}
}

// startRegistry serves a registry over HTTP on loopback.
func startRegistry(t *testing.T) (place string) {
	t.Helper()
	server := httptest.NewServer(ociserver.New(ocimem.New(), nil))
	t.Cleanup(server.Close)
	return "oci://" + strings.TrimPrefix(server.URL, "http://")
}

func TestCopyToADirectory(t *testing.T) {
	s, _ := openStore(t)
	base := testBase(t, s)
	record(t, s, artifact.OfBase(base), base.Recipe, "debian.base")
	place := "oci:" + filepath.Join(t.TempDir(), "usb")
	to, err := artifact.Open(place)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := artifact.Copy(t.Context(), s, "debian.base", to, ""); err != nil {
		t.Fatal(err)
	}
	from, err := artifact.Source(t.Context(), place) // while it is open for writing
	if err != nil {
		t.Fatal(err)
	}
	if desc, err := from.Resolve(context.WithoutCancel(t.Context()), "debian.base"); err != nil {
		t.Error(err)
	} else if r, err := from.Fetch(t.Context(), desc); err != nil {
		t.Error(err)
	} else if b, err := io.ReadAll(r); err != nil || r.Close() != nil || !strings.Contains(string(b), artifact.TypeOf(artifact.KindBase)) {
		t.Errorf("read %s, %v", b, err)
	}
	if err := to.Close(); err != nil {
		t.Error(err)
	}
}

func TestPlaces(t *testing.T) {
	for place, plain := range map[string]bool{
		"oci://registry.example.com/fleet": false, "oci://registry.example.com:5000/a/b": false, "oci+http://registry.example.com/fleet": true,
		"oci://127.0.0.1:5000/fleet": true, "oci://localhost/fleet": true, "oci://[::1]:5000/fleet": true,
	} {
		repo, err := artifact.Registry(place)
		if err != nil {
			t.Errorf("%s: %v", place, err)
		} else if repo.PlainHTTP != plain {
			t.Errorf("%s: without TLS: %v", place, repo.PlainHTTP)
		}
	}
	for _, place := range []string{"", "oci:", "fleet", "https://registry.example.com/fleet", "oci://registry.example.com", "oci://registry.example.com/fleet:web", "oci://registry.example.com/UPPER"} {
		if _, err := artifact.Source(t.Context(), place); err == nil {
			t.Errorf("%q was taken for a place", place)
		}
	}
}
