package health

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

func port(t *testing.T, addr string) uint16 {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(a.Port)
}

// closedPort is one on which nobody listens.
func closedPort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return port(t, l.Addr().String())
}

// fakeSystemctl puts a program of that name first in the PATH, which knows some units.
func fakeSystemctl(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestTry(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "/", http.StatusFound)
		case "/slow":
			<-r.Context().Done()
		case "/bad":
			http.Error(w, "no", http.StatusInternalServerError)
		}
	}))
	defer srv.Close()
	p, none := port(t, srv.Listener.Addr().String()), closedPort(t)
	fakeSystemctl(t, `case "$*" in
"is-active -- good.service") echo active;;
"is-active -- bad.service") echo failed; exit 3;;
"is-active -- odd.service") exit 4;;
esac
`)
	for _, tt := range []struct {
		check agentapi.Check
		want  string // part of the error; "" for none
	}{
		{agentapi.Check{HTTP: &agentapi.HTTPCheck{Port: p, Path: "/", Status: 200}}, ""},
		{agentapi.Check{HTTP: &agentapi.HTTPCheck{Port: p}}, ""},
		{agentapi.Check{HTTP: &agentapi.HTTPCheck{Port: p, Path: "/moved", Status: 302}}, ""},
		{agentapi.Check{HTTP: &agentapi.HTTPCheck{Port: p, Path: "/bad", Status: 200}}, "answered 500, want 200"},
		{agentapi.Check{HTTP: &agentapi.HTTPCheck{Port: p, Path: "/slow", Status: 200}}, "no answer within 1s"},
		{agentapi.Check{HTTP: &agentapi.HTTPCheck{Port: none, Path: "/", Status: 200}}, "connection refused"},
		{agentapi.Check{TCP: &agentapi.TCPCheck{Port: p}}, ""},
		{agentapi.Check{TCP: &agentapi.TCPCheck{Port: none}}, "connection refused"},
		{agentapi.Check{Unit: "good.service"}, ""},
		{agentapi.Check{Unit: "bad.service"}, "failed"},
		{agentapi.Check{Unit: "odd.service"}, "exit status 4"},
		{agentapi.Check{Exec: []string{"true"}}, ""},
		{agentapi.Check{Exec: []string{"sh", "-c", "echo one; echo why >&2; exit 7"}}, "exit status 7: why"},
		{agentapi.Check{Exec: []string{"/nonexistent"}}, "no such file"},
		// A child that outlives its parent and holds the output must not hold the check.
		{agentapi.Check{Exec: []string{"sh", "-c", "sleep 1000 & sleep 1000"}}, "no answer within 1s"},
	} {
		err := Try(t.Context(), tt.check, time.Second)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", Name(tt.check), err, tt.want)
		}
	}
}

func TestTrySystem(t *testing.T) {
	for script, want := range map[string]string{
		`exit 0`: "",
		`[ "$1" = is-system-running ] && echo degraded; exit 3`: "",
		`[ "$1" = is-system-running ] && echo starting; exit 3`: `systemd says "starting"`,
		`exit 1`: "exit status 1",
	} {
		fakeSystemctl(t, script)
		err := Try(t.Context(), agentapi.Check{}, 5*time.Second)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
}

func TestTryEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Try(ctx, agentapi.Check{Exec: []string{"sleep", "1000"}}, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("Try: %v", err)
	}
}

func TestRunnerTellsChangesOnly(t *testing.T) {
	var good atomic.Bool
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !good.Load() {
			http.Error(w, "no", http.StatusServiceUnavailable)
		}
	}))
	defer srv.Close()
	p := port(t, srv.Listener.Addr().String())
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan agentapi.Health, 10)
	r := Runner{
		Checks: []agentapi.Check{
			{HTTP: &agentapi.HTTPCheck{Port: p, Path: "/x", Status: 200}, Every: time.Millisecond},
			{TCP: &agentapi.TCPCheck{Port: p}, Every: time.Millisecond},
		},
		Log: slog.New(slog.DiscardHandler), Changed: func(h agentapi.Health) { told <- h },
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	first := <-told
	if first.Healthy || len(first.Failing) != 1 || !strings.HasPrefix(first.Failing[0], "http :") {
		t.Errorf("first: %+v", first)
	}
	good.Store(true)
	if h := <-told; !h.Healthy || len(h.Failing) != 0 {
		t.Errorf("second: %+v", h)
	}
	good.Store(false)
	if h := <-told; h.Healthy {
		t.Errorf("third: %+v", h)
	}
	cancel()
	<-done
	if len(told) > 0 {
		t.Errorf("told once more: %+v", <-told)
	}
}

// frozen is a directory in a file system that lets nobody write until thaw is called, as on a disk that does not answer.
// Who writes there waits in the kernel, and cannot be killed.
func frozen(t *testing.T) (dir string, thaw func()) {
	t.Helper()
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	run("mke2fs", "-q", "-F", "-t", "ext4", image, "16M")
	run("mount", "-o", "loop", image, dir)
	t.Cleanup(func() { run("umount", "--lazy", dir) }) // who was let go may not be out yet
	run("fsfreeze", "--freeze", dir)
	thaw = sync.OnceFunc(func() { run("fsfreeze", "--unfreeze", dir) })
	t.Cleanup(thaw)
	return dir, thaw
}

// stuck waits until the process whose ID is the first line of a file waits in the kernel, and cannot be killed there.
func stuck(t *testing.T, file string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Error("the command never hangs")
			return
		}
		b, _ := os.ReadFile(file) // not there yet, or not whole
		pid, _, ok := strings.Cut(string(b), "\n")
		if !ok {
			continue
		}
		stat, _ := os.ReadFile("/proc/" + pid + "/stat")
		// proc_pid_stat(5): the state follows the name, which may have any character and stands in parentheses.
		if at := strings.LastIndex(string(stat), ")"); at >= 0 && strings.HasPrefix(string(stat)[at:], ") D ") {
			return
		}
	}
}

// TestRunnerLeavesACommandThatHangsInTheKernel has a check that cannot be killed.
func TestRunnerLeavesACommandThatHangsInTheKernel(t *testing.T) {
	dir, thaw := frozen(t)
	runs := filepath.Join(t.TempDir(), "runs")
	c := agentapi.Check{Exec: []string{"sh", "-c", "echo $$ >>" + runs + "; echo x >" + dir + "/x"}}
	lines := func() int {
		b, err := os.ReadFile(runs)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "\n")
	}
	var p prober
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first := make(chan error, 1)
	go func() { first <- p.try(ctx, c, time.Hour) }()
	stuck(t, runs)
	cancel()
	if err := <-first; !errors.Is(err, errHangs) || !errors.Is(err, context.Canceled) {
		t.Fatalf("as it hangs: %v", err)
	}
	for range 2 {
		if err := p.try(t.Context(), c, 100*time.Millisecond); err == nil || err.Error() != "no answer within 100ms: it hangs in the kernel" {
			t.Errorf("while it hangs: %v", err)
		}
	}
	if n := lines(); n != 1 {
		t.Errorf("%d runs were started while one hung", n)
	}
	left := p.hung
	thaw()
	<-left
	if err := p.try(t.Context(), c, time.Minute); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestTryLeavesACommandThatDoesNotBegin has programs that nobody gives a byte of, as on a disk that does not answer.
func TestTryLeavesACommandThatDoesNotBegin(t *testing.T) {
	dir := t.TempDir()
	silent, script := filepath.Join(dir, "silent"), filepath.Join(dir, "script")
	if err := errors.Join(syscall.Mkfifo(silent, 0o700), os.WriteFile(script, []byte("#! "+silent+" -x\n"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{silent, script} {
		var p prober
		err := p.try(t.Context(), agentapi.Check{Exec: []string{program}}, 10*time.Millisecond)
		if err == nil || err.Error() != "no answer within 10ms: it hangs in the kernel" {
			t.Fatalf("%s: %v", program, err)
		}
		for hangs := true; hangs; { // until its reader was there
			f, err := os.OpenFile(silent, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			select {
			case <-p.hung:
				hangs = false
			default:
			}
		}
	}
}

// TestRunnerEndsWhileACommandHangs stops the checks, as for another assignment, while one cannot be killed.
func TestRunnerEndsWhileACommandHangs(t *testing.T) {
	dir, _ := frozen(t)
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan agentapi.Health)
	r := Runner{
		Checks: []agentapi.Check{{Exec: []string{"sh", "-c", "echo x >" + dir + "/x"}, Timeout: 500 * time.Millisecond}},
		Log:    slog.New(slog.DiscardHandler), Changed: func(h agentapi.Health) { told <- h },
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	for h := range told { // a command may be killed before it comes to where it hangs
		if h.Healthy {
			t.Fatalf("health %+v", h)
		}
		if strings.HasSuffix(strings.Join(h.Failing, ""), "it hangs in the kernel") {
			break
		}
	}
	cancel()
	<-done
}

// TestRunnerIsEagerForTheFirstMinutesOnly counts the tries of checks that never pass, minute by minute.
func TestRunnerIsEagerForTheFirstMinutesOnly(t *testing.T) {
	var tries atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		tries.Add(1)
		http.Error(w, "no", http.StatusServiceUnavailable)
	}))
	defer srv.Close()
	runs := filepath.Join(t.TempDir(), "runs")
	for _, tt := range []struct {
		check agentapi.Check
		count func() int64
		want  []int64
	}{
		{agentapi.Check{HTTP: &agentapi.HTTPCheck{Port: port(t, srv.Listener.Addr().String())}, Every: 10 * time.Second}, tries.Load, []int64{261, 120, 120, 6, 6}},
		{agentapi.Check{Exec: []string{"sh", "-c", "printf x >>" + runs + "; exit 1"}, Every: 20 * time.Second}, func() int64 {
			fi, err := os.Stat(runs)
			if err != nil {
				t.Fatal(err)
			}
			return fi.Size()
		}, []int64{121, 120, 120, 3, 3}},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			r := Runner{Checks: []agentapi.Check{tt.check}, Log: slog.New(slog.DiscardHandler), Changed: func(agentapi.Health) {}}
			done := make(chan struct{})
			go func() {
				defer close(done)
				r.Run(ctx)
			}()
			var got []int64
			last := int64(0)
			time.Sleep(time.Millisecond) // of the bubble: not in step with the tries
			for range tt.want {
				time.Sleep(time.Minute)
				n := tt.count()
				got, last = append(got, n-last), n
			}
			cancel()
			<-done
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("%s: tries in each minute (-want +got):\n%s", Name(tt.check), diff)
			}
		})
	}
}
