package source

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
)

func TestEmptyRepository(t *testing.T) {
	work := newGitRepo(t)
	r := open(t, Config{Repo: work.dir})
	if _, err := r.Fetch(t.Context()); !errors.Is(err, ErrNoBranch) || !strings.Contains(err.Error(), "no branches yet") {
		t.Errorf("got %v", err)
	}
	head := work.commit("a", "1")
	want(t, fetch(t, r), head, "a", "1")
}

func TestBranchAndPath(t *testing.T) {
	work := newGitRepo(t)
	work.commit("fleets/first/fleet.cue", "first")
	work.commit("top.cue", "top")
	work.git("branch", "release/1.0")
	r := open(t, Config{Repo: work.dir, Branch: "release/1.0", Path: "/fleets/first/"})
	rev := fetch(t, r)
	want(t, rev, work.git("rev-parse", "release/1.0"), "fleet.cue", "first")
	if _, err := fs.Stat(rev.Tree, "top.cue"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("above the path: %v", err)
	}
	for _, p := range []string{"fleets/second", "top.cue", "top.cue/x"} {
		rev, err := open(t, Config{Repo: work.dir, Path: p}).Fetch(t.Context())
		if !errors.Is(err, ErrNoPath) || rev.Commit.Hash == "" {
			t.Errorf("%s: got %v, %+v", p, err, rev)
		}
	}
	if _, err := open(t, Config{Repo: work.dir, Branch: "nope"}).Fetch(t.Context()); !errors.Is(err, ErrNoBranch) || !strings.Contains(err.Error(), "main, release/1.0") {
		t.Errorf("got %v", err)
	}
	for _, cfg := range []Config{
		{Repo: work.dir, Path: "../x"},
		{Repo: work.dir, Branch: "a..b"},
		{Repo: work.dir, Branch: "a\nb"},
		{Repo: ""},
		{Repo: "ftp://example.com/x"},
		{Repo: "https:///x"},
		{Repo: "file://elsewhere/x"},
	} {
		cfg.Dir = t.TempDir()
		if _, err := Open(cfg); err == nil {
			t.Errorf("%+v is accepted", cfg)
		}
	}
}

func TestRevisions(t *testing.T) {
	work := newGitRepo(t)
	first := work.commit("a", "1")
	work.git("tag", "v1")
	work.git("tag", "-a", "-m", "annotated", "v1.0")
	second := work.commit("a", "2")
	work.git("checkout", "-q", "-b", "side", first)
	side := work.commit("b", "side")
	work.git("checkout", "-q", "main")
	work.git("merge", "-q", "--no-edit", "side")
	merge := work.git("rev-parse", "HEAD")
	r := open(t, Config{Repo: work.dir})
	if _, err := r.Revision(t.Context(), "HEAD"); !errors.Is(err, ErrNoRevision) {
		t.Errorf("before the first fetch: %v", err)
	}
	fetch(t, r)
	for rev, hash := range map[string]string{
		"HEAD": merge, "main": merge, "side": side, "refs/heads/side": side, "origin/main": merge, "v1": first, "v1.0": first,
		first: first, first[:4]: first, first[:7]: first, strings.ToUpper(second[:12]): second, "HEAD~1": second, "HEAD^": second,
		"HEAD^2": side, "main~2": first, "HEAD^2~1": first, "HEAD~0": merge, "HEAD^0": merge,
	} {
		got, err := r.Revision(t.Context(), rev)
		if err != nil || got.Commit.Hash != hash {
			t.Errorf("%s: got %s, %v, want %s", rev, got.Commit.Hash, err, hash)
		}
	}
	for _, rev := range []string{
		"", "nope", "^", "~1", "HEAD~4", "HEAD^3", "-x", "a..b", strings.Repeat("0", 40), "0000", "main:a", "HEAD^{tree}", ":/x",
		"HEAD~999999999", work.git("rev-parse", "HEAD:a"), "x y", "../../etc/passwd",
	} {
		if _, err := r.Revision(t.Context(), rev); !errors.Is(err, ErrNoRevision) {
			t.Errorf("%q: got %v, want ErrNoRevision", rev, err)
		}
	}
}

func FuzzRevision(f *testing.F) {
	work := newGitRepo(f)
	first := work.commit("a", "1")
	work.commit("a", "2")
	r := open(f, Config{Repo: work.dir})
	if _, err := r.Fetch(context.Background()); err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{"HEAD", "HEAD~1", "main^", first[:7], "^2~", "refs/heads/main", "a@{u}"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, rev string) {
		got, err := r.Revision(context.Background(), rev)
		if (err == nil) == (got.Commit.Hash == "") {
			t.Errorf("%q: %v, %+v", rev, err, got)
		}
		if err != nil && !errors.Is(err, ErrNoRevision) {
			t.Errorf("%q: %v", rev, err)
		}
	})
}

// A local repository is repacked and collected while it is read.
func TestCollectedWhileRead(t *testing.T) {
	work := newGitRepo(t)
	for i := range 20 {
		work.commit(fmt.Sprintf("dir%d/f", i), "x")
	}
	done := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		defer close(done)
		for i := range 12 {
			work.write("a", fmt.Sprint(i))
			for _, args := range [][]string{{"add", "-A"}, {"commit", "-q", "--amend", "-m", fmt.Sprint(i)}, {"reflog", "expire", "--expire=now", "--all"}, {"gc", "-q", "--prune=now"}} {
				cmd := exec.Command("git", append([]string{"-c", "user.name=A", "-c", "user.email=a@b.c"}, args...)...)
				cmd.Dir = work.dir
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("git %v: %v\n%s", args, err, out)
				}
			}
		}
	})
	for n := 0; ; n++ {
		r := open(t, Config{Repo: work.dir})
		rev, err := r.Fetch(t.Context())
		if err != nil {
			t.Fatalf("fetch %d: %v", n, err)
		}
		if _, err := fs.ReadFile(rev.Tree, "dir7/f"); err != nil {
			t.Fatalf("fetch %d: %v", n, err)
		}
		select {
		case <-done:
			wait.Wait()
			return
		default:
		}
	}
}

// damage is done to a mirror that has one commit; a new process must get over it.
func TestDamagedMirror(t *testing.T) {
	glob := func(t *testing.T, dir, pattern string) string {
		t.Helper()
		all, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(all) == 0 {
			t.Fatalf("no %s in the mirror", pattern)
		}
		return all[0]
	}
	truncate := func(name string, keep int64) error {
		fi, err := os.Stat(name)
		if err != nil {
			return err
		}
		return os.Truncate(name, min(keep, fi.Size()))
	}
	//nolint:thelper // only glob fails t, and it is a helper
	for name, damage := range map[string]func(t *testing.T, dir string) error{
		"a truncated pack": func(t *testing.T, dir string) error { return truncate(glob(t, dir, "objects/pack/*.pack"), 40) },
		"an empty pack":    func(t *testing.T, dir string) error { return truncate(glob(t, dir, "objects/pack/*.pack"), 0) },
		"a pack with a flipped bit": func(t *testing.T, dir string) error {
			p := glob(t, dir, "objects/pack/*.pack")
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			return errors.Join(os.Chmod(p, 0o600), os.WriteFile(p, b, 0o600))
		},
		"no index":      func(t *testing.T, dir string) error { return os.Remove(glob(t, dir, "objects/pack/*.idx")) },
		"half an index": func(t *testing.T, dir string) error { return truncate(glob(t, dir, "objects/pack/*.idx"), 100) },
		"no pack":       func(t *testing.T, dir string) error { return os.Remove(glob(t, dir, "objects/pack/*.pack")) },
		"no names":      func(t *testing.T, dir string) error { return os.Remove(filepath.Join(dir, "packed-refs")) },
		"garbage as names": func(t *testing.T, dir string) error {
			return os.WriteFile(filepath.Join(dir, "packed-refs"), []byte("a b c\n"), 0o600)
		},
		"only a directory": func(t *testing.T, dir string) error {
			return errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Join(dir, "objects"), 0o700))
		},
		"nothing": func(t *testing.T, dir string) error { return os.RemoveAll(dir) },
		"half a pack": func(t *testing.T, dir string) error {
			return os.WriteFile(filepath.Join(dir, "objects/pack/tmp_pack_1"), []byte("PACK"), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			work := newGitRepo(t)
			head := work.commit("a", "1")
			dir := filepath.Join(t.TempDir(), "mirror")
			fetch(t, open(t, Config{Repo: work.dir, Dir: dir}))
			if err := damage(t, dir); err != nil {
				t.Fatal(err)
			}
			r := open(t, Config{Repo: work.dir, Dir: dir})
			want(t, fetch(t, r), head, "a", "1")
			if left, _ := filepath.Glob(filepath.Join(dir, "objects/pack/tmp_*")); len(left) > 0 {
				t.Errorf("left %q", left)
			}
			want(t, fetch(t, open(t, Config{Repo: work.dir, Dir: dir})), head, "a", "1")
		})
	}
}

// What can be read of a damaged mirror is kept: the remote may not have it any more.
func TestDamagedMirrorKeepsWhatItCan(t *testing.T) {
	work := newGitRepo(t)
	first := work.commit("a", "1")
	bare := work.bare()
	dir := filepath.Join(t.TempDir(), "mirror")
	r := open(t, Config{Repo: bare, Dir: dir})
	fetch(t, r)
	work.git("commit", "-q", "--amend", "-m", "forced")
	work.git("push", "-q", "-f")
	fetch(t, r)
	runGit(t, bare, "gc", "-q", "--prune=now")
	work.commit("a", "2")
	work.git("push", "-q")
	before, _ := filepath.Glob(filepath.Join(dir, "objects/pack/*.pack"))
	fetch(t, r)
	after, _ := filepath.Glob(filepath.Join(dir, "objects/pack/*.pack"))
	for _, p := range after {
		if !strings.Contains(strings.Join(before, " "), p) {
			if err := os.Truncate(p, 30); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Rename(bare, bare+".away"); err != nil {
		t.Fatal(err)
	}
	r = open(t, Config{Repo: bare, Dir: dir})
	rev, err := r.Revision(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	want(t, rev, first, "a", "1")
}

// A mirror that is damaged under a running server is made anew by the next fetch, and its revisions stay readable.
func TestDamagedWhileOpen(t *testing.T) {
	work := newGitRepo(t)
	work.commit("a", "1")
	r := open(t, Config{Repo: work.dir})
	old := fetch(t, r)
	packs, _ := filepath.Glob(filepath.Join(r.mirror.dir, "objects/pack/*"))
	for _, p := range packs {
		if err := os.Remove(p); err != nil {
			t.Fatal(err)
		}
	}
	head := work.commit("a", "2")
	want(t, fetch(t, r), head, "a", "2")
	want(t, old, old.Commit.Hash, "a", "1")
}

// split fetches two commits, of which the second has a directory that only the first one's pack has, and returns that
// pack without its ending.
func split(t *testing.T) (r *Repo, head, pack string) {
	t.Helper()
	work := newGitRepo(t)
	work.commit("dir/a", "1")
	r = open(t, Config{Repo: work.dir})
	fetch(t, r)
	packs, err := filepath.Glob(filepath.Join(r.mirror.dir, "objects/pack/*.pack"))
	if err != nil || len(packs) != 1 {
		t.Fatalf("packs %q, %v", packs, err)
	}
	head = work.commit("b", "2")
	fetch(t, r)
	r = open(t, r.cfg) // which has read no directory yet
	return r, head, strings.TrimSuffix(packs[0], ".pack")
}

// A mirror that cannot be read is not the commit's fault: the commit is asked for again, and taken when it can be.
func TestUnreadableMirror(t *testing.T) {
	r, head, pack := split(t)
	if err := errors.Join(os.Rename(pack+".pack", pack+".away"), os.Mkdir(pack+".pack", 0o700)); err != nil { // which is read with EISDIR
		t.Fatal(err)
	}
	rev, err := r.Fetch(t.Context())
	if err == nil || errors.Is(err, ErrTree) || errors.Is(err, ErrNoPath) || rev.Tree != nil {
		t.Errorf("got %v, want an error that blames no commit", err)
	}
	if now, ok := r.look(t.Context()); !ok || !r.differs(now) {
		t.Error("nobody would ask again")
	}
	if err := errors.Join(os.Remove(pack+".pack"), os.Rename(pack+".away", pack+".pack")); err != nil {
		t.Fatal(err)
	}
	want(t, fetch(t, r), head, "dir/a", "1")
	if now, ok := r.look(t.Context()); !ok || r.differs(now) {
		t.Error("everybody would ask again")
	}
}

// A directory that a running server's mirror lost is fetched again, though the commit that has it is still there.
func TestLostDirectory(t *testing.T) {
	r, head, pack := split(t)
	if err := errors.Join(os.Remove(pack+".pack"), os.Remove(pack+".idx")); err != nil {
		t.Fatal(err)
	}
	want(t, fetch(t, r), head, "dir/a", "1")
}

// What a remote says goes into a record.
func TestLongErrors(t *testing.T) {
	var none scrubber
	long := strings.Repeat("long\n", 1<<20)
	if text := none.wrap("fetching", fmt.Errorf("%w: %s", ErrAuth, long)).Error(); len(text) > maxText+100 || strings.Contains(text, "\n") {
		t.Errorf("an error has %d bytes: %.100q", len(text), text)
	}
	got := refs{}
	for i := range 9 {
		got[plumbing.NewBranchReferenceName(fmt.Sprint(i, strings.Repeat("x", 60_000)))] = plumbing.ZeroHash
	}
	if text := noBranch("main", got).Error(); len(text) > 1000 || !strings.HasSuffix(text, "and 4 more") {
		t.Errorf("an error has %d bytes: %.100q", len(text), text)
	}
}

const killMe = "TROUPE_TEST_SOURCE_FETCH"

// A process is killed again and again while it fetches. The next one goes on.
func TestKilled(t *testing.T) {
	if args := os.Getenv(killMe); args != "" {
		repo, dir, _ := strings.Cut(args, "|")
		r, err := Open(Config{Repo: repo, Dir: dir})
		fmt.Println("open:", err)
		for err == nil {
			_, err = r.Fetch(context.Background())
			fmt.Println("fetched:", err)
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, "objects")), os.RemoveAll(filepath.Join(dir, "packed-refs")))
			if err == nil {
				r, err = Open(Config{Repo: repo, Dir: dir})
			}
		}
		t.Fatal(err)
	}
	work := newGitRepo(t)
	for i := range 200 {
		work.write(fmt.Sprintf("dir%d/file%d", i%10, i), strings.Repeat(fmt.Sprint(i), 500))
	}
	head := work.commit("a", "1")
	dir := filepath.Join(t.TempDir(), "mirror")
	for i := range 15 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), killMe+"="+work.dir+"|"+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 100)); err != nil { // it has opened the mirror
			t.Fatal(err)
		}
		// Not a wait for anything: the moment of death is to be another one each time.
		time.Sleep(time.Duration(i) * 3 * time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		state, err := cmd.Process.Wait()
		if err != nil {
			t.Fatal(err)
		}
		if ws, ok := state.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
			t.Fatalf("the process ended by itself: %v", state)
		}
		want(t, fetch(t, open(t, Config{Repo: work.dir, Dir: dir})), head, "a", "1")
	}
}

// Many fetches do not leave many packs, and lose nothing that was ever in force.
func TestCompact(t *testing.T) {
	work := newGitRepo(t)
	var hashes []string
	var r *Repo
	var early Revision
	for i := range maxPacks + 10 {
		hashes = append(hashes, work.commit("a", fmt.Sprint(i)))
		if i == 0 {
			r = open(t, Config{Repo: work.bare()})
		}
		work.git("push", "-q", "-f")
		rev := fetch(t, r)
		if i == 3 {
			early = rev
			work.git("reset", "-q", "--hard", "HEAD~1") // what i == 3 made is only in our mirror
		}
	}
	packs, _ := filepath.Glob(filepath.Join(r.mirror.dir, "objects/pack/*.pack"))
	if len(packs) > maxPacks {
		t.Errorf("there are %d packs", len(packs))
	}
	for i, h := range hashes {
		rev, err := r.Revision(t.Context(), h)
		if err != nil {
			t.Fatal(err)
		}
		want(t, rev, h, "a", fmt.Sprint(i))
	}
	want(t, early, hashes[3], "a", "3")
	runGit(t, r.mirror.dir, "fsck", "--full")
}

func TestShallowRepository(t *testing.T) {
	work := newGitRepo(t)
	work.commit("a", "1")
	work.commit("a", "2")
	head := work.commit("a", "3")
	dir := filepath.Join(t.TempDir(), "shallow")
	runGit(t, work.dir, "clone", "-q", "--depth=1", "file://"+work.dir, dir)
	r := open(t, Config{Repo: dir})
	want(t, fetch(t, r), head, "a", "3")
	if _, err := r.Revision(t.Context(), "HEAD~1"); !errors.Is(err, ErrNoRevision) {
		t.Errorf("got %v", err)
	}
}

func TestAlternates(t *testing.T) {
	work := newGitRepo(t)
	head := work.commit("a", "1")
	dir := filepath.Join(t.TempDir(), "shared")
	runGit(t, work.dir, "clone", "-q", "--shared", work.dir, dir)
	want(t, fetch(t, open(t, Config{Repo: dir})), head, "a", "1")
}

// One branch that cannot be read does not hold up the other.
func TestBrokenSideBranch(t *testing.T) {
	work := newGitRepo(t)
	head := work.commit("a", "1")
	work.write(".git/refs/heads/broken", strings.Repeat("1", 40)+"\n")
	r := open(t, Config{Repo: work.dir})
	want(t, fetch(t, r), head, "a", "1")
	if _, err := r.Revision(t.Context(), "broken"); !errors.Is(err, ErrNoRevision) {
		t.Errorf("got %v", err)
	}
	r = open(t, Config{Repo: work.dir, Branch: "broken"})
	if _, err := r.Fetch(t.Context()); err == nil {
		t.Error("a broken branch is no error")
	}
}
