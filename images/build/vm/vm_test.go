package vm

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A guest is the other end of what a machine says.
type guest struct{ console, events *os.File }

// newWatcher is a watcher of a machine that is not there, and the machine's side.
func newWatcher(t *testing.T, j Job) (*watcher, guest) {
	t.Helper()
	var fds [2]int
	var ends [2]*os.File
	for i := range fds {
		var err error
		if fds[i], ends[i], err = socketPair(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = unix.Close(fds[i])
			_ = ends[i].Close()
		})
	}
	w := &watcher{job: j, console: fds[0], events: fds[1], limit: time.Hour, timer: time.AfterFunc(time.Hour, func() {})}
	t.Cleanup(func() { w.timer.Stop() })
	return w, guest{ends[0], ends[1]}
}

func (g guest) say(t *testing.T, to *os.File, text string) {
	t.Helper()
	if _, err := io.WriteString(to, text); err != nil {
		t.Fatal(err)
	}
}

func (g guest) end() { _, _ = g.console.Close(), g.events.Close() }

// All of this is there before the watcher looks: what a step said stands before the next one all the same, where the
// console was written first, as it was.
func TestWatcher(t *testing.T) {
	var log strings.Builder
	j := Job{Steps: []string{"a", "b"}, Console: &log, Step: func(i int) { fmt.Fprintf(&log, "<%d>", i) }}
	w, g := newWatcher(t, j)
	g.say(t, g.console, "kernel\n")
	g.say(t, g.events, "\nnoise {\n{\"begin\":7}\n{\"begin\":0}\n\n{\"beg")
	if err := drainBoth(w); err != nil {
		t.Fatal(err)
	}
	g.say(t, g.console, "first\n")
	g.say(t, g.events, "in\":1}\n{\"ended\":{\"step\":1,\"status\":3}}\n")
	if err := drainBoth(w); err != nil {
		t.Fatal(err)
	}
	g.say(t, g.console, "reboot: Restarting system\n")
	g.end()
	if err := w.watch(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("kernel\n<0>first\n<1>", log.String()); diff != "" {
		t.Errorf("console and steps (-want +got):\n%s", diff)
	}
	var exit *ExitError
	if !errors.As(w.failure, &exit) || *exit != (ExitError{Step: 1, Status: 3}) {
		t.Errorf("failure %v", w.failure)
	}
}

// drainBoth takes what is there, as watch does in one round.
func drainBoth(w *watcher) error {
	if _, err := drain(w.console, w.takeConsole); err != nil {
		return err
	}
	_, err := drain(w.events, w.takeEvents)
	return err
}

func TestWatcherBoundsEvents(t *testing.T) {
	w, _ := newWatcher(t, Job{})
	err := w.takeEvents(bytes.Repeat([]byte("x"), maxEvent+1))
	if err == nil || !strings.Contains(err.Error(), "more than 65536 bytes") {
		t.Errorf("an event without an end: %v", err)
	}
}

func FuzzEvents(f *testing.F) {
	f.Add([]byte("{\"begin\":0}\n"), []byte("{\"done\":-1}\n"))
	f.Add([]byte("{\"ended\":{\"step\":-5"), []byte("}}\n{\"failed\":\"x\"}\nnull\n[]\n"))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		w, _ := newWatcher(t, Job{Steps: []string{"a"}, Step: func(i int) {
			if i != 0 {
				t.Errorf("step %d of one", i)
			}
		}})
		for _, p := range [][]byte{first, second} {
			if err := w.takeEvents(p); err != nil && len(first)+len(second) <= maxEvent {
				t.Error(err)
			}
		}
	})
}

func TestOrder(t *testing.T) {
	name := filepath.Join(t.TempDir(), "order")
	err := writeOrder(name, Job{Steps: []string{"true"}, Dir: "/src", Files: func(w *tar.Writer) error {
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: UpperNames + "src/", Mode: 0o755})
	}})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(b)%4096 != 0 {
		t.Errorf("a disk of %d bytes", len(b))
	}
	r := tar.NewReader(bytes.NewReader(b))
	h, err := r.Next()
	if err != nil || h.Name != orderName {
		t.Fatalf("first comes %v, %v", h, err)
	}
	text, err := io.ReadAll(r)
	const want = `{"boot":false,"steps":["true"],"env":null,"dir":"/src","limit":1800000000000,"network":false,"output":""}`
	if err != nil || string(text) != want {
		t.Errorf("order %s, %v", text, err)
	}
	if h, err = r.Next(); err != nil || h.Name != "upper/src/" {
		t.Errorf("then comes %v, %v", h, err)
	}
}

func TestWithoutQEMU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := NewHost("/proc/self/exe", 1).Run(t.Context(), Job{})
	if err == nil || !strings.Contains(err.Error(), "Debian package qemu-system-x86") {
		t.Errorf("got error %v", err)
	}
}

func TestInitMustBeStatic(t *testing.T) {
	_, err := NewHost("/bin/sh", 1).Run(t.Context(), Job{Scratch: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("got error %v", err)
	}
}

func TestLimitIsKept(t *testing.T) {
	h := NewHost("", 1)
	h.slots <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Run(ctx, Job{}); !errors.Is(err, context.Canceled) {
		t.Errorf("with one machine running, and no more allowed: %v", err)
	}
	if n := cap(NewHost("", 0).slots); n < 1 {
		t.Errorf("%d machines at a time", n)
	}
}

// TestQEMUFails has QEMU end by itself, before a machine is there.
func TestQEMUFails(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"kernel", initrdFile, orderFile, layerFile, resultFile, "base"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 4096), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_, err := NewHost("", 1).runMachine(t.Context(), Job{Kernel: filepath.Join(dir, "none"), Base: filepath.Join(dir, "base"), Scratch: dir})
	if err == nil || !strings.Contains(err.Error(), "could not open kernel file") {
		t.Errorf("got error %v", err)
	}
}

func TestCommandLine(t *testing.T) {
	if got, want := cmdline(Job{}), "console=ttyS0 quiet loglevel=3 panic=-1 rw -- troupe-vm-guest"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for j, want := range map[*Job]bool{{}: false, {Network: true}: true} {
		if has := strings.Contains(strings.Join(NewHost("", 1).args(*j, "tcg"), " "), "-netdev"); has != want {
			t.Errorf("network %v: a network card %v", want, has)
		}
	}
}
