package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// restarting is a transport to a server that answers 503 until its fleet is in force. It works without sockets, so that
// the time of a synctest bubble goes on.
type restarting struct {
	ready time.Time

	mu      sync.Mutex
	asked   map[string][]time.Time // by path
	reports []agentapi.Report
}

func (s *restarting) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	s.asked[r.URL.Path] = append(s.asked[r.URL.Path], time.Now())
	s.mu.Unlock()
	if time.Now().Before(s.ready) {
		return answer(r, http.StatusServiceUnavailable, agentapi.Error{Message: "no fleet is in force yet"})
	}
	const version = "7"
	switch r.URL.Path {
	case agentapi.PathHello:
		return answer(r, http.StatusOK, agentapi.Assignment{Version: version, State: agentapi.Waiting})
	case agentapi.PathAssignment:
		if r.URL.Query().Get("after") == version {
			<-r.Context().Done()
			return nil, r.Context().Err()
		}
		return answer(r, http.StatusOK, agentapi.Assignment{Version: version, State: agentapi.Waiting})
	}
	var rep agentapi.Report
	if err := json.NewDecoder(r.Body).Decode(&rep); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.reports = append(s.reports, rep)
	s.mu.Unlock()
	return answer(r, http.StatusOK, agentapi.ReportReply{Version: version})
}

func answer(r *http.Request, status int, v any) (*http.Response, error) {
	b, err := json.Marshal(v)
	return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(string(b))), Request: r}, err
}

// checkPace fails the test if the server was ever left alone for longer than a node may wait, until it was ready.
func (s *restarting) checkPace(t *testing.T, path string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	tries := s.asked[path]
	if len(tries) < 10 {
		t.Fatalf("%s was asked for %d times", path, len(tries))
	}
	steps := map[time.Duration]bool{}
	for i := range len(tries) - 1 {
		gap := tries[i+1].Sub(tries[i])
		if tries[i].Before(s.ready) && gap > 5*time.Second {
			t.Errorf("%s was asked for again after %v", path, gap)
		}
		steps[gap] = true
	}
	if len(steps) < 5 {
		t.Errorf("%s was asked for at a steady pace: many nodes would come in step", path)
	}
}

func TestServerThatIsNotReadyIsAskedAgainQuietly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &restarting{ready: time.Now().Add(3 * time.Minute), asked: map[string][]time.Time{}}
		c, err := agentapi.NewClient("http://10.77.0.1:8080", server)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		rep := newReporter(c, nothing, agentapi.Report{})
		rep.mark(agentapi.Mark{Stage: agentapi.StageAgent})
		hello := func() agentapi.Hello { return agentapi.Hello{} }
		booting, serving := newFollower(c, nothing, hello), newFollower(c, nothing, hello)
		greeted := make(chan error, 1)
		go func() { greeted <- booting.greet(ctx, func() {}) }()
		var wg sync.WaitGroup
		wg.Go(func() { serving.run(ctx) })
		wg.Go(func() { rep.run(ctx) })
		if err := <-greeted; err != nil || booting.get().Version != "7" {
			t.Errorf("greeted: %v, %+v", err, booting.get())
		}
		<-serving.changed
		if late := time.Since(server.ready); late > 5*time.Second {
			t.Errorf("both lives know the assignment %v after the server was ready", late)
		}
		time.Sleep(10 * time.Second) // of the bubble: for the report
		cancel()
		wg.Wait()
		for _, path := range []string{agentapi.PathHello, agentapi.PathAssignment, agentapi.PathReport} {
			server.checkPace(t, path)
		}
		if len(server.reports) == 0 || len(server.reports[0].Marks) != 1 {
			t.Fatalf("reports: %+v", server.reports)
		}
		for _, r := range server.reports {
			if r.Error != "" {
				t.Errorf("a server that was not ready is reported as %q", r.Error)
			}
		}
	})
}

// TestNoWakeUpIsLost has newer assignments that come in the moment in which the work for the one before has failed.
func TestNoWakeUpIsLost(t *testing.T) {
	failed := errors.New("failed")
	for i := range 1000 {
		f := newFollower(nil, nothing, nil)
		now := f.get()
		err := f.whileCurrent(t.Context(), now, func(context.Context) error {
			f.set(agentapi.Assignment{Version: "newer"})
			return failed
		})
		if !errors.Is(err, errNewer) {
			t.Fatalf("try %d: %v, want %v", i, err, errNewer)
		}
	}
	f := newFollower(nil, nothing, nil)
	if err := f.whileCurrent(t.Context(), f.get(), func(context.Context) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("with no newer one: %v, want %v", err, failed)
	}
	err := f.whileCurrent(t.Context(), f.get(), func(ctx context.Context) error {
		f.set(agentapi.Assignment{Version: "newer"})
		<-ctx.Done() // it ends the work
		return ctx.Err()
	})
	if !errors.Is(err, errNewer) {
		t.Errorf("work that was broken off: %v, want %v", err, errNewer)
	}
}
