package testbed

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// aConsole is a client of a lab whose node n1 said nothing yet, and the file that its console's output goes to.
func aConsole(t *testing.T) (*Client, string) {
	t.Helper()
	c := &Client{dir: t.TempDir()}
	path := c.ConsolePath("n1")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	return c, path
}

func say(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Error(err)
	}
}

func TestWaitConsole(t *testing.T) {
	c, path := aConsole(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		say(t, path, "begin\r\nrea") // in two parts
		say(t, path, "dy one\r\n")
	}()
	end, err := c.WaitConsole(t.Context(), "n1", 0, regexp.MustCompile("ready"))
	<-done
	if err != nil || end != int64(len("begin\r\nready")) {
		t.Fatalf("got %d, %v", end, err)
	}
	say(t, path, "ready two\r\n")
	if end, err = c.WaitConsole(t.Context(), "n1", end, regexp.MustCompile("ready t..")); err != nil || end != int64(len("begin\r\nready one\r\nready two")) {
		t.Errorf("the second one: got %d, %v", end, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("time is up"))
	_, err = c.WaitConsole(ctx, "n1", 0, regexp.MustCompile("three"))
	if err == nil || !strings.Contains(err.Error(), "time is up") || !strings.Contains(err.Error(), "ready two") {
		t.Errorf("waiting in vain: got %v, want why and the last lines", err)
	}
}

func TestFollowConsole(t *testing.T) {
	c, path := aConsole(t)
	say(t, path, "old\nnew\n")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got strings.Builder
	err := c.FollowConsole(ctx, "n1", 4, writerFunc(func(p []byte) (int, error) {
		if got.Write(p); got.Len() == len("new\n") {
			say(t, path, strings.Repeat("x", 100_000)) // more than one read
		}
		if got.Len() == 100_004 {
			cancel()
		}
		return len(p), nil
	}))
	if !errors.Is(err, context.Canceled) || !strings.HasPrefix(got.String(), "new\nxxx") || got.Len() != 100_004 {
		t.Errorf("got %d bytes, %v", got.Len(), err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestLastLines(t *testing.T) {
	for _, test := range []struct {
		name, said string
		n          int
		want       string
	}{
		{"nothing", "", 3, ""},
		{"fewer", "a\nb\n", 3, "a\nb"},
		{"more", "a\nb\nc\nd\n", 2, "c\nd"},
		{"serial line ends", "a\r\nb\r\n\r\n", 3, "a\nb"},
		{"drawn over", "10%\r20%\r30%\nend", 3, "30%\nend"},
		{"colours", "\x1b[0;32mok\x1b[0m \x1b[?7l\x1bcx", 3, "ok x"},
		{"bells", "a\a\x00b", 3, "ab"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := lastLines([]byte(test.said), test.n); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
