package plan

import (
	"testing"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// What keeps a release from being there is the same text in a plan, for operators and on a machine's console.
func TestMissing(t *testing.T) {
	id := images.RecipeID("sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")
	for want, b := range map[string]state.Build{
		"role web waits to be built":                                           {},
		"role web is being built":                                              {Phase: state.BuildRunning},
		"role web is being built: packages":                                    {Phase: state.BuildRunning, Step: "packages"},
		`the build of role web failed: packages; see troupe logs 0123456789ab`: {Phase: state.BuildFailed, Step: "packages"},
	} {
		if got := (Missing{What: "role web", Recipe: id, Build: b}).String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if got := (Missing{}).String(); got != "" {
		t.Errorf("of nothing: got %q", got)
	}
}

func TestReleaseGrowsWithWhatIsBuilt(t *testing.T) {
	w := newWorld()
	built := func() Wanted {
		return Artifacts[images.RecipeID]{Bases: w.obs.Bases, Deltas: w.obs.Deltas, Builds: w.obs.Builds}.Release(w.fleet, w.fleet.Roles["web"])
	}
	first := built()
	if first.Release != nil || first.Missing.What != "image debian" || first.Missing.Recipe != first.Base {
		t.Errorf("with nothing built: %+v", first)
	}
	w.obs.Bases[first.Base] = images.Base{Recipe: first.Base}
	if second := built(); second.Release != nil || second.Missing.What != "role web" || second.Missing.Recipe != first.Delta {
		t.Errorf("with the base built: %+v", second)
	}
	w.obs.Deltas[first.Delta] = images.Delta{Recipe: first.Delta}
	if third := built(); third.Release == nil || third.ID != third.Release.ID() || third.Missing.String() != "" {
		t.Errorf("with all built: %+v", third)
	}
}
