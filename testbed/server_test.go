package testbed

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"
)

func get(t *testing.T, client *http.Client, url string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func waitServer(t *testing.T, lab *Lab) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return lab.WaitServer(ctx)
}

func TestServer(t *testing.T) {
	lab := startLab(t, Config{Page: "127.0.0.1:0", Serve: Serve{Args: []string{"serve", ":8080"}}})
	if err := waitServer(t, lab); err != nil {
		t.Fatal(err)
	}
	first := get(t, lab.HTTP(), lab.ServerURL())
	if !strings.HasPrefix(first, "http://127.0.0.1:3128 ") {
		t.Errorf("the server's environment: got proxy and process %q, want the uplink", first)
	}
	host := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if got := get(t, host, lab.Page()); got != first {
		t.Errorf("the page on the host: got %q, inside the lab %q", got, first)
	}
	st, err := lab.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// The process is called something else inside.
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", st.Serve.PID)); err != nil || !strings.HasSuffix(string(b), "\x00serve\x00:8080\x00") {
		t.Errorf("the server's process is said to be %d, whose command line is %q (%v)", st.Serve.PID, b, err)
	}
	if err := lab.ServeKill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st, err = lab.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st.Serve.Running || st.Serve.PID != 0 || st.Serve.Ended != "signal: killed" {
		t.Errorf("a server that was killed: got %+v", st.Serve)
	}
	if err := lab.ServeStart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := waitServer(t, lab); err != nil {
		t.Fatal(err)
	}
	if again := get(t, lab.HTTP(), lab.ServerURL()); again == first {
		t.Errorf("the server after a kill and a start is process %q, as before", again)
	}
	if err := lab.ServeStop(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A server that cannot start is told from one that takes its time.
	if err := lab.ServeStart(t.Context(), "serve", "256.0.0.1:1"); err != nil {
		t.Fatal(err)
	}
	if err := waitServer(t, lab); err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "256.0.0.1") {
		t.Errorf("waiting for a server that ends: got %v, want its status and its last words", err)
	}
}

func TestUplink(t *testing.T) {
	world := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Etag", `"as it is"`)
		_, _ = io.WriteString(w, r.Method+" "+r.Host+r.URL.Path+" "+string(b)+r.Header.Get("X-Forwarded-For"))
	})
	plain, secret := httptest.NewServer(world), httptest.NewTLSServer(world)
	defer plain.Close()
	defer secret.Close()
	lab := startLab(t, Config{})
	proxy := &url.URL{Scheme: "http", Host: uplinkAddr}

	for _, server := range []*httptest.Server{plain, secret} {
		inside := server.Client().Transport.(*http.Transport).Clone()
		inside.DialContext, inside.DisableKeepAlives = lab.Dial, true
		// Without the uplink nothing in the lab reaches the host's loopback: it is another one.
		direct := &http.Client{Transport: inside}
		if _, err := direct.Get(server.URL); err == nil {
			t.Errorf("%s can be reached from inside the lab without the uplink", server.URL)
		}
		inside = inside.Clone()
		inside.Proxy = http.ProxyURL(proxy)
		resp, err := (&http.Client{Transport: inside}).Post(server.URL+"/a", "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		want := "POST " + strings.SplitN(server.URL, "//", 2)[1] + "/a body"
		if string(b) != want || resp.Header.Get("Etag") != `"as it is"` {
			t.Errorf("through the uplink: got %q with %v, want %q", b, resp.Header, want)
		}
	}

	inside := &http.Client{Transport: &http.Transport{DialContext: lab.Dial, Proxy: http.ProxyURL(proxy), DisableKeepAlives: true}}
	resp, err := inside.Get("http://127.0.0.1:1/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusBadGateway {
		t.Errorf("a server that is not there: got %s, want 502", resp.Status)
	}
	if _, err := inside.Get("https://127.0.0.1:1/"); err == nil || !strings.Contains(err.Error(), "Bad Gateway") {
		t.Errorf("a tunnel to nowhere: got %v, want 502", err)
	}
	direct := &http.Client{Transport: &http.Transport{DialContext: lab.Dial, DisableKeepAlives: true}}
	if got := get(t, direct, "http://"+uplinkAddr+"/"); !strings.Contains(got, "this is a proxy") {
		t.Errorf("a request for the uplink itself: got %q", got)
	}
}

func TestDialNowhere(t *testing.T) {
	lab := startLab(t, Config{})
	if c, err := lab.Dial(t.Context(), "tcp", "10.99.0.1:9"); err == nil {
		c.Close()
		t.Error("a port where nobody listens: no error")
	} else if !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("a port where nobody listens: got %v", err)
	}
	if _, err := lab.Dial(t.Context(), "udp", "10.99.0.1:9"); err == nil {
		t.Error("UDP: no error")
	}
}
