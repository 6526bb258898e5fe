package main

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// Who waits for recipes is shown those alone, in their order; builds of that name from another time are nothing to him.
func TestPartsOf(t *testing.T) {
	of := func(s string) digest.Digest { return digest.Of([]byte(s)) }
	images := []api.Image{ // the newest first, as the server has them
		{Name: "web", Recipe: of("web 1"), Phase: state.BuildDone, Declared: true},
		{Name: "debian", Recipe: of("debian 1"), Phase: state.BuildDone},
		{Name: "web", Recipe: of("web 2"), Phase: state.BuildQueued},
		{Name: "debian", Recipe: of("debian 2"), Phase: state.BuildFailed},
	}
	for _, tt := range []struct {
		name          string
		recipes, want []digest.Digest
	}{
		{"a role", []digest.Digest{of("debian 2"), of("web 2")}, []digest.Digest{of("debian 2"), of("web 2")}},
		{"an image", []digest.Digest{of("debian 2")}, []digest.Digest{of("debian 2")}},
		{"a role that the server has not come to yet", []digest.Digest{of("debian 2"), of("new 1")}, nil},
	} {
		var got []digest.Digest
		for _, i := range partsOf(images, tt.recipes) {
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

func TestFailedAnew(t *testing.T) {
	early, late := time.Unix(1, 0), time.Unix(2, 0)
	failed := api.Image{Phase: state.BuildFailed, Error: "exit status 1", Finished: early}
	for _, tt := range []struct {
		name   string
		i, old api.Image
		want   bool
	}{
		{"the failure from before", failed, failed, false},
		{"a second failure", api.Image{Phase: state.BuildFailed, Error: "exit status 1", Finished: late}, failed, true},
		{"a first failure", failed, api.Image{}, true},
		{"it ran", failed, api.Image{Phase: state.BuildRunning}, true},
		{"never begun, and given up", api.Image{Phase: state.BuildFailed, Error: "stopped"}, api.Image{}, true},
		{"failed, asked for, and given up", api.Image{Phase: state.BuildFailed, Error: "stopped", Finished: early}, failed, true},
		{"it runs", api.Image{Phase: state.BuildRunning, Finished: early}, failed, false},
	} {
		if got := failedAnew(tt.i, tt.old); got != tt.want {
			t.Errorf("%s: %t, want %t", tt.name, got, tt.want)
		}
	}
}
