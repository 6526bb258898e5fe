package rescue

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func script(t *testing.T, text string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := Shell(t.Context(), strings.NewReader(text), &out, &out, false)
	return out.String(), err
}

func TestShellRunsUrootsCommands(t *testing.T) {
	dir := t.TempDir()
	out, err := script(t, `cd `+dir+`
mkdir a && touch a/x && cp a/x a/y && mv a/y a/z && ls a
echo text > a/x; cat a/x; find a -name z
rm -r a; for i in 1 2; do echo n$i; done | cat
`)
	if err != nil {
		t.Fatal(err)
	}
	if want := "x\nz\ntext\n" + dir + "/a/z\nn1\nn2\n"; out != want {
		t.Errorf("printed %q, want %q", out, want)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestShellSaysWhatIsWrongAndGoesOn(t *testing.T) {
	out, err := script(t, "cat /nonexistent\necho status $?\nnosuchcommand\nreboot now\necho still here\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"/nonexistent", "status 1", `"nosuchcommand": executable file not found`, "reboot: takes no arguments: now", "still here"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in:\n%s", want, out)
		}
	}
}

func TestShellShowsTheMachine(t *testing.T) {
	out, err := script(t, "help; ip; mount; lsblk")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"modprobe", "1: lo", "proc"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in:\n%s", want, out)
		}
	}
}

// terminal gives one line a read, as a terminal does.
type terminal struct{ lines []string }

func (t *terminal) Read(p []byte) (int, error) {
	if len(t.lines) == 0 {
		return 0, io.EOF
	}
	n := copy(p, t.lines[0])
	t.lines = t.lines[1:]
	return n, nil
}

func TestInteractiveShell(t *testing.T) {
	var out bytes.Buffer
	in := "echo one\nif true\nthen echo two\nfi\n)\necho three\nexit\necho never\n"
	if err := Shell(t.Context(), &terminal{strings.SplitAfter(in, "\n")}, &out, &out, true); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, want := range []string{"troupe# one\n", "> ", "two\n", "three\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
	if strings.Contains(text, "never") {
		t.Errorf("it went on after exit:\n%s", text)
	}
}

// TestOfferEndsWithItsContext offers a shell on a terminal that nobody touches.
func TestOfferEndsWithItsContext(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	slave := slaveOf(t, master)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- offerOnce(ctx, slave) }()
	if _, err := io.WriteString(master, "no newline"); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("a shell was given to nobody")
	}
	if err := offerOnce(t.Context(), filepath.Join(t.TempDir(), "tty")); err == nil {
		t.Error("a terminal that is not there was waited at")
	}
}

// slaveOf unlocks the other side of a pseudo terminal and returns its path.
func slaveOf(t *testing.T, master *os.File) string {
	t.Helper()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	return "/dev/pts/" + strconv.Itoa(n)
}
