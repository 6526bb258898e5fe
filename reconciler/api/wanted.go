package api

import (
	"fmt"
	"maps"
	"slices"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// wanted is what the fleet in force wants a role to run.
type wanted struct {
	base, delta images.RecipeID
	release     digest.Digest // "" while it is not built
	missing     string        // for people: what is not built
}

// releasesWanted are what the fleet in force wants, by role; empty before a fleet is in force.
func (r *Records) releasesWanted() map[string]wanted {
	all := map[string]wanted{}
	if r.Fleet != nil {
		for name, role := range r.Fleet.Roles {
			all[name] = r.wanted(role)
		}
	}
	return all
}

func (r *Records) wanted(role schema.Role) wanted {
	w := wanted{base: images.BaseRecipeOf(r.Fleet.Images[role.OS]).ID()}
	w.delta = images.DeltaRecipeOf(w.base, role).ID()
	base, ok := r.Bases[string(w.base)]
	if !ok {
		w.missing = r.waitsFor("image "+role.OS, w.base)
		return w
	}
	delta, ok := r.Deltas[string(w.delta)]
	if !ok || delta.Base != base.Image { // or it lies over other bytes that the same recipe made before
		w.missing = r.waitsFor("role "+role.Name, w.delta)
		return w
	}
	w.release = images.Release{
		Base: base.Image, Delta: delta.Image, Kernel: base.Kernel, Modules: base.Modules, KernelArgs: role.Kernel.Args,
	}.ID()
	return w
}

// waitsFor says why the artifacts of a recipe are not there.
func (r *Records) waitsFor(what string, recipe images.RecipeID) string {
	b, ok := r.Builds[string(recipe)]
	switch {
	case !ok || b.Phase == state.BuildQueued:
		return what + " waits to be built"
	case b.Phase == state.BuildFailed:
		return fmt.Sprintf("the build of %s failed: %s", what, b.Step)
	case b.Step == "":
		return what + " is being built"
	}
	return fmt.Sprintf("%s is being built: %s", what, b.Step)
}

// declaredRecipes are those of the fleet in force, with the name and the kind that each is shown under. Declared says
// that it is to be built: some host has its role, or machines boot it that no host declares.
func (r *Records) declaredRecipes() map[images.RecipeID]Image {
	all := map[images.RecipeID]Image{}
	if r.Fleet == nil {
		return all
	}
	hasHosts := map[string]bool{}
	for _, h := range r.Fleet.Hosts {
		hasHosts[h.Role] = true
	}
	discovery := r.Fleet.Discovery.OS
	if discovery == "" && len(r.Fleet.Images) > 0 {
		discovery = slices.Min(slices.Collect(maps.Keys(r.Fleet.Images)))
	}
	needed := map[string]bool{discovery: true}
	for name, w := range r.releasesWanted() {
		needed[r.Fleet.Roles[name].OS] = needed[r.Fleet.Roles[name].OS] || hasHosts[name]
		all[w.delta] = Image{Name: name, Kind: "delta", Recipe: w.delta, Declared: hasHosts[name]}
	}
	for name, img := range r.Fleet.Images {
		id := images.BaseRecipeOf(img).ID()
		all[id] = Image{Name: name, Kind: "base", Recipe: id, Declared: needed[name]}
	}
	return all
}
