package plan

import (
	"fmt"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// Artifacts are what was built, by recipe, in whichever type of string somebody has listed the records. A nil map is as
// one without any.
type Artifacts[K ~string] struct {
	Bases  map[K]images.Base
	Deltas map[K]images.Delta
	Disks  map[K]images.Disk
	Apps   map[K]images.App
	Builds map[K]state.Build
}

// A Wanted is the release that a fleet wants for a role.
type Wanted struct {
	Base, Delta images.RecipeID            // Delta is "" where the image is of kind "disk"
	Apps        map[string]images.RecipeID // by app; nil for none
	Release     *images.Release            // nil while it is not built
	ID          digest.Digest              // of Release
	Missing     Missing                    // the part that has to be built next, where Release is nil
}

// Release finds the release of a role, of fleet, among what was built.
func (a Artifacts[K]) Release(fleet *schema.Fleet, role schema.Role) Wanted {
	if img := fleet.Images[role.OS]; img.From.Disk != nil {
		return a.disk(img, role)
	}
	w := Wanted{Base: images.BaseRecipeOf(fleet.Images[role.OS]).ID()}
	w.Delta = images.DeltaRecipeOf(w.Base, role).ID()
	w.Apps = appRecipes(fleet, role)
	base, ok := a.Bases[K(w.Base)]
	if !ok {
		w.Missing = Missing{What: "image " + role.OS, Recipe: w.Base, Build: a.Builds[K(w.Base)]}
		return w
	}
	delta, ok := a.Deltas[K(w.Delta)]
	if !ok || delta.Base != base.Image.Blob { // a base that was built again has other bytes under the delta
		w.Missing = Missing{What: "role " + role.Name, Recipe: w.Delta, Build: a.Builds[K(w.Delta)]}
		return w
	}
	var apps []images.ReleaseApp
	for _, app := range role.Apps {
		id := w.Apps[app.Name]
		built, ok := a.Apps[K(id)]
		if !ok {
			w.Missing = Missing{What: "app image " + app.Image, Recipe: id, Build: a.Builds[K(id)]}
			return w
		}
		apps = append(apps, images.ReleaseAppOf(app, built.Image))
	}
	w.Release = &images.Release{
		Apps: apps,
		Base: base.Image, Delta: delta.Image, Kernel: base.Kernel, Modules: base.Modules, KernelArgs: role.Kernel.Args,
	}
	w.ID = w.Release.ID()
	return w
}

// appRecipes are the recipes of a role's app images, by app; nil for none.
func appRecipes(fleet *schema.Fleet, role schema.Role) map[string]images.RecipeID {
	if len(role.Apps) == 0 {
		return nil
	}
	all := make(map[string]images.RecipeID, len(role.Apps))
	for _, app := range role.Apps {
		all[app.Name] = images.AppRecipeOf(fleet.Images[app.Image]).ID()
	}
	return all
}

// disk finds the release of a role whose image is booted as it is.
func (a Artifacts[K]) disk(img schema.Image, role schema.Role) Wanted {
	w := Wanted{Base: images.DiskRecipeOf(img).ID()}
	disk, ok := a.Disks[K(w.Base)]
	switch size := role.ISCSI.Size; {
	case !ok:
		w.Missing = Missing{What: "image " + role.OS, Recipe: w.Base, Build: a.Builds[K(w.Base)]}
	case size > 0 && size < disk.Image.Size:
		w.Missing = Missing{What: "role " + role.Name, Recipe: w.Base, Why: fmt.Sprintf(
			"the disk of image %s has %s, and role %s gives a host %s (iscsi: size)", role.OS, bytes(disk.Image.Size), role.Name, bytes(size))}
	default:
		w.Release = &images.Release{Disk: disk.Image}
		w.ID = w.Release.ID()
	}
	return w
}

// A Missing is an image that is not built, or cannot be used.
type Missing struct {
	What   string // for people: "image debian", "role web"
	Recipe images.RecipeID
	Build  state.Build // the zero Build where there is no record
	Why    string      // that no build mends; "" where one does
}

// String says for people how far it is; "" for the zero Missing.
func (m Missing) String() string {
	switch {
	case m.What == "":
		return ""
	case m.Why != "":
		return m.Why
	case m.Build.Phase == state.BuildFailed:
		return fmt.Sprintf("the build of %s failed: %s; see troupe logs %s", m.What, m.Build.Step, m.Recipe.Short())
	case m.Build.Phase == state.BuildRunning && m.Build.Step != "":
		return fmt.Sprintf("%s is being built: %s", m.What, m.Build.Step)
	case m.Build.Phase == state.BuildRunning:
		return m.What + " is being built"
	}
	return m.What + " waits to be built"
}
