package plan

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

const (
	maxParts   = 256 << 10 // bytes of a recipe's parts that are recorded: a record must stay below what the store takes
	maxReasons = 8         // of one kind that are told
)

// changes are the reasons why a host gets another generation; none if it is to run on as it does.
func (p *planner) changes(old *state.Assignment, want wanted) []string {
	var why []string
	if old.Role != want.Role {
		why = append(why, fmt.Sprintf("role %s → %s", old.Role, want.Role))
	} else if r := want.role; r.release == nil || old.Release != r.id {
		why = append(why, p.released(old, r)...)
	}
	boot := bootChange(old, want)
	why = append(why, boot...)
	if old.Node != want.node {
		parts := nodeChanges(old, want)
		if len(parts) == 0 && len(boot) == 0 {
			parts = []string{"node delta changed"}
		}
		why = append(why, parts...)
	}
	if old.Spec.Disk != agentapi.Disks(want.Disk) {
		why = append(why, "disk policy changed")
	}
	if was, is := old.Spec.Cache, agentapi.Cache(want.Cache); was != is {
		why = append(why, fmt.Sprintf("cache: rate %s → %s", rate(was.Rate), rate(is.Rate)))
	}
	if !slices.EqualFunc(old.Spec.Checks, want.role.checks, sameCheck) {
		why = append(why, "health checks of role "+want.Role+" changed")
	}
	if was, is := cmp.Or(old.Spec.HealthyWithin, agentapi.DefaultHealthyWithin), cmp.Or(healthyWithin(want.role), agentapi.DefaultHealthyWithin); was != is {
		why = append(why, fmt.Sprintf("healthyWithin %v → %v", was, is))
	}
	if was, is := old.Spec.Fresh, want.role.Role.Delta == deltaFresh; was != is {
		why = append(why, "delta "+map[bool]string{true: "keep → fresh", false: "fresh → keep"}[is])
	}
	if !slices.Equal(old.Spec.Persist, want.role.Persist) {
		why = append(why, "persist of role "+want.Role+" changed")
	}
	if was, is := old.Spec.Activate, activateOf(want.role.Activate); was != is {
		why = append(why, fmt.Sprintf("activate %s → %s", cmp.Or(was, "reboot"), cmp.Or(is, "reboot")))
	}
	return why
}

// rate is a number of bytes a second, for people.
func rate(n int64) string {
	if n == 0 {
		return "without limit"
	}
	return fmt.Sprintf("%d B/s", n)
}

type diffKey struct {
	base, delta images.RecipeID
	release     digest.Digest
	role        string
}

// released says what is different between the release that a host has and the one that its role has now. Many hosts
// have the same answer.
func (p *planner) released(old *state.Assignment, r *role) []string {
	key := diffKey{old.BaseRecipe, old.DeltaRecipe, old.Release, r.Name}
	if why, ok := p.diffs[key]; ok {
		return why
	}
	why := p.compare(old, r)
	p.diffs[key] = why
	return why
}

func (p *planner) compare(old *state.Assignment, r *role) []string {
	var why []string
	if isDisk := old.ISCSI != nil && old.ISCSI.Image != nil; isDisk != (r.disk != nil) {
		return []string{"image " + r.OS + ", which is of another kind"}
	}
	if old.BaseRecipe != r.base && r.disk != nil {
		why = append(why, p.recipes("image "+r.OS, old.BaseRecipe, diskParts(*r.disk))...)
	} else if old.BaseRecipe != r.base {
		why = append(why, p.recipes("OS image "+r.OS, old.BaseRecipe, baseParts(r.baseRecipe))...)
	}
	if old.DeltaRecipe != r.delta && r.disk == nil {
		of := "role " + r.Name
		// A delta's recipe names its base: with another base it is another recipe, made of the same parts.
		if now := deltaParts(r.recipe); old.BaseRecipe == r.base || !maps.Equal(p.obs.Builds[old.DeltaRecipe].Parts, now) {
			why = append(why, p.recipes(of, old.DeltaRecipe, now)...)
		}
	}
	why = append(why, p.appChanges(old, r)...)
	if rel := old.Spec.Release; rel != nil && !slices.Equal(rel.KernelArgs, r.Kernel.Args) {
		why = append(why, "kernel arguments of role "+r.Name+" changed")
	}
	if len(why) == 0 && r.release != nil {
		why = append(why, r.rebuilt(old)...)
	}
	return why
}

// rebuilt says which image has other bytes though its recipe is the same.
func (r *role) rebuilt(old *state.Assignment) []string {
	if r.disk != nil {
		return []string{"image " + r.OS + " was built again"}
	}
	rel := old.Spec.Release
	if rel != nil && rel.Base == agentImage(r.release.Base) && rel.Kernel == r.release.Kernel.Digest {
		return []string{"role " + r.Name + " was built again"}
	}
	return []string{"OS image " + r.OS + " was built again"}
}

// recipes compares what was built by the recipe before with the parts now.
func (p *planner) recipes(of string, before images.RecipeID, now map[string]string) []string {
	old := p.obs.Builds[before].Parts
	if len(old) == 0 || len(now) == 0 {
		return []string{of + " changed"}
	}
	why := compareParts(old, now, func(part, how string) string { return part + " of " + of + " " + how })
	if len(why) == 0 {
		return []string{of + " changed"}
	}
	return why
}

// compareParts says which parts were added, removed and changed, by name.
func compareParts(old, now map[string]string, say func(part, how string) string) []string {
	var why []string
	names := maps.Clone(old)
	maps.Copy(names, now)
	for _, part := range slices.Sorted(maps.Keys(names)) {
		was, had := old[part]
		is, has := now[part]
		switch {
		case !has:
			why = append(why, say(part, "removed"))
		case !had:
			why = append(why, say(part, "added"))
		case was != is:
			why = append(why, say(part, "changed"))
		}
	}
	if n := len(why); n > maxReasons {
		why = append(why[:maxReasons-1:maxReasons-1], fmt.Sprintf("and %d more", n-maxReasons+1))
	}
	return why
}

func nodeChanges(old *state.Assignment, want wanted) []string {
	why := compareParts(nodeParts(old.Spec.Node.Files), nodeParts(want.Node.Files), func(part, how string) string { return part + " " + how })
	if was, is := addr(old.Address), addr(want.Address); was != is {
		why = append(why, fmt.Sprintf("address %s → %s", orNone(was), orNone(is)))
	}
	if was, is := old.Spec.Node.Domain, want.domain; was != is {
		why = append(why, fmt.Sprintf("domain %s → %s", orNone(was), orNone(is)))
	}
	return why
}

// bootChange says whether a host is to run from elsewhere, or gets another disk there.
func bootChange(old *state.Assignment, want wanted) []string {
	now := want.role.iscsi
	switch {
	case bootOf(old) != want.role.Boot && (bootOf(old) != bootDisk || want.role.Boot != ""):
		return []string{fmt.Sprintf("boot %s → %s", bootOf(old), cmp.Or(want.role.Boot, bootDisk))}
	case now == nil:
		return nil
	case old.ISCSI.Size != now.Size:
		return []string{fmt.Sprintf("disk on the server %s → %s, from its next reset on", bytes(old.ISCSI.Size), bytes(now.Size))}
	}
	return nil
}

// bootOf is from where a host was to run.
func bootOf(a *state.Assignment) string {
	switch {
	case a.ISCSI != nil:
		return bootISCSI
	case a.Spec.RAM:
		return bootRAM
	}
	return bootDisk
}

// bytes is a size for people: in GiB where it has whole ones.
func bytes(n int64) string {
	if n%(1<<30) == 0 {
		return fmt.Sprintf("%d GiB", n>>30)
	}
	return fmt.Sprintf("%d bytes", n)
}

func nodeParts[F agentapi.File | schema.File](files map[string]F) map[string]string {
	parts := make(map[string]string, len(files))
	for path, f := range files {
		parts["node file "+path] = fileValue(images.File(f))
	}
	return parts
}

// addr is a in text; "" for the zero Addr.
func addr(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// baseParts are the parts of an OS base's recipe.
func baseParts(r images.BaseRecipe) map[string]string {
	parts := map[string]string{"suite": r.Suite, "mirror": r.Mirror, "architecture": r.Arch, "kernel": r.Kernel}
	if r.Rebuild != "" {
		parts["rebuild"] = r.Rebuild
	}
	named(parts, "component ", r.Components)
	named(parts, "package ", r.Packages)
	return limited(parts)
}

// diskParts are the parts of a disk image's recipe. A password in its URL is not told.
func diskParts(r images.DiskRecipe) map[string]string {
	at := r.URL
	if u, err := url.Parse(r.URL); err == nil {
		at = u.Redacted()
	}
	return map[string]string{"URL": at, "SHA-256": r.SHA256, "format": r.Format}
}

// deltaParts are the parts of a role delta's recipe, without its base. "commands" is always among them, so that even an
// empty delta has a part.
func deltaParts(r images.DeltaRecipe) map[string]string {
	e := encoder("")
	for _, cmd := range r.Run {
		e = e.str(cmd)
	}
	parts := map[string]string{"commands": digest.Of(e).Short()}
	if len(r.Boot) > 0 {
		e = encoder("")
		for _, cmd := range r.Boot {
			e = e.str(cmd)
		}
		parts["commands after boot"] = digest.Of(e).Short()
	}
	named(parts, "package ", r.Packages)
	named(parts, "service ", r.Enable)
	for path, f := range r.Files {
		parts["file "+path] = fileValue(f)
	}
	return limited(parts)
}

func named(parts map[string]string, kind string, names []string) {
	for _, n := range names {
		parts[kind+n] = ""
	}
}

func limited(parts map[string]string) map[string]string {
	size := 0
	for part, value := range parts {
		size += len(part) + len(value) + len(`"":"",`)
	}
	if size > maxParts {
		return nil
	}
	return parts
}

func fileValue(f images.File) string {
	return digest.Of(encoder("").str(f.Content).num(uint64(f.Mode)).num(uint64(f.UID)).num(uint64(f.GID))).Short()
}

func sameCheck(a, b agentapi.Check) bool {
	return a.Unit == b.Unit && a.Every == b.Every && a.Timeout == b.Timeout && slices.Equal(a.Exec, b.Exec) &&
		samePtr(a.HTTP, b.HTTP) && samePtr(a.TCP, b.TCP)
}

func samePtr[T comparable](a, b *T) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

func join(why []string) string { return strings.Join(why, "; ") }
