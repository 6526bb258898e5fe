package source

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// No test may read the keys, the agent or the Git configuration of who runs it.
	for _, name := range []string{"SSH_AUTH_SOCK", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"} {
		_ = os.Unsetenv(name)
	}
	goleak.VerifyTestMain(m)
}

// A gitRepo is a working tree that a person works in, with the git program.
type gitRepo struct {
	t   testing.TB
	dir string
}

// git runs git in dir and returns what it prints.
func runGit(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(),
		"HOME="+filepath.Join(os.TempDir(), "nobody"), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_AUTHOR_NAME=Ada", "GIT_AUTHOR_EMAIL=ada@example.com", "GIT_COMMITTER_NAME=Ada", "GIT_COMMITTER_EMAIL=ada@example.com")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func newGitRepo(t testing.TB) *gitRepo {
	t.Helper()
	r := &gitRepo{t, t.TempDir()}
	r.git("init", "-q", "-b", "main", ".")
	r.git("config", "gc.auto", "0")
	return r
}

func (r *gitRepo) git(args ...string) string { r.t.Helper(); return runGit(r.t, r.dir, args...) }

func (r *gitRepo) write(name, text string) {
	r.t.Helper()
	name = filepath.Join(r.dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

// commit writes one file, commits everything and returns the commit's hash.
func (r *gitRepo) commit(name, text string) string {
	r.t.Helper()
	r.write(name, text)
	r.git("add", "-A")
	r.git("commit", "-q", "-m", "set "+name)
	return r.git("rev-parse", "HEAD")
}

// bare makes a bare repository that r pushes to with `git push`.
func (r *gitRepo) bare() string {
	r.t.Helper()
	dir := filepath.Join(r.t.TempDir(), "fleet.git")
	runGit(r.t, r.t.TempDir(), "init", "-q", "--bare", "-b", "main", dir)
	r.git("remote", "add", "origin", dir)
	r.git("push", "-q", "-u", "origin", "main")
	return dir
}

func testLog(t testing.TB) *slog.Logger {
	t.Helper()
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func open(t testing.TB, cfg Config) *Repo {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(t.TempDir(), "mirror")
	}
	cfg.Log = testLog(t)
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func fetch(t testing.TB, r *Repo) Revision {
	t.Helper()
	rev, err := r.Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func want(t testing.TB, rev Revision, hash, file, text string) {
	t.Helper()
	if rev.Commit.Hash != hash {
		t.Errorf("got commit %s, want %s", rev.Commit.Hash, hash)
	}
	b, err := fs.ReadFile(rev.Tree, file)
	if err != nil || string(b) != text {
		t.Errorf("%s has %q (%v), want %q", file, b, err, text)
	}
}

func TestFetchLocal(t *testing.T) {
	work := newGitRepo(t)
	first := work.commit("fleet.cue", "one")
	bare := work.bare()
	linked := filepath.Join(t.TempDir(), "linked")
	work.git("worktree", "add", "-q", "-b", "other", linked)
	for name, repo := range map[string]string{
		"working tree": work.dir, "bare": bare, "file URL": "file://" + bare, "linked worktree": linked,
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, Config{Repo: repo})
			rev := fetch(t, r)
			want(t, rev, first, "fleet.cue", "one")
			if rev.Commit.Subject != "set fleet.cue" || rev.Commit.Author != "Ada" || rev.Commit.Time.IsZero() || rev.Rewritten {
				t.Errorf("got %+v", rev)
			}
		})
	}
}

func TestRewritten(t *testing.T) {
	work := newGitRepo(t)
	first := work.commit("a", "1")
	second := work.commit("a", "2")
	bare := work.bare()
	dir := filepath.Join(t.TempDir(), "mirror")
	r := open(t, Config{Repo: bare, Dir: dir})
	want(t, fetch(t, r), second, "a", "2")
	if fetch(t, r).Rewritten {
		t.Error("an unchanged branch is rewritten")
	}
	work.git("reset", "-q", "--hard", first)
	third := work.commit("a", "3")
	work.git("push", "-q", "-f")
	runGit(t, bare, "gc", "-q", "--prune=now")
	rev := fetch(t, r)
	want(t, rev, third, "a", "3")
	if !rev.Rewritten {
		t.Error("a forced branch is not rewritten")
	}
	if fetch(t, r).Rewritten {
		t.Error("told twice")
	}
	// What was in force can still be loaded, by another process, with the remote gone.
	if err := os.RemoveAll(bare); err != nil {
		t.Fatal(err)
	}
	r = open(t, Config{Repo: bare, Dir: dir})
	old, err := r.Revision(t.Context(), second)
	if err != nil {
		t.Fatal(err)
	}
	want(t, old, second, "a", "2")
	if _, err := r.Fetch(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v, want ErrUnreachable", err)
	}
}

// A process is killed after the mirror moved, and before its caller wrote down what it was given: the next one is told.
func TestRewrittenSinceWhatIsKnown(t *testing.T) {
	work := newGitRepo(t)
	first := work.commit("a", "1")
	second := work.commit("a", "2")
	cfg := Config{Repo: work.dir, Dir: filepath.Join(t.TempDir(), "mirror")}
	fetch(t, open(t, cfg))
	work.git("reset", "-q", "--hard", first)
	third := work.commit("a", "3")
	fetch(t, open(t, cfg)) // killed with what it was given
	fourth := work.commit("a", "4")
	for known, rewritten := range map[string]bool{
		"": false, first: false, second: true, third: false, fourth: false, strings.Repeat("0", 40): false, strings.Repeat("1", 40): true,
	} {
		rev, err := open(t, cfg).FetchSince(t.Context(), known)
		if err != nil || rev.Commit.Hash != fourth || rev.Rewritten != rewritten {
			t.Errorf("since %q: got %s, rewritten %v, %v; want %s, %v", known, rev.Commit.Hash, rev.Rewritten, err, fourth, rewritten)
		}
	}
}

func TestTreeIsAFileSystem(t *testing.T) {
	work := newGitRepo(t)
	work.write("fleet.cue", "package fleet\n")
	work.write("a/b/c.txt", "c")
	work.write("a.b/x", "sorted apart from a")
	work.write("a/empty", "")
	head := work.commit("z/run.sh", "#!/bin/sh\n")
	rev := fetch(t, open(t, Config{Repo: work.dir}))
	if rev.Commit.Hash != head {
		t.Fatal(rev.Commit)
	}
	if err := fstest.TestFS(rev.Tree, "fleet.cue", "a/b/c.txt", "a.b/x", "a/empty", "z/run.sh"); err != nil {
		t.Fatal(err)
	}
}

// One commit in a repository of 10,000 files, from the push to its tree.
func BenchmarkFetchOneCommit(b *testing.B) {
	work := newGitRepo(b)
	for i := range 10_000 {
		work.write(fmt.Sprintf("hosts/%02d/h%05d.cue", i%100, i), fmt.Sprintf("package fleet\n\nhosts: h%05d: role: \"web\"\n", i))
	}
	work.commit("fleet.cue", "package fleet\n")
	r := open(b, Config{Repo: work.dir})
	if _, err := r.Fetch(b.Context()); err != nil {
		b.Fatal(err)
	}
	n := 0
	for b.Loop() {
		b.StopTimer()
		n++
		head := work.commit("hosts/07/h00007.cue", fmt.Sprint("package fleet // ", n))
		b.StartTimer()
		rev, err := r.Fetch(b.Context())
		if err != nil || rev.Commit.Hash != head {
			b.Fatal(err, rev)
		}
	}
}
