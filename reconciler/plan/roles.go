package plan

import (
	"cmp"
	"encoding/binary"
	"maps"
	"slices"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// role computes what the hosts of a role have in common, once.
func (p *planner) role(name string) *role {
	if r := p.roles[name]; r != nil {
		return r
	}
	r := p.newRole(name)
	p.roles[name] = r
	return r
}

func (p *planner) newRole(name string) *role {
	r := &role{Role: p.fleet.Roles[name]}
	if img := p.fleet.Images[r.OS]; img.From.Disk != nil {
		disk := images.DiskRecipeOf(img)
		r.base, r.disk = disk.ID(), &disk
	} else {
		r.baseRecipe = images.BaseRecipeOf(img)
		r.base = r.baseRecipe.ID()
		r.recipe = images.DeltaRecipeOf(r.base, r.Role)
		r.delta = r.recipe.ID()
	}
	r.checks = checksOf(r.Healthy)
	built := Artifacts[images.RecipeID]{Bases: p.obs.Bases, Deltas: p.obs.Deltas, Disks: p.obs.Disks, Apps: p.obs.Apps, Builds: p.obs.Builds}
	want := built.Release(p.fleet, r.Role)
	r.apps = want.Apps
	r.release, r.id, r.wait, r.unfit = want.Release, want.ID, want.Missing.String(), want.Missing.Why != ""
	r.iscsi = r.onServer()
	return r
}

// onServer is what the role's hosts have on the server; nil for nothing.
func (r *role) onServer() *state.ISCSI {
	if r.Boot != bootISCSI {
		return nil
	}
	of := &state.ISCSI{Size: cmp.Or(r.ISCSI.Size, defaultDisk)}
	if r.disk != nil && r.release != nil {
		of.Image, of.Size = &r.release.Disk, max(of.Size, r.release.Disk.Size)
	}
	return of
}

const (
	deltaFresh  = "fresh"  // of a role whose hosts begin with a new node delta at each boot; "keep" and "" do not
	bootDisk    = "disk"   // of a role whose hosts run from disks of their own; "" is the same
	bootISCSI   = "iscsi"  // of a role whose hosts run from LUNs of the server
	bootRAM     = "ram"    // of one whose hosts run from their memory
	defaultDisk = 16 << 30 // bytes, of a disk there
)

// BuildsOf are the builds by which the image or, where there is no such image, the role of that name is made, the base
// first, with their recipes and names alone, whether or not they are done. None where the fleet has neither.
func BuildsOf(fleet *schema.Fleet, name string) []Build {
	if img := fleet.Images[name]; img.Kind == string(KindApp) {
		return appBuilds(img)
	}
	role, isRole := fleet.Roles[name]
	os := role.OS
	if _, isImage := fleet.Images[name]; isImage {
		os, isRole = name, false
	} else if !isRole {
		return nil
	}
	if img := fleet.Images[os]; img.From.Disk != nil {
		disk := images.DiskRecipeOf(img)
		return []Build{{Recipe: disk.ID(), Kind: KindDisk, Name: os, Disk: &disk}}
	}
	base := images.BaseRecipeOf(fleet.Images[os])
	all := []Build{{Recipe: base.ID(), Kind: KindBase, Name: os, Base: &base}}
	if isRole {
		delta := images.DeltaRecipeOf(all[0].Recipe, role)
		all = append(all, Build{Recipe: delta.ID(), Kind: KindDelta, Name: name, Delta: &delta})
		for _, app := range role.Apps {
			all = append(all, appBuilds(fleet.Images[app.Image])...)
		}
	}
	return all
}

// appBuilds are the build of an app image, and before it that of the machine that compiles for it.
func appBuilds(img schema.Image) []Build {
	b := appBuild(img)
	if c := img.From.Compile; c != nil {
		machine := images.MachineRecipeOf(c)
		return []Build{{Recipe: b.After, Kind: KindBase, Name: c.In, Base: &machine}, b}
	}
	return []Build{b}
}

// appBuild is the build of an app image.
func appBuild(img schema.Image) Build {
	recipe := images.AppRecipeOf(img)
	b := Build{Recipe: recipe.ID(), Kind: KindApp, Name: img.Name, App: &recipe, Dir: img.From.Dir}
	if c := img.From.Compile; c != nil {
		b.Dir, b.After = c.Source.Dir, recipe.Compile.Base
	}
	return b
}

// wantApp adds the build of an app image, and before it that of the machine that compiles for it.
func (p *planner) wantApp(all map[images.RecipeID]*Build, b Build, img schema.Image) {
	if c := img.From.Compile; c != nil {
		if _, based := p.obs.Bases[b.After]; based {
			b.After = ""
		} else {
			machine := images.MachineRecipeOf(c)
			p.want(all, Build{Recipe: b.After, Kind: KindBase, Name: c.In, Base: &machine, Hosts: b.Hosts})
		}
	}
	p.want(all, b)
}

// builds lists what has to be built for the hosts, for discovery, since a machine that no host declares boots an OS image
// too, and what an operator asked for.
func (p *planner) builds() []Build {
	byRecipe := map[images.RecipeID]*Build{}
	for _, name := range slices.Sorted(maps.Keys(p.roles)) {
		p.wantRole(byRecipe, p.roles[name])
	}
	if slices.ContainsFunc(slices.Collect(maps.Values(p.obs.Builds)), func(b state.Build) bool { return b.Asked }) {
		p.wantAsked(byRecipe)
	}
	if os := p.fleet.Discovery.OS; os != "" {
		recipe := images.BaseRecipeOf(p.fleet.Images[os])
		if id := recipe.ID(); p.obs.Bases[id].Recipe == "" {
			p.want(byRecipe, Build{Recipe: id, Kind: KindBase, Name: os, Base: &recipe})
		}
	}
	out := make([]Build, 0, len(byRecipe))
	for _, b := range byRecipe {
		slices.Sort(b.Hosts)
		out = append(out, *b)
	}
	slices.SortFunc(out, func(a, b Build) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Recipe, b.Recipe))
	})
	return out
}

// wantRole adds what is missing of a role.
func (p *planner) wantRole(all map[images.RecipeID]*Build, r *role) {
	if r.release != nil || r.unfit {
		return
	}
	if r.disk != nil {
		p.want(all, Build{Recipe: r.base, Kind: KindDisk, Name: r.OS, Disk: r.disk, Hosts: r.waiting})
		return
	}
	for _, app := range r.Apps {
		img := p.fleet.Images[app.Image]
		if b := appBuild(img); p.obs.Apps[b.Recipe].Recipe == "" {
			b.Hosts = r.waiting
			p.wantApp(all, b, img)
		}
	}
	_, based := p.obs.Bases[r.base]
	if !based {
		p.want(all, Build{Recipe: r.base, Kind: KindBase, Name: r.OS, Base: &r.baseRecipe, Hosts: r.waiting})
	}
	if delta, ok := p.obs.Deltas[r.delta]; based && ok && delta.Base == p.obs.Bases[r.base].Image.Blob {
		return // only apps are missing
	}
	b := Build{Recipe: r.delta, Kind: KindDelta, Name: r.Name, Delta: &r.recipe, Hosts: r.waiting}
	if !based {
		b.After = r.base
	}
	p.want(all, b)
}

// wantAsked adds what is missing of what operators asked for. It computes the recipe of every image and role.
func (p *planner) wantAsked(all map[images.RecipeID]*Build) {
	for _, name := range slices.Sorted(maps.Keys(p.fleet.Images)) {
		img := p.fleet.Images[name]
		if img.Kind == string(KindApp) {
			b := appBuild(img)
			if p.obs.Apps[b.Recipe].Recipe == "" && all[b.Recipe] == nil && p.obs.Builds[b.Recipe].Asked {
				p.wantApp(all, b, img)
			}
			continue
		}
		if img.From.Disk != nil {
			disk := images.DiskRecipeOf(img)
			if id := disk.ID(); p.obs.Disks[id].Recipe == "" && all[id] == nil && p.obs.Builds[id].Asked {
				p.want(all, Build{Recipe: id, Kind: KindDisk, Name: name, Disk: &disk})
			}
			continue
		}
		recipe := images.BaseRecipeOf(img)
		id := recipe.ID()
		if _, based := p.obs.Bases[id]; !based && all[id] == nil && p.obs.Builds[id].Asked {
			p.want(all, Build{Recipe: id, Kind: KindBase, Name: name, Base: &recipe})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.fleet.Roles)) {
		if p.roles[name] != nil {
			continue
		}
		if r := p.newRole(name); p.obs.Builds[r.delta].Asked {
			p.wantRole(all, r)
		}
	}
}

// want adds a build, or the hosts that wait for it to one that is wanted already.
func (p *planner) want(all map[images.RecipeID]*Build, b Build) {
	if known := all[b.Recipe]; known != nil {
		known.Name = min(known.Name, b.Name)
		known.Hosts = append(known.Hosts, b.Hosts...)
		return
	}
	rec := p.obs.Builds[b.Recipe]
	switch rec.Phase {
	case state.BuildRunning:
		b.State = BuildRunning
	case state.BuildFailed:
		b.State, b.Error = BuildFailed, rec.Error
	default:
		b.State = BuildMissing
	}
	switch {
	case b.Base != nil:
		b.Parts = baseParts(*b.Base)
	case b.Delta != nil:
		b.Parts = deltaParts(*b.Delta)
	case b.App != nil:
		b.Parts, b.Commit = appParts(*b.App), p.commit
	default:
		b.Parts = diskParts(*b.Disk)
	}
	b.Hosts = slices.Clone(b.Hosts)
	all[b.Recipe] = &b
}

// maxNames is how many roles that have one release are named with it, for people: a record has a size.
const maxNames = 100

// releases lists the releases of the roles that hosts have.
func (p *planner) releases() []state.Release {
	var out []state.Release
	for _, name := range slices.Sorted(maps.Keys(p.roles)) {
		r := p.roles[name]
		if r.release == nil {
			continue
		}
		i := slices.IndexFunc(out, func(rel state.Release) bool { return rel.ID == r.id })
		if i < 0 {
			out = append(out, state.Release{ID: r.id, Base: r.base, Delta: r.delta, AppRecipes: r.apps, Release: *r.release})
			i = len(out) - 1
		}
		if len(out[i].Roles) < maxNames {
			out[i].Roles = append(out[i].Roles, name)
		}
	}
	slices.SortFunc(out, func(a, b state.Release) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// canonical bytes: each part says how long it is before it comes, so that two different values never have the same.
type canonical []byte

func encoder(format string) canonical { return canonical(nil).str(format) }

func (e canonical) num(n uint64) canonical { return binary.BigEndian.AppendUint64(e, n) }

func (e canonical) str(s string) canonical { return append(e.num(uint64(len(s))), s...) }

func (e canonical) flag(b bool) canonical {
	if b {
		return e.num(1)
	}
	return e.num(0)
}

func (e canonical) check(c agentapi.Check) canonical {
	if e = e.flag(c.HTTP != nil); c.HTTP != nil {
		e = e.num(uint64(c.HTTP.Port)).str(c.HTTP.Path).num(uint64(c.HTTP.Status)) //nolint:gosec // another number has other bytes either way
	}
	if e = e.flag(c.TCP != nil); c.TCP != nil {
		e = e.num(uint64(c.TCP.Port))
	}
	e = e.str(c.Unit).num(uint64(len(c.Exec)))
	for _, arg := range c.Exec {
		e = e.str(arg)
	}
	return e.num(uint64(c.Every)).num(uint64(c.Timeout)) //nolint:gosec // as above
}
