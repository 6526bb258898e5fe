package load

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/schema"
)

const goodRoot = `package fleet
network: subnet: "10.77.0.0/24"
images: debian: {kind: "os", from: debian: {suite: "bookworm", kernel: "linux-image-cloud-amd64"}}
roles: web: os: "debian"
`

// endless is a comprehension that CUE works on for more than a minute.
const endless = `package fleet
import "list"
hosts: {for i in list.Range(0, 1000000, 1) for j in list.Range(0, 1000000, 1) {"n\(i)-\(j)": role: "web"}}
`

// doublings are 24 structs of which each has the one before twice.
func doublings() string {
	var b strings.Builder
	b.WriteString("package fleet\n_a0: {l: 1, r: 2}\n")
	for i := range 24 {
		fmt.Fprintf(&b, "_a%d: {l: _a%d & {k%d: 1}, r: _a%d & {k%d: 2}}\n", i+1, i, i, i, i)
	}
	return b.String()
}

// longString doubles a string 34 times: 16 GiB.
func longString() string {
	var b strings.Builder
	b.WriteString("package fleet\n#s0: \"x\"\n")
	for i := range 34 {
		fmt.Fprintf(&b, "#s%d: \"\\(#s%d)\\(#s%d)\"\n", i+1, i, i)
	}
	b.WriteString("hosts: n1: {role: \"web\", labels: a: #s34}\n")
	return b.String()
}

func TestBombs(t *testing.T) {
	for name, text := range map[string]string{"endless": endless, "doublings": doublings(), "long string": longString()} {
		t.Run(name, func(t *testing.T) {
			l := Loader{Deadline: 2 * time.Second, Memory: 192 << 20}
			_, err := l.Load(t.Context(), fstest.MapFS{
				"root.cue":      {Data: []byte(goodRoot)},
				"good/a.cue":    {Data: []byte("package fleet\nhosts: a: {serial: \"1\", role: \"web\", bad: 1}\n")},
				"r1/bomb.cue":   {Data: []byte(text)},
				"r1/readme.txt": {Data: []byte("x")},
			})
			t.Log(err)
			var ps schema.Problems
			if !errors.Is(err, ErrLimit) || !errors.As(err, &ps) {
				t.Fatalf("error %v; want one that is ErrLimit and schema.Problems", err)
			}
			for _, want := range []string{"evaluating r1 ", "192 MiB", "2s", "good/a.cue:2:38: hosts.a.bad: unknown field"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			noChildren(t)
			// The same Loader goes on, and keeps nothing of the bomb.
			if _, err := l.Load(t.Context(), fstest.MapFS{"root.cue": {Data: []byte(goodRoot)}}); err != nil {
				t.Errorf("loading a good fleet after a bomb: %v", err)
			}
		})
	}
}

// noChildren fails the test if this process has a child left, running or not.
func noChildren(t *testing.T) {
	t.Helper()
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child is left: wait4 returned %d, %v", pid, err)
	}
}

func TestCancel(t *testing.T) {
	why := errors.New("the test has seen enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error)
	go func() {
		var l Loader
		_, err := l.Load(ctx, fstest.MapFS{"a.cue": {Data: []byte(endless)}})
		done <- err
	}()
	awaitChild(t, os.Getpid())
	cancel(why)
	err := <-done
	var ps schema.Problems
	if !errors.Is(err, why) || errors.As(err, &ps) {
		t.Errorf("error %v; want the cause of the cancellation, and no problem of the fleet", err)
	}
	noChildren(t)
}

// awaitChild waits until a process has a child, and returns its id.
func awaitChild(t *testing.T, parent int) int {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(20 * time.Second); ; {
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
		for _, name := range lists {
			b, _ := os.ReadFile(name)
			if first, _, ok := strings.Cut(string(b), " "); ok {
				if pid, err := strconv.Atoi(first); err == nil {
					return pid
				}
			}
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("process %d has no child", parent)
		}
	}
}

// TestChildDiesWithParent kills a process in the middle of a load; its child must not go on alone.
func TestChildDiesWithParent(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.cue"), []byte(endless), 0o644); err != nil {
		t.Fatal(err)
	}
	parent := exec.Command("/proc/self/exe", "load-for-test", dir)
	parent.Stdout, parent.Stderr = os.Stderr, os.Stderr
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	child := awaitChild(t, parent.Process.Pid)
	fd, err := unix.PidfdOpen(child, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait() // it was killed
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 10_000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n != 1 {
			t.Errorf("the child %d outlived its parent by 10 s (poll: %d, %v)", child, n, err)
			_ = unix.Kill(child, unix.SIGKILL)
		}
		return
	}
}

func TestBrokenEvaluator(t *testing.T) {
	for name, tc := range map[string]struct{ script, want string }{
		"says nothing":           {"cat >/dev/null", "without an answer for every directory"},
		"says nonsense":          {"cat >/dev/null; echo nonsense", "reading the evaluator's answer"},
		"ends what is not begun": {`cat >/dev/null; echo '{"end":0,"result":{"dir":"."}}'`, "reading the evaluator's answer"},
		"fails at once":          {"echo no such verb >&2; exit 2", "no such verb"},
		"is not there":           {"", "starting the evaluator"},
	} {
		t.Run(name, func(t *testing.T) {
			l := Loader{Command: []string{"/bin/sh", "-c", tc.script}}
			if tc.script == "" {
				l.Command = []string{filepath.Join(t.TempDir(), "nothing")}
			}
			_, err := l.Load(t.Context(), fstest.MapFS{"root.cue": {Data: []byte(goodRoot)}})
			var ps schema.Problems
			if err == nil || errors.As(err, &ps) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v; want one that says %q and blames no fleet", err, tc.want)
			}
			noChildren(t)
		})
	}
}

func TestWhatAChildWithoutMemorySays(t *testing.T) {
	for _, says := range []string{
		"fatal error: runtime: out of memory",
		"runtime: failed to create new OS thread (have 7 already; errno=11)",
		"runtime/cgo: pthread_create failed: Resource temporarily unavailable",
	} {
		l := Loader{Command: []string{"/bin/sh", "-c", `cat >/dev/null; echo '{"begin":0}'; echo "$0" >&2; exit 2`, says}}
		_, err := l.Load(t.Context(), fstest.MapFS{"root.cue": {Data: []byte(goodRoot)}})
		var ps schema.Problems
		if !errors.As(err, &ps) || !strings.Contains(err.Error(), "took too much memory") {
			t.Errorf("of a child that says %q: error %v; want one that blames the fleet for its memory", says, err)
		}
	}
}

func TestBigFiles(t *testing.T) {
	tree := fstest.MapFS{
		"root.cue": {Data: []byte(goodRoot)},
		"big.cue":  {Data: append([]byte("package fleet\n"), make([]byte, maxFile)...)},
		"link.cue": {Data: []byte("root.cue"), Mode: os.ModeSymlink},
		strings.Repeat("d/", maxDepth+2) + "x.cue": {Data: []byte("package fleet\n")},
	}
	var l Loader
	_, err := l.Load(t.Context(), tree)
	var ps schema.Problems
	if !errors.As(err, &ps) || len(ps) != 3 {
		t.Fatalf("error %v; want three problems", err)
	}
	for _, want := range []string{"big.cue: is bigger than 16 MiB", "link.cue: is not a regular file: symbolic links are not followed", "d: more than 32 directories in one another"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %v; want %q in it", err, want)
		}
	}
}

// FuzzDecodeRequest gives the child's decoder anything.
func FuzzDecodeRequest(f *testing.F) {
	f.Add([]byte(`{"memory":1,"workers":1,"files":[{"name":"a.cue","text":"eA=="}],"shards":[{"dir":".","files":[0]}]}`))
	f.Add([]byte(`{"memory":1,"workers":1,"files":[{"name":"../a.cue"}]}`))
	f.Add([]byte(`{"memory":1,"workers":1,"shards":[{"files":[-1]}]}`))
	f.Add([]byte(`{}`))
	f.Add([]byte(`nonsense`))
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := decodeRequest(strings.NewReader(string(b)))
		if err != nil {
			return
		}
		for _, s := range req.Shards {
			for _, i := range s.Files {
				if name := req.Files[i].Name; strings.Contains(name, "..") && strings.Contains("/"+name+"/", "/../") {
					t.Errorf("file name %q leads out", name)
				}
			}
		}
	})
}

// FuzzEvaluate gives the parser and the words about errors anything that is not long enough to be a bomb.
func FuzzEvaluate(f *testing.F) {
	f.Add(goodRoot)
	f.Add("package fleet\nhosts: n1: {mac: 5, rol: \"x\"}\n")
	f.Add("package fleet\nroles: x: {os: \"y\", #host: _, node: files: \"/a\": #host.name}\nhosts: n1: {serial: \"1\", role: \"x\"}\n")
	f.Add("package fleet\nhosts: \"\\(x)\": 1\nx: {")
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 200 || strings.Contains(text, "import") || strings.Contains(text, "*") {
			return // it may be a bomb
		}
		var w worker
		req := &request{Files: []file{{Name: "a.cue", Text: []byte(text)}}}
		out := w.evaluate(req, shardRequest{Dir: ".", Files: []int{0}})
		for _, p := range out.Problems {
			if p.Message == "" || p.File != "" && p.File != "a.cue" {
				t.Errorf("problem %+v of %q", p, text)
			}
			if strings.Contains(p.Message, "crashed CUE") {
				t.Errorf("%q: %s", text, p.Message)
			}
		}
	})
}

// TestLongProblems has very long names and values wherever one can stand: each problem stays short, and still
// says what is wrong.
func TestLongProblems(t *testing.T) {
	long := strings.Repeat("é\u0007", 30_000)
	quoted := strings.ReplaceAll(long, "\u0007", `\u0007`)
	word := strings.Repeat("x", 100_000)
	digits := strings.Repeat("0.", 50_000)
	for name, tc := range map[string]struct{ text, want string }{
		"a field of a role":     {`roles: web: "` + quoted + `": 1`, ": unknown field"},
		"a field at the top":    {`"` + quoted + `": 1`, ": unknown field"},
		"the name of a role":    {`roles: "` + quoted + `": os: "debian"`, "this is not the name of an image or a role"},
		"a path":                {`roles: web: files: "/` + quoted + `": "x"`, "it is too long"},
		"a path not clean":      {`roles: web: files: "/a//` + strings.Repeat("b/", 1900) + `x": "x"`, "is clean: want"},
		"a path below another":  {`_d: "/` + strings.Repeat("b/", 1900) + `x", roles: web: files: {(_d): "", (_d + "/y"): ""}`, "so nothing can lie below it"},
		"a role that is not":    {`hosts: a: {serial: "s", role: "` + quoted + `"}`, "is not the name of an image or a role"},
		"a subnet":              {`network: subnet: "` + digits + `/24"`, "too long"},
		"a lease":               {`network: lease: "` + strings.Repeat("9", 100_000) + `h"`, "too long"},
		"a number":              {`hosts: a: {serial: "s", role: "web", mac: ` + strings.Repeat("9", 10_000) + `}`, "is not a MAC address"},
		"an import":             {`import "x.` + word + `"`, "only packages of CUE's own library can be imported"},
		"a reference":           {`roles: web: os: ` + word, "reference"},
		"a syntax error":        {word + " " + word, "expected"},
		"a field and its place": {`roles: web: files: "/a": "` + quoted + `": 1`, "roles.web.files"},
	} {
		t.Run(name, func(t *testing.T) {
			var l Loader
			_, err := l.Load(t.Context(), fstest.MapFS{
				"root.cue": {Data: []byte(strings.Replace(goodRoot, "network:", "_network:", 1))},
				"a.cue":    {Data: []byte("package fleet\n" + tc.text + "\n")},
			})
			var ps schema.Problems
			if !errors.As(err, &ps) {
				t.Fatalf("error %v; want problems", err)
			}
			for _, p := range ps {
				if len(p.Message) > maxMessage || !utf8.ValidString(p.Message) || strings.ContainsFunc(p.Message, unicode.IsControl) {
					t.Errorf("a problem has %d bytes, UTF-8 %v: %.100q", len(p.Message), utf8.ValidString(p.Message), p.Message)
				}
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %.4000q; want %q in it", err, tc.want)
			}
		})
	}
}
