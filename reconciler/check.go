package reconciler

import (
	"context"
	"errors"
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

// An artifact is what came out of a recipe, by its record.
type artifact struct {
	kind   plan.Kind
	recipe images.RecipeID
	blobs  []images.Blob
}

// check looks, at the start and every hour until ctx ends, for artifacts that the store has no longer, lost or rotten,
// and sends them to lost. It reads every blob through, once for each process: so it is not done while something waits.
func (b *builds) check(ctx context.Context, lost chan<- artifact) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		all, err := b.artifacts(ctx)
		if err != nil && ctx.Err() == nil {
			b.log.Error("checking what was built against the store", "error", err)
		}
		for _, a := range all {
			if b.whole(ctx, a) {
				continue
			}
			select {
			case lost <- a:
			case <-ctx.Done():
				return
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (b *builds) artifacts(ctx context.Context) ([]artifact, error) {
	bases, err := state.Bases.List(ctx, b.store)
	if err != nil {
		return nil, err
	}
	deltas, err := state.Deltas.List(ctx, b.store)
	if err != nil {
		return nil, err
	}
	disks, err := state.Disks.List(ctx, b.store)
	if err != nil {
		return nil, err
	}
	all := make([]artifact, 0, len(bases)+len(deltas)+len(disks))
	for _, base := range bases {
		all = append(all, artifact{plan.KindBase, base.Recipe, []images.Blob{base.Image, base.Kernel, base.Modules}})
	}
	for _, delta := range deltas {
		all = append(all, artifact{plan.KindDelta, delta.Recipe, []images.Blob{delta.Image}})
	}
	for _, disk := range disks {
		all = append(all, artifact{plan.KindDisk, disk.Recipe, []images.Blob{disk.Image}})
	}
	return all, nil
}

// whole says whether the store has all of an artifact. Where that cannot be told, it has.
func (b *builds) whole(ctx context.Context, a artifact) bool {
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
func (b *builds) forget(ctx context.Context, a artifact) {
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
