package api_test

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/api/apitest"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

var now = time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)

// states writes hosts as "key: state (detail)".
func states(hosts []api.Host) []string {
	var lines []string
	for _, h := range hosts {
		line := h.Key() + ": " + string(h.State)
		if h.Detail != "" {
			line += " (" + h.Detail + ")"
		}
		lines = append(lines, withoutRecipe(line))
	}
	return lines
}

var recipe = regexp.MustCompile(`\b[0-9a-f]{12}\b`)

func withoutRecipe(text string) string { return recipe.ReplaceAllString(text, "RECIPE") }

func TestHostStates(t *testing.T) {
	got := states(apitest.Mixed(now).Records().Hosts())
	want := []string{
		"n1: healthy",
		"n2: staging (45%)",
		"n3: unhealthy (http port 80 /: connection refused)",
		"n4: waiting (the build of role db failed: packages; see troupe logs RECIPE)",
		"n5: absent (never seen)",
		"n6: lost (not seen for 11 min)",
		"n7: booting (kernel)",
		"n8: failed (no disk may be taken: vda holds ext4 (set disk: take: true to lose what is on it))",
		"n9: rebooting",
		"52:54:00:77:00:63: unclaimed",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("states (-want +got):\n%s", d)
	}
}

// TestHostStateOne changes one thing about a healthy host, and says how the host is then.
func TestHostStateOne(t *testing.T) {
	mac := apitest.MAC(1)
	node := func(change func(*state.Node)) func(*apitest.Fleet) {
		return func(f *apitest.Fleet) {
			n := f.Nodes[mac]
			run := *n.Running
			n.Running = &run
			change(&n)
			f.Nodes[mac] = n
		}
	}
	starting := func(since, healthy time.Duration) func(*apitest.Fleet) {
		return func(f *apitest.Fleet) {
			node(func(n *state.Node) {
				n.Stage, n.BootID, n.Running.Health = "service", "zz", agentapi.Health{Failing: []string{"a", "b"}}
			})(f)
			b := state.Boot{ID: "zz", MAC: mac, Started: now.Add(-time.Hour), Marks: []state.Mark{{Stage: "service", Time: now.Add(-since)}}}
			if healthy > 0 {
				b.Healthy = now.Add(-healthy)
			}
			f.Boots[mac+"/zz"] = b
		}
	}
	boots := func(ago time.Duration, stage string) func(*apitest.Fleet) {
		return func(f *apitest.Fleet) {
			at := f.Now.Add(-ago)
			f.Boots[mac+"/zz"] = state.Boot{ID: "zz", MAC: mac, Started: at, Marks: []state.Mark{{Stage: stage, Time: at}}}
		}
	}
	for _, tt := range []struct {
		name   string
		change func(*apitest.Fleet)
		want   string
	}{
		{"nothing", func(*apitest.Fleet) {}, "healthy"},
		{"older generation, same bytes", node(func(n *state.Node) { n.Running.Generation = 0 }), "healthy"},
		{"another node delta", node(func(n *state.Node) { n.Running.Node = digest.Of(nil) }), "staging"},
		{"fetching", node(func(n *state.Node) {
			n.Running.Release, n.Fetch = digest.Of(nil), &agentapi.Progress{Done: 999, Total: 1000}
		}), "staging (99%)"},
		{"staged", node(func(n *state.Node) { n.Running.Release, n.Staged = digest.Of(nil), n.Running.Release }), "rebooting (staged)"},
		{"service, checks not run yet", node(func(n *state.Node) { n.Stage, n.Running.Health = "service", agentapi.Health{} }), "booting (service)"},
		{"a check fails", node(func(n *state.Node) { n.Running.Health = agentapi.Health{Failing: []string{"a", "b"}} }), "unhealthy (a; b)"},
		{"its first checks fail", starting(4*time.Minute, 0), "booting (checks: a; b)"},
		{"its first checks fail for long", starting(6*time.Minute, 0), "unhealthy (a; b)"},
		{"a check fails after it was healthy", starting(4*time.Minute, time.Minute), "unhealthy (a; b)"},
		{"its healthy mark is written, the rest of that report not yet", func(f *apitest.Fleet) {
			starting(time.Minute, time.Millisecond)(f)
			node(func(n *state.Node) { n.LastSeen = now.Add(-2 * time.Millisecond) })(f)
		}, "booting (checks: a; b)"},
		{"needs help", node(func(n *state.Node) { n.Stage, n.Error = "failed", "cache full" }), "failed (cache full)"},
		{"rolled back", node(func(n *state.Node) {
			n.Bad = []agentapi.BadRelease{{Host: "n1", Release: n.Running.Release, Node: n.Running.Node, Why: "http :80/: not passed within 10m0s"}}
			n.Running.Release = digest.Of(nil)
		}), "rolled-back (release RECIPE: http :80/: not passed within 10m0s)"},
		{"rolled back, and another is wanted by now", node(func(n *state.Node) {
			n.Bad = []agentapi.BadRelease{{Host: "n1", Release: digest.Of([]byte("x")), Node: n.Running.Node, Why: "no"}}
		}), "healthy"},
		{"rolled back, and another role is declared", func(f *apitest.Fleet) {
			node(func(n *state.Node) {
				n.Bad = []agentapi.BadRelease{{Host: "n1", Release: n.Running.Release, Node: n.Running.Node, Why: "no"}}
				n.Running.Release = digest.Of(nil)
			})(f)
			h := f.Schema.Hosts["n1"]
			h.Role = "idle"
			f.Schema.Hosts["n1"] = h
		}, "waiting (being planned)"},
		{"bad, and nothing to go back to", node(func(n *state.Node) {
			n.Bad = []agentapi.BadRelease{{Host: "n1", Release: n.Running.Release, Node: n.Running.Node, Why: "no"}}
			n.Running.Health = agentapi.Health{Failing: []string{"a"}}
		}), "unhealthy (a)"},
		{"bad, and waits in its boot", node(func(n *state.Node) {
			n.Bad = []agentapi.BadRelease{{Host: "n1", Release: n.Running.Release, Node: n.Running.Node, Why: "no"}}
			n.Stage, n.Running, n.Error = "failed", nil, "nothing to boot"
		}), "rolled-back (release RECIPE: no (failed: nothing to boot))"},
		{"went on after a failure", node(func(n *state.Node) { n.Stage = "failed" }), "healthy"},
		{"tries again", node(func(n *state.Node) {
			n.Running.Release, n.Error = digest.Of(nil), "fetching image ab: EOF; trying again"
		}), "staging (fetching image ab: EOF; trying again)"},
		{"tries again in its boot", node(func(n *state.Node) {
			n.Stage, n.Running, n.Error = "cache", nil, "fetching image ab: EOF; trying again"
			n.Fetch = &agentapi.Progress{Done: 45, Total: 100}
		}), "booting (fetch 45%: fetching image ab: EOF; trying again)"},
		{"went on in its boot", func(f *apitest.Fleet) {
			n := f.Nodes[mac]
			n.Stage, n.Running = "failed", nil
			f.Nodes[mac] = n
			for key, b := range f.Boots {
				if b.ID == n.BootID {
					b.Marks = []state.Mark{{Stage: "agent-up", Time: now}, {Stage: "cache", Time: now}, {Stage: "failed", Time: now}}
					f.Boots[key] = b
				}
			}
		}, "booting (cache)"},
		{"went on in a boot that is not recorded", node(func(n *state.Node) { n.Stage, n.Running, n.BootID = "failed", nil, "x" }), "booting (agent-up)"},
		{"silent", node(func(n *state.Node) { n.LastSeen = now.Add(-31 * time.Second) }), "lost (not seen for 31 s)"},
		{"silent in its boot", node(func(n *state.Node) {
			n.Stage, n.Running, n.LastSeen = "fetch", nil, now.Add(-4*time.Minute)
		}), "booting (fetch)"},
		{"gone in its boot", node(func(n *state.Node) {
			n.Stage, n.Running, n.LastSeen = "fetch", nil, now.Add(-6*time.Minute)
		}), "lost (not seen for 6 min)"},
		{"reset", boots(time.Second, "dhcp-offer"), "booting (dhcp-offer)"},
		{"an older boot", boots(24*time.Hour, "dhcp-offer"), "healthy"},
		{"another role, built", func(f *apitest.Fleet) { h := f.Schema.Hosts["n1"]; h.Role = "idle"; f.Schema.Hosts["n1"] = h }, "waiting (being planned)"},
		{"another role, not built", func(f *apitest.Fleet) {
			f.Schema.Roles["new"] = schema.Role{Name: "new", OS: "debian"}
			h := f.Schema.Hosts["n1"]
			h.Role = "new"
			f.Schema.Hosts["n1"] = h
		}, "waiting (role new waits to be built)"},
		{"moved to another MAC", func(f *apitest.Fleet) {
			h := f.Schema.Hosts["n1"]
			h.MAC = apitest.MAC(77)
			f.Schema.Hosts["n1"] = h
		}, "absent (never seen)"},
		{"known by UUID", func(f *apitest.Fleet) {
			h := f.Schema.Hosts["n1"]
			h.MAC, h.UUID = "", f.Machines[mac].UUID
			f.Schema.Hosts["n1"] = h
		}, "healthy"},
		{"before the fleet is loaded", func(f *apitest.Fleet) { f.Schema = nil }, "healthy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := apitest.New(now)
			f.Declare(1, "web")
			f.Run(1)
			tt.change(f)
			got := states(f.Records().Hosts())
			if len(got) == 0 || got[0] != "n1: "+tt.want {
				t.Errorf("got %q, want n1: %s", got, tt.want)
			}
		})
	}
}

// TestLostAfterRestart has a server that was away for longer than a host may be silent.
func TestLostAfterRestart(t *testing.T) {
	f := apitest.New(now)
	f.Declare(1, "web")
	f.Run(1)
	n := f.Nodes[apitest.MAC(1)]
	n.LastSeen = now.Add(-time.Hour)
	f.Nodes[n.MAC] = n
	for up, want := range map[time.Duration]string{10 * time.Second: "n1: healthy", 31 * time.Second: "n1: lost (not seen for 1 h)"} {
		r := f.Records()
		r.Started = now.Add(-up)
		if got := states(r.Hosts()); got[0] != want {
			t.Errorf("%s after the server's start: %q, want %q", up, got[0], want)
		}
	}
}

func TestStatus(t *testing.T) {
	f := apitest.New(now)
	f.Schema.Roles = map[string]schema.Role{"web": f.Schema.Roles["web"]} // without the one whose build failed
	for n := range 3 {
		f.Declare(n+1, "web")
		f.Run(n + 1)
	}
	status := func() api.Status {
		r := f.Records()
		return r.Status(r.Hosts(), r.Images())
	}
	if st := status(); !st.Converged || len(st.Waiting) != 0 || st.Hosts.Healthy != 3 || st.Attempted != nil {
		t.Errorf("a healthy fleet: %+v", st)
	}
	r := f.Records()
	r.Planned = apitest.Hash("00")
	if st := r.Status(r.Hosts(), r.Images()); st.Converged {
		t.Error("it counts as converged although its newest commit is not planned yet")
	}
	f.Source.FetchError = "no route to host"
	if st := status(); st.Converged || !strings.Contains(st.Waiting[0], "no route to host") {
		t.Errorf("with the repo out of reach: %+v", st)
	}

	mixed := apitest.Mixed(now).Records()
	st := mixed.Status(mixed.Hosts(), mixed.Images())
	want := []string{
		"commit b2b2b2b2b2 is not in force: it has 2 problems",
		"1 build failed",
		"1 host absent: n5",
		"1 host booting: n7",
		"1 host failed: n8",
		"1 host lost: n6",
		"1 host rebooting: n9",
		"1 host staging: n2",
		"1 host unhealthy: n3",
		"1 host waiting: n4",
	}
	if d := cmp.Diff(want, st.Waiting); d != "" {
		t.Errorf("what is missing (-want +got):\n%s", d)
	}
	if st.Hosts.Total != 9 || st.Hosts.Serving != 2 || st.Hosts.Healthy != 1 || st.Hosts.Unclaimed != 1 || st.Builds.Failed != 1 {
		t.Errorf("counts: %+v, %+v", st.Hosts, st.Builds)
	}
}

// TestServing has hosts that shall run another release than they do: they serve as well as before.
func TestServing(t *testing.T) {
	f := apitest.New(now)
	for n := range 3 {
		f.Declare(n+1, "web")
		f.Run(n + 1)
		f.Assign(fmt.Sprintf("n%d", n+1), "idle", 2, "role web → idle")
	}
	r := f.Records()
	if got := r.Status(r.Hosts(), r.Images()).Hosts; got.Total != 3 || got.Serving != 3 || got.Healthy != 0 {
		t.Errorf("counts: %+v; want 3 that serve, and none at its release", got)
	}
}

func TestProposal(t *testing.T) {
	f := apitest.Mixed(now)
	f.Unclaimed(100)
	odd := f.Machines[apitest.MAC(100)]
	odd.Serial = "To be filled by O.E.M."
	odd.Inventory.SMBIOS = agentapi.SMBIOS{Vendor: "Evil\nhosts: x: y", Product: "\x1b[31m*/ }"}
	f.Machines[apitest.MAC(100)] = odd
	hosts := f.Records().Hosts()
	got := hosts[len(hosts)-2].Entry + hosts[len(hosts)-1].Entry
	want := `// Supermicro AS-1114S, serial SM000099X
// 1 x AMD EPYC 7443P 24-Core Processor (48 threads), 128 GiB memory, uefi
// disk nvme0n1: 894 GiB, SAMSUNG MZQL2960HCJR, blank
// nic eth0: 52:54:00:77:00:63, ice, 25000 Mbit/s
hosts: "sm000099x": {mac: "52:54:00:77:00:63", address: "10.77.0.20", role: "choose-a-role"}
// Evil hosts: x: y  [31m*/ }
// 1 x AMD EPYC 7443P 24-Core Processor (48 threads), 128 GiB memory, uefi
// disk nvme0n1: 894 GiB, SAMSUNG MZQL2960HCJR, blank
// nic eth0: 52:54:00:77:00:64, ice, 25000 Mbit/s
hosts: "m525400770064": {mac: "52:54:00:77:00:64", address: "10.77.0.21", role: "choose-a-role"}
`
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("entries (-want +got):\n%s", d)
	}
}

// TestProposalFull has no address left in the subnet but in the dynamic range.
func TestProposalFull(t *testing.T) {
	f := apitest.New(now)
	f.Schema.Network = schema.Network{
		Subnet: netip.MustParsePrefix("10.9.0.0/29"), Router: netip.MustParseAddr("10.9.0.1"),
		Dynamic: schema.Range{First: netip.MustParseAddr("10.9.0.4"), Last: netip.MustParseAddr("10.9.0.6")},
	}
	for n := range 3 {
		f.Unclaimed(n)
	}
	var got []string
	for _, h := range f.Records().Hosts() {
		got = append(got, h.Propose.Address.String())
	}
	if d := cmp.Diff([]string{"10.9.0.2", "10.9.0.3", "invalid IP"}, got); d != "" {
		t.Errorf("addresses (-want +got):\n%s", d)
	}
}

func TestImages(t *testing.T) {
	f := apitest.Mixed(now)
	f.Schema.Roles["new"] = schema.Role{Name: "new", OS: "debian"}
	f.Declare(12, "new")
	f.Schema.Roles["unused"] = schema.Role{Name: "unused", OS: "debian", Packages: []string{"vim"}}
	r := f.Records()
	var got []string
	for _, i := range r.Images() {
		got = append(got, fmt.Sprintf("%s %s %s used=%t declared=%t", i.Kind, i.Name, i.Phase, i.Used, i.Declared))
	}
	want := []string{
		"delta new queued used=false declared=true",
		"delta db failed used=false declared=true",
		"delta idle done used=true declared=true",
		"delta web done used=true declared=true",
		"base debian done used=true declared=true",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("images (-want +got):\n%s", d)
	}
	web, ok := r.Image("web")
	if !ok || web.Delta == nil || len(web.Releases) != 1 {
		t.Fatalf("image web: %+v", web)
	}
	for _, ref := range []string{web.Recipe.Short(), web.Recipe.String(), web.Digest.Hex()[:7]} {
		if d, ok := r.Image(ref); !ok || d.Name != "web" {
			t.Errorf("image %q is %q", ref, d.Name)
		}
	}
	for _, ref := range []string{"", "sha256:", web.Recipe.Hex()[:5], "nosuch"} {
		if d, ok := r.Image(ref); ok {
			t.Errorf("image %q is %q", ref, d.Name)
		}
	}
}

func TestRolesAndReleases(t *testing.T) {
	r := apitest.Mixed(now).Records()
	hosts := r.Hosts()
	var got []string
	for _, role := range r.Roles(hosts) {
		got = append(got, fmt.Sprintln(role.Name, role.Hosts, role.Healthy, role.Release != "", role.Waiting))
	}
	for _, rel := range r.ReleaseViews(hosts) {
		got = append(got, fmt.Sprintln(rel.Roles, rel.Assigned, rel.Running))
	}
	want := []string{
		`db [n4] 0 false the build of role db failed: packages; see troupe logs RECIPE`, "idle [n6 n9] 0 true", "web [n1 n2 n3 n5 n7 n8] 1 true",
		"[idle] [n6 n9] [n2 n6 n9]", "[web] [n1 n2 n3 n5 n7 n8] [n1 n3]",
	}
	slices.Sort(got[3:]) // the two releases were made at one time
	for i := range got {
		got[i] = withoutRecipe(strings.TrimSpace(got[i]))
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("roles and releases (-want +got):\n%s", d)
	}
}

func TestBootView(t *testing.T) {
	mark := func(stage string, at time.Duration) state.Mark { return state.Mark{Stage: stage, Time: now.Add(at)} }
	got := api.BootViews([]state.Boot{
		{ID: "old", Started: now.Add(-time.Hour), Marks: []state.Mark{mark("dhcp-offer", -time.Hour)}},
		{
			// The node's clock says that its agent was up before the kernel was sent, and before the boot began.
			ID: "new", Started: now, Healthy: now.Add(9 * time.Second),
			Marks: []state.Mark{
				mark("kernel", 4*time.Second), mark("agent-up", -time.Second), mark("service", 9*time.Second), mark("healthy", 9*time.Second),
				mark("reboot", time.Hour), mark("stage", 30*time.Minute),
			},
		},
	})
	var lines []string
	for _, b := range got {
		for _, m := range b.Marks {
			lines = append(lines, fmt.Sprint(b.ID, " ", b.Took, " ", m.Stage, " ", m.At, " ", m.Took, " ", m.Later))
		}
	}
	want := []string{
		"new 9s agent-up 0s 0s false", "new 9s kernel 4s 4s false", "new 9s service 9s 5s false", "new 9s healthy 9s 0s false",
		"new 9s stage 30m0s 0s true", "new 9s reboot 1h0m0s 0s true", "old 0s dhcp-offer 0s 0s false",
	}
	if d := cmp.Diff(want, lines); d != "" {
		t.Errorf("boots (-want +got):\n%s", d)
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 243 << 20: "243 MiB", 128 << 30: "128 GiB",
		960197124096: "894 GiB", 1023 << 20: "1 GiB", -5: "-5 B", 10239: "10 KiB",
	} {
		if got := api.Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}
