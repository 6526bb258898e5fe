package api

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"

	godigest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"

	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/internal/digest"
)

// A Client is what oras copies from: the artifacts of a server's store.
var _ oras.ReadOnlyTarget = (*Client)(nil)

// Resolve finds a manifest of the server's store by tag or digest.
func (c *Client) Resolve(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	a, err := get[Artifact](ctx, c, "/api/v1/artifacts/"+url.PathEscape(ref), nil)
	return ocispec.Descriptor{
		MediaType: a.MediaType, ArtifactType: a.ArtifactType, Digest: godigest.Digest(a.Digest), Size: a.Size,
	}, err
}

// Fetch reads a blob of the server's store. Wrong bytes are an error in place of io.EOF.
func (c *Client) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	d, err := digest.Parse(string(desc.Digest))
	if err != nil {
		return nil, fmt.Errorf("fetching a blob: %w", err)
	}
	r, err := c.do(ctx, http.MethodGet, "/blobs/sha256/"+d.Hex(), nil, nil)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{digest.VerifyReader(r.Body, d, desc.Size), r.Body}, nil
}

// Exists says that the server has a blob: who names it found its manifest there.
func (c *Client) Exists(context.Context, ocispec.Descriptor) (bool, error) { return true, nil }

// PullArtifact has the server get an artifact from its registry.
func (c *Client) PullArtifact(ctx context.Context, ref string) (Artifact, error) {
	var a Artifact
	return a, c.post(ctx, "/api/v1/artifacts/"+url.PathEscape(ref)+"/pull", nil, &a)
}

// VerifyStore has the server hash all of its store.
func (c *Client) VerifyStore(ctx context.Context) (artifact.Verification, error) {
	var v artifact.Verification
	return v, c.post(ctx, "/api/v1/store/verify", nil, &v)
}

// Collect has the server delete what nothing needs or, in a dry run, say what that is.
func (c *Client) Collect(ctx context.Context, dry bool) (Collected, error) {
	var v Collected
	return v, c.post(ctx, fmt.Sprintf("/api/v1/store/collect?dryRun=%t", dry), nil, &v)
}

// Contents are the images and packages of an image, a role or a release.
func (c *Client) Contents(ctx context.Context, ref string) (Contents, error) {
	return get[Contents](ctx, c, "/api/v1/images/"+url.PathEscape(ref)+"/contents", nil)
}

// Diff is in what two images, roles or releases differ.
func (c *Client) Diff(ctx context.Context, before, after string) (Diff, error) {
	return get[Diff](ctx, c, "/api/v1/diff", url.Values{"before": {before}, "after": {after}})
}

// SBOM reads the SBOM of a release. The caller closes it.
func (c *Client) SBOM(ctx context.Context, ref string) (io.ReadCloser, error) {
	r, err := c.do(ctx, http.MethodGet, "/api/v1/releases/"+url.PathEscape(ref)+"/sbom", nil, nil)
	if err != nil {
		return nil, err
	}
	return r.Body, nil
}
