package qmp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startQEMU starts a machine with nothing in it, and returns its monitor.
func startQEMU(t *testing.T) net.Conn {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	cmd := exec.Command("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-accel", "tcg", "-machine", "pc", "-m", "16",
		"-display", "none", "-S", "-chardev", "socket,id=m,fd=3", "-mon", "chardev=m,mode=control")
	cmd.ExtraFiles, cmd.Stderr = []*os.File{theirs}, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestRealQEMU(t *testing.T) {
	events := make(chan Event, 16)
	c, err := New(t.Context(), startQEMU(t), func(e Event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var status struct {
		Status  string `json:"status"`
		Running bool   `json:"running"`
	}
	if err := c.Run(t.Context(), "query-status", nil, &status); err != nil || status.Running || status.Status != "prelaunch" {
		t.Errorf("before cont: got %+v, %v", status, err)
	}
	var refused *Error
	if err := c.Run(t.Context(), "fly", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Errorf("an unknown command: got %v, want CommandNotFound", err)
	}
	if err := c.Run(t.Context(), "set_link", map[string]any{"name": "none", "up": true}, nil); !errors.As(err, &refused) {
		t.Errorf("an unknown device: got %v, want a refusal", err)
	}
	// Nobody takes events from the channel: answers come all the same.
	for _, command := range []string{"cont", "system_reset", "stop"} {
		if err := c.Run(t.Context(), command, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"RESUME", "RESET", "STOP"} {
		if got := nextEvent(t, events, want); got.Time.IsZero() {
			t.Errorf("event %s has no time", want)
		}
	}
	if err := c.Run(t.Context(), "quit", nil, nil); err != nil && !errors.Is(err, ErrClosed) {
		t.Errorf("quit: %v", err)
	}
	<-c.Done()
	if err := c.Run(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: got %v, want ErrClosed", err)
	}
}

// nextEvent is the next one of a name.
func nextEvent(t *testing.T, events <-chan Event, name string) Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		select {
		case e := <-events:
			if e.Name == name {
				return e
			}
		case <-ctx.Done():
			t.Fatalf("event %s never came", name)
		}
	}
}

// peer plays QEMU: it greets, agrees to the capabilities, then answers each command with what answer makes of it.
func peer(t *testing.T, answer func(n int, line string) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	ended := make(chan struct{})
	t.Cleanup(func() { <-ended })
	go func() {
		defer close(ended)
		defer theirs.Close()
		fmt.Fprintln(theirs, `{"QMP": {"version": {}, "capabilities": []}}`)
		lines := bufio.NewScanner(theirs)
		for n := 0; lines.Scan(); n++ {
			reply := `{"return": {}}` + "\n"
			if n > 0 {
				reply = answer(n, lines.Text())
			}
			if _, err := io.WriteString(theirs, reply); err != nil {
				return
			}
		}
	}()
	return ours
}

func TestBadPeers(t *testing.T) {
	for _, test := range []struct{ name, reply, want string }{
		{"not JSON", "hello\n", "line that is not QMP"},
		{"a second greeting", `{"QMP": {}}` + "\n", "second greeting"},
		{"two answers", `{"return": 1}` + "\n" + `{"return": 2}` + "\n", "answer to no command"},
		{"an endless line", strings.Repeat("x", MaxLine+1), "too long"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := New(t.Context(), peer(t, func(int, string) string { return test.reply }), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.Run(t.Context(), "a", nil, nil) // the first of two answers is good
			<-c.Done()
			err = c.Run(t.Context(), "b", nil, nil)
			if !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want it to say %q", err, test.want)
			}
		})
	}
}

func TestPeerThatHangs(t *testing.T) {
	c, err := New(t.Context(), peer(t, func(int, string) string { return "" }), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("time is up"))
	if err := c.Run(ctx, "a", nil, nil); err == nil || !strings.Contains(err.Error(), "time is up") {
		t.Errorf("got %v, want why it was given up", err)
	}
	ours, theirs := net.Pipe()
	defer theirs.Close()
	if _, err := New(ctx, ours, nil); err == nil || !strings.Contains(err.Error(), "time is up") {
		t.Errorf("no greeting: got %v, want why it was given up", err)
	}
}

func TestAnswersInTurn(t *testing.T) {
	c, err := New(t.Context(), peer(t, func(n int, line string) string {
		return fmt.Sprintf(`{"event": "X"}`+"\n"+`{"return": %s}`+"\n", line)
	}), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	done := make(chan error)
	for i := range 20 {
		go func() {
			var got struct{ Execute string }
			name := fmt.Sprintf("c%d", i)
			err := c.Run(t.Context(), name, nil, &got)
			if err == nil && got.Execute != name {
				err = fmt.Errorf("%s got the answer of %s", name, got.Execute)
			}
			done <- err
		}()
	}
	for range 20 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// FuzzRead feeds a session what no QEMU would say: it must end, without a panic and with all its goroutines.
func FuzzRead(f *testing.F) {
	for _, seed := range []string{
		"", "\n", "{}\n", `{"QMP":{}}` + "\n", `{"return":{}}` + "\n", `{"QMP":{}}` + "\n" + `{"return":{}}` + "\n" + `{"event":"RESET"}` + "\n",
		`{"QMP":null,"return":null,"error":null}` + "\n", `{"error":{"class":"GenericError","desc":"no"}}` + "\n", `{"event":7}` + "\n", "[]\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		c, err := New(t.Context(), &script{said: strings.NewReader(string(said))}, nil)
		if err != nil {
			return
		}
		err = c.Run(t.Context(), "query-status", nil, nil)
		c.Close()
		if again := c.Run(t.Context(), "query-status", nil, nil); !errors.Is(again, ErrClosed) {
			t.Errorf("after Close (and %v): got %v, want ErrClosed", err, again)
		}
	})
}

// A script says its lines, whatever it is told.
type script struct{ said *strings.Reader }

func (s *script) Read(p []byte) (int, error)  { return s.said.Read(p) }
func (s *script) Write(p []byte) (int, error) { return len(p), nil }
func (s *script) Close() error                { return nil }
