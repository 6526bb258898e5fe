package plan

import (
	"maps"
	"net/url"
	"slices"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// appsOf are the apps of a release, as its agent gets them.
func appsOf(list []images.ReleaseApp) []agentapi.App {
	var out []agentapi.App
	for _, a := range list {
		out = append(out, appOf(a))
	}
	return out
}

func appOf(a images.ReleaseApp) agentapi.App {
	return agentapi.App{
		Name: a.Name, Image: agentImage(a.Image), Mount: a.Mount, Exec: a.Exec, Env: a.Env, User: a.User, Root: a.Root, Data: a.Data, Delta: a.Delta,
	}
}

// appChanges says what is different in the apps of a host's role.
func (p *planner) appChanges(old *state.Assignment, r *role) []string {
	before := map[string]agentapi.App{}
	if old.Spec.Release != nil {
		for _, a := range old.Spec.Release.Apps {
			before[a.Name] = a
		}
	}
	var why []string
	for _, app := range r.Apps {
		a, had := before[app.Name]
		delete(before, app.Name)
		of := "image " + app.Image + " of app " + app.Name
		as := appOf(images.ReleaseAppOf(app, images.Image{}))
		as.Image = a.Image
		switch {
		case !had:
			why = append(why, "app "+app.Name+" added")
		case old.AppRecipes[app.Name] != r.apps[app.Name]:
			recipe := images.AppRecipeOf(p.fleet.Images[app.Image])
			why = append(why, p.recipes(of, old.AppRecipes[app.Name], appParts(recipe))...)
		case p.obs.Apps[r.apps[app.Name]].Recipe != "" && agentImage(p.obs.Apps[r.apps[app.Name]].Image) != a.Image:
			why = append(why, of+" was built again")
		case !sameApp(as, a):
			why = append(why, "app "+app.Name+" changed")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(before)) {
		why = append(why, "app "+name+" removed")
	}
	return why
}

// sameApp says whether two apps are the same, for a node.
func sameApp(a, b agentapi.App) bool {
	return a.Name == b.Name && a.Image == b.Image && a.Mount == b.Mount && slices.Equal(a.Exec, b.Exec) && slices.Equal(a.Env, b.Env) &&
		a.User == b.User && a.Root == b.Root && a.Data == b.Data && a.Delta == b.Delta
}

// appParts are the parts of an app image's recipe. A password in its URL is not told.
func appParts(r images.AppRecipe) map[string]string {
	parts := map[string]string{}
	set := func(part, value string) {
		if value != "" {
			parts[part] = value
		}
	}
	set("directory", r.Tree.Short())
	set("SHA-256", r.SHA256)
	set("OCI image", r.OCI)
	set("architecture", r.Arch)
	if c := r.Compile; c.Output != "" {
		set("source", c.Source.Short())
		set("machine", c.Base.Short())
		set("steps", c.Result("").Short())
		set("output", c.Output)
	}
	if u, err := url.Parse(r.URL); err == nil {
		set("URL", u.Redacted())
	}
	if len(r.Debian.Packages) > 0 {
		maps.Copy(parts, baseParts(r.Debian))
		delete(parts, "kernel")
	}
	return limited(parts)
}
