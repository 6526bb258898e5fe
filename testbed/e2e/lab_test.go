package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed"
)

// patience bounds every wait of these tests. It is generous: a machine without KVM needs a minute to boot while nothing
// else runs on this one.
const patience = 8 * time.Minute

// programs are both of troupe's, built for these tests.
func programs(t *testing.T) (troupe, agent string) {
	t.Helper()
	dir := t.TempDir()
	troupe, agent = filepath.Join(dir, "troupe"), filepath.Join(dir, "troupe-agent")
	for _, args := range [][]string{
		{"build", "-o", troupe, "../../cmd/troupe"},
		{"build", "-trimpath", "-ldflags=-s -w", "-o", agent, "../../cmd/troupe-agent"},
	} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	return troupe, agent
}

// A fleet is a Git repo that a server follows, and the lab with its machines.
type fleet struct {
	t      *testing.T
	work   string // clone that the test commits in
	lab    *testbed.Lab
	client *api.Client
}

// newFleet makes the repo from a directory of CUE, and a lab whose server follows it.
func newFleet(t *testing.T, from string, nodes []testbed.Node) *fleet {
	t.Helper()
	troupe, agent := programs(t)
	dir := t.TempDir()
	f := &fleet{t: t, work: filepath.Join(dir, "work")}
	bare := filepath.Join(dir, "fleet.git")
	f.sh("", "git", "init", "-q", "--bare", "-b", "main", bare)
	f.sh("", "git", "clone", "-q", bare, f.work)
	f.sh(f.work, "git", "checkout", "-q", "-b", "main")
	if err := os.CopyFS(f.work, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	f.push("a first fleet")
	lab, err := testbed.Start(t.Context(), testbed.Config{
		Dir: filepath.Join(dir, "lab"), Binary: troupe, Router: netip.MustParsePrefix("10.77.0.1/24"), Nodes: nodes,
		Serve: testbed.Serve{Args: []string{
			"serve", "--repo", bare, "--data", filepath.Join(dir, "data"), "--agent", agent, "--interface", testbed.Bridge, "--interval", "5s",
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	f.lab = lab
	f.client = &api.Client{URL: lab.ServerURL(), HTTP: lab.HTTP()}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(lab.Failure())
		}
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// sh runs a command that must succeed.
func (f *fleet) sh(dir string, args ...string) string {
	f.t.Helper()
	cmd := exec.CommandContext(f.t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.com", "GIT_COMMITTER_NAME=t",
		"GIT_COMMITTER_EMAIL=t@example.com", "GIT_CONFIG_GLOBAL=/dev/null")
	out, err := cmd.CombinedOutput()
	if err != nil {
		f.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// push commits all of the working tree and pushes; it returns the commit.
func (f *fleet) push(subject string) string {
	f.t.Helper()
	f.sh(f.work, "git", "add", "-A")
	f.sh(f.work, "git", "commit", "-q", "--allow-empty", "-m", subject)
	return f.pushHead()
}

func (f *fleet) pushHead() string {
	f.t.Helper()
	f.sh(f.work, "git", "push", "-q", "origin", "HEAD:main")
	return f.sh(f.work, "git", "rev-parse", "HEAD")
}

// edit replaces old by new, which must stand exactly once in the file.
func (f *fleet) edit(file, old, new string) {
	f.t.Helper()
	name := filepath.Join(f.work, file)
	b, err := os.ReadFile(name)
	if err != nil {
		f.t.Fatal(err)
	}
	if n := bytes.Count(b, []byte(old)); n != 1 {
		f.t.Fatalf("%q stands %d times in %s, want once", old, n, file)
	}
	if err := os.WriteFile(name, bytes.Replace(b, []byte(old), []byte(new), 1), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// await follows the fleet until done says yes. A server that is killed meanwhile is waited for.
func (f *fleet) await(what string, done func(*api.Snapshot) bool) *api.Snapshot {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), patience)
	defer cancel()
	var last *api.Snapshot
	for {
		ok := false
		err := f.client.Follow(ctx, func(s *api.Snapshot) bool {
			last, ok = s, done(s)
			return ok
		})
		if ok {
			f.t.Logf("%s: yes", what)
			return last
		}
		if ctx.Err() != nil {
			f.t.Fatalf("waited in vain for: %s\nlast error: %v\n%s", what, err, hostsText(last))
		}
		f.awaitServer(ctx)
	}
}

// awaitServer waits until the server answers, by asking it every half second: a server that is not there tells nobody
// when it comes.
func (f *fleet) awaitServer(ctx context.Context) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := f.client.Status(ctx); err == nil || ctx.Err() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func hostsText(s *api.Snapshot) string {
	if s == nil {
		return "(the server never answered)"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "converged %v, waiting for %v\n", s.Status.Converged, s.Status.Waiting)
	for _, h := range s.Hosts {
		fmt.Fprintf(&b, "%-18s %-8s %-10s %s; stage %s, generation %d of %d, error %q\n",
			h.Key(), h.Role, h.State, h.Detail, h.Stage, h.RunningGeneration, h.Generation, h.Error)
	}
	for _, e := range s.Events[:min(len(s.Events), 20)] {
		fmt.Fprintf(&b, "%s %s %s: %s\n", e.Time.Format(time.TimeOnly), e.Kind, e.Subject, e.Message)
	}
	return b.String()
}

// healthy is a condition: these hosts run, healthily, what they shall.
func healthy(names ...string) func(*api.Snapshot) bool {
	return func(s *api.Snapshot) bool {
		left := len(names)
		for _, h := range s.Hosts {
			for _, name := range names {
				if h.Name == name && h.State == api.HostHealthy {
					left--
				}
			}
		}
		return left == 0
	}
}

// inRole is a condition: the host is healthy in that role.
func inRole(name, role string) func(*api.Snapshot) bool {
	return func(s *api.Snapshot) bool {
		h := find(s, name)
		return h != nil && h.State == api.HostHealthy && h.RunningRole == role
	}
}

func find(s *api.Snapshot, key string) *api.Host {
	for i, h := range s.Hosts {
		if h.Key() == key {
			return &s.Hosts[i]
		}
	}
	return nil
}

func (f *fleet) power(node string, action testbed.PowerAction) {
	f.t.Helper()
	if err := f.lab.Power(f.t.Context(), node, action); err != nil {
		f.t.Fatal(err)
	}
}

// get is what a node serves over HTTP.
func (f *fleet) get(url string) string {
	f.t.Helper()
	req, err := http.NewRequestWithContext(f.t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		f.t.Fatal(err)
	}
	resp, err := f.lab.HTTP().Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return string(b)
}

// host is all about one host.
func (f *fleet) host(name string) api.HostDetail {
	f.t.Helper()
	h, err := f.client.Host(f.t.Context(), name)
	if err != nil {
		f.t.Fatal(err)
	}
	return h
}

// killServer ends the server as a power cut would, and starts it again.
func (f *fleet) killServer() {
	f.t.Helper()
	if err := f.lab.ServeKill(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
	if err := f.lab.ServeStart(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
}

// troupe runs a verb inside the lab's network and returns what it printed and its exit status.
func (f *fleet) troupe(args ...string) (out string, status int) {
	f.t.Helper()
	cmd := f.lab.Command(f.t.Context(), f.lab.Binary(), args...)
	b, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		f.t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// wantMatch fails the test where text does not match.
func wantMatch(t *testing.T, what, text, pattern string) {
	t.Helper()
	if !regexp.MustCompile(pattern).MatchString(text) {
		t.Errorf("%s does not match %q:\n%s", what, pattern, text)
	}
}
