package reconciler

import (
	"context"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/reconciler/api"
)

// TestStatusAfterALookIsOfTheNewestCommit pushes, waits for a look, and asks: again and again, since it is about a race.
func TestStatusAfterALookIsOfTheNewestCommit(t *testing.T) {
	f := newFollowed(t)
	r, err := New(Config{Store: f.store, Repo: f.repo, Branch: "main", Loader: f.loader})
	if err != nil {
		t.Fatal(err)
	}
	r.follow.gap = time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.follow.run(ctx) }()
	srv := httptest.NewServer(r.API().Handler())
	defer func() {
		srv.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	c := &api.Client{URL: srv.URL}
	for _, hosts := range []string{"n1\n", "n2\n", "!problem\n", "n3\n", "n4\n", ""} {
		f.commit(hosts)
		if err := c.Look(t.Context()); err != nil {
			t.Fatal(err)
		}
		st, err := c.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		bad := hosts == "!problem\n" || hosts == ""
		newest := st.Applied
		if bad {
			newest = st.Attempted
		}
		if newest == nil || newest.Subject != strings.TrimSpace(hosts) && hosts != "" || bad != (len(st.Problems) > 0) || st.Converged {
			t.Errorf("after %q was pushed: in force %+v, attempted %+v, problems %v", hosts, st.Applied, st.Attempted, st.Problems)
		}
	}
	var refused *api.Error
	if _, err := c.PlanRevision(t.Context(), "main"); !errors.As(err, &refused) || refused.Status != 422 {
		t.Errorf("the plan of a fleet without hosts: %v, want that it is refused", err)
	}
}
