package reconciler

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

func TestSilenceEvents(t *testing.T) {
	host := func(name string, s api.HostState, role, stage string) api.Host {
		return api.Host{Name: name, MAC: testMAC, State: s, Detail: "not seen for 31 s", RunningRole: role, Stage: stage}
	}
	lost := map[string]bool{"told": true, "back": true}
	hosts := []api.Host{
		host("web", api.HostLost, "web", "healthy"),
		host("boots", api.HostLost, "", "kernel"),
		host("told", api.HostLost, "web", "healthy"),
		host("back", api.HostBooting, "", "dhcp-offer"),
		host("well", api.HostHealthy, "web", "healthy"),
		host("", api.HostUnclaimed, "", "wait"),
	}
	var got []string
	for _, ev := range silenceEvents(lost, hosts) {
		got = append(got, ev.Subject+": "+ev.Message)
	}
	want := []string{
		"web: lost: not seen for 31 s, it ran role web",
		"boots: lost: not seen for 31 s, it came as far as kernel",
		"back: heard of again",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	if again := silenceEvents(lost, hosts); len(again) != 0 {
		t.Errorf("told twice: %v", again)
	}
}

// TestSilencesAreToldOnce has a server that is started again while a host is lost.
func TestSilencesAreToldOnce(t *testing.T) {
	store := openStore(t)
	look := func(st api.HostState) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		looks := 0
		s := silences{store: store, events: &recorder{store: store, log: slog.New(slog.DiscardHandler)}, every: time.Millisecond}
		s.hosts = func(context.Context) ([]api.Host, error) {
			if looks++; looks == 3 {
				cancel() // what the two looks before told is written
			}
			return []api.Host{{Name: "n1", State: st, Detail: "not seen for 31 s", RunningRole: "web"}}, nil
		}
		if err := s.run(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for _, st := range []api.HostState{api.HostHealthy, api.HostLost, api.HostLost, api.HostHealthy, api.HostHealthy} {
		look(st)
	}
	all, err := state.Events.List(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, id := range slices.Sorted(maps.Keys(all)) {
		got = append(got, all[id].Message)
	}
	want := []string{"lost: not seen for 31 s, it ran role web", "heard of again"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}
