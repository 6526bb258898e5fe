package api_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/api/apitest"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// ahead is the fleet's now: later than ours, so that no host gets lost while a test runs slowly.
func ahead() time.Time { return time.Now().Add(5 * time.Minute) }

// serve puts f into a store of its own and serves it.
func serve(t *testing.T, f *apitest.Fleet, c *apitest.Controllers) (*api.Client, *state.Store) {
	t.Helper()
	store, err := state.Open(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Put(t.Context(), store); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(apitest.Server(store, f, c).Handler())
	t.Cleanup(func() {
		srv.CloseClientConnections() // watchers live as long as their clients
		srv.Close()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return &api.Client{URL: srv.URL + "/"}, store
}

func TestReads(t *testing.T) {
	ctx := t.Context()
	f := apitest.Mixed(ahead())
	c, _ := serve(t, f, &apitest.Controllers{})

	st, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.Repo != f.Source.Repo || st.Hosts.Total != 9 || len(st.Problems) != 2 || st.Attempted.Hash != apitest.Hash("b2") {
		t.Errorf("status: %+v", st)
	}
	hosts, err := c.Hosts(ctx, false)
	if err != nil || len(hosts) != 10 {
		t.Errorf("%d hosts, %v", len(hosts), err)
	}
	hosts, err = c.Hosts(ctx, true)
	if err != nil || len(hosts) != 1 || hosts[0].Inventory == nil {
		t.Errorf("unclaimed: %+v, %v", hosts, err)
	}
	for _, key := range []string{"n1", apitest.MAC(1), strings.ToUpper(apitest.MAC(1))} {
		h, err := c.Host(ctx, key)
		if err != nil || h.Name != "n1" || len(h.Boots) != 1 || len(h.Boots[0].Marks) != 11 || h.Spec == nil || h.Assignment == nil {
			t.Errorf("host %s: %+v, %v", key, h, err)
		}
	}
	h, err := c.Host(ctx, apitest.MAC(99))
	if err != nil || h.State != api.HostUnclaimed || h.Lease == nil {
		t.Errorf("unclaimed machine: %+v, %v", h, err)
	}
	if roles, err := c.Roles(ctx); err != nil || len(roles) != 3 {
		t.Errorf("%d roles, %v", len(roles), err)
	}
	images, err := c.Images(ctx)
	if err != nil || len(images) != 4 {
		t.Fatalf("%d images, %v", len(images), err)
	}
	if i, err := c.Image(ctx, images[0].Recipe.Short()); err != nil || i.Recipe != images[0].Recipe {
		t.Errorf("image: %+v, %v", i, err)
	}
	if rels, err := c.Releases(ctx); err != nil || len(rels) != 2 {
		t.Errorf("%d releases, %v", len(rels), err)
	}
	if _, err := c.Host(ctx, "nosuch"); !api.NotFound(err) {
		t.Errorf("no such host: %v", err)
	}
}

func TestEvents(t *testing.T) {
	f := apitest.Mixed(ahead())
	c, _ := serve(t, f, &apitest.Controllers{})
	for _, tt := range []struct {
		query api.EventQuery
		want  []string
	}{
		{api.EventQuery{}, []string{"a1a1a1a1a1", "db", "b2b2b2b2b2", "n3"}},
		{api.EventQuery{Limit: 2}, []string{"b2b2b2b2b2", "n3"}},
		{api.EventQuery{Subject: "db"}, []string{"db"}},
		{api.EventQuery{Since: f.Now.Add(-90 * time.Second)}, []string{"n3"}},
		{api.EventQuery{Since: f.Now.Add(-91 * time.Second)}, []string{"b2b2b2b2b2", "n3"}},
	} {
		events, err := c.Events(t.Context(), tt.query)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range events {
			got = append(got, e.Subject)
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%+v (-want +got):\n%s", tt.query, d)
		}
	}
}

func TestWrites(t *testing.T) {
	ctx := t.Context()
	ctl := &apitest.Controllers{
		Planned: plan.Plan{Commit: "c", Hosts: []plan.Host{{Name: "n1", Action: plan.Reboot, Why: []string{"role idle → web"}}}},
		LogText: "I: creating tarball\nE: no space left\n",
	}
	c, _ := serve(t, apitest.Mixed(ahead()), ctl)

	if err := c.Poke(ctx); err != nil {
		t.Error(err)
	}
	p, err := c.Plan(ctx, &schema.Fleet{Hosts: map[string]schema.Host{"n1": {Name: "n1"}}})
	if err != nil || len(p.Hosts) != 1 || p.Hosts[0].Action != plan.Reboot {
		t.Errorf("plan: %+v, %v", p, err)
	}
	if _, err := c.PlanRevision(ctx, "HEAD~1"); err != nil {
		t.Error(err)
	}
	var refused *api.Error
	if _, err = c.PlanRevision(ctx, "bad"); !errors.As(err, &refused) || refused.Status != 422 || len(refused.Problems) != 1 {
		t.Errorf("a bad revision: %v", err)
	}
	if _, err = c.PlanRevision(ctx, "none"); !api.NotFound(err) {
		t.Errorf("an unknown revision: %v", err)
	}
	roles, err := c.Roles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	web := roles[slices.IndexFunc(roles, func(r api.Role) bool { return r.Name == "web" })]
	noted, err := c.BuildImage(ctx, "web")
	if d := cmp.Diff(api.Noted{Recipes: []digest.Digest{web.BaseRecipe, web.DeltaRecipe}}, noted); err != nil || d != "" {
		t.Errorf("asked for web: %v (-want +got):\n%s", err, d)
	}
	if _, err := c.BuildImage(ctx, "none"); !api.NotFound(err) {
		t.Errorf("an unknown image: %v", err)
	}
	log, err := c.BuildLog(ctx, "db", true)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if b, err := io.ReadAll(log); err != nil || string(b) != ctl.LogText {
		t.Errorf("log: %q, %v", b, err)
	}
	db, err := c.Image(ctx, "db")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"poke", "plan 1 hosts", "plan HEAD~1", "plan bad", "plan none", "build web", "log " + db.Recipe.Short() + " follow true"}
	if d := cmp.Diff(want, ctl.Asked()); d != "" {
		t.Errorf("asked of the controllers (-want +got):\n%s", d)
	}
}

func TestNodes(t *testing.T) {
	ctl := &apitest.Controllers{Assigned: agentapi.Assignment{Version: "7", State: agentapi.Waiting, Reason: "soon"}}
	c, _ := serve(t, apitest.New(ahead()), ctl)
	for _, tt := range []struct {
		method, path, body string
		status             int
		want               string // in the answer
	}{
		{"POST", "/node/v1/hello", `{"mac":"52:54:00:AA:00:01","bootID":"b"}`, 200, `"version":"7"`},
		{"POST", "/node/v1/report", `{"mac":"52:54:00:aa:00:01","bootID":"b"}`, 200, `"version":"7"`},
		{"GET", "/node/v1/assignment?mac=52:54:00:aa:00:01&after=6&wait=9", "", 200, `"reason":"soon"`},
		{"GET", "/node/v1/assignment?mac=52:54:00:aa:00:01&wait=4000000000", "", 200, `"reason":"soon"`},
		{"GET", "/node/v1/assignment?mac=52:54:00:aa:00:01&wait=soon", "", 400, "wait"},
		{"GET", "/node/v1/assignment", "", 400, "mac"},
		{"POST", "/node/v1/hello", `{"mac":"../../etc"}`, 400, "mac"},
		{"POST", "/node/v1/hello", `{"mac":`, 400, "reading the body"},
		{"POST", "/node/v1/report", `{"mac":"52:54:00:aa:00:01","running":{"release":"sha256:zz"}}`, 400, "digest"},
		{"POST", "/node/v1/report", `{"error":"` + strings.Repeat("x", 256<<10) + `"}`, 413, "more than"},
		{"GET", "/node/v1/hello", "", 404, "there is no"},
		{"GET", "/api/v1/nosuch", "", 404, "there is no"},
		{"GET", "/api/v1/events?limit=0", "", 400, "limit"},
		{"GET", "/api/v1/events?since=yesterday", "", 400, "since"},
		{"POST", "/api/v1/plan", `{}`, 400, "want a fleet or a revision"},
		{"POST", "/api/v1/plan", `{"revision":"a","fleet":{}}`, 400, "want a fleet or a revision"},
		{"GET", "/api/v1/builds/nosuch/log", "", 404, "nosuch"},
		{"GET", "/healthz", "", 200, "ok"},
		{"GET", "/api/v1/openapi.json", "", 200, `"openapi"`},
	} {
		status, body := request(t, tt.method, c.URL+strings.TrimPrefix(tt.path, "/"), tt.body, nil)
		if status != tt.status || !strings.Contains(body, tt.want) {
			t.Errorf("%s %s: %d %.200s, want %d with %q", tt.method, tt.path, status, body, tt.status, tt.want)
		}
		if status != 200 {
			var e agentapi.Error
			if err := json.Unmarshal([]byte(body), &e); err != nil || e.Message == "" {
				t.Errorf("%s %s: the error is no agentapi.Error: %.200s", tt.method, tt.path, body)
			}
		}
	}
	want := []string{
		"hello 52:54:00:aa:00:01 from 127.0.0.1", "report 52:54:00:aa:00:01 from 127.0.0.1",
		`assignment 52:54:00:aa:00:01 after "6" wait 9s`, `assignment 52:54:00:aa:00:01 after "" wait 1m0s`,
	}
	if d := cmp.Diff(want, ctl.Asked()); d != "" {
		t.Errorf("asked of the controllers (-want +got):\n%s", d)
	}
}

func request(t *testing.T, method, url, body string, header map[string]string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// TestForgery has a page of another origin make a browser poke.
func TestForgery(t *testing.T) {
	ctl := &apitest.Controllers{}
	c, _ := serve(t, apitest.New(ahead()), ctl)
	status, _ := request(t, "POST", c.URL+"api/v1/poke", "", map[string]string{"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"})
	if status != http.StatusForbidden || len(ctl.Asked()) > 0 {
		t.Errorf("a forged request: %d, asked %v", status, ctl.Asked())
	}
}

// TestNoControllers has a server that can only show records.
func TestNoControllers(t *testing.T) {
	store, err := state.Open(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	srv := httptest.NewServer((&api.Server{Store: store, Fleet: func() *schema.Fleet { return nil }}).Handler())
	defer srv.Close()
	c := &api.Client{URL: srv.URL}
	st, err := c.Status(t.Context())
	if err != nil || st.Converged || len(st.Waiting) != 1 {
		t.Errorf("status of an empty server: %+v, %v", st, err)
	}
	_, buildErr := c.BuildImage(t.Context(), "x")
	for _, err := range []error{c.Poke(t.Context()), buildErr} {
		var e *api.Error
		if !errors.As(err, &e) || e.Status != http.StatusNotImplemented {
			t.Errorf("without a controller: %v", err)
		}
	}
}

func TestMetrics(t *testing.T) {
	f := apitest.Mixed(ahead())
	f.Leases[apitest.MAC(98)] = state.Lease{MAC: apitest.MAC(98), Expires: time.Now().Add(-time.Minute)} // kept, and not counted
	c, _ := serve(t, f, &apitest.Controllers{})
	_, body := request(t, "GET", c.URL+"metrics", "", nil)
	for _, want := range []string{
		"troupe_converged 0", "troupe_source_ok 0", `troupe_hosts{state="healthy"} 1`, `troupe_hosts{state="unclaimed"} 1`,
		`troupe_builds{kind="delta",phase="failed"} 1`, "troupe_releases 2", "troupe_dhcp_leases 1",
		`troupe_host_boot_seconds{host="n1"} 27.28`, `troupe_host_boot_fetched_bytes{host="n1"} 2.54926848e+08`,
		`troupe_http_requests_total{class="2xx"} 0`, "go_goroutines",
	} {
		if !strings.Contains(body, "\n"+want) {
			t.Errorf("metrics have no %q", want)
		}
	}
}

// watch collects what changes until the test ends.
func watch(t *testing.T, c *api.Client) <-chan api.Change {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	changes, done := make(chan api.Change, 100), make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Watch(ctx, func(change api.Change) error { changes <- change; return nil })
		close(changes)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return changes
}

// next waits for a change of one kind.
func next(t *testing.T, changes <-chan api.Change, kind string) api.Change {
	t.Helper()
	for {
		select {
		case c, ok := <-changes:
			if !ok {
				t.Fatalf("the watch ended before a change of kind %s", kind)
			}
			if c.Kind() == kind {
				return c
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("no change of kind %s", kind)
		}
	}
}

func TestWatch(t *testing.T) {
	ctx := t.Context()
	f := apitest.Mixed(ahead())
	c, store := serve(t, f, &apitest.Controllers{})
	changes := watch(t, c)

	first := next(t, changes, "snapshot")
	if len(first.Snapshot.Hosts) != 10 || len(first.Snapshot.Events) != 4 || first.Snapshot.Events[0].Subject != "n3" {
		t.Errorf("snapshot: %+v", first.Snapshot)
	}
	n := f.Nodes[apitest.MAC(1)]
	n.Running.Health = agentapi.Health{Failing: []string{"it smokes"}}
	if err := state.Nodes.Put(ctx, store, n.MAC, n); err != nil {
		t.Fatal(err)
	}
	if h := next(t, changes, "host").Host; h.Name != "n1" || h.State != api.HostUnhealthy || h.Detail != "it smokes" {
		t.Errorf("host: %+v", h)
	}
	ev := state.Event{Time: time.Now(), Kind: "node", Subject: "n1", Message: "it smokes", Warning: true}
	if err := state.Events.Put(ctx, store, "9", ev); err != nil {
		t.Fatal(err)
	}
	if e := next(t, changes, "event").Event; e.Message != "it smokes" {
		t.Errorf("event: %+v", e)
	}
	mac := apitest.MAC(99)
	for _, err := range []error{
		state.Machines.Delete(ctx, store, mac), state.Nodes.Delete(ctx, store, mac), deleteBoots(ctx, store, mac),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// Between two of these, it may be there with less known of it.
	if gone := next(t, changes, "gone"); gone.Gone != mac {
		t.Errorf("gone: %+v", gone)
	}
	src := f.Source
	src.Applied, src.Problems = src.Attempted, nil
	if err := state.Sources.Put(ctx, store, state.SourceID, src); err != nil {
		t.Fatal(err)
	}
	for st := next(t, changes, "status").Status; len(st.Problems) > 0; {
		st = next(t, changes, "status").Status
	}
	build := f.Builds[string(first.Snapshot.Images[0].Recipe)]
	build.Phase = state.BuildRunning
	if err := state.Builds.Put(ctx, store, string(build.Recipe), build); err != nil {
		t.Fatal(err)
	}
	if i := next(t, changes, "image").Image; i.Recipe != build.Recipe || i.Phase != state.BuildRunning {
		t.Errorf("image: %+v", i)
	}
}

func deleteBoots(ctx context.Context, s *state.Store, mac string) error {
	all, err := state.Boots.ListUnder(ctx, s, mac+"/")
	for id := range all {
		err = errors.Join(err, state.Boots.Delete(ctx, s, id))
	}
	return err
}

// TestFollow has a snapshot, kept up to date by changes, be what a fresh one is.
func TestFollow(t *testing.T) {
	ctx := t.Context()
	f := apitest.Mixed(ahead())
	c, store := serve(t, f, &apitest.Controllers{})
	n := f.Nodes[apitest.MAC(3)]
	n.Running.Health = agentapi.Health{Healthy: true}
	wrote := false
	err := c.Follow(ctx, func(s *api.Snapshot) bool {
		if !wrote {
			wrote = true
			if err := state.Nodes.Put(ctx, store, n.MAC, n); err != nil {
				t.Error(err)
			}
		}
		h, ok := s.Host("n3")
		return ok && h.State == api.HostHealthy && s.Status.Hosts.Healthy == 2
	})
	if err != nil {
		t.Error(err)
	}
}

// TestFollowReconnects takes the server away from somebody who follows it.
func TestFollowReconnects(t *testing.T) {
	times := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		times++ // requests come one after the other
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "event: snapshot\ndata: {\"snapshot\":{\"status\":{\"version\":\"%d\"}}}\n\n", times)
	}))
	defer srv.Close()
	c := &api.Client{URL: srv.URL}
	if err := c.Follow(t.Context(), func(s *api.Snapshot) bool { return s.Status.Version == "2" }); err != nil || times != 2 {
		t.Errorf("after %d connections: %v", times, err)
	}
	srv.Close()
	if err := c.Follow(t.Context(), func(*api.Snapshot) bool { return true }); err == nil {
		t.Error("nothing is wrong with a server that was never there")
	}
}

// TestWatchSlow has a client that reads nothing: nobody else may have to wait for it.
func TestWatchSlow(t *testing.T) {
	f := apitest.New(ahead())
	for n := range 100 {
		f.Declare(n+1, "web")
		f.Run(n + 1)
	}
	c, store := serve(t, f, &apitest.Controllers{})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.URL+"api/v1/watch", nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if _, err := bufio.NewReaderSize(r.Body, 16).ReadByte(); err != nil {
		t.Fatal(err)
	}
	changes := watch(t, c) // somebody who does read
	next(t, changes, "snapshot")
	for i := range 5 {
		n := f.Nodes[apitest.MAC(1)]
		n.Running.Health.Healthy = i%2 == 1
		if err := state.Nodes.Put(t.Context(), store, n.MAC, n); err != nil {
			t.Fatal(err)
		}
		if h := next(t, changes, "host").Host; h.Healthy != n.Running.Health.Healthy {
			t.Fatalf("change %d was not told", i)
		}
	}
}

func TestReadChanges(t *testing.T) {
	var b bytes.Buffer
	fmt.Fprint(&b, ": here\n\nevent: gone\ndata: {\"gone\":\"n1\"}\n\nevent: x\ndata: {\"nosuch\":1}\n\ndata: [")
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b.Bytes()) }))
	defer srv.Close()
	var got []string
	err := (&api.Client{URL: srv.URL}).Watch(t.Context(), func(c api.Change) error {
		got = append(got, c.Kind()+c.Gone)
		return nil
	})
	if err == nil || cmp.Diff([]string{"gonen1", "event"}, got) != "" {
		t.Errorf("got %q, %v", got, err)
	}
}

// BenchmarkSnapshot is what one change costs a server with watchers.
func BenchmarkSnapshot(b *testing.B) {
	for _, hosts := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprint(hosts), func(b *testing.B) {
			f := apitest.New(now)
			for n := range hosts {
				f.Declare(n+1, "web")
				f.Run(n + 1)
			}
			r := f.Records()
			for b.Loop() {
				if s := r.Snapshot(); len(s.Hosts) != hosts || s.Hosts[0].Target == digest.Digest("") {
					b.Fatal("hosts are missing")
				}
			}
		})
	}
}
