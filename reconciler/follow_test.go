package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/reconciler/source"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
	"github.com/troupe-dev/troupe/schema/load"
)

// A hostsLoader takes each line of the file "hosts" for a host; a line that starts with "!" is an error of that name.
type hostsLoader struct {
	loads int
	fail  int // so many loads fail
}

func (l *hostsLoader) Load(_ context.Context, tree fs.FS) (*schema.Fleet, error) {
	l.loads++
	if l.fail > 0 {
		l.fail--
		return nil, errors.New("no more processes")
	}
	b, err := fs.ReadFile(tree, "hosts")
	if err != nil {
		return nil, schema.Problems{{Message: "no fleet here"}}
	}
	f := &schema.Fleet{Hosts: map[string]schema.Host{}}
	for line := range strings.Lines(string(b)) {
		name := strings.TrimSpace(line)
		switch name {
		case "!problem":
			return nil, schema.Problems{{File: "hosts", Line: 1, Column: 1, Message: "wrong"}}
		case "!huge":
			all := make(schema.Problems, maxProblems+1)
			for i := range all {
				all[i] = schema.Problem{File: strings.Repeat("f", 1<<20), Message: strings.Repeat("m", 1<<20)}
			}
			return nil, all
		case "!limit":
			return nil, fmt.Errorf("%w: %w", load.ErrLimit, schema.Problems{{Message: "took too long"}})
		case "!transient":
			return nil, errors.New("no more processes")
		case "!empty":
			f.AllowEmpty = true
		default:
			f.Hosts[name] = schema.Host{Name: name}
		}
	}
	return f, nil
}

// A followed is a follow controller and the repo that it follows.
type followed struct {
	*follow
	t      *testing.T
	dir    string
	loader *hostsLoader
	clock  time.Time
}

func newFollowed(t *testing.T) *followed {
	t.Helper()
	s := openStore(t)
	f := &followed{t: t, dir: t.TempDir(), loader: &hostsLoader{}, clock: testStart}
	f.git("init", "-q", "-b", "main")
	f.commit("n1\nn2\n")
	f.follow = f.on(s, t.TempDir())
	return f
}

// on is a controller as a server has it that was just started.
func (f *followed) on(s *state.Store, mirror string) *follow {
	f.t.Helper()
	return f.onPath(s, mirror, ".")
}

func (f *followed) onPath(s *state.Store, mirror, path string) *follow {
	f.t.Helper()
	log := slog.New(slog.DiscardHandler)
	repo, err := source.Open(source.Config{Repo: f.dir, Dir: mirror, Path: path})
	if err != nil {
		f.t.Fatal(err)
	}
	return &follow{
		repo: repo, branch: "main", path: path, loader: f.loader, store: s, events: &recorder{store: s, log: log}, log: log,
		now: func() time.Time { return f.clock }, changed: func() {}, wake: make(chan struct{}, 1),
	}
}

func (f *followed) git(args ...string) {
	f.t.Helper()
	cmd := exec.CommandContext(f.t.Context(), "git", args...)
	cmd.Dir = f.dir
	cmd.Env = append(os.Environ(), "GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.com", "GIT_COMMITTER_NAME=t",
		"GIT_COMMITTER_EMAIL=t@example.com", "GIT_CONFIG_GLOBAL=/dev/null")
	if out, err := cmd.CombinedOutput(); err != nil {
		f.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
}

func (f *followed) commit(hosts string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, "hosts"), []byte(hosts), 0o644); err != nil {
		f.t.Fatal(err)
	}
	f.git("add", ".")
	f.git("commit", "-q", "--allow-empty-message", "-m", strings.ReplaceAll(strings.TrimSpace(hosts), "\n", " "))
}

// looked is the source record after one look at the repo.
func (f *followed) looked() state.Source {
	f.t.Helper()
	if err := f.step(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
	rec, err := state.Sources.Get(f.t.Context(), f.store, state.SourceID)
	if err != nil {
		f.t.Fatal(err)
	}
	return rec
}

func TestBadCommitLeavesTheFleetAsItIs(t *testing.T) {
	f := newFollowed(t)
	good := f.looked()
	if good.Applied == nil || good.Applied.Subject != "n1 n2" || len(good.Problems) != 0 {
		t.Fatalf("after a good commit: %+v", good)
	}
	f.commit("!problem\n")
	bad := f.looked()
	if bad.Applied.Hash != good.Applied.Hash || bad.Attempted.Subject != "!problem" || len(bad.Problems) != 1 || bad.Problems[0].String() != "hosts:1:1: wrong" {
		t.Errorf("after a bad commit: %+v", bad)
	}
	if n := len(f.fleet.Load().fleet.Hosts); n != 2 {
		t.Errorf("%d hosts in force, want the 2 of the good commit", n)
	}
	loads := f.loader.loads
	f.looked()
	if f.loader.loads != loads {
		t.Error("a commit that is known to be wrong was loaded again")
	}
	f.git("reset", "-q", "--hard", "HEAD~1")
	back := f.looked()
	if len(back.Problems) != 0 || back.Attempted.Hash != good.Applied.Hash || back.Rewritten.IsZero() {
		t.Errorf("after the branch went back: %+v", back)
	}
}

func TestWhatMayNotBeTheCommitsFaultIsTriedAgain(t *testing.T) {
	for what, after := range map[string]time.Duration{"!limit\n": retryLimit, "!transient\n": retryEvery} {
		f := newFollowed(t)
		f.looked()
		f.commit(what)
		rec := f.looked()
		if len(rec.Problems) != 1 || !rec.Retry.Equal(f.clock.Add(after)) {
			t.Errorf("%s: %+v, want one problem, and another try after %s", what, rec, after)
		}
		loads := f.loader.loads
		f.looked()
		if f.loader.loads != loads {
			t.Errorf("%s: tried again before its time", what)
		}
		f.clock = f.clock.Add(after)
		if err := f.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		if f.loader.loads != loads+1 {
			t.Errorf("%s: not tried again when its time came", what)
		}
	}
}

func TestEmptiedFleetIsRefusedUnlessItIsMeant(t *testing.T) {
	f := newFollowed(t)
	f.looked()
	f.commit("")
	if rec := f.looked(); len(rec.Problems) != 1 || !strings.Contains(rec.Problems[0].Message, "allowEmpty") {
		t.Errorf("emptied: %+v, want a problem that names allowEmpty", rec.Problems)
	}
	f.commit("!empty\n")
	if rec := f.looked(); len(rec.Problems) != 0 || rec.Applied.Subject != "!empty" {
		t.Errorf("emptied on purpose: %+v", rec)
	}
}

func TestEmptiedFleetIsRefusedByAServerThatKnowsOnlyAssignments(t *testing.T) {
	f := newFollowed(t)
	if err := state.Assignments.Put(t.Context(), f.store, "n1", state.Assignment{Host: "n1"}); err != nil {
		t.Fatal(err)
	}
	f.commit("")
	if rec := f.looked(); len(rec.Problems) != 1 || f.fleet.Load() != nil {
		t.Errorf("got %+v, want the emptied fleet refused", rec)
	}
}

func TestFleetInForceIsTakenUpWithoutTheRemote(t *testing.T) {
	f := newFollowed(t)
	mirror := t.TempDir()
	f.follow = f.on(f.store, mirror)
	f.looked()
	f.commit("!problem\n")
	f.looked()
	if err := os.Rename(f.dir, f.dir+".away"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Rename(f.dir+".away", f.dir) })
	again := f.on(f.store, mirror)
	if err := again.step(t.Context()); err != nil {
		t.Fatal(err)
	}
	cur := again.fleet.Load()
	if cur == nil || len(cur.fleet.Hosts) != 2 {
		t.Fatalf("in force after a restart without the remote: %+v, want the good commit's 2 hosts", cur)
	}
	rec, err := state.Sources.Get(t.Context(), f.store, state.SourceID)
	if err != nil || rec.FetchError == "" || rec.Applied == nil {
		t.Errorf("the record says %+v, %v; want why the repo cannot be followed", rec, err)
	}
}

func TestFleetInForceIsTriedUntilItLoads(t *testing.T) {
	f := newFollowed(t)
	mirror := t.TempDir()
	f.follow = f.on(f.store, mirror)
	f.looked()
	f.commit("!problem\n")
	f.looked()
	again := f.on(f.store, mirror)
	f.loader.fail = 1 // as on a server that is busy with its start
	for range 2 {
		if err := again.look(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if cur := again.fleet.Load(); cur == nil || len(cur.fleet.Hosts) != 2 {
		t.Errorf("in force after the second try: %+v, want the good commit's 2 hosts", cur)
	}
}

func TestForcePushIsToldAfterAKill(t *testing.T) {
	f := newFollowed(t)
	f.looked()
	killed := func(subject string) { // before it wrote down what it was given
		f.clock = f.clock.Add(time.Hour)
		f.git("commit", "-q", "--amend", "-m", subject)
		if _, err := f.repo.Fetch(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	killed("another")
	told := f.looked()
	if !told.Rewritten.Equal(f.clock) || told.Attempted.Subject != "another" {
		t.Errorf("after a force-push: %+v", told)
	}
	killed("a third")
	f.branch = "other" // than the one of which the record tells
	if rec := f.looked(); !rec.Rewritten.Equal(told.Rewritten) {
		t.Errorf("after a change of the branch: %+v", rec)
	}
}

// What a commit is refused for is recorded, however long its names are.
func TestLongProblemsAreCut(t *testing.T) {
	f := newFollowed(t)
	f.looked()
	f.commit("!huge\n")
	rec := f.looked()
	if len(rec.Problems) != maxProblems+1 {
		t.Fatalf("%d problems, want the first %d, and how many more", len(rec.Problems), maxProblems)
	}
	for _, p := range rec.Problems {
		if len(p.File)+len(p.Message) > 2*maxText+10 {
			t.Errorf("a problem of %d bytes", len(p.File)+len(p.Message))
		}
	}
	if got := warnings(t, f.store); len(got) != 1 {
		t.Errorf("warnings about %v, want one", got)
	}
}

// Nobody is told again and again of a commit whose refusal cannot be recorded.
func TestRefusalIsToldWhenItIsRecorded(t *testing.T) {
	f := newFollowed(t)
	rec := f.looked()
	rec.Attempted = &state.Commit{Hash: "c2"}
	rec.Repo = tooMuch // as if the disk were full
	for range 3 {
		if err := f.refuse(t.Context(), rec, schema.Problems{{Message: "no"}}); err == nil {
			t.Fatal("a record of 2 MiB was written")
		}
	}
	if got := warnings(t, f.store); len(got) != 0 {
		t.Errorf("warnings about %v, want none", got)
	}
}

// A server that was started with the wrong path takes up the same commit when it is started with the right one.
func TestCorrectedPathIsTakenUp(t *testing.T) {
	f := newFollowed(t)
	mirror := t.TempDir()
	wrong := f.onPath(f.store, mirror, "flete")
	if err := wrong.step(t.Context()); err != nil {
		t.Fatal(err)
	}
	rec, err := state.Sources.Get(t.Context(), f.store, state.SourceID)
	if err != nil || len(rec.Problems) != 1 || rec.Applied != nil {
		t.Fatalf("with the wrong path: %+v, %v; want a problem", rec, err)
	}
	f.follow = f.on(f.store, mirror)
	if rec := f.looked(); len(rec.Problems) != 0 || rec.Applied == nil || rec.Path != "." {
		t.Errorf("with the right path: %+v, want the commit in force", rec)
	}
}

// However often somebody asks, looks at the repo have a pause between them.
func TestPokesAreGathered(t *testing.T) {
	f := newFollowed(t)
	f.gap = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	start := func() { go func() { ended <- f.run(ctx) }() }
	if err := f.looks.after(t.Context(), start); err != nil { // it looks when it starts
		t.Fatal(err)
	}
	for range 5 { // each is taken out before the next one has room
		f.wake <- struct{}{}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if f.looks.begun != 1 {
		t.Errorf("%d looks in an hour with a pause of an hour, want 1", f.looks.begun)
	}
}

// A look that finds nothing new is not worth a write, but for one a minute.
func TestLooksWithoutNewsAreNotWritten(t *testing.T) {
	f := newFollowed(t)
	for _, hosts := range []string{"n1\n", "!problem\n"} {
		f.commit(hosts)
		first := f.looked().Fetched
		f.clock = f.clock.Add(lookEvery - time.Second)
		if got := f.looked().Fetched; !got.Equal(first) {
			t.Errorf("%q: written %s after the last time, with nothing new", hosts, got.Sub(first))
		}
		f.clock = f.clock.Add(time.Second)
		if got := f.looked().Fetched; !got.Equal(f.clock) {
			t.Errorf("%q: the record says that the repo last answered at %s, want %s", hosts, got, f.clock)
		}
	}
}
