package agent

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/digest"
)

// onlyOtherApps gives an assignment apps that it had not, and nothing else.
func onlyOtherApps(a *agentapi.Assignment, activate string) {
	r := *a.Release
	r.OS, r.ID = r.System(), digest.Of([]byte("with apps"))
	r.Apps = []agentapi.App{{Name: "site", Image: agentapi.Image{Blob: agentapi.Blob{Digest: digest.Of([]byte("site"))}}, Mount: "/opt/site", Data: "keep"}}
	a.Release, a.Activate = &r, activate
}

// withApp is an assignment with an app of that content.
func withApp(s *agentapitest.Server, content string, gen uint64) agentapi.Assignment {
	a := assigned(s, "web", gen)
	onlyOtherApps(&a, agentapi.Restart)
	a.Release.Apps[0].Image = s.AddImage([]byte(content))
	a.Release.ID = digest.Of([]byte("release with " + content))
	a.Checks = passing
	return a
}

// testPlace notes what is done with apps.
type testPlace struct {
	mu   sync.Mutex
	done []string
	err  error // of the next start
}

func (p *testPlace) note(what string, list []agentapi.App) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range list {
		p.done = append(p.done, what+" "+a.Image.Digest.Short())
	}
}

func (p *testPlace) Start(_ context.Context, list []agentapi.App) error {
	p.note("start", list)
	err := p.err
	p.err = nil
	return err
}

func (p *testPlace) Stop(_ context.Context, list []agentapi.App) error {
	p.note("stop", list)
	return nil
}

func (p *testPlace) want(t *testing.T, want ...string) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := cmp.Diff(want, p.done); d != "" {
		t.Errorf("done with apps (-want +got):\n%s", d)
	}
}

func imageOf(a agentapi.Assignment) string { return a.Release.Apps[0].Image.Digest.Short() }

func TestOtherAppsAreTakenUpWithoutAReboot(t *testing.T) {
	var s agentapitest.Server
	old, next := withApp(&s, "one", 1), withApp(&s, "two", 2)
	n := newNode(t, old, &s)
	place := &testPlace{}
	n.apps = place
	n.booted(old)
	reboots, stop := n.start()
	n.wait("health", healthy)
	s.Assign(next)
	n.wait("the new apps", func(r agentapi.Report) bool {
		return healthy(r) && r.Running.Release == next.Release.ID && r.Running.Generation == 2 && r.Good == next.Release.ID && r.Staged == "" && r.Error == ""
	})
	if r := s.Reports(); r[len(r)-1].Running.System != old.Release.System() {
		t.Errorf("the system is another one: %+v", r[len(r)-1].Running)
	}
	place.want(t, "stop "+imageOf(old), "start "+imageOf(next))
	_ = stop()
	if len(reboots) > 0 {
		t.Error("it rebooted")
	}
	if r := n.record(next); !r.IsGood() || r.Attempts != 0 || r.NodeDelta() != n.record(old).NodeDelta() || r.Used <= n.record(old).Used {
		t.Errorf("record %+v", r)
	}
	k, err := loadState(filepath.Join(n.dir, "run", stateFile))
	if err != nil || k.get().Trial != nil || k.get().Assignment.Release.ID != next.Release.ID {
		t.Errorf("left to the next process: %+v, %v", k.get(), err)
	}
}

func TestAppsThatAreNotHealthyAreLeft(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*testPlace, *agentapi.Assignment)
		why   string
	}{
		"its checks fail": {func(_ *testPlace, a *agentapi.Assignment) { a.Checks, a.HealthyWithin = failing, 50*time.Millisecond }, "exec false: exit status 1: not passed within 50ms"},
		"does not mount":  {func(p *testPlace, _ *agentapi.Assignment) { p.err = errors.New("it does not mount") }, "it does not mount"},
	} {
		t.Run(name, func(t *testing.T) {
			var s agentapitest.Server
			old, next := withApp(&s, "one", 1), withApp(&s, "two", 2)
			n := newNode(t, old, &s)
			place := &testPlace{}
			n.apps = place
			n.booted(old)
			reboots, stop := n.start()
			n.wait("health", healthy)
			c.spoil(place, &next)
			s.Assign(next)
			n.wait("the verdict", func(r agentapi.Report) bool {
				return healthy(r) && r.Running.Release == old.Release.ID && len(r.Bad) == 1 && r.Bad[0].Release == next.Release.ID && strings.Contains(r.Bad[0].Why, c.why)
			})
			n.wait("the mark", func(agentapi.Report) bool { return strings.HasSuffix(n.stages(), "stage bad") })
			_ = stop()
			place.want(t, "stop "+imageOf(old), "start "+imageOf(next), "stop "+imageOf(next), "stop "+imageOf(old), "start "+imageOf(old))
			if len(reboots) > 0 {
				t.Error("it rebooted")
			}
			if r := n.record(next); r.Bad == nil {
				t.Errorf("record %+v", r)
			}
		})
	}
}

// A process that was killed while it tried other apps is followed by one that goes back first.
func TestATrialThatWasKilledEndsInTheAppsBefore(t *testing.T) {
	var s agentapitest.Server
	old, next := withApp(&s, "one", 1), withApp(&s, "two", 2)
	n := newNode(t, old, &s)
	place := &testPlace{}
	n.apps = place
	n.booted(old)
	k, err := loadState(filepath.Join(n.dir, "run", stateFile))
	if err == nil {
		err = k.change(func(st *RunState) { st.Trial = &next.Release.Apps })
	}
	if err != nil {
		t.Fatal(err)
	}
	_, stop := n.start()
	n.wait("health", func(r agentapi.Report) bool { return healthy(r) && r.Running.Release == old.Release.ID })
	_ = stop()
	place.want(t, "stop "+imageOf(next), "stop "+imageOf(old), "start "+imageOf(old))
	if k, err = loadState(k.path); err != nil || k.get().Trial != nil {
		t.Errorf("the trial goes on: %+v, %v", k.get().Trial, err)
	}
}
