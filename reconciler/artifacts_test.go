package reconciler

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cuelabs.dev/go/oci/ociregistry/ocimem"
	"cuelabs.dev/go/oci/ociregistry/ociserver"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// A testRegistry is a registry on loopback that can be away.
type testRegistry struct {
	place string
	away  atomic.Bool
}

func startRegistry(t *testing.T) *testRegistry {
	t.Helper()
	r := &testRegistry{}
	handler := ociserver.New(ocimem.New(), nil)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if r.away.Load() {
			http.Error(w, "away", http.StatusBadGateway)
			return
		}
		handler.ServeHTTP(w, req)
	}))
	t.Cleanup(server.Close)
	r.place = "oci://" + strings.TrimPrefix(server.URL, "http://") + "/fleet"
	return r
}

// withArtifacts gives a controller of builds one of artifacts, with the registry where it is not nil.
func withArtifacts(t *testing.T, b *builds, registry *testRegistry) *artifacts {
	t.Helper()
	blobs, ok := b.blobs.(*store.Store)
	if !ok {
		t.Fatal("the test's builds have no store")
	}
	a := newArtifacts(b.store, blobs, nil, "", b.events, slog.New(slog.DiscardHandler))
	if registry != nil {
		remote, err := artifact.Registry(registry.place)
		if err != nil {
			t.Fatal(err)
		}
		a.remote, a.place = remote, registry.place
	}
	b.artifacts = a
	return a
}

// startArtifacts runs the controller until stop is called.
func startArtifacts(t *testing.T, a *artifacts) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() { done <- a.run(ctx) }()
	go func() { done <- a.push(ctx) }()
	return func() {
		cancel()
		if err := errors.Join(<-done, <-done); err != nil {
			t.Error(err)
		}
	}
}

// awaitEvent waits until an event says so.
func awaitEvent(t *testing.T, s *state.Store, text string) state.Event {
	t.Helper()
	for range s.Watch(t.Context(), state.Events.Prefix()) {
		all, err := state.Events.List(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range all {
			if strings.Contains(ev.Message, text) {
				return ev
			}
		}
	}
	t.Fatal("the watch ended")
	return state.Event{}
}

// What one server built another one takes from the registry, and a third from its own directory.
func TestWhatIsInTheRegistryIsNotBuilt(t *testing.T) {
	registry := startRegistry(t)
	first, builder := newTestBuilds(t)
	a := withArtifacts(t, first, registry)
	stopBuilds, stopArtifacts := start(t, first), startArtifacts(t, a)
	awaitBuilds(t, first, allDone)
	awaitPushed(t, a)
	stopBuilds()
	stopArtifacts()
	if got := builder.log(); got != "base, delta" {
		t.Fatalf("the first server built %q", got)
	}

	second, builder2 := newTestBuilds(t)
	withArtifacts(t, second, registry)
	stop := start(t, second)
	awaitBuilds(t, second, allDone)
	stop()
	if got := builder2.log(); got != "" {
		t.Errorf("the second server built %q", got)
	}
	sameArtifacts(t, first, second)

	// Its records are lost, and the registry is away.
	registry.away.Store(true)
	third, builder3 := newTestBuilds(t)
	third.blobs, third.damage = second.blobs, builder2.blobs
	withArtifacts(t, third, registry)
	stop = start(t, third)
	awaitBuilds(t, third, allDone)
	stop()
	if got := builder3.log(); got != "" {
		t.Errorf("the third server built %q", got)
	}
	sameArtifacts(t, first, third)
}

// awaitPushed waits until the registry has every tag of the store.
func awaitPushed(t *testing.T, a *artifacts) {
	t.Helper()
	await(t, func() bool {
		tags := 0
		for _, m := range a.blobs.Manifests() {
			for _, tag := range m.Tags {
				tags++
				if got, err := a.remote.Resolve(t.Context(), tag); err != nil || got.Digest != m.Digest {
					return false
				}
			}
		}
		return tags == 6 // of a base and a delta: recipe, name, and name with version
	})
}

// awaitTag waits until the store has a manifest of that name.
func awaitTag(t *testing.T, a *artifacts, tag string) (desc ocispec.Descriptor) {
	t.Helper()
	await(t, func() bool {
		var err error
		desc, err = a.blobs.Resolve(t.Context(), tag)
		return err == nil
	})
	return desc
}

func sameArtifacts(t *testing.T, x, y *builds) {
	t.Helper()
	one, err := x.onRecord(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	two, err := y.onRecord(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	blobs := map[digest.Digest]bool{}
	for _, a := range one {
		for _, b := range a.blobs {
			blobs[b.Digest] = true
		}
	}
	for _, a := range two {
		for _, b := range a.blobs {
			if !blobs[b.Digest] {
				t.Errorf("blob %s of the %s is none of the first server's", b.Digest.Short(), a.kind)
			}
			if _, err := y.blobs.Stat(t.Context(), b.Digest); err != nil {
				t.Error(err)
			}
		}
	}
	if len(one) == 0 || len(one) != len(two) {
		t.Errorf("%d artifacts, and %d", len(one), len(two))
	}
}

// A registry that is away keeps nothing from being built, and gets it when it is back.
func TestRegistryThatIsAway(t *testing.T) {
	registry := startRegistry(t)
	registry.away.Store(true)
	b, builder := newTestBuilds(t)
	a := withArtifacts(t, b, registry)
	stopBuilds, stopArtifacts := start(t, b), startArtifacts(t, a)
	defer stopBuilds()
	defer stopArtifacts()
	awaitBuilds(t, b, allDone)
	if got := builder.log(); got != "base, delta" {
		t.Errorf("built %q", got)
	}
	if ev := awaitEvent(t, b.store, "is tried again"); !ev.Warning || ev.Subject != registry.place {
		t.Errorf("event %+v", ev)
	}
	registry.away.Store(false)
	awaitEvent(t, b.store, "the registry has all that was built")
}

// A blob that was cut short in the server's store is never given to anybody, is told, and is made again of its layer.
func TestTruncatedBlobIsMadeAgainOfItsLayer(t *testing.T) {
	b, builder := newTestBuilds(t)
	a := withArtifacts(t, b, nil)
	stopBuilds, stopArtifacts := start(t, b), startArtifacts(t, a)
	defer stopBuilds()
	defer stopArtifacts()
	awaitBuilds(t, b, allDone)
	delta := onlyDelta(t, b)
	awaitTag(t, a, artifact.TagOf(delta.recipe))

	truncate(t, builder.blobs, delta.blobs[0].Digest)
	_, err := bootBlobs{builder.blobs}.Open(t.Context(), delta.blobs[0].Digest)
	if err == nil {
		t.Error("a node was given a blob that was cut short")
	}
	awaitEvent(t, b.store, "found rotten in the server's store")
	awaitEvent(t, b.store, "made again from its own layer")
	if err := builder.blobs.Verify(t.Context(), delta.blobs[0].Digest); err != nil {
		t.Error(err)
	}
	if got := builder.log(); got != "base, delta" {
		t.Errorf("built %q", got)
	}
}

// Where image and layer are lost it is pulled again and, where there is no registry, built again.
func TestTruncatedBlobAndLayer(t *testing.T) {
	for name, registry := range map[string]*testRegistry{"pulled": startRegistry(t), "built": nil} {
		t.Run(name, func(t *testing.T) {
			b, builder := newTestBuilds(t)
			a := withArtifacts(t, b, registry)
			stopBuilds, stopArtifacts := start(t, b), startArtifacts(t, a)
			awaitBuilds(t, b, allDone)
			delta := onlyDelta(t, b)
			desc := awaitTag(t, a, artifact.TagOf(delta.recipe))
			if registry != nil {
				awaitPushed(t, a)
			}
			stopBuilds()
			stopArtifacts()
			m, err := artifact.Manifest(t.Context(), builder.blobs, desc)
			if err != nil {
				t.Fatal(err)
			}
			truncate(t, builder.blobs, delta.blobs[0].Digest)
			truncate(t, builder.blobs, digest.Digest(m.Layers[0].Digest))
			stopBuilds, stopArtifacts = start(t, b), startArtifacts(t, a)
			defer stopBuilds()
			defer stopArtifacts()
			if registry != nil {
				awaitEvent(t, b.store, "made again from "+registry.place)
			} else {
				awaitBuilds(t, b, func(all map[string]state.Build) bool { return all[delta.recipe.String()].Attempts == 2 && allDone(all) })
			}
			want := "base, delta, delta"
			if registry != nil {
				want = "base, delta"
			}
			if got := builder.log(); got != want {
				t.Errorf("built %q, want %q", got, want)
			}
			if err := builder.blobs.Verify(t.Context(), delta.blobs[0].Digest); err != nil {
				t.Error(err)
			}
		})
	}
}

func onlyDelta(t *testing.T, b *builds) artifactRecord {
	t.Helper()
	all, err := b.onRecord(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if a.kind == plan.KindDelta {
			return a
		}
	}
	t.Fatal("there is no delta")
	return artifactRecord{}
}

func truncate(t *testing.T, s *store.Store, d digest.Digest) {
	t.Helper()
	if err := os.Truncate(s.Path(d), 2); err != nil {
		t.Fatal(err)
	}
}

// await looks until something is so, of which nothing tells.
func await(t *testing.T, so func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !so() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("it did not come to that")
		}
	}
}

// An app has a manifest, and is part of the releases that name its image.
func TestAppsAreParts(t *testing.T) {
	b, builder := newTestBuilds(t)
	a := withArtifacts(t, b, nil)
	a.done, a.told = map[digest.Digest]digest.Digest{}, map[digest.Digest]bool{}
	app := images.App{Recipe: digest.Of([]byte("app recipe"))}
	app.Image.Blob = builder.put(t.Context(), "app image")
	rel := state.Release{ID: digest.Of([]byte("release")), Roles: []string{"web"}}
	rel.Release.Base.Blob, rel.Release.Delta.Blob = app.Image.Blob, images.Blob{}
	if err := state.Apps.Put(t.Context(), b.store, app.Recipe.String(), app); err != nil {
		t.Fatal(err)
	}
	if err := a.step(t.Context()); err != nil {
		t.Fatal(err)
	}
	desc, err := builder.blobs.Resolve(t.Context(), artifact.TagOf(app.Recipe))
	if err != nil || desc.ArtifactType != artifact.TypeOf(artifact.KindApp) {
		t.Errorf("the app's manifest: %+v, %v", desc, err)
	}
	parts, err := a.appsOf(t.Context(), rel)
	if err != nil || len(parts) != 1 || parts[0] != app.Recipe {
		t.Errorf("the release's apps: %v, %v", parts, err)
	}
}
