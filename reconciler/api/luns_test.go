package api_test

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/api/apitest"
	"github.com/troupe-dev/troupe/reconciler/state"
)

func diskless() *apitest.Fleet {
	f := apitest.New(ahead())
	delete(f.Schema.Roles, "db")
	f.Diskless(1, false)
	f.Diskless(2, true)
	return f
}

func TestLUNs(t *testing.T) {
	ctl := &apitest.Controllers{}
	f := diskless()
	f.LUNSets["n1"] = withSecret(f.LUNSets["n1"])
	c, _ := serve(t, f, ctl)
	luns, err := c.LUNs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range luns {
		got = append(got, strings.TrimSpace(string(l.Kind)+" "+l.Name))
	}
	if d := cmp.Diff([]string{"cow cloud", "rw", "ro debian"}, got); d != "" {
		t.Error(d)
	}
	for _, path := range []string{"hosts/n1", "luns", "hosts", "plan"} {
		method := "GET"
		if path == "plan" {
			method = "POST"
		}
		if _, body := request(t, method, c.URL+"api/v1/"+path, "{}", nil); strings.Contains(body, "hidden") {
			t.Errorf("%s shows a secret:\n%s", path, body)
		}
	}
	_, metrics := request(t, "GET", c.URL+"metrics", "", nil)
	for _, want := range []string{`troupe_iscsi_sessions{host="n1"} 1`, `troupe_iscsi_delta_bytes{host="n2"} 3.4603008e+07`, `troupe_hosts{state="booted"} 1`} {
		if !strings.Contains(metrics, "\n"+want) {
			t.Errorf("metrics have no %q", want)
		}
	}
}

// A host that does not get at its disk says why, wherever its machine is in its boot; one that runs what it should goes on.
func TestHostThatDoesNotGetAtItsDisk(t *testing.T) {
	f := diskless()
	for i := range f.Targets {
		f.Targets[i].Waiting = "the image is lost"
	}
	n := f.Nodes[apitest.MAC(2)]
	n.Running = nil
	for _, stage := range []string{"script", "wait"} {
		n.Stage = stage
		f.Nodes[n.MAC] = n
		c, _ := serve(t, f, &apitest.Controllers{})
		hosts, err := c.Hosts(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"n1": "booted ()", "n2": "waiting (the image is lost)"}
		for _, h := range hosts {
			if got := string(h.State) + " (" + h.Detail + ")"; want[h.Name] != "" && got != want[h.Name] {
				t.Errorf("%s at %s is %s, want %s", h.Name, stage, got, want[h.Name])
			}
		}
	}
}

func withSecret(l state.LUNs) state.LUNs {
	l.Disks = []state.LUNDisk{{ID: l.Current, Secret: "hidden", MutualSecret: "hidden"}}
	return l
}

// A system without an agent is booted, and counts as healthy; with another release to run it waits for its next boot.
func TestHostThatIsBootedAsItIs(t *testing.T) {
	f := diskless()
	state1 := func() (api.HostState, string, bool) {
		recs := f.Records()
		recs.Nodes = state.WithDisks(recs.Nodes, f.LUNSets, map[string]bool{"n1": true}, f.Now)
		hosts := recs.Hosts()
		i := slices.IndexFunc(hosts, func(h api.Host) bool { return h.Name == "n1" })
		return hosts[i].State, hosts[i].Detail, recs.Status(hosts, recs.Images()).Converged
	}
	if got, detail, converged := state1(); got != api.HostBooted || !converged {
		t.Errorf("as assigned: %s (%s), converged %v", got, detail, converged)
	}
	a := f.Assignments["n1"]
	a.Generation, a.Node = 2, "sha256:another"
	f.Assignments["n1"] = a
	if got, detail, converged := state1(); got != api.HostWaiting || detail != "for its next boot, which is into generation 2" || converged {
		t.Errorf("with another assignment: %s (%s), converged %v", got, detail, converged)
	}
	l := f.LUNSets["n1"]
	l.Current = "another"
	f.LUNSets["n1"] = l
	if got, detail, _ := state1(); got != api.HostFailed || !strings.Contains(detail, "boot it again") {
		t.Errorf("after its disk was reset: %s (%s)", got, detail)
	}
}

func TestReset(t *testing.T) {
	ctl := &apitest.Controllers{}
	c, _ := serve(t, diskless(), ctl)
	for _, tt := range []struct {
		host   string
		force  bool
		status int // 0: done
	}{
		{"n2", false, 0},
		{"n1", false, http.StatusConflict},
		{"n1", true, 0},
		{"n9", true, http.StatusNotFound},
	} {
		got, err := c.Reset(t.Context(), tt.host, tt.force)
		var e *api.Error
		if tt.status == 0 {
			if err != nil || got.Host != tt.host || !got.Resetting {
				t.Errorf("%s: %+v, %v", tt.host, got, err)
			}
		} else if !errors.As(err, &e) || e.Status != tt.status {
			t.Errorf("%s: got %v, want status %d", tt.host, err, tt.status)
		}
	}
	if d := cmp.Diff([]string{"reset n2 force false", "reset n1 force false", "reset n1 force true"}, ctl.Asked()); d != "" {
		t.Error(d)
	}
	status, _ := request(t, "POST", c.URL+"api/v1/hosts/n2/reset", "{}", map[string]string{"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"})
	if status != http.StatusForbidden {
		t.Errorf("a forged request: %d", status)
	}
}
