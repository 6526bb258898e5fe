package plan

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/schema"
)

// site gives the role web an app of a directory with that content.
func (w *world) site(content string, change ...func(*schema.Role)) {
	w.fleet.Images["site"] = schema.Image{Name: "site", Kind: "app", From: schema.From{Dir: "site", Tree: digest.Of([]byte(content)).String()}}
	w.changeRole("web", func(r *schema.Role) {
		r.Apps = schema.Apps{{Name: "www", Image: "site", Mount: "/opt/www", Exec: []string{"run"}, Data: "keep"}}
		for _, f := range change {
			f(r)
		}
	})
}

// withSite is a settled world whose n1 has the app.
func withSite(activate string) *world {
	w := settled()
	w.site("one", func(r *schema.Role) { r.Activate = activate })
	w.settle()
	return w
}

func TestAppIsBuiltAndAssigned(t *testing.T) {
	w := settled()
	w.site("one")
	p := w.plan()
	check(t, host(t, p, "n1"), Host{
		Action: AwaitBuild, Changed: true, Reboot: true, FromRole: "web", ToRole: "web", FetchBytes: -1, Generation: 2,
		Why: []string{"app www added", "app image site waits to be built"},
	})
	if len(p.Builds) != 1 || p.Builds[0].Kind != KindApp || p.Builds[0].Name != "site" || p.Builds[0].Dir != "site" || p.Builds[0].Commit != "c0ffee" ||
		!slices.Equal(p.Builds[0].Hosts, []string{"n1"}) {
		t.Fatalf("builds: %+v", p.Builds)
	}
	before := w.obs.Assignments["n1"].Spec.Release
	w.build()
	p = w.plan()
	n1 := host(t, p, "n1")
	check(t, n1, Host{
		Action: StageAndReboot, Changed: true, Reboot: true, FromRole: "web", ToRole: "web", FetchBytes: 7, Generation: 2, Why: []string{"app www added"},
	})
	rel := n1.Spec.Release
	want := []agentapi.App{{
		Name: "www", Image: agentImage(w.obs.Apps[p.Releases[releaseOf(p, n1.To)].AppRecipes["www"]].Image), Mount: "/opt/www", Exec: []string{"run"}, Data: "keep",
	}}
	if d := cmp.Diff(want, rel.Apps); d != "" {
		t.Errorf("apps (-want +got):\n%s", d)
	}
	if rel.System() != before.ID || rel.ID == before.ID {
		t.Errorf("the release is %s and its system %s; before it was %s", rel.ID, rel.System(), before.ID)
	}
	w.assign()
	w.run()
	if p := w.plan(); !p.Empty() {
		t.Errorf("a plan that was carried out is not empty: %+v", p)
	}
}

func releaseOf(p Plan, id digest.Digest) int {
	for i, r := range p.Releases {
		if r.ID == id {
			return i
		}
	}
	return -1
}

func TestChangesOfApps(t *testing.T) {
	for name, c := range map[string]struct {
		activate string
		change   func(*world)
		want     Host
	}{
		"content, by a reboot": {
			change: func(w *world) { w.site("two") },
			want:   Host{Action: StageAndReboot, Reboot: true, FetchBytes: 7, Why: []string{"directory of image site of app www changed"}},
		},
		"content": {
			activate: agentapi.Restart,
			change:   func(w *world) { w.site("two") },
			want:     Host{Action: Restart, FetchBytes: 7, Why: []string{"directory of image site of app www changed"}},
		},
		"what it runs": {
			activate: agentapi.Restart,
			change:   func(w *world) { w.site("one", func(r *schema.Role) { r.Apps[0].Exec = []string{"other"} }) },
			want:     Host{Action: Restart, Why: []string{"app www changed"}},
		},
		"gone": {
			activate: agentapi.Restart,
			change:   func(w *world) { w.changeRole("web", func(r *schema.Role) { r.Apps = nil }) },
			want:     Host{Action: Restart, Why: []string{"app www removed"}},
		},
		"built again": {
			activate: agentapi.Restart,
			change: func(w *world) {
				for id, a := range w.obs.Apps {
					a.Image.Digest = digest.Of([]byte("other bytes"))
					w.obs.Apps[id] = a
				}
			},
			want: Host{Action: Restart, FetchBytes: 7, Why: []string{"image site of app www was built again"}},
		},
		"with a file of the role": {
			activate: agentapi.Restart,
			change: func(w *world) {
				w.site("two", func(r *schema.Role) { r.Files["/etc/motd"] = schema.File{Content: "new\n", Mode: 0o644} })
			},
			want: Host{Action: StageAndReboot, Reboot: true, FetchBytes: 37, Why: []string{"file /etc/motd of role web changed", "directory of image site of app www changed"}},
		},
		"with a file of the host": {
			activate: agentapi.Restart,
			change: func(w *world) {
				w.site("two")
				w.change(1, func(h *schema.Host) { h.Node.Files["/srv/name"] = schema.File{Content: "new", Mode: 0o644} })
			},
			want: Host{Action: StageAndReboot, Reboot: true, FetchBytes: 7, Why: []string{"directory of image site of app www changed", "node file /srv/name changed"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := withSite(c.activate)
			activate := func(r *schema.Role) { r.Activate = c.activate }
			c.change(w)
			w.changeRole("web", activate)
			w.build()
			c.want.Changed, c.want.FromRole, c.want.ToRole, c.want.Generation = true, "web", "web", 3
			check(t, host(t, w.plan(), "n1"), c.want)
		})
	}
}

func TestBuildsOfAnApp(t *testing.T) {
	w := withSite("")
	if b := BuildsOf(w.fleet, "site"); len(b) != 1 || b[0].Kind != KindApp || b[0].App.Tree != digest.Of([]byte("one")) {
		t.Errorf("builds of the image: %+v", b)
	}
	var kinds []Kind
	for _, b := range BuildsOf(w.fleet, "web") {
		kinds = append(kinds, b.Kind)
	}
	if d := cmp.Diff([]Kind{KindBase, KindDelta, KindApp}, kinds); d != "" {
		t.Errorf("builds of the role (-want +got):\n%s", d)
	}
}

// TestCompiledApp wants the OS image of the machine that compiles before the app, though no role runs on it.
func TestCompiledApp(t *testing.T) {
	w := settled()
	tools := &schema.Debian{Suite: "trixie", Kernel: "linux-image-cloud-amd64"}
	w.site("one")
	img := w.fleet.Images["site"]
	img.From = schema.From{Compile: &schema.Compile{
		Source: schema.CompileSource{Dir: "src", Tree: digest.Of([]byte("one")).String()}, In: "tools", Base: tools,
		Run: []string{"make"}, Output: "/out",
	}}
	w.fleet.Images["site"] = img
	machine := images.MachineRecipeOf(img.From.Compile)
	p := w.plan()
	if len(p.Builds) != 2 || p.Builds[0].Kind != KindApp || p.Builds[0].After != machine.ID() || p.Builds[0].Dir != "src" ||
		p.Builds[1].Kind != KindBase || p.Builds[1].Name != "tools" || p.Builds[1].Recipe != machine.ID() {
		t.Fatalf("builds: %+v", p.Builds)
	}
	w.obs.Bases[machine.ID()] = images.Base{Recipe: machine.ID()}
	p = w.plan()
	if len(p.Builds) != 1 || p.Builds[0].Kind != KindApp || p.Builds[0].After != "" || p.Builds[0].App.Compile.Base != machine.ID() {
		t.Fatalf("builds with the machine's base: %+v", p.Builds)
	}
	if all := BuildsOf(w.fleet, "site"); len(all) != 2 || all[0].Recipe != machine.ID() || all[1].Kind != KindApp {
		t.Errorf("builds by name: %+v", all)
	}
}
