package reconciler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/chunks"
	"github.com/troupe-dev/troupe/images/sbom"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

const (
	// resolveTime is how long a build waits for a registry to say whether it has what is to be built.
	resolveTime = 15 * time.Second
	// firstPush and lastPush are the waits between two tries to push to a registry that is away.
	firstPush = 5 * time.Second
	lastPush  = 5 * time.Minute
)

// artifacts is the controller that keeps an OCI manifest of everything that was built in the store, and pushes it to the
// registry where the server has one. It makes layers, so it comes after what machines wait for and keeps none of it waiting.
type artifacts struct {
	store  *state.Store
	blobs  *store.Store
	remote oras.Target // nil: there is no registry
	place  string      // what the registry is called
	events *recorder
	log    *slog.Logger
	wake   chan struct{} // to look at everything anew
	pushed chan struct{} // wakes the pusher

	done map[images.RecipeID]digest.Digest // what was recorded, by the digest of its own record; owned by run
	told map[images.RecipeID]bool          // of which people were told that it cannot be; owned by run

	chunks chunks.Keeper
}

func newArtifacts(s *state.Store, blobs *store.Store, remote oras.Target, place string, events *recorder, log *slog.Logger) *artifacts {
	return &artifacts{
		store: s, blobs: blobs, remote: remote, place: place, events: events, log: log,
		wake: make(chan struct{}, 1), pushed: make(chan struct{}, 1),
	}
}

// run records what was built until ctx ends.
func (a *artifacts) run(ctx context.Context) error {
	a.done, a.told = map[images.RecipeID]digest.Digest{}, map[images.RecipeID]bool{}
	changed := a.store.Watch(ctx, state.Bases.Prefix(), state.Deltas.Prefix(), state.Disks.Prefix(), state.Apps.Prefix(),
		state.Releases.Prefix())
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-changed:
		case <-a.wake:
			clear(a.done)
		case <-tick.C:
			clear(a.done)
		case <-ctx.Done():
			return nil
		}
		if err := a.step(ctx); err != nil && ctx.Err() == nil {
			a.log.Error("recording what was built as artifacts", "error", err)
		}
		poke(a.pushed)
	}
}

// A toRecord is something built that shall have a manifest.
type toRecord struct {
	artifact.Artifact
	recipe  images.RecipeID
	name    string // for people
	version digest.Digest
	when    time.Time
}

// step records what has no manifest yet. One that cannot be recorded keeps none of the others.
func (a *artifacts) step(ctx context.Context) error {
	all, err := a.built(ctx)
	if err != nil {
		return err
	}
	newest := map[string]bool{}
	for _, r := range all { // the newest first: it has the name without a version
		names := artifact.NamesOf(r.name, r.Kind, r.version)
		if newest[names[0]] {
			names = names[1:]
		} else {
			newest[names[0]] = true
		}
		a.once(ctx, r.recipe, r.Kind, fmt.Sprint(r.Config, names), func() error {
			_, err := artifact.Record(ctx, a.blobs, r.Artifact, r.recipe, names...)
			return err
		})
	}
	return a.releases(ctx)
}

// once does what makes a manifest, unless it was done already for the same value.
func (a *artifacts) once(ctx context.Context, id digest.Digest, kind, value string, do func() error) {
	is := digest.Of([]byte(value))
	if a.done[id] == is || ctx.Err() != nil {
		return
	}
	err := do()
	if err == nil {
		a.done[id] = is
		delete(a.told, id)
		return
	}
	if ctx.Err() != nil || a.told[id] {
		return
	}
	a.told[id] = true
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, digest.ErrMismatch) {
		a.log.Info("what was built is not all there", "kind", kind, "id", id.Short(), "error", err)
		return // the check of the store tells of it, and has it built again
	}
	a.events.note(ctx, state.Event{Kind: "build", Subject: id.Short(), Warning: true, Message: fmt.Sprintf("the %s has no manifest in the store: %v", kind, err)})
}

// built lists what was built, the newest first.
func (a *artifacts) built(ctx context.Context) ([]toRecord, error) {
	bases, deltas, disks, err := listArtifacts(ctx, a.store)
	if err != nil {
		return nil, err
	}
	builds, err := state.Builds.List(ctx, a.store)
	if err != nil {
		return nil, err
	}
	var all []toRecord
	add := func(of artifact.Artifact, recipe images.RecipeID, version digest.Digest) {
		rec := builds[recipe.String()]
		all = append(all, toRecord{of, recipe, cmp.Or(rec.Name, recipe.Short()), version, rec.Finished})
	}
	for _, v := range bases {
		add(artifact.OfBase(v), v.Recipe, v.Image.Digest)
	}
	for _, v := range deltas {
		add(artifact.OfDelta(v), v.Recipe, v.Image.Digest)
	}
	for _, v := range disks {
		add(artifact.OfDisk(v), v.Recipe, v.Image.Digest)
	}
	apps, err := state.Apps.List(ctx, a.store)
	if err != nil {
		return nil, err
	}
	for _, v := range apps {
		add(artifact.OfApp(v), v.Recipe, v.Image.Digest)
	}
	slices.SortFunc(all, func(x, y toRecord) int { return cmp.Or(y.when.Compare(x.when), cmp.Compare(x.recipe, y.recipe)) })
	return all, nil
}

func listArtifacts(ctx context.Context, s *state.Store) (
	bases map[string]images.Base, deltas map[string]images.Delta, disks map[string]images.Disk, err error,
) {
	if bases, err = state.Bases.List(ctx, s); err != nil {
		return nil, nil, nil, err
	}
	if deltas, err = state.Deltas.List(ctx, s); err != nil {
		return nil, nil, nil, err
	}
	disks, err = state.Disks.List(ctx, s)
	return bases, deltas, disks, err
}

// releases records those releases whose parts are what they were made of.
func (a *artifacts) releases(ctx context.Context) error {
	releases, err := state.Releases.List(ctx, a.store)
	if err != nil {
		return err
	}
	bases, deltas, _, err := listArtifacts(ctx, a.store)
	if err != nil {
		return err
	}
	newest := map[string]bool{}
	byAge := slices.SortedFunc(maps.Values(releases), func(x, y state.Release) int {
		return cmp.Or(y.Created.Compare(x.Created), cmp.Compare(x.ID, y.ID))
	})
	for _, rel := range byAge {
		base, delta := bases[rel.Base.String()], deltas[rel.Delta.String()]
		if base.Image.Digest != rel.Release.Base.Digest || delta.Image.Digest != rel.Release.Delta.Digest {
			continue // built again since, with other bytes
		}
		var names []string
		for _, role := range rel.Roles {
			both := artifact.NamesOf(role, artifact.KindRelease, rel.ID)
			if newest[role] {
				both = both[1:]
			}
			newest[role] = true
			names = append(names, both...)
		}
		a.once(ctx, rel.ID, artifact.KindRelease, fmt.Sprint(rel, base, delta, names), func() error {
			return a.release(ctx, rel, base, delta, names)
		})
	}
	return nil
}

func (a *artifacts) release(ctx context.Context, rel state.Release, base images.Base, delta images.Delta, names []string) error {
	doc, err := sbomOf(rel, base, delta)
	if err != nil {
		return err
	}
	parts := []digest.Digest{rel.Base}
	if rel.Delta != "" {
		parts = append(parts, rel.Delta)
	}
	apps, err := a.appsOf(ctx, rel)
	if err != nil {
		return err
	}
	parts = append(parts, apps...)
	config := artifact.Release{ID: rel.ID, BaseRecipe: rel.Base, DeltaRecipe: rel.Delta, Content: rel.Release}
	_, err = artifact.RecordRelease(ctx, a.blobs, config, parts, doc, names...)
	return err
}

// appsOf are the recipes of a release's apps, sorted.
func (a *artifacts) appsOf(ctx context.Context, rel state.Release) ([]digest.Digest, error) {
	apps, err := state.Apps.List(ctx, a.store)
	if err != nil {
		return nil, err
	}
	named, err := digestsIn(rel)
	if err != nil {
		return nil, err
	}
	var recipes []digest.Digest
	for _, app := range apps {
		if named[app.Image.Digest] {
			recipes = append(recipes, app.Recipe)
		}
	}
	slices.Sort(recipes)
	return recipes, nil
}

// sbomOf is the SBOM of a release.
func sbomOf(rel state.Release, base images.Base, delta images.Delta) ([]byte, error) {
	return sbom.Of(rel.ID, rel.Release, base, delta).Document(sbom.Epoch(os.Getenv("SOURCE_DATE_EPOCH")))
}

// push copies to the registry what that does not have, until ctx ends. A registry that is away is tried again; nothing waits
// for it.
func (a *artifacts) push(ctx context.Context) error {
	if a.remote == nil {
		<-ctx.Done()
		return nil
	}
	wait := backoff.Backoff{First: firstPush, Limit: lastPush}
	there, away := map[string]digest.Digest{}, false
	for {
		select {
		case <-a.pushed:
		case <-ctx.Done():
			return nil
		}
		for {
			err := a.pushAll(ctx, there)
			if ctx.Err() != nil {
				return nil //nolint:nilerr // the copy ended because ctx did
			}
			if away != (err != nil) {
				away = err != nil
				a.tellRegistry(ctx, err)
			}
			if err == nil {
				wait.Reset()
				break
			}
			if wait.Wait(ctx) != nil {
				return nil //nolint:nilerr // it waits no longer because ctx ended
			}
		}
	}
}

func (a *artifacts) tellRegistry(ctx context.Context, err error) {
	ev := state.Event{Kind: "build", Subject: a.place, Message: "the registry has all that was built"}
	if err != nil {
		ev.Message, ev.Warning = fmt.Sprintf("the registry does not have all that was built, and is tried again: %v", err), true
	}
	a.events.note(ctx, ev)
}

// pushAll copies every tag that is not in the registry as it is here. there has those that are.
func (a *artifacts) pushAll(ctx context.Context, there map[string]digest.Digest) error {
	for _, m := range a.blobs.Manifests() {
		for _, tag := range m.Tags {
			if there[tag] == digest.Digest(m.Digest) {
				continue
			}
			if err := a.pushTag(ctx, m.Descriptor, tag); err != nil {
				return err
			}
			there[tag] = digest.Digest(m.Digest)
		}
	}
	return nil
}

func (a *artifacts) pushTag(ctx context.Context, desc ocispec.Descriptor, tag string) error {
	if a.blobs.Complete(ctx, desc) != nil {
		return nil //nolint:nilerr // what is not whole is made again, and pushed then
	}
	got, err := a.remote.Resolve(ctx, tag)
	if err == nil && got.Digest == desc.Digest {
		return nil
	}
	if err != nil && !artifact.IsNotFound(err) {
		return fmt.Errorf("asking for %s: %w", tag, err)
	}
	_, err = artifact.Copy(ctx, a.blobs, tag, a.remote, "")
	return err
}

// find gets what a recipe makes without building it: from a manifest of the store, of which the working copies are made
// again, else from the registry. fits says whether that is what is looked for. What is found is whole in the store.
func find[T any](ctx context.Context, a *artifacts, kind plan.Kind, recipe images.RecipeID, fits func(T) bool, out io.Writer) (v T, from string, ok bool) {
	if a == nil {
		return v, "", false
	}
	tag := artifact.TagOf(recipe)
	if desc, err := a.blobs.Resolve(ctx, tag); err == nil && a.blobs.Complete(ctx, desc) == nil {
		err := artifact.ReadConfig(ctx, a.blobs, desc, string(kind), &v)
		if err == nil && fits(v) {
			err = artifact.Restore(ctx, a.blobs, desc)
			if err == nil {
				return v, "its manifest in the store", true
			}
		}
		if err != nil {
			_, _ = fmt.Fprintf(out, "not taken from the store: %v\n", err)
		}
	}
	if a.remote == nil {
		return v, "", false
	}
	v, ok, err := pull(ctx, a, kind, recipe, fits)
	switch {
	case ok:
		return v, a.place, true
	case err != nil:
		_, _ = fmt.Fprintf(out, "not taken from %s: %v\n", a.place, err)
	}
	return v, "", false
}

// pull gets what a recipe makes from the registry. That the registry has no such thing is no error.
func pull[T any](ctx context.Context, a *artifacts, kind plan.Kind, recipe images.RecipeID, fits func(T) bool) (v T, ok bool, err error) {
	tag := artifact.TagOf(recipe)
	rctx, cancel := context.WithTimeout(ctx, resolveTime)
	defer cancel()
	desc, err := a.remote.Resolve(rctx, tag)
	if artifact.IsNotFound(err) {
		return v, false, nil
	}
	if err == nil {
		err = artifact.ReadConfig(rctx, a.remote, desc, string(kind), &v)
	}
	if err != nil || !fits(v) {
		return v, false, err
	}
	if _, err = artifact.Copy(ctx, a.remote, tag, a.blobs, ""); err == nil {
		err = artifact.Restore(ctx, a.blobs, desc)
	}
	return v, err == nil, err
}

// mend makes whole again what the store lost of an artifact: from what is left of it, or from the registry. It says from
// where; "" where it cannot be.
func (a *artifacts) mend(ctx context.Context, lost artifactRecord) string {
	if a == nil {
		return ""
	}
	tag := artifact.TagOf(lost.recipe)
	desc, err := a.blobs.Resolve(ctx, tag)
	if err == nil && a.blobs.Complete(ctx, desc) == nil && artifact.Restore(ctx, a.blobs, desc) == nil {
		return "its own layer"
	}
	if err != nil || a.remote == nil {
		return ""
	}
	// By its digest: the registry may have something else of that recipe by now.
	if _, err := artifact.Copy(ctx, a.remote, desc.Digest.String(), a.blobs, tag); err == nil {
		err = artifact.Restore(ctx, a.blobs, desc)
		if err == nil {
			return a.place
		}
	}
	return ""
}
