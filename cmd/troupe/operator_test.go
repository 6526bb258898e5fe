package main

import (
	"context"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api/apitest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// TestOperatorScripts runs the scripts in testdata/operator. They have the commands
//
//	server mixed|healthy|sick|empty|namesakes|diskless  serves such a fleet, from a store of its own, to the commands that follow
//	heal                                       makes the sick host of that fleet healthy
//	push good|bad                              pushes a commit, which the server sees only when it looks at the repo
func TestOperatorScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/operator", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("TZ", "UTC")
			env.Values["site"] = new(site)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"server": serveFleet, "heal": heal, "push": push},
	})
}

// A site is what a script's server serves.
type site struct {
	fleet *apitest.Fleet
	ctl   *apitest.Controllers
	store *state.Store
}

// fleetOf is the fleet that a script calls name. Its now is later than ours, so that no host gets lost meanwhile.
func fleetOf(name string) (*apitest.Fleet, *apitest.Controllers) {
	now := time.Now().Add(5 * time.Minute)
	ctl := &apitest.Controllers{LogText: "==> packages\nE: Unable to locate package postgresql-99\n"}
	if name == "mixed" {
		ctl.Planned = plannedSwitch()
		return apitest.Mixed(now), ctl
	}
	f := apitest.New(now)
	delete(f.Schema.Roles, "db")
	if name == "diskless" {
		f.Diskless(1, false)
		f.Diskless(2, true)
		f.Declare(3, "idle")
		f.Run(3)
		return f, ctl
	}
	if name == "empty" {
		f.Unclaimed(99)
		hostile := f.Machines[apitest.MAC(99)]
		hostile.Inventory.SMBIOS.Product = "\x1b]0;owned\a\nhosts: evil: role: 1"
		f.Machines[apitest.MAC(99)] = hostile
		return f, ctl
	}
	for n := range 3 {
		f.Declare(n+1, "web")
		f.Run(n + 1)
	}
	if name == "namesakes" {
		addNamesake(f)
	}
	if name == "sick" {
		n := f.Nodes[apitest.MAC(1)]
		n.Running.Health = agentapi.Health{Failing: []string{"unit web.service: failed"}}
		f.Nodes[n.MAC] = n
	}
	return f, ctl
}

// addNamesake adds an image that is built, that no role uses, and that has the name of a role of which nothing is built.
func addNamesake(f *apitest.Fleet) {
	f.Role("db", false)
	img := f.Schema.Images["debian"]
	from := *img.From.Debian
	from.Packages = []string{"postgresql"}
	img.Name, img.From.Debian = "db", &from
	f.Schema.Images["db"] = img
	id := images.BaseRecipeOf(img).ID()
	base := f.Bases[string(images.BaseRecipeOf(f.Schema.Images["debian"]).ID())]
	base.Recipe, base.Image.Blob = id, images.Blob{Digest: digest.Of([]byte("db")), Size: 77 << 20}
	f.Bases[string(id)] = base
	f.Builds[string(id)] = state.Build{
		Recipe: id, Kind: "base", Name: "db", Phase: state.BuildDone, Attempts: 1, Started: f.Now.Add(-time.Hour),
		Finished: f.Now.Add(-time.Hour + time.Minute), Result: base.Image.Digest, Size: base.Image.Size,
	}
}

// plannedSwitch is a plan in which n2 gets another role.
func plannedSwitch() plan.Plan {
	return plan.Plan{
		Commit: apitest.Hash("c3"),
		Builds: []plan.Build{{Kind: plan.KindDelta, Name: "db", State: plan.BuildMissing, Hosts: []string{"n4"}}},
		Hosts: []plan.Host{
			{Name: "n1", Action: plan.None, FromRole: "web", ToRole: "web", Generation: 1},
			{
				Name: "n2", Action: plan.StageAndReboot, Changed: true, Why: []string{"role idle → web", "node file /etc/x added"},
				FromRole: "idle", ToRole: "web", FetchBytes: 3 << 20, Reboot: true, Generation: 2,
			},
			{Name: "n4", Action: plan.AwaitBuild, Changed: true, Why: []string{"role db has to be built"}, ToRole: "db", FetchBytes: -1, Generation: 1},
		},
	}
}

func serveFleet(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: server mixed|healthy|sick|empty|namesakes|diskless")
	}
	f, ctl := fleetOf(args[0])
	ctx := context.Background()                      // the store outlives the script's commands, until Defer
	dir, err := os.MkdirTemp(ts.MkAbs("."), "store") // a script may have several servers
	ts.Check(err)
	store, err := state.Open(ctx, dir, nil)
	ts.Check(err)
	ts.Check(f.Put(ctx, store))
	srv := httptest.NewServer(apitest.Server(store, f, ctl).Handler())
	ts.Defer(func() {
		srv.CloseClientConnections()
		srv.Close()
		_ = store.Close()
	})
	ts.Setenv("TROUPE_SERVER", srv.URL)
	*ts.Value("site").(*site) = site{f, ctl, store}
}

func heal(ts *testscript.TestScript, _ bool, _ []string) {
	s := ts.Value("site").(*site)
	n := s.fleet.Nodes[apitest.MAC(1)]
	n.Running.Health = agentapi.Health{Healthy: true}
	ts.Check(state.Nodes.Put(context.Background(), s.store, n.MAC, n))
}

func push(ts *testscript.TestScript, _ bool, args []string) {
	s := ts.Value("site").(*site)
	c := state.Commit{Hash: apitest.Hash("c3"), Subject: "web: say hello", Author: "Eve", Time: s.fleet.Now}
	src := s.fleet.Source
	src.Attempted = &c
	switch {
	case len(args) == 1 && args[0] == "good":
		src.Applied = &c
	case len(args) == 1 && args[0] == "bad":
		src.Problems = []schema.Problem{{File: "hosts.cue", Line: 1, Column: 2, Message: "hosts.n1: no"}}
	default:
		ts.Fatalf("usage: push good|bad")
	}
	s.ctl.Push(func() error { return state.Sources.Put(context.Background(), s.store, state.SourceID, src) })
}

func TestHostlist(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"n1", "n1"},
		{"n[1-3,9]", "n1 n2 n3 n9"},
		{"n[08-10]", "n08 n09 n10"},
		{"r[1-2]n[1,3],x", "r1n1 r1n3 r2n1 r2n3 x"},
		{"n[1-2]-ib", "n1-ib n2-ib"},
		{"n[1", "error"},
		{"n1]", "error"},
		{"n[]", "error"},
		{"n[a]", "error"},
		{"n[3-1]", "error"},
		{"n[1-999999]", "error"},
		{"a[1-999]b[1-999]", "error"},
		{"n[1-2147483649]", "error"},
		{"52:54:00:77:00:01", "52:54:00:77:00:01"},
	} {
		names, err := hostlist([]string{tt.in})
		got := strings.Join(names, " ")
		if err != nil {
			got = "error"
		}
		if got != tt.want {
			t.Errorf("%s: %s, %v; want %s", tt.in, got, err, tt.want)
		}
	}
}

func FuzzHostlist(f *testing.F) {
	for _, s := range []string{"n[1-5,9]", "a[1]b[2]c", "[", "]", "[[1]]", ",", "n[1-100000]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		names, err := hostlist([]string{s})
		if err == nil && len(names) > maxHostlist {
			t.Errorf("%d names", len(names))
		}
	})
}

func TestTable(t *testing.T) {
	var b strings.Builder
	tab := table{header: []string{"NAME", "STATE"}, colour: func(int, string) string { return "coloured" }}
	tab.add("größe", "ok")
	tab.add("n1", "\x1b[31mred\r\n", "x")
	if err := tab.write(&b, ""); err != nil {
		t.Fatal(err)
	}
	want := "NAME    STATE\ngröße   ok\nn1      \uFFFD[31mred\uFFFD    x\n"
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestSpans(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0 s", 59 * time.Second: "59 s", time.Minute: "1 min", 90 * time.Minute: "1 h", 47 * time.Hour: "47 h", 49 * time.Hour: "2 days",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%s) = %q, want %q", d, got, want)
		}
	}
	for d, want := range map[time.Duration]string{90 * time.Millisecond: "90 ms", 5200 * time.Millisecond: "5.2 s", 150 * time.Second: "2m30s"} {
		if got := exact(d); got != want {
			t.Errorf("exact(%s) = %q, want %q", d, got, want)
		}
	}
}

func TestWithoutQuery(t *testing.T) {
	for in, want := range map[string]string{
		"http://10.77.0.1:8080/boot.ipxe?mac=52:54:00:77:00:01&uuid=1": "http://10.77.0.1:8080/boot.ipxe",
		"10.77.0.11, http://a/b?c=d, UEFI":                             "10.77.0.11, http://a/b, UEFI",
		"why? because":                                                 "why? because",
	} {
		if got := withoutQuery(in); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}
