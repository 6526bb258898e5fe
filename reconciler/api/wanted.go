package api

import (
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/reconciler/plan"
)

// releasesWanted are what the fleet in force wants, by role; empty before a fleet is in force.
func (r *Records) releasesWanted() map[string]plan.Wanted {
	all := map[string]plan.Wanted{}
	if r.Fleet != nil {
		built := plan.Artifacts[string]{Bases: r.Bases, Deltas: r.Deltas, Disks: r.Disks, Apps: r.Apps, Builds: r.Builds}
		for name, role := range r.Fleet.Roles {
			all[name] = built.Release(r.Fleet, role)
		}
	}
	return all
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
	needed := map[string]bool{r.Fleet.Discovery.OS: true}
	for name, w := range r.releasesWanted() {
		needed[r.Fleet.Roles[name].OS] = needed[r.Fleet.Roles[name].OS] || hasHosts[name]
		for _, app := range r.Fleet.Roles[name].Apps {
			needed[app.Image] = needed[app.Image] || hasHosts[name]
		}
		if w.Delta == "" {
			continue // its image is booted as it is
		}
		all[w.Delta] = Image{Name: name, Kind: "delta", Recipe: w.Delta, Declared: hasHosts[name]}
	}
	for name, img := range r.Fleet.Images {
		id, kind := images.BaseRecipeOf(img).ID(), plan.KindBase
		switch {
		case img.From.Disk != nil:
			id, kind = images.DiskRecipeOf(img).ID(), plan.KindDisk
		case img.Kind == string(plan.KindApp):
			id, kind = images.AppRecipeOf(img).ID(), plan.KindApp
		}
		all[id] = Image{Name: name, Kind: string(kind), Recipe: id, Declared: needed[name]}
	}
	return all
}
