package api_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/troupe-dev/troupe/internal/pipelisten"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/schema"
)

// A patient is a planner that plans until it is told to end, or its caller gives up.
type patient struct {
	begun chan struct{}
	end   chan struct{}
}

func (p *patient) Plan(ctx context.Context, _ *schema.Fleet) (plan.Plan, error) {
	return p.PlanRevision(ctx, "")
}

func (p *patient) PlanRevision(ctx context.Context, _ string) (plan.Plan, error) {
	p.begun <- struct{}{}
	select {
	case <-p.end:
		return plan.Plan{Commit: "c"}, nil
	case <-ctx.Done():
		return plan.Plan{}, ctx.Err()
	}
}

// dial connects to a server that servePipes started.
func dial(t *testing.T, l *pipelisten.Listener) net.Conn {
	t.Helper()
	c, err := l.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// servePipes serves s until the function that it returns is called.
func servePipes(t *testing.T, s *api.Server) (l *pipelisten.Listener, stop func()) {
	t.Helper()
	l = pipelisten.New()
	srv := &http.Server{Handler: s.Handler()}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	return l, func() {
		_ = srv.Close()
		<-done
	}
}

func send(t *testing.T, c net.Conn, method, path, body string, length int) {
	t.Helper()
	if _, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", method, path, length, body); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, in *bufio.Reader) (*http.Response, string) {
	t.Helper()
	r, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r, string(b)
}

func TestPlansAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &patient{begun: make(chan struct{}), end: make(chan struct{})}
		l, stop := servePipes(t, &api.Server{Planner: p})
		defer stop()
		const body = `{"revision":"main"}`
		var busy []net.Conn
		for range 2 {
			c := dial(t, l)
			defer c.Close()
			send(t, c, "POST", "/api/v1/plan", body, len(body))
			<-p.begun
			busy = append(busy, c)
		}
		third := dial(t, l)
		defer third.Close()
		send(t, third, "POST", "/api/v1/plan", body, len(body))
		if r, text := receive(t, bufio.NewReader(third)); r.StatusCode != http.StatusServiceUnavailable || r.Header.Get("Retry-After") == "" {
			t.Errorf("a third plan: %s, Retry-After %q, %s", r.Status, r.Header.Get("Retry-After"), text)
		}
		p.end <- struct{}{}
		p.end <- struct{}{}
		for _, c := range busy {
			if r, text := receive(t, bufio.NewReader(c)); r.StatusCode != http.StatusOK {
				t.Errorf("a plan: %s: %s", r.Status, text)
			}
		}
		// There is room again; and a plan that takes too long ends.
		start := time.Now()
		fourth := dial(t, l)
		defer fourth.Close()
		send(t, fourth, "POST", "/api/v1/plan", body, len(body))
		<-p.begun
		if r, text := receive(t, bufio.NewReader(fourth)); r.StatusCode != http.StatusGatewayTimeout {
			t.Errorf("a plan without end: %s: %s", r.Status, text)
		}
		if took := time.Since(start); took != 2*time.Minute {
			t.Errorf("a plan without end was ended after %s", took)
		}
	})
}

// A client that does not send its body gets an answer, and loses its connection.
func TestSlowBodies(t *testing.T) {
	for _, tt := range []struct {
		path, body string
		status     int
	}{
		{"/node/v1/hello", `{"mac":`, http.StatusRequestTimeout},
		{"/node/v1/hello", `{"mac":"52:54:00:00:00:01"}`, http.StatusRequestTimeout}, // more was announced
		{"/api/v1/plan", `{"revision":`, http.StatusRequestTimeout},
		{"/api/v1/poke", "", http.StatusAccepted}, // which does not read it
		{"/api/v1/nosuch", "", http.StatusNotFound},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctl := struct{ api.Agents }{}
			l, stop := servePipes(t, &api.Server{Agents: ctl, Planner: &patient{}, Poke: func() {}})
			defer stop()
			c := dial(t, l)
			defer c.Close()
			send(t, c, "POST", tt.path, tt.body, 100)
			in := bufio.NewReader(c)
			if r, text := receive(t, in); r.StatusCode != tt.status {
				t.Errorf("%s: %s: %s, want %d", tt.path, r.Status, text, tt.status)
			}
			if _, err := in.ReadByte(); err != io.EOF {
				t.Errorf("%s: %v, want the connection to be closed", tt.path, err)
			}
		})
	}
}

// A client that does not take its answer loses its connection; one that is slow does not, nor does its next request
// suffer from the one before.
func TestSlowReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, stop := servePipes(t, &api.Server{Poke: func() {}})
		defer stop()
		slow := dial(t, l)
		defer slow.Close()
		in := bufio.NewReader(slow)
		for range 2 {
			send(t, slow, "POST", "/api/v1/poke", "", 0)
			time.Sleep(9 * time.Second) // on the bubble's clock
			if r, text := receive(t, in); r.StatusCode != http.StatusAccepted {
				t.Errorf("a slow client: %s: %s", r.Status, text)
			}
			time.Sleep(5 * time.Minute)
		}
		stuck := dial(t, l)
		defer stuck.Close()
		send(t, stuck, "GET", "/api/v1/openapi.json", "", 0)
		time.Sleep(3 * time.Minute)
		b, err := io.ReadAll(stuck)
		if err != nil || strings.HasSuffix(string(b), "}\n") {
			t.Errorf("after three minutes: %d bytes, %v; want a closed connection before the end of the answer", len(b), err)
		}
	})
}
