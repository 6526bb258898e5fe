package reconciler

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
	"oras.land/oras-go/v2/content"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/chunks"
	"github.com/troupe-dev/troupe/images/filediff"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

const (
	// collectGrace is how long what nothing needs is kept all the same: a revert the day after costs no build.
	collectGrace = 24 * time.Hour
	// lowSpace is the part of a file system that is free, in percent, below which the server collects by itself.
	lowSpace = 10
)

// A collection is one look for what nothing needs. What is needed is found by digest: whatever a record of a host, a node or a
// disk names is, in whichever of its fields, so that a field that is added later cannot be forgotten here.
type collection struct {
	needed map[digest.Digest]bool // recipes, releases, blobs
	keep   map[digest.Digest]bool // blobs
	gone   map[digest.Digest]bool // blobs of artifacts that go
	sizes  map[digest.Digest]int64
	all    []collectable
}

// A collectable is an artifact: by its records, its manifest, or both.
type collectable struct {
	api.CollectedItem
	blobs map[digest.Digest]bool
	names []digest.Digest // by which it is needed: its recipe and its image, or the release
	needs []digest.Digest // what it is nothing without: a delta's base, a release's parts
	stays bool
}

var digests = regexp.MustCompile(`sha256:[0-9a-f]{64}`)

// digestsIn are all digests in the JSON of a value.
func digestsIn(v any) (map[digest.Digest]bool, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("looking for digests in a record: %w", err)
	}
	all := map[digest.Digest]bool{}
	for _, d := range digests.FindAll(b, -1) {
		all[digest.Digest(d)] = true
	}
	return all, nil
}

func (c *collection) need(v any) error {
	all, err := digestsIn(v)
	for d := range all {
		c.needed[d] = true
	}
	return err
}

// Collect deletes from the store what nothing needs, with its records or, in a dry run, says what that is. No build begins
// and no host is assigned anything meanwhile.
func (r *Reconciler) Collect(ctx context.Context, dry bool) (api.Collected, error) {
	return r.collect(ctx, dry, collectGrace)
}

func (r *Reconciler) collect(ctx context.Context, dry bool, grace time.Duration) (out api.Collected, err error) {
	done := make(chan struct{})
	do := func(run context.Context) {
		defer close(done)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(run, cancel)()
		r.assign.busy.Lock()
		defer r.assign.busy.Unlock()
		out, err = r.collectAlone(ctx, dry, grace)
	}
	select {
	case r.builds.alone <- do:
	case <-ctx.Done():
		return out, ctx.Err()
	}
	<-done
	return out, err
}

// collectAlone is called where no build begins and no assignment is made.
func (r *Reconciler) collectAlone(ctx context.Context, dry bool, grace time.Duration) (api.Collected, error) {
	c := &collection{
		needed: map[digest.Digest]bool{}, keep: map[digest.Digest]bool{}, gone: map[digest.Digest]bool{}, sizes: map[digest.Digest]int64{},
	}
	after := time.Now().Add(-grace)
	if err := errors.Join(r.mark(ctx, c, after), r.listCollectables(ctx, c, after)); err != nil {
		return api.Collected{}, err
	}
	c.settle()
	blobs, err := r.cfg.Blobs.List(ctx)
	if err != nil {
		return api.Collected{}, err
	}
	for _, b := range blobs {
		c.sizes[b.Digest] = b.Size
	}
	out := c.result(dry)
	if !dry {
		if err := r.forgetCollected(ctx, c); err != nil {
			return out, err
		}
	}
	swept, err := r.cfg.Blobs.Sweep(ctx, store.Sweep{
		Keep: func(d digest.Digest) bool { return c.keep[d] || c.needed[d] }, Gone: func(d digest.Digest) bool { return c.gone[d] }, After: after, Dry: dry,
	})
	for _, b := range swept {
		out.Blobs++
		out.Bytes += b.Size
	}
	if err != nil || dry {
		return out, err
	}
	_, err = r.cfg.Blobs.SweepCorrupt(after)
	if out.Blobs > 0 {
		r.events.note(ctx, state.Event{
			Kind: "build", Subject: "store", Message: fmt.Sprintf("deleted %d artifacts that nothing needs: %s in %d files", len(out.Artifacts), api.Bytes(out.Bytes), out.Blobs),
		})
	}
	return out, err
}

// mark finds what hosts, nodes, disks and the fleet in force need, and what was built or asked for since.
func (r *Reconciler) mark(ctx context.Context, c *collection, after time.Time) error {
	fleet := r.Fleet()
	if fleet == nil {
		return &UnavailableError{Reason: errNoFleet.Error() + ": nobody can say what it needs"}
	}
	obs, err := r.observed(ctx)
	if err != nil {
		return err
	}
	sets, err := state.LUNSets.List(ctx, r.cfg.Store)
	if err != nil {
		return err
	}
	for _, v := range []any{obs.Assignments, obs.Nodes, sets, r.cfg.Agent, plan.Make(fleet, "", obs).Releases} {
		if err := c.need(v); err != nil {
			return err
		}
	}
	needFleet(c, fleet)
	for _, b := range obs.Builds {
		if b.Asked || b.Phase == state.BuildRunning || b.Finished.After(after) {
			c.needed[b.Recipe] = true
		}
	}
	for recipe := range r.builds.running {
		c.needed[recipe] = true
	}
	return nil
}

// needFleet needs all that the fleet has: hosts, discovery and standby roles take from it.
func needFleet(c *collection, fleet *schema.Fleet) {
	names := map[string]bool{}
	for name := range fleet.Images {
		names[name] = true
	}
	for name := range fleet.Roles {
		names[name] = true
	}
	for name := range names {
		for _, want := range plan.BuildsOf(fleet, name) {
			c.needed[want.Recipe] = true
		}
	}
	for _, role := range fleet.Roles { // a role may have the name of an image
		if img := fleet.Images[role.OS]; img.From.Debian != nil {
			c.needed[images.DeltaRecipeOf(images.BaseRecipeOf(img).ID(), role).ID()] = true
		}
	}
}

// listCollectables lists all artifacts, by record and by manifest.
func (r *Reconciler) listCollectables(ctx context.Context, c *collection, after time.Time) error {
	bases, deltas, disks, err := listArtifacts(ctx, r.cfg.Store)
	if err != nil {
		return err
	}
	builds, err := state.Builds.List(ctx, r.cfg.Store)
	if err != nil {
		return err
	}
	releases, err := state.Releases.List(ctx, r.cfg.Store)
	if err != nil {
		return err
	}
	apps, err := state.Apps.List(ctx, r.cfg.Store)
	if err != nil {
		return err
	}
	add := func(kind, name string, id, image digest.Digest, v any, needs ...digest.Digest) {
		blobs, derr := digestsIn(v)
		err = errors.Join(err, derr)
		names := slices.DeleteFunc([]digest.Digest{id, image}, func(d digest.Digest) bool { return d == "" })
		c.all = append(c.all, collectable{CollectedItem: api.CollectedItem{Kind: kind, Name: name, ID: id}, blobs: blobs, names: names, needs: needs})
	}
	for _, v := range bases {
		add(artifact.KindBase, builds[v.Recipe.String()].Name, v.Recipe, v.Image.Digest, v)
	}
	for _, v := range deltas {
		add(artifact.KindDelta, builds[v.Recipe.String()].Name, v.Recipe, v.Image.Digest, v, v.Base.Digest)
	}
	for _, v := range disks {
		add(artifact.KindDisk, builds[v.Recipe.String()].Name, v.Recipe, v.Image.Digest, v)
	}
	for _, v := range apps {
		add(string(plan.KindApp), builds[v.Recipe.String()].Name, v.Recipe, v.Image.Digest, v)
	}
	for _, v := range releases {
		name := v.ID.Short()
		if len(v.Roles) > 0 {
			name = v.Roles[0]
		}
		all, derr := digestsIn(v) // its recipes and its images, those of apps with them
		err = errors.Join(err, derr)
		add(artifact.KindRelease, name, v.ID, "", v, slices.Collect(maps.Keys(all))...)
		if v.Created.After(after) {
			c.needed[v.ID] = true
		}
	}
	for _, v := range bases {
		err = errors.Join(err, r.keepsChunks(ctx, c, v.Recipe, v.Image))
	}
	for _, v := range deltas {
		err = errors.Join(err, r.keepsChunks(ctx, c, v.Recipe, v.Image))
	}
	for _, v := range apps {
		err = errors.Join(err, r.keepsChunks(ctx, c, v.Recipe, v.Image))
	}
	return errors.Join(err, r.listManifests(ctx, c, after))
}

// keepsChunks adds to an artifact what its image is transferred by. An index that is not there, or not good, names nothing: it is
// made again of the image, with what it names.
func (r *Reconciler) keepsChunks(ctx context.Context, c *collection, recipe images.RecipeID, img images.Image) error {
	blobs, err := chunks.Blobs(ctx, r.cfg.Blobs, img)
	if err != nil {
		return ctx.Err()
	}
	for i := range c.all {
		if c.all[i].ID != recipe {
			continue
		}
		for _, b := range blobs {
			c.all[i].blobs[b.Digest] = true
		}
	}
	return nil
}

// listManifests adds what manifests name to the artifacts that they are of. One that no record is of was pulled by somebody: it
// stays as long as what was just built.
func (r *Reconciler) listManifests(ctx context.Context, c *collection, after time.Time) error {
	for _, m := range r.cfg.Blobs.Manifests() {
		blobs := map[digest.Digest]bool{}
		r.reach(ctx, m, blobs, 0)
		at := slices.IndexFunc(c.all, func(a collectable) bool { return slices.Contains(m.Tags, artifact.TagOf(a.ID)) })
		if at >= 0 {
			for d := range blobs {
				c.all[at].blobs[d] = true
			}
			continue
		}
		item := api.CollectedItem{Kind: "manifest", Name: digest.Digest(m.Digest).Short(), ID: digest.Digest(m.Digest)}
		names := []digest.Digest{item.ID}
		for _, tag := range m.Tags {
			if id, err := digest.FromHex(tag); err == nil {
				names = append(names, id)
			} else {
				item.Name = tag
			}
		}
		fi, err := os.Stat(r.cfg.Blobs.Path(item.ID))
		stays := err == nil && fi.ModTime().After(after)
		c.all = append(c.all, collectable{CollectedItem: item, blobs: blobs, names: names, stays: stays})
	}
	return ctx.Err()
}

// reach adds all that a manifest names to blobs. What cannot be read names nothing: the check of the store tells of it.
func (r *Reconciler) reach(ctx context.Context, m store.Manifest, blobs map[digest.Digest]bool, depth int) {
	blobs[digest.Digest(m.Digest)] = true
	if !store.IsManifest(m.MediaType) || depth > 4 {
		return
	}
	parts, err := content.Successors(ctx, r.cfg.Blobs, m.Descriptor)
	if err != nil {
		return
	}
	for _, part := range parts {
		if raw, ok, err := artifact.WorkingCopy(part); ok && err == nil {
			blobs[raw.Digest] = true
		}
		r.reach(ctx, store.Manifest{Descriptor: part}, blobs, depth+1)
	}
}

// settle decides which artifacts stay: those by one of whose names something is needed, and what these need. That they share a
// kernel with one that stays keeps none of them.
func (c *collection) settle() {
	for again := true; again; {
		again = false
		for i := range c.all {
			a := &c.all[i]
			if !a.stays && slices.ContainsFunc(a.names, func(d digest.Digest) bool { return c.needed[d] }) {
				a.stays = true
			}
			if !a.stays {
				continue
			}
			for d := range a.blobs {
				c.keep[d] = true
			}
			for _, d := range a.needs {
				if !c.needed[d] {
					c.needed[d], again = true, true
				}
			}
		}
	}
	for _, a := range c.all {
		for d := range a.blobs {
			c.gone[d] = c.gone[d] || !a.stays && !c.keep[d]
		}
	}
}

func (c *collection) result(dry bool) api.Collected {
	out := api.Collected{DryRun: dry, Artifacts: []api.CollectedItem{}}
	for _, a := range c.all {
		if a.stays {
			out.Kept++
			continue
		}
		for d := range a.blobs {
			if c.gone[d] { // each is counted once, with the first that has it
				a.Bytes += c.sizes[d]
				delete(c.sizes, d)
			}
		}
		out.Artifacts = append(out.Artifacts, a.CollectedItem)
	}
	slices.SortFunc(out.Artifacts, func(x, y api.CollectedItem) int {
		return cmp.Or(cmp.Compare(y.Bytes, x.Bytes), cmp.Compare(x.Kind, y.Kind), cmp.Compare(x.ID, y.ID))
	})
	return out
}

// forgetCollected deletes the records of artifacts that go, then their names: what is half done is done by the next round.
func (r *Reconciler) forgetCollected(ctx context.Context, c *collection) error {
	manifests := map[digest.Digest]bool{}
	for _, a := range c.all {
		if a.stays {
			continue
		}
		var err error
		id := a.ID.String()
		switch a.Kind {
		case artifact.KindBase:
			err = state.Bases.Delete(ctx, r.cfg.Store, id)
		case artifact.KindDelta:
			err = state.Deltas.Delete(ctx, r.cfg.Store, id)
		case artifact.KindDisk:
			err = state.Disks.Delete(ctx, r.cfg.Store, id)
		case string(plan.KindApp):
			err = state.Apps.Delete(ctx, r.cfg.Store, id)
		case artifact.KindRelease:
			err = state.Releases.Delete(ctx, r.cfg.Store, id)
		}
		if err == nil {
			err = state.Builds.Delete(ctx, r.cfg.Store, id) // it says that the artifact is there
		}
		if err != nil {
			return fmt.Errorf("forgetting the %s %s: %w", a.Kind, a.Name, err)
		}
		for d := range a.blobs {
			manifests[d] = c.gone[d]
		}
	}
	return r.cfg.Blobs.Forget(ctx, manifests)
}

// collectWhereLow collects where the store's file system has little room, and says so.
func (r *Reconciler) collectWhereLow(ctx context.Context) error {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		free, err := freePercent(r.cfg.Blobs.Dir())
		if err == nil && free < lowSpace {
			_, err = r.Collect(ctx, false)
		}
		if err != nil && ctx.Err() == nil {
			r.log.Error("making room in the store", "error", err)
		}
	}
}

func freePercent(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("asking for the free space of %q: %w", dir, err)
	}
	return st.Bavail * 100 / max(st.Blocks, 1), nil
}

// Resolve finds a manifest of the store.
func (r *Reconciler) Resolve(ctx context.Context, ref string) (api.Artifact, error) {
	desc, err := r.cfg.Blobs.Resolve(ctx, ref)
	if artifact.IsNotFound(err) {
		return api.Artifact{}, fmt.Errorf("the store has no artifact %q: %w", ref, state.ErrNotFound)
	}
	return api.Artifact{Digest: digest.Digest(desc.Digest), Size: desc.Size, MediaType: desc.MediaType, ArtifactType: desc.ArtifactType}, err
}

// Pull gets an artifact from the server's registry.
func (r *Reconciler) Pull(ctx context.Context, ref string) (api.Artifact, error) {
	if r.cfg.Registry == nil {
		return api.Artifact{}, &UnavailableError{Reason: "this server has no registry: start it with --store oci://HOST/NAME"}
	}
	desc, err := artifact.Copy(ctx, r.cfg.Registry, ref, r.cfg.Blobs, "")
	if artifact.IsNotFound(err) {
		return api.Artifact{}, fmt.Errorf("%s has no artifact %q: %w", r.cfg.Place, ref, state.ErrNotFound)
	}
	if err == nil {
		err = artifact.Restore(ctx, r.cfg.Blobs, desc)
	}
	if err != nil {
		return api.Artifact{}, err
	}
	r.builds.poke() // a build may wait for it
	return r.Resolve(ctx, ref)
}

// Verify reads all of the store.
func (r *Reconciler) Verify(ctx context.Context) (artifact.Verification, error) {
	return artifact.Verify(ctx, r.cfg.Blobs)
}

// SBOM is that of a release.
func (r *Reconciler) SBOM(ctx context.Context, release digest.Digest) ([]byte, error) {
	desc, err := r.cfg.Blobs.Resolve(ctx, artifact.TagOf(release))
	if artifact.IsNotFound(err) {
		return nil, fmt.Errorf("release %s has no manifest in the store yet: %w", release.Short(), state.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return artifact.SBOM(ctx, r.cfg.Blobs, desc)
}

// Files compares two roots, each of images that lie over one another.
func (r *Reconciler) Files(ctx context.Context, before, after []digest.Digest) ([]filediff.Change, error) {
	opened := map[digest.Digest]fs.FS{}
	var files []io.Closer
	defer func() {
		for _, f := range files {
			_ = f.Close() // it was only read
		}
	}()
	open := func(layers []digest.Digest) (all []fs.FS, err error) {
		for _, d := range layers {
			if opened[d] == nil {
				f, err := r.cfg.Blobs.Open(ctx, d)
				if err != nil {
					return nil, err
				}
				files = append(files, f)
				at, ok := f.(io.ReaderAt)
				if !ok {
					return nil, fmt.Errorf("reading image %s: the store cannot read at an offset", d)
				}
				if opened[d], err = erofs.Open(at); err != nil {
					return nil, fmt.Errorf("reading image %s: %w", d, err)
				}
			}
			all = append(all, opened[d])
		}
		return all, nil
	}
	x, err := open(before)
	if err != nil {
		return nil, err
	}
	y, err := open(after)
	if err != nil {
		return nil, err
	}
	return filediff.Diff(ctx, x, y)
}
