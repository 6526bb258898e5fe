package agentapi_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/digest"
)

func client(t *testing.T, h http.Handler) *agentapi.Client {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	c, err := agentapi.NewClient(srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.CloseIdle)
	return c
}

func TestClientRefusesWhatIsNoServer(t *testing.T) {
	for _, bad := range []string{"", "10.77.0.1:8080", "ftp://x", "http://", "http://%zz", "tftp://10.77.0.1/x"} {
		if _, err := agentapi.NewClient(bad, nil); err == nil {
			t.Errorf("NewClient(%q) is no error", bad)
		}
	}
	c, err := agentapi.NewClient("http://10.77.0.1:8080/boot/x?y", nil)
	if err != nil || c.Server() != "http://10.77.0.1:8080" {
		t.Errorf("Server: %q, %v", c.Server(), err)
	}
}

func TestHelloReportAndAssignment(t *testing.T) {
	var s agentapitest.Server
	c := client(t, &s)
	h := agentapi.Hello{Identity: agentapi.Identity{MAC: "52:54:00:77:00:01"}, BootID: "b1"}
	a, err := c.Hello(t.Context(), h)
	if err != nil || a.State != agentapi.Unclaimed {
		t.Fatalf("Hello: %+v, %v", a, err)
	}
	if diff := cmp.Diff([]agentapi.Hello{h}, s.Hellos()); diff != "" {
		t.Errorf("hellos (-want +got):\n%s", diff)
	}
	got := make(chan agentapi.Assignment)
	go func() {
		a, err := c.Assignment(t.Context(), h.MAC, a.Version, time.Minute)
		if err != nil {
			t.Error(err)
		}
		got <- a
	}()
	s.Assign(agentapi.Assignment{State: agentapi.Waiting, Host: "n1"})
	if a = <-got; a.Host != "n1" {
		t.Errorf("Assignment: %+v", a)
	}
	s.Forget()
	reply, err := c.Report(t.Context(), agentapi.Report{BootID: "b1"})
	if err != nil || reply != (agentapi.ReportReply{Version: a.Version, Hello: true}) {
		t.Errorf("Report: %+v, %v", reply, err)
	}
	if _, err := c.Assignment(t.Context(), h.MAC, "", 0); !agentapi.NotFound(err) || !strings.Contains(err.Error(), "no such machine") {
		t.Errorf("Assignment of a forgotten machine: %v", err)
	}
}

func TestErrorsSayWhatTheServerSaid(t *testing.T) {
	for body, want := range map[string]string{
		`{"error":"no room"}`:    "POST /node/v1/report: the server answered 503: no room",
		"plain words\n":          "POST /node/v1/report: the server answered 503: plain words",
		"":                       "POST /node/v1/report: the server answered 503: Service Unavailable",
		strings.Repeat("x", 1e6): "POST /node/v1/report: the server answered 503: " + strings.Repeat("x", 4096),
	} {
		c := client(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, body)
		}))
		_, err := c.Report(t.Context(), agentapi.Report{})
		if err == nil || err.Error() != want {
			t.Errorf("error %v, want %s", err, want)
		}
		var se *agentapi.StatusError
		if isOurs := strings.HasPrefix(body, "{"); !errors.As(err, &se) || se.Troupe != isOurs {
			t.Errorf("error %+v: of a troupe server, want %v", se, isOurs)
		}
	}
}

func TestAnswersAreBoundedAndChecked(t *testing.T) {
	for name, body := range map[string]string{
		"endless":          `{"host":"` + strings.Repeat("x", 20<<20) + `"}`,
		"not JSON":         "<html>",
		"malformed digest": `{"release":{"id":"sha256:../../etc/passwd"}}`,
	} {
		c := client(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) }))
		if _, err := c.Assignment(t.Context(), "m", "", 0); err == nil || !strings.Contains(err.Error(), "reading the answer to GET") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBlobSaysWhereItBegins(t *testing.T) {
	var s agentapitest.Server
	b := s.Add([]byte("0123456789"))
	ignoreRange := false
	s.Blob = func(w http.ResponseWriter, _ *http.Request, _ digest.Digest, content []byte) bool {
		if ignoreRange {
			_, _ = w.Write(content)
		}
		return ignoreRange
	}
	c := client(t, &s)
	read := func(offset int64) string {
		body, at, err := c.Blob(t.Context(), b.Digest, offset)
		if err != nil {
			return err.Error()
		}
		defer body.Close()
		text, err := io.ReadAll(body)
		if err != nil {
			return err.Error()
		}
		return string(rune('0'+at)) + ":" + string(text)
	}
	for offset, want := range map[int64]string{0: "0:0123456789", 4: "4:456789"} {
		if got := read(offset); got != want {
			t.Errorf("from %d: %q, want %q", offset, got, want)
		}
	}
	if got := read(10); !strings.Contains(got, "answered 416") {
		t.Errorf("from the end: %q", got)
	}
	ignoreRange = true
	if got := read(4); got != "0:0123456789" {
		t.Errorf("from a server without Range: %q", got)
	}
	if _, _, err := c.Blob(t.Context(), digest.Of([]byte("other")), 0); !agentapi.NotFound(err) {
		t.Errorf("an unknown blob: %v", err)
	}
}

func TestCallsEndWithTheirContext(t *testing.T) {
	c := client(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // so that the server sees the client leave
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Hello(ctx, agentapi.Hello{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Hello: %v", err)
	}
}
