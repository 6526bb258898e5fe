package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// Who waits for a role waits for its OS image, too; builds of that name from another time are nothing to him.
func TestPartsOf(t *testing.T) {
	of := func(s string) digest.Digest { return digest.Of([]byte(s)) }
	roles := []api.Role{
		{Name: "web", OS: "debian", BaseRecipe: of("debian 2"), DeltaRecipe: of("web 2")},
		{Name: "new", OS: "debian", BaseRecipe: of("debian 2"), DeltaRecipe: of("new 1")},
	}
	images := []api.Image{ // the newest first, as the server has them
		{Name: "spare", Recipe: of("spare 2"), Phase: state.BuildRunning},
		{Name: "spare", Recipe: of("spare 1"), Phase: state.BuildDone},
		{Name: "web", Recipe: of("web 1"), Phase: state.BuildDone, Declared: true},
		{Name: "debian", Recipe: of("debian 1"), Phase: state.BuildDone},
		{Name: "web", Recipe: of("web 2"), Phase: state.BuildQueued},
		{Name: "debian", Recipe: of("debian 2"), Phase: state.BuildFailed},
	}
	for _, tt := range []struct {
		name string
		want []digest.Digest
	}{
		{"web", []digest.Digest{of("debian 2"), of("web 2")}},
		{"debian", []digest.Digest{of("debian 2")}},
		{"spare", []digest.Digest{of("spare 2")}},
		{"new", nil}, // the server has not come to it yet
		{"other", nil},
	} {
		var got []digest.Digest
		for _, i := range partsOf(images, roles, tt.name) {
			got = append(got, i.Recipe)
			if !i.Declared {
				t.Errorf("%s: %s is not shown", tt.name, i.Name)
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}
