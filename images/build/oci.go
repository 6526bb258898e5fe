package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/retry"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
)

const (
	maxLayers   = 500      // of an OCI image
	maxManifest = 4 << 20  // bytes of a manifest or an index
	maxLayer    = 16 << 30 // bytes of a layer as it lies there
)

// addOCI adds the layers of an OCI image (image specification 1.1, layer.md), the lowest first, and gives the digest of the
// manifest that they were found by. Of what a registry sends nothing counts that is not what its digest says.
func (f *flattener) addOCI(ctx context.Context, r images.AppRecipe, s *steps) (digest.Digest, error) {
	target, ref, done, err := openOCI(ctx, r.OCI)
	if err != nil {
		return "", fmt.Errorf("opening %s: %w", r.OCI, err)
	}
	defer done()
	platform := &ocispec.Platform{OS: "linux", Architecture: r.Arch}
	desc, err := oras.Resolve(ctx, target, ref, oras.ResolveOptions{TargetPlatform: platform, MaxMetadataBytes: maxManifest})
	if err != nil {
		return "", fmt.Errorf("looking for %s for %s: %w", r.OCI, r.Arch, err)
	}
	id, err := digest.Parse(desc.Digest.String())
	if err != nil {
		return "", fmt.Errorf("looking for %s: %w", r.OCI, err)
	}
	manifest, err := manifestOf(ctx, target, desc)
	if err != nil {
		return "", fmt.Errorf("reading the manifest %s: %w", id, err)
	}
	_, _ = fmt.Fprintf(s, "manifest %s, %d layers\n", id, len(manifest.Layers))
	s.begin("layers")
	f.noDev = true
	for i, l := range manifest.Layers {
		if err := f.addLayer(ctx, target, l); err != nil {
			return "", fmt.Errorf("layer %d, %s: %w", i+1, l.Digest, err)
		}
		_, _ = fmt.Fprintf(s, "layer %d of %d, %d bytes\n", i+1, len(manifest.Layers), l.Size)
	}
	return id, nil
}

// manifestOf reads a manifest, which is what its digest says.
func manifestOf(ctx context.Context, from content.Fetcher, desc ocispec.Descriptor) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if desc.Size > maxManifest {
		return m, fmt.Errorf("it has %d bytes, more than %d", desc.Size, maxManifest)
	}
	b, err := content.FetchAll(ctx, from, desc)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, err
	}
	if len(m.Layers) == 0 || len(m.Layers) > maxLayers {
		return m, fmt.Errorf("it has %d layers; want 1 to %d", len(m.Layers), maxLayers)
	}
	return m, nil
}

func (f *flattener) addLayer(ctx context.Context, from content.Fetcher, desc ocispec.Descriptor) error {
	if desc.Size < 0 || desc.Size > maxLayer {
		return fmt.Errorf("it has %d bytes, more than %d", desc.Size, int64(maxLayer))
	}
	rc, err := from.Fetch(ctx, desc)
	if err != nil {
		return err
	}
	defer rc.Close()
	verified := content.NewVerifyReader(rc, desc)
	plain, closePlain, err := decompress(verified)
	if err != nil {
		return err
	}
	defer closePlain()
	if err := f.add(ctx, plain); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, verified); err != nil { // what follows the archive counts for the digest, too
		return err
	}
	return verified.Verify()
}

// openOCI opens where an image is, and gives the tag or the digest that names it there.
func openOCI(ctx context.Context, image string) (target oras.ReadOnlyTarget, ref string, done func(), err error) {
	if dir, ok := strings.CutPrefix(image, "oci:"); ok {
		dir, ref = cutRef(dir)
		store, err := oci.NewFromFS(ctx, os.DirFS(dir))
		return store, ref, func() {}, err
	}
	name, ok := strings.CutPrefix(image, "docker://")
	if !ok {
		return nil, "", nil, errors.New(`want "oci:DIR:TAG" or "docker://HOST/NAME:TAG"`)
	}
	name, ref = cutRef(name)
	repo, err := remote.NewRepository(name)
	if err != nil {
		return nil, "", nil, err
	}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, ResponseHeaderTimeout: stalled, TLSHandshakeTimeout: stalled, ForceAttemptHTTP2: true,
	}
	repo.Client = &auth.Client{Client: &http.Client{Transport: retry.NewTransport(transport)}, Cache: auth.NewCache()}
	repo.PlainHTTP = isLoopback(repo.Reference.Host())
	return repo, ref, transport.CloseIdleConnections, nil
}

// cutRef parts a name from its tag or digest.
func cutRef(s string) (name, ref string) {
	if name, ref, ok := strings.Cut(s, "@"); ok {
		return name, ref
	}
	i := strings.LastIndexByte(s, ':')
	return s[:max(i, 0)], s[i+1:]
}

// isLoopback says whether a registry is on this machine: such a one is asked without TLS, as other clients do.
func isLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
