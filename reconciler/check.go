package reconciler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// checkEvery is how often the store is asked whether it still has what the records say was built.
const checkEvery = time.Hour

// Blobs tells whether the store has some bytes, whole. Bytes that it does not have are store.ErrNotFound, such that are
// not what their digest says digest.ErrMismatch.
type Blobs interface {
	Stat(ctx context.Context, d digest.Digest) (images.Blob, error)
}

// damage is what the store found rotten, when it did.
type damage interface {
	Damaged() <-chan struct{}
	TakeDamage() []store.Damage
}

// An artifactRecord is what came out of a recipe, by its record.
type artifactRecord struct {
	kind   plan.Kind
	recipe images.RecipeID
	blobs  []images.Blob
	image  images.Image // that nodes fetch; zero of a disk
}

// check looks, at the start, every hour, and when somebody found a blob rotten, until ctx ends, for artifacts that the store
// has no longer, lost or rotten. What cannot be made whole from its layers, or from the registry, it sends to lost. It reads
// every blob through, once for each process: so it is not done while something waits.
func (b *builds) check(ctx context.Context, lost chan<- artifactRecord) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		all, err := b.onRecord(ctx)
		if err != nil && ctx.Err() == nil {
			b.log.Error("checking what was built against the store", "error", err)
		}
		for _, a := range all {
			if b.whole(ctx, a) || b.mended(ctx, a) {
				b.artifacts.keepChunks(ctx, a.image)
				continue
			}
			select {
			case lost <- a:
			case <-ctx.Done():
				return
			}
		}
		b.tellDamage(ctx)
		if !b.awaitCheck(ctx, tick.C) {
			return
		}
	}
}

// awaitCheck waits until the store is to be looked through; false when ctx ends before.
func (b *builds) awaitCheck(ctx context.Context, tick <-chan time.Time) bool {
	select {
	case <-tick:
	case <-b.damage.Damaged():
		b.tellDamage(ctx)
	case <-ctx.Done():
		return false
	}
	return true
}

// tellDamage has people know what the store set aside, and the manifests be looked at: a layer may be lost that no machine is
// given.
func (b *builds) tellDamage(ctx context.Context) {
	all := b.damage.TakeDamage()
	for _, d := range all {
		b.events.note(ctx, state.Event{
			Kind: "build", Subject: d.Name, Warning: true,
			Message: fmt.Sprintf("found rotten in the server's store and set aside: %v", d.Err),
		})
	}
	if len(all) > 0 && b.artifacts != nil {
		poke(b.artifacts.wake)
	}
}

// mended makes an artifact whole again, where that can be done without a build, and says so.
func (b *builds) mended(ctx context.Context, a artifactRecord) bool {
	from := b.artifacts.mend(ctx, a)
	if from == "" || !b.whole(ctx, a) {
		return false
	}
	b.events.note(ctx, state.Event{
		Kind: "build", Subject: a.recipe.Short(), Warning: true,
		Message: "some of the " + string(a.kind) + " was lost or rotten in the store; it was made again from " + from,
	})
	return true
}

func (b *builds) onRecord(ctx context.Context) ([]artifactRecord, error) {
	bases, deltas, disks, err := listArtifacts(ctx, b.store)
	if err != nil {
		return nil, err
	}
	apps, err := state.Apps.List(ctx, b.store)
	if err != nil {
		return nil, err
	}
	all := make([]artifactRecord, 0, len(bases)+len(deltas)+len(disks)+len(apps))
	for _, base := range bases {
		all = append(all, artifactRecord{plan.KindBase, base.Recipe, []images.Blob{base.Image.Blob, base.Kernel, base.Modules}, base.Image})
	}
	for _, delta := range deltas {
		all = append(all, artifactRecord{plan.KindDelta, delta.Recipe, []images.Blob{delta.Image.Blob}, delta.Image})
	}
	for _, disk := range disks {
		all = append(all, artifactRecord{plan.KindDisk, disk.Recipe, []images.Blob{disk.Image}, images.Image{}})
	}
	for _, app := range apps {
		all = append(all, artifactRecord{plan.KindApp, app.Recipe, []images.Blob{app.Image.Blob}, app.Image})
	}
	return all, nil
}

// whole says whether the store has all of an artifact. Where that cannot be told, it has.
func (b *builds) whole(ctx context.Context, a artifactRecord) bool {
	for _, blob := range a.blobs {
		_, err := b.blobs.Stat(ctx, blob.Digest)
		if errors.Is(err, store.ErrNotFound) || errors.Is(err, digest.ErrMismatch) {
			return false
		}
		if err != nil && ctx.Err() == nil {
			b.log.Error("checking what was built against the store", "blob", blob.Digest.Short(), "error", err)
		}
	}
	return true
}

// forget deletes the record of an artifact that is lost: then it is missing, and is built again where it is needed. One
// that is being built is not lost any more.
func (b *builds) forget(ctx context.Context, a artifactRecord) {
	if b.running[a.recipe] != nil {
		return
	}
	var err error
	switch a.kind {
	case plan.KindBase:
		err = state.Bases.Delete(ctx, b.store, a.recipe.String())
	case plan.KindDelta:
		err = state.Deltas.Delete(ctx, b.store, a.recipe.String())
	case plan.KindDisk:
		err = state.Disks.Delete(ctx, b.store, a.recipe.String())
	case plan.KindApp:
		err = state.Apps.Delete(ctx, b.store, a.recipe.String())
	}
	if err != nil {
		b.log.Error("forgetting what is lost", "recipe", a.recipe.Short(), "error", err)
		return
	}
	b.events.note(ctx, state.Event{
		Kind: "build", Subject: a.recipe.Short(), Warning: true,
		Message: "the " + string(a.kind) + " is no longer in the store, or not what its digest says; it is built again where it is needed",
	})
}
