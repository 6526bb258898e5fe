package artifact

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"

	"github.com/troupe-dev/troupe/images/store"
)

// Schemes of places.
const (
	schemeHTTPS = "oci://"      // a registry
	schemeHTTP  = "oci+http://" // a registry without TLS; on a loopback address oci:// is, too
	schemeDir   = "oci:"        // an OCI layout: a directory
)

// A registry that does not answer is away.
const (
	dialTime   = 10 * time.Second
	answerTime = time.Minute // until the head of an answer comes; a registry may look through a large upload before
)

// A Place is somewhere that artifacts are copied to: an open layout, or a repository of a registry.
type Place interface {
	oras.Target
	Close() error
}

// Open opens a place to write to: oci://HOST/NAME, oci+http://HOST/NAME, or oci:DIR, which is made where it is not there.
func Open(place string) (Place, error) {
	if isRegistry(place) {
		repo, err := Registry(place)
		return closing{repo}, err
	}
	dir, err := Directory(place)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the layout %q: %w", dir, err)
	}
	return store.Open(dir)
}

// A closing has nothing to close.
type closing struct{ oras.Target }

func (closing) Close() error { return nil }

// Source opens a place to read from. A directory may be in use by a server, and may be read-only.
func Source(ctx context.Context, place string) (oras.ReadOnlyTarget, error) {
	if isRegistry(place) {
		return Registry(place)
	}
	dir, err := Directory(place)
	if err != nil {
		return nil, err
	}
	from, err := oci.NewFromFS(ctx, os.DirFS(dir))
	if err != nil {
		return nil, fmt.Errorf("opening the layout %q: %w", dir, err)
	}
	return from, nil
}

func isRegistry(place string) bool {
	return strings.HasPrefix(place, schemeHTTPS) || strings.HasPrefix(place, schemeHTTP)
}

// Directory is the directory of an OCI image layout: oci:DIR.
func Directory(place string) (string, error) {
	dir, ok := strings.CutPrefix(place, schemeDir)
	if !ok || dir == "" {
		return "", fmt.Errorf("%q is no place of artifacts: want oci://HOST/NAME, oci+http://HOST/NAME or oci:DIRECTORY", place)
	}
	return dir, nil
}

// Registry is a repository of a registry: oci://HOST[:PORT]/NAME. Credentials are those of docker's config.json, or what that
// says has them. Nothing is asked of the registry yet.
func Registry(place string) (*remote.Repository, error) {
	name, plain := strings.CutPrefix(place, schemeHTTP)
	if !plain {
		var ok bool
		if name, ok = strings.CutPrefix(place, schemeHTTPS); !ok {
			return nil, fmt.Errorf("%q is no registry: want oci://HOST/NAME, or oci+http://HOST/NAME for one without TLS", place)
		}
	}
	ref, err := registry.ParseReference(name)
	if err == nil && ref.Reference != "" {
		err = errors.New("a name of what is in it is too much here")
	}
	if err != nil {
		return nil, fmt.Errorf("registry %q: %w", place, err)
	}
	client, err := httpClient()
	if err != nil {
		return nil, fmt.Errorf("registry %q: %w", place, err)
	}
	return &remote.Repository{Reference: ref, PlainHTTP: plain || isLoopback(ref.Registry), Client: client}, nil
}

func httpClient() (*auth.Client, error) {
	stored, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	if err != nil {
		return nil, fmt.Errorf("reading docker's credentials: %w", err)
	}
	transport := &http.Transport{
		Proxy:       http.ProxyFromEnvironment,
		DialContext: (&net.Dialer{Timeout: dialTime, KeepAlive: 15 * time.Second}).DialContext, TLSHandshakeTimeout: dialTime,
		ResponseHeaderTimeout: answerTime, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true,
	}
	return &auth.Client{
		Client: &http.Client{Transport: transport}, Cache: auth.NewCache(), Credential: credentials.Credential(stored),
		Header: http.Header{"User-Agent": {"troupe"}},
	}, nil
}

// isLoopback says whether a registry is on this machine, where nobody listens in.
func isLoopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && addr.IsLoopback()
}

// Copy copies an artifact with all that it names, under the name that it has in from or, where as is not "", under that.
func Copy(ctx context.Context, from oras.ReadOnlyTarget, ref string, to oras.Target, as string) (ocispec.Descriptor, error) {
	desc, err := oras.Copy(ctx, from, ref, to, as, oras.CopyOptions{CopyGraphOptions: oras.CopyGraphOptions{
		Concurrency: 2, MaxMetadataBytes: maxManifest,
	}})
	if err != nil {
		return desc, fmt.Errorf("copying %s: %w", ref, err)
	}
	return desc, nil
}
