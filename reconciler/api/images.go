package api

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// Images are the recipes that were ever built or shall be, the newest first.
func (r *Records) Images() []Image {
	declared, used := r.declaredRecipes(), r.usedRecipes()
	all := make([]Image, 0, len(r.Builds))
	for _, b := range r.Builds {
		all = append(all, Image{
			Name: b.Name, Kind: b.Kind, Recipe: b.Recipe, Phase: b.Phase, Step: b.Step, Error: b.Error, Tail: b.Tail,
			Attempts: b.Attempts, Started: b.Started, Finished: b.Finished, Retry: b.Retry,
			Digest: b.Result, Size: b.Size, Used: used[b.Recipe], Declared: declared[b.Recipe].Declared,
		})
	}
	for recipe, i := range declared {
		if _, known := r.Builds[string(recipe)]; !known && i.Declared { // nobody got to it yet
			i.Phase = state.BuildQueued
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b Image) int {
		return cmp.Or(newestFirst(a.Started, b.Started), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name),
			cmp.Compare(a.Recipe, b.Recipe))
	})
	return all
}

// newestFirst orders times, those that are not yet before all others.
func newestFirst(a, b time.Time) int {
	if a.IsZero() || b.IsZero() {
		return cmp.Compare(btoi(b.IsZero()), btoi(a.IsZero()))
	}
	return b.Compare(a)
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// usedRecipes are those of the releases that some host shall run or runs.
func (r *Records) usedRecipes() map[digest.Digest]bool {
	used := map[digest.Digest]bool{}
	use := func(release digest.Digest) {
		if rel, ok := r.Releases[string(release)]; ok {
			used[rel.Base], used[rel.Delta] = true, true
			for _, app := range rel.AppRecipes {
				used[app] = true
			}
		}
	}
	for _, a := range r.Assignments {
		use(a.Release)
	}
	for _, n := range r.Nodes {
		if n.Running != nil {
			use(n.Running.Release)
		}
	}
	return used
}

// Image finds one image: by name, else by the start of its recipe's or its own digest (six hex digits at least, with or
// without "sha256:"). Of several with one name it is
// the one that the fleet in force declares, else one that is used, else the newest.
func (r *Records) Image(ref string) (ImageDetail, bool) {
	all := r.Images()
	slices.SortStableFunc(all, func(a, b Image) int { return cmp.Compare(rank(a), rank(b)) })
	for _, match := range []func(Image) bool{
		func(i Image) bool { return i.Name == ref },
		func(i Image) bool { return hasDigest(i.Recipe, ref) || hasDigest(i.Digest, ref) },
	} {
		if at := slices.IndexFunc(all, match); at >= 0 {
			return r.imageDetail(all[at]), true
		}
	}
	return ImageDetail{}, false
}

// rank orders images of one name: what is declared, what is used, what is left over; images before what roles add to them.
func rank(i Image) int {
	n := 4
	switch {
	case i.Declared:
		n = 0
	case i.Used:
		n = 2
	}
	if i.Kind == string(plan.KindDelta) {
		n++
	}
	return n
}

// minPrefix is how many hex digits of a digest name it, at least.
const minPrefix = 6

func hasDigest(d digest.Digest, ref string) bool {
	hex := strings.TrimPrefix(ref, digest.Prefix)
	return len(hex) >= minPrefix && strings.HasPrefix(d.Hex(), hex)
}

func (r *Records) imageDetail(i Image) ImageDetail {
	d := ImageDetail{Image: i}
	if b, ok := r.Bases[string(i.Recipe)]; ok {
		d.Base = &b
	}
	if b, ok := r.Deltas[string(i.Recipe)]; ok {
		d.Delta = &b
	}
	if b, ok := r.Disks[string(i.Recipe)]; ok {
		d.Disk = &b
	}
	if a, ok := r.Apps[string(i.Recipe)]; ok {
		d.App = &a
	}
	for _, rel := range r.newestReleases() {
		if rel.Base == i.Recipe || rel.Delta == i.Recipe || slices.Contains(slices.Collect(maps.Values(rel.AppRecipes)), i.Recipe) {
			d.Releases = append(d.Releases, rel.ID)
		}
	}
	return d
}

// recipe finds a build's recipe by the start of its digest, or by the name of its image.
func (r *Records) recipe(ref string) (digest.Digest, bool) {
	for _, b := range r.Builds {
		if string(b.Recipe) == ref {
			return b.Recipe, true
		}
	}
	i, ok := r.Image(ref)
	return i.Recipe, ok
}

func (r *Records) newestReleases() []state.Release {
	return slices.SortedFunc(maps.Values(r.Releases), func(a, b state.Release) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
}

// ReleaseViews are all releases, the newest first.
func (r *Records) ReleaseViews(hosts []Host) []Release {
	assigned, running := map[digest.Digest][]string{}, map[digest.Digest][]string{}
	for _, h := range hosts { // sorted by name, so that what follows is, too
		if h.Name != "" && h.Target != "" {
			assigned[h.Target] = append(assigned[h.Target], h.Name)
		}
		if h.Running != "" {
			running[h.Running] = append(running[h.Running], h.Key())
		}
	}
	all := make([]Release, 0, len(r.Releases))
	for _, rel := range r.newestReleases() {
		all = append(all, Release{
			ID: rel.ID, Roles: rel.Roles, Created: rel.Created, Size: rel.Release.Base.Size + rel.Release.Delta.Size + rel.Disk.Size,
			Content: rel.Release, BaseRecipe: rel.Base, DeltaRecipe: rel.Delta,
			Assigned: orEmpty(assigned[rel.ID]), Running: orEmpty(running[rel.ID]),
		})
	}
	return all
}

// Roles are the declared roles by name.
func (r *Records) Roles(hosts []Host) []Role {
	all := []Role{}
	if r.Fleet == nil {
		return all
	}
	want := r.releasesWanted()
	byRole, healthy := map[string][]string{}, map[string]int{}
	for _, h := range hosts {
		if h.Name == "" {
			continue
		}
		byRole[h.Role] = append(byRole[h.Role], h.Name)
		if h.State.Fine() {
			healthy[h.Role]++
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Fleet.Roles)) {
		spec := r.Fleet.Roles[name]
		w := want[name]
		role := Role{
			Name: name, OS: spec.OS, Boot: spec.Boot, Release: w.ID, Waiting: w.Missing.String(),
			BaseRecipe: w.Base, DeltaRecipe: w.Delta, Hosts: orEmpty(byRole[name]), Healthy: healthy[name], Spec: spec,
		}
		all = append(all, role)
	}
	return all
}

// orEmpty keeps JSON from having null for a list.
func orEmpty[T any](all []T) []T {
	if all == nil {
		return []T{}
	}
	return all
}
