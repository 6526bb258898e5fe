package source

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-git/go-git/v5/plumbing"
)

// mktree makes a tree of "mode type hash\tname" lines.
func (r *gitRepo) mktree(lines ...string) string {
	r.t.Helper()
	cmd := exec.Command("git", "mktree", "--missing")
	cmd.Dir = r.dir
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	out, err := cmd.Output()
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func (r *gitRepo) commitTree(tree string) string {
	r.t.Helper()
	h := r.git("commit-tree", "-m", "made by hand", tree)
	r.git("update-ref", "refs/heads/main", h)
	return h
}

func TestHostileTrees(t *testing.T) {
	work := newGitRepo(t)
	work.commit("a", "1")
	blob := work.git("rev-parse", "HEAD:a")
	bomb := work.mktree("100644 blob " + blob + "\tf")
	for range 12 {
		var lines []string
		for i := range 10 {
			lines = append(lines, fmt.Sprintf("040000 tree %s\td%d", bomb, i))
		}
		bomb = work.mktree(lines...)
	}
	deep := work.mktree("100644 blob " + blob + "\tf")
	for range MaxDepth + 2 {
		deep = work.mktree("040000 tree " + deep + "\td")
	}
	for name, tree := range map[string]string{
		"a bomb": bomb, "too deep": deep,
		"dots": work.mktree("100644 blob " + blob + "\t.."), "a long name": work.mktree("100644 blob " + blob + "\t" + strings.Repeat("x", 300)),
	} {
		h := work.commitTree(tree)
		rev, err := open(t, Config{Repo: work.dir}).Fetch(t.Context())
		if !errors.Is(err, ErrTree) || rev.Commit.Hash != h || rev.Tree != nil {
			t.Errorf("%s: got %v, %+v", name, err, rev)
		}
	}
}

// What is no directory, with a hash that says that it is meant so, stays that.
func TestMalformedDirectory(t *testing.T) {
	work := newGitRepo(t)
	work.commit("a", "1")
	r := open(t, Config{Repo: work.dir})
	fetch(t, r)
	cmd := exec.CommandContext(t.Context(), "git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin")
	cmd.Dir, cmd.Stdin = r.mirror.dir, strings.NewReader("no tree")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.mirror.objects.tree(plumbing.NewHash(strings.TrimSpace(string(out))))
	if !errors.Is(blame(err), ErrTree) {
		t.Errorf("got %v, want one that is the commit's fault", err)
	}
}

func TestOddEntries(t *testing.T) {
	work := newGitRepo(t)
	work.commit("fleet.cue", "one")
	blob := work.git("rev-parse", "HEAD:fleet.cue")
	work.write("big", strings.Repeat("x", MaxFileSize+1))
	big := work.git("hash-object", "-w", "big")
	work.commitTree(work.mktree(
		"100644 blob "+blob+"\tfleet.cue", "100755 blob "+blob+"\trun", "120000 blob "+blob+"\tlink", "100644 blob "+big+"\tbig",
		"160000 commit "+strings.Repeat("1", 40)+"\tsubmodule", "100644 blob "+blob+"\tlatin\xe9", "040000 tree "+work.mktree("100644 blob "+blob+"\tx")+"\tdir",
	))
	tree := fetch(t, open(t, Config{Repo: work.dir})).Tree
	list, err := fs.ReadDir(tree, ".")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range list {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%v %s %d", info.Mode(), e.Name(), info.Size()))
	}
	const want = "-r--r--r-- big 0, dr-xr-xr-x dir 0, -r--r--r-- fleet.cue 3, Lrwxrwxrwx link 3, -r-xr-xr-x run 3" // big was left out
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
	for name, want := range map[string]error{"big": errTooBig, "link": errSymlink, "link/x": errSymlink, "submodule": fs.ErrNotExist, "fleet.cue/x": fs.ErrNotExist, "../x": fs.ErrInvalid} {
		if _, err := fs.ReadFile(tree, name); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", name, err, want)
		}
	}
	if to, err := fs.ReadLink(tree, "link"); err != nil || to != "one" {
		t.Errorf("got %q, %v", to, err)
	}
	h, ok := tree.(interface{ Hash(string) (string, bool) }).Hash("fleet.cue")
	if !ok || h != blob {
		t.Errorf("got %s, want %s", h, blob)
	}
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"/srv/fleet.git":                              "/srv/fleet.git",
		"git@example.com:fleet.git":                   "git@example.com:fleet.git",
		"ssh://git@example.com/f":                     "ssh://git@example.com/f",
		"ssh://git:pw@example.com/f":                  "ssh://git@example.com/f",
		"https://example.com/f":                       "https://example.com/f",
		"https://u:pw@example.com:8443/f?token=x#y":   "https://example.com:8443/f",
		"https://ghp_token@example.com/f":             "https://example.com/f",
		"https://u:p%zz@example.com/f?private_token=": "https://example.com/f",
		"file:///srv/fleet.git":                       "file:///srv/fleet.git",
	} {
		if got := Redact(in); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
	cfg := Config{Repo: "https://u:hunter2@example.com/f", Branch: "main"}
	if s := fmt.Sprint(cfg, cfg.Redacted().Repo); strings.Contains(s, "hunter2") {
		t.Error(s)
	}
}

func FuzzRedact(f *testing.F) {
	f.Add("user", "pa ss/wo@rd", "example.com/x")
	f.Add("", "%zz", "h")
	f.Fuzz(func(t *testing.T, user, password, rest string) {
		const mark = "M4RK"
		repo := "https://" + url.UserPassword(user, mark+password).String() + "@" + rest
		if strings.Contains(rest, mark) || strings.Contains(user, mark) {
			return
		}
		if got := Redact(repo); strings.Contains(got, mark) {
			t.Errorf("%q: got %q", repo, got)
		}
		s := newScrubber(repo)
		if got := s.text("fetching " + repo + ": no"); strings.Contains(got, mark) {
			t.Errorf("%q: got %q", repo, got)
		}
		Redact(rest)
	})
}

func TestGitDir(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"garbage": "hello\n", "nowhere": "gitdir: /does/not/exist\n", "huge": "gitdir: " + strings.Repeat("x", 10<<10)} {
		d := filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(d, 0o755), os.WriteFile(filepath.Join(d, ".git"), []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
		if got, err := gitDir(d); err == nil {
			t.Errorf("%s: got %q", name, got)
		}
	}
	if _, err := gitDir(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	for in, ok := range map[string]bool{"git@h:p": true, "h:p/q": true, "./h:p": false, "/a:b": false, "h:": false, ":p": false} {
		if _, got := hostPath(in); got != ok {
			t.Errorf("%s: got %v", in, got)
		}
	}
}
