package quick

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed"
)

// Patience bounds every wait of a lab. It is generous: nothing here is about how long something takes.
const Patience = 3 * time.Minute

// Config is what a lab begins with.
type Config struct {
	// Files are those of the fleet's repo, by path, over those that are there by default: see Fleet.
	Files map[string]string
	// Nodes are the lab's machines; none: one for each host that Fleet has, n1. Firmware "" is testbed.Direct here, and Memory 0
	// is 512 MiB.
	Nodes []testbed.Node
	// Args are added to those of troupe serve.
	Args []string
}

// Fleet is what the repo of a lab has where Config.Files says nothing else: host n1 in role a, and roles a and b that differ in a file.
func Fleet() map[string]string {
	return map[string]string{
		"fleet.cue": `package fleet

network: {
	subnet:  "10.77.0.0/24"
	router:  "10.77.0.1"
	dns: ["10.77.0.1"]
	dynamic: "10.77.0.100-10.77.0.199"
}

images: quick: {
	kind: "os"
	from: debian: {suite: "bookworm", packages: ["quick"], kernel: "linux-image-quick"}
}
`,
		"hosts.cue": `package fleet

hosts: n1: {mac: "52:54:00:77:01:01", address: "10.77.0.11", role: "a"}
`,
		"roles.cue": `package fleet

roles: [name=string]: {
	os:   "quick"
	boot: *"disk" | string
	files: "/etc/role": name + "\n"
	healthy: [{http: {port: 80, path: "/"}}]
}
roles: a: {}
roles: b: {}
`,
	}
}

// DefaultNodes are the machines of Fleet.
func DefaultNodes() []testbed.Node {
	return []testbed.Node{{Name: "n1", MAC: "52:54:00:77:01:01"}}
}

// A Lab is a server that follows a Git repo, and machines. It ends with the test that started it.
type Lab struct {
	*testbed.Lab
	API *api.Client

	t     testing.TB
	work  string // clone that is committed in
	data  string // of the server
	files map[string]string
}

// Start makes the repo and starts the server. The machines are off.
func Start(t testing.TB, cfg Config) *Lab {
	t.Helper()
	tools, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l := &Lab{t: t, work: filepath.Join(dir, "work"), data: filepath.Join(dir, "data"), files: Fleet()}
	maps.Copy(l.files, cfg.Files)
	bare := filepath.Join(dir, "fleet.git")
	l.git("", "init", "-q", "--bare", "-b", "main", bare)
	l.git("", "clone", "-q", bare, l.work)
	l.git(l.work, "checkout", "-q", "-b", "main")
	l.Push(nil)
	args := append([]string{
		"serve", "--repo", bare, "--data", l.data, "--agent", tools.agent, "--interface", testbed.Bridge, "--interval", "1s", "--verbose",
	}, cfg.Args...)
	l.Lab, err = testbed.Start(t.Context(), testbed.Config{
		Dir: filepath.Join(dir, "lab"), Binary: tools.troupe, Router: netip.MustParsePrefix("10.77.0.1/24"), Nodes: completeNodes(cfg.Nodes),
		Serve: testbed.Serve{Args: args, Env: []string{"PATH=" + tools.bin + ":" + os.Getenv("PATH")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	l.API = &api.Client{URL: l.ServerURL(), HTTP: l.HTTP()}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.Failure())
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func completeNodes(nodes []testbed.Node) []testbed.Node {
	nodes = slices.Clone(nodes)
	if len(nodes) == 0 {
		nodes = DefaultNodes()
	}
	for i := range nodes {
		if nodes[i].Firmware == "" {
			nodes[i].Firmware = testbed.Direct
		}
		if nodes[i].Memory == 0 {
			nodes[i].Memory = 512
		}
	}
	return nodes
}

// Data is the server's data directory.
func (l *Lab) Data() string { return l.data }

// Within is the lab for a subtest.
func (l *Lab) Within(t testing.TB) *Lab {
	g := *l
	g.t = t
	return &g
}

// git must succeed.
func (l *Lab) git(dir string, args ...string) string {
	l.t.Helper()
	out, err := testbed.Git{Dir: dir}.Run(l.t.Context(), args...)
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

// Push commits the files, over those that are there, and pushes. It returns the commit.
func (l *Lab) Push(files map[string]string) string {
	l.t.Helper()
	maps.Copy(l.files, files)
	for name, text := range l.files {
		path := filepath.Join(l.work, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			l.t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			l.t.Fatal(err)
		}
	}
	l.git(l.work, "add", "-A")
	l.git(l.work, "commit", "-q", "--allow-empty", "-m", "a change")
	l.git(l.work, "push", "-q", "origin", "HEAD:main")
	return l.git(l.work, "rev-parse", "HEAD")
}

// Edit replaces old by new, which must stand exactly once in the file, and pushes.
func (l *Lab) Edit(file, old, new string) {
	l.t.Helper()
	if n := strings.Count(l.files[file], old); n != 1 {
		l.t.Fatalf("%q stands %d times in %s, want once", old, n, file)
	}
	l.Push(map[string]string{file: strings.Replace(l.files[file], old, new, 1)})
}

// Role gives a host of the default fleet's form another role, and pushes.
func (l *Lab) Role(host, role string) {
	l.t.Helper()
	line := regexp.MustCompile(`(?m)^(.*\b` + regexp.QuoteMeta(host) + `: \{.*role: ")[^"]*(".*)$`)
	if !line.MatchString(l.files["hosts.cue"]) {
		l.t.Fatalf("hosts.cue has no line with the role of %s", host)
	}
	l.Push(map[string]string{"hosts.cue": line.ReplaceAllString(l.files["hosts.cue"], "${1}"+role+"${2}")})
}

// On switches a machine on, Off cuts its power.
func (l *Lab) On(node string) { l.t.Helper(); l.power(node, testbed.On) }

// Off cuts a machine's power.
func (l *Lab) Off(node string) { l.t.Helper(); l.power(node, testbed.Off) }

// Cycle cuts a machine's power and switches it on again.
func (l *Lab) Cycle(node string) { l.t.Helper(); l.power(node, testbed.Cycle) }

func (l *Lab) power(node string, action testbed.PowerAction) {
	l.t.Helper()
	if err := l.Power(l.t.Context(), node, action); err != nil {
		l.t.Fatal(err)
	}
}

// Cable plugs a machine's network in or pulls it out.
func (l *Lab) Cable(node string, in bool) {
	l.t.Helper()
	if err := l.Link(l.t.Context(), node, in); err != nil {
		l.t.Fatal(err)
	}
}

// StopServer ends the server as a power cut would; StartServer starts it again.
func (l *Lab) StopServer() {
	l.t.Helper()
	if err := l.ServeKill(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
}

// StartServer starts a server that was stopped, and waits until it answers.
func (l *Lab) StartServer() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), Patience)
	defer cancel()
	if err := l.ServeStart(ctx); err != nil {
		l.t.Fatal(err)
	}
	if err := l.WaitServer(ctx); err != nil {
		l.t.Fatal(err)
	}
}

// Poll tries, four times a second, until try is content or Patience is at its end: then the test fails with try's last error.
func (l *Lab) Poll(what string, try func(context.Context) error) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), Patience)
	defer cancel()
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for {
		err := try(ctx)
		if err == nil {
			l.t.Logf("%s: yes, after %v", what, time.Since(began).Round(100*time.Millisecond))
			return
		}
		l.wantNoError(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			l.t.Fatalf("waited in vain for: %s: %v", what, err)
		}
	}
}

// wantNoError ends the test where a machine went off by itself, and not well: nothing is to be waited for then.
func (l *Lab) wantNoError(ctx context.Context) {
	l.t.Helper()
	st, err := l.Status(ctx)
	if err != nil {
		return // the wait has its end
	}
	for _, n := range st.Nodes {
		if n.Error != "" {
			l.t.Fatalf("machine %s: %s", n.Name, n.Error)
		}
	}
}

// Await waits until done is content with what the server says of all. A server that does not answer is waited for.
func (l *Lab) Await(what string, done func(*api.Snapshot) bool) *api.Snapshot {
	l.t.Helper()
	var last *api.Snapshot
	l.Poll(what, func(ctx context.Context) error {
		err := l.API.Follow(ctx, func(s *api.Snapshot) bool {
			last = s
			return done(s)
		})
		if err != nil {
			return fmt.Errorf("%w\n%s", err, Text(last))
		}
		return nil
	})
	return last
}

// Text is what a snapshot says of hosts and events.
func Text(s *api.Snapshot) string {
	if s == nil {
		return "(the server never answered)"
	}
	var b strings.Builder
	for _, h := range s.Hosts {
		fmt.Fprintf(&b, "%-18s %-8s %-10s %s; stage %s, generation %d of %d, error %q\n",
			h.Key(), h.Role, h.State, h.Detail, h.Stage, h.RunningGeneration, h.Generation, h.Error)
	}
	for _, e := range s.Events[:min(len(s.Events), 20)] {
		fmt.Fprintf(&b, "%s %s %s: %s\n", e.Time.Format(time.TimeOnly), e.Kind, e.Subject, e.Message)
	}
	return b.String()
}

// Find is a host of a snapshot; nil where it has none of that name.
func Find(s *api.Snapshot, name string) *api.Host {
	i := slices.IndexFunc(s.Hosts, func(h api.Host) bool { return h.Key() == name })
	if i < 0 {
		return nil
	}
	return &s.Hosts[i]
}

// AwaitHealthy waits until a host runs, healthily, what it shall.
func (l *Lab) AwaitHealthy(host string) {
	l.t.Helper()
	l.Await(host+" is healthy", func(s *api.Snapshot) bool {
		h := Find(s, host)
		return h != nil && h.State == api.HostHealthy
	})
}

// AwaitRole waits until a host is healthy in a role.
func (l *Lab) AwaitRole(host, role string) {
	l.t.Helper()
	l.Await(host+" is healthy as "+role, func(s *api.Snapshot) bool {
		h := Find(s, host)
		return h != nil && h.State == api.HostHealthy && h.RunningRole == role
	})
}

// AwaitBoot waits until a host is healthy in another boot than that.
func (l *Lab) AwaitBoot(host, after string) {
	l.t.Helper()
	l.Await(host+" is healthy after another boot", func(s *api.Snapshot) bool {
		h := Find(s, host)
		return h != nil && h.State == api.HostHealthy && h.BootID != after
	})
}

// Host is all about one host.
func (l *Lab) Host(name string) api.HostDetail {
	l.t.Helper()
	h, err := l.API.Host(l.t.Context(), name)
	if err != nil {
		l.t.Fatal(err)
	}
	return h
}

// Running is the release that a host runs.
func (l *Lab) Running(name string) api.Release {
	l.t.Helper()
	h := l.Host(name)
	all, err := l.API.Releases(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(r api.Release) bool { return r.ID == h.Running })
	if i < 0 {
		l.t.Fatalf("%s runs %q, which is no release", name, h.Running)
	}
	return all[i]
}

// Troupe runs a verb of the command line against the server, and returns what it printed and its exit status.
func (l *Lab) Troupe(args ...string) (out string, status int) {
	l.t.Helper()
	cmd := l.Command(l.t.Context(), l.Binary(), args...)
	b, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		l.t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// Run runs a command on the system of the machine at an address, as root, and returns what it printed. It must succeed.
func (l *Lab) Run(address string, args ...string) string {
	l.t.Helper()
	out, status, err := l.TryRun(l.t.Context(), address, args...)
	if err != nil || status != 0 {
		l.t.Fatalf("%s: %s: status %d, error %v: %s", address, strings.Join(args, " "), status, err, out)
	}
	return out
}

// TryRun is Run, for a command that may fail.
func (l *Lab) TryRun(ctx context.Context, address string, args ...string) (out string, status int, err error) {
	body, err := json.Marshal(map[string]any{"args": args})
	if err != nil {
		return "", 0, err
	}
	resp, out, err := l.post(ctx, "http://"+address+"/run", body)
	if err != nil {
		return out, 0, err
	}
	status, err = strconv.Atoi(resp.Header.Get("Status"))
	return out, status, err
}

// Behave has the system of the machine at an address misbehave: see testbed/quick/init.
func (l *Lab) Behave(address, word string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), 10*time.Second)
	defer cancel()
	_, out, err := l.post(ctx, "http://"+address+"/behave?word="+word, nil)
	if dies := word == "panic" || word == "hang"; err != nil && !dies {
		l.t.Fatalf("%s: %s: %v: %s", address, word, err, out)
	}
}

func (l *Lab) post(ctx context.Context, url string, body []byte) (*http.Response, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	resp, err := l.HTTP().Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, resp.Status)
	}
	return resp, string(out), err
}
