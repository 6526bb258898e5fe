package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

func TestNextArgsAreTheMachinesAndTheRoles(t *testing.T) {
	old, k := digest.Of([]byte("old")), digest.Of([]byte("new"))
	line := "initrd=initrd0 initrd=initrd1 troupe.server=http://10.77.0.1:8080 troupe.mac=52:54:00:77:00:01 troupe.boot=b1 " +
		`console=tty0 x="a b" troupe.kernel=` + old.String() + ` quiet old="c d"` + "\n"
	for _, c := range []struct {
		name, line string
		role       []string
		want       []string
	}{
		{"the server's", line, []string{"debug", `y="e f"`}, []string{
			"troupe.server=http://10.77.0.1:8080", "troupe.mac=52:54:00:77:00:01", "console=tty0", `x="a b"`,
			"troupe.boot=b2", "troupe.kernel=" + k.String(), "debug", `y="e f"`,
		}},
		{"started by hand", "BOOT_IMAGE=/k troupe.dead=x root=none", nil, []string{"root=none", "troupe.boot=b2", "troupe.kernel=" + k.String()}},
	} {
		if d := cmp.Diff(c.want, nextArgs(c.line, k, c.role, "troupe.boot=b2")); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
	// The next boot finds what it needs in it, and gives the same to the one after that.
	next := strings.Join(nextArgs(line, k, []string{"debug"}, "troupe.boot=b2"), " ")
	cmd, err := ParseCmdline(next)
	if err != nil || cmd.Kernel != k || cmd.Boot != "b2" || len(cmd.lacks([]string{"debug"})) > 0 {
		t.Errorf("%q: %+v, %v", next, cmd, err)
	}
	if again := strings.Join(nextArgs(next, k, []string{"debug"}, "troupe.boot=b2"), " "); again != next {
		t.Errorf("the boot after that: %q, want %q", again, next)
	}
}

func TestKexecIsTriedOnceInARow(t *testing.T) {
	c, err := cache.Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	src := blobs{}
	a := agentapi.Assignment{Host: "n1", Release: &agentapi.Release{
		ID: digest.Of([]byte("r")), Kernel: digest.Of([]byte("k")), KernelBlob: src.add("k"), Modules: src.add("m"),
	}}
	a.Agent = src.add("a")
	jumps := 0
	b := &boot{log: slog.New(slog.DiscardHandler), cache: c, cmd: Cmdline{Kernel: digest.Of([]byte("other"))}}
	b.jump = func(r cache.Record) error {
		jumps++
		if got := c.State().KernelTries; got != 1 || r.Assignment.Host != "n1" {
			t.Errorf("the jump is counted %d times: %+v", got, r)
		}
		return errors.New("locked down")
	}
	want := func(what string, n int) {
		t.Helper()
		b.tryJump(a)
		if jumps != n {
			t.Errorf("%s: %d jumps, want %d", what, jumps, n)
		}
	}
	want("nothing is in the cache", 0)
	if _, err := c.Fetch(t.Context(), cache.Fetch{Source: src, Blobs: bootFiles(a)}); err != nil {
		t.Fatal(err)
	}
	want("all is in the cache", 1)
	if n := c.State().KernelTries; n != 0 {
		t.Errorf("a jump that failed at once is counted: %d", n)
	}
	if err := c.SetState(func(s *cache.State) { s.KernelTries = 1 }); err != nil { // it came back with the wrong kernel
		t.Fatal(err)
	}
	want("after one that did not end well", 1)
	b.cmd.Kernel = a.Release.Kernel
	want("the kernel is right", 1)
}

func TestARoleThatWantsKexecGetsItOrAReasonWhyNot(t *testing.T) {
	k := &stateKeeper{path: t.TempDir() + "/state.json"}
	s := &service{log: slog.New(slog.DiscardHandler), state: k}
	var went string
	s.reboot = func(context.Context, *slog.Logger) error { went = "reboot"; return nil }
	s.jump = func(context.Context, *slog.Logger) error { went = "kexec"; return nil }
	for _, c := range []struct {
		activate  string
		loads     error
		say, goes string
	}{
		{"", nil, "", "reboot"},
		{agentapi.Kexec, nil, "; by kexec", "kexec"},
		{agentapi.Kexec, errors.New("locked down"), "; not by kexec: locked down", "reboot"},
	} {
		s.load = func(agentapi.Assignment) error { return c.loads }
		said := s.loadNext(agentapi.Assignment{Activate: c.activate})
		if err := s.leaveSystem(t.Context()); err != nil || said != c.say || went != c.goes {
			t.Errorf("activate %q, loading %v: says %q and goes by %s, %v; want %q and %s", c.activate, c.loads, said, went, err, c.say, c.goes)
		}
	}
}

// blobs is a source of what was added to it.
type blobs map[digest.Digest]string

func (b blobs) add(content string) agentapi.Blob {
	d := digest.Of([]byte(content))
	b[d] = content
	return agentapi.Blob{Digest: d, Size: int64(len(content))}
}

func (b blobs) Blob(_ context.Context, d digest.Digest, offset int64) (io.ReadCloser, int64, error) {
	return io.NopCloser(strings.NewReader(b[d][offset:])), offset, nil
}
