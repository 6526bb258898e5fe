// Package source follows a branch of a Git repository (gitprotocol-pack(5), gitrepository-layout(5)) through a bare mirror
// of its own, and gives each commit as a read-only file tree without checking it out.
//
// Everything is read from the mirror, also where the repository lies on the same machine: a repository that is open in
// place may repack or collect what is being read, and after a force-push and a collection the commit that is in force
// would be gone from it. The mirror keeps every commit that was ever the head of the followed branch, so the one in
// force can be loaded again after a restart, with the remote unreachable or rewritten.
//
// Who can push to any branch is not trusted with the server's memory: the mirror leaves out files that are too big for a
// fleet, wherever it can.
//
// The mirror is a cache: where it is found damaged it is made anew from the repository, and what can still be read of
// the old one is taken over.
package source

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/object"

	"github.com/troupe-dev/troupe/reconciler/state"
)

// Defaults of Config.
const (
	DefaultBranch   = "main"
	DefaultInterval = 30 * time.Second
	DefaultTimeout  = 5 * time.Minute
)

// Config says what to follow, and how.
type Config struct {
	// Repo is the path of a working tree or of a bare repository, or a URL: https://, http://, ssh://, file://, or
	// [user@]host:path. It may hold credentials; Redact takes them out.
	Repo   string
	Branch string // default "main"
	Path   string // the fleet's directory in the repo, slash-separated; default ".", the whole of it
	Dir    string // of the mirror; made if missing. Nothing else may lie in it. One process at a time

	Interval time.Duration // between two polls by Watch; default 30 s
	Timeout  time.Duration // of one Fetch; default 5 min. A poll has at most 30 s

	// Credentials is a file in the format of git-credential-store(1), for https; "" for none. Those in Repo go first.
	Credentials string
	CAFile      string // PEM, certificate authorities for https beside those of the system; "" for none
	// SSHKey is a private key without a passphrase. "" asks the agent at SSH_AUTH_SOCK, then tries ~/.ssh/id_ed25519,
	// id_ecdsa and id_rsa.
	SSHKey string
	// KnownHosts is a file in the format of sshd(8). "" takes those of SSH_KNOWN_HOSTS (a list as in PATH), else
	// ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts. A host that is not in it is not talked to.
	KnownHosts string

	Log *slog.Logger // nil discards
}

// Redacted is c without credentials.
func (c Config) Redacted() Config {
	c.Repo = Redact(c.Repo)
	return c
}

// String is the repository and the branch, without credentials: a Config may be printed.
func (c Config) String() string { return Redact(c.Repo) + " " + c.Branch }

func (c Config) withDefaults() Config {
	if c.Branch == "" {
		c.Branch = DefaultBranch
	}
	c.Path = path.Clean(strings.Trim(c.Path, "/"))
	if c.Interval <= 0 {
		c.Interval = DefaultInterval
	}
	if c.Timeout <= 0 {
		c.Timeout = DefaultTimeout
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// A Revision is one commit, and the fleet's directory as it was in it.
type Revision struct {
	Commit state.Commit
	// Tree is the directory Config.Path of the commit. It also has Hash(name string) (string, bool), the Git object id
	// of a file or directory: what has the same id has the same content. It is safe for use by several goroutines and
	// stays readable as long as the Repo's directory does.
	Tree fs.FS
	// Rewritten says that the commit does not descend from the head that was known: a force-push.
	Rewritten bool
}

// A Repo follows one branch. Its methods may be called by several goroutines at once.
type Repo struct {
	cfg    Config
	log    *slog.Logger
	remote remote
	mirror *mirror
	scrub  scrubber
	busy   chan struct{} // holds a token while somebody changes the mirror

	mu       sync.Mutex
	known    observation // how the last Fetch found the remote
	answered time.Time
}

// A remote is the repository that is followed.
type remote interface {
	// list gives the heads and tags. An empty repository has none, and is no error.
	list(ctx context.Context) (refs, error)
	// fetch lists, and brings the objects that the mirror lacks.
	fetch(ctx context.Context, m *mirror) (refs, error)
}

// Open opens the mirror in cfg.Dir, makes it where there is none, and makes it anew where it is damaged. It does not talk
// to the repository: Revision works at once with what an earlier process fetched.
func Open(cfg Config) (*Repo, error) {
	cfg = cfg.withDefaults()
	r := &Repo{cfg: cfg, log: cfg.Log, scrub: newScrubber(cfg.Repo), busy: make(chan struct{}, 1)}
	if cfg.Dir == "" {
		return nil, errors.New("opening a mirror: no directory given")
	}
	if err := plumbing.NewBranchReferenceName(cfg.Branch).Validate(); err != nil || !printable(cfg.Branch) {
		return nil, fmt.Errorf("branch %q: not a valid name", cfg.Branch)
	}
	if !fs.ValidPath(cfg.Path) {
		return nil, fmt.Errorf("path %q: leaves the repository", cfg.Path)
	}
	var err error
	if r.remote, err = newRemote(cfg, &r.scrub); err != nil {
		return nil, r.scrub.wrap("opening "+Redact(cfg.Repo), err)
	}
	if r.mirror, err = openMirror(cfg.Dir, r.log); err != nil {
		return nil, err
	}
	return r, nil
}

// Repo is what is followed, without credentials.
func (r *Repo) Repo() string { return Redact(r.cfg.Repo) }

// Answered is when the remote last answered a Fetch or a poll; the zero Time before that.
func (r *Repo) Answered() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.answered
}

// Fetch is FetchSince the head that the Fetch before gave, to this process or to one before it.
func (r *Repo) Fetch(ctx context.Context) (Revision, error) { return r.FetchSince(ctx, "") }

// FetchSince brings the mirror up to date and gives the head of the branch, and says whether that descends from known:
// the hash of the head that the caller dealt with last. The mirror's own knowledge, which "" stands for, is ahead of a
// caller that was killed before it wrote down what it was given.
//
// It fails with ErrNoBranch (there is no such branch, or nothing at all in the repository), ErrAuth (credentials or host
// key), ErrUnreachable (anything else about the remote), ErrNoPath or ErrTree, or ctx's error; any other error is one of
// this machine, which Watch tells of again at the next poll. With ErrNoPath and ErrTree the Revision has its Commit: it
// exists, but is no fleet.
func (r *Repo) FetchSince(ctx context.Context, known string) (Revision, error) {
	select {
	case r.busy <- struct{}{}:
		defer func() { <-r.busy }()
	case <-ctx.Done():
		return Revision{}, fmt.Errorf("fetching %s: %w", r.Repo(), ctx.Err())
	}
	since := r.mirror.head(r.cfg.Branch) // before it moves
	if known != "" {
		since = plumbing.NewHash(known)
	}
	rev, err := r.fetch(ctx)
	if errors.Is(err, errMirror) && ctx.Err() == nil {
		if err = r.rebuild(err); err == nil {
			rev, err = r.fetch(ctx)
		}
	}
	rev.Rewritten = rev.Commit.Hash != "" && !since.IsZero() && !r.mirror.descends(plumbing.NewHash(rev.Commit.Hash), since)
	return rev, err
}

// fetch brings the mirror up to date, and opens the head of the branch.
func (r *Repo) fetch(ctx context.Context) (Revision, error) {
	got, err := r.sync(ctx)
	if err != nil {
		if ctx.Err() == nil {
			r.note(observation{kind: kindOf(err)})
		}
		return Revision{}, err
	}
	r.note(observe(got))
	rev, err := r.advance(got)
	if err != nil && !errors.Is(err, ErrNoBranch) && !errors.Is(err, ErrNoPath) && !errors.Is(err, ErrTree) {
		r.note(observation{kind: kindMirror}) // so that the next poll finds something else
	}
	return rev, err
}

// rebuild makes the mirror anew.
func (r *Repo) rebuild(why error) error {
	r.log.Warn("making the mirror anew", "dir", r.cfg.Dir, "why", r.scrub.text(why.Error()))
	return r.mirror.rebuild()
}

// sync brings the mirror's objects up to date with the remote.
func (r *Repo) sync(ctx context.Context) (refs, error) {
	what := "fetching " + r.Repo()
	tctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	got, err := r.remote.fetch(tctx, r.mirror)
	if err == nil {
		return got, nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", what, ctx.Err())
	}
	if errors.Is(tctx.Err(), context.DeadlineExceeded) {
		return nil, fmt.Errorf("%s: %w: no answer within %v", what, ErrUnreachable, r.cfg.Timeout)
	}
	return nil, r.scrub.wrap(what, err)
}

// advance makes what was fetched the mirror's own, and opens the head of the branch.
func (r *Repo) advance(got refs) (Revision, error) {
	next := r.mirror.keep(got)
	branch := plumbing.NewBranchReferenceName(r.cfg.Branch)
	head, ok := got[branch]
	if _, whole := next[branch]; whole {
		if old := r.mirror.head(r.cfg.Branch); !old.IsZero() && old != head && !r.mirror.descends(head, old) {
			next[seenName(old)] = old
		}
		next[followedName(r.cfg.Branch)] = head
	}
	if err := r.mirror.setRefs(next); err != nil {
		return Revision{}, err
	}
	if !ok {
		return Revision{}, fmt.Errorf("%s: %w", r.Repo(), noBranch(r.cfg.Branch, got))
	}
	if err := r.mirror.compact(); err != nil {
		r.log.Warn("packing the mirror", "dir", r.cfg.Dir, "err", err)
	}
	return r.open(head)
}

// Revision gives any commit of the mirror by its hash, a unique abbreviation of at least four digits, a branch, a tag,
// or HEAD, which is the head of the followed branch as the last Fetch found it; each may have ~N and ^N after it. It is
// ErrNoRevision where there is no such commit, and ErrNoPath and ErrTree as in Fetch.
func (r *Repo) Revision(ctx context.Context, rev string) (Revision, error) {
	if err := ctx.Err(); err != nil {
		return Revision{}, fmt.Errorf("revision %q: %w", rev, err)
	}
	h, err := r.mirror.resolve(rev, r.cfg.Branch)
	if err != nil {
		return Revision{}, fmt.Errorf("revision %q of %s: %w", rev, r.Repo(), err)
	}
	return r.open(h)
}

func (r *Repo) open(h plumbing.Hash) (Revision, error) {
	c, err := r.mirror.objects.commit(h)
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		err = fmt.Errorf("%w: %w", ErrNoRevision, err)
	}
	if err != nil {
		return Revision{}, fmt.Errorf("commit %s of %s: %w", h, r.Repo(), err)
	}
	rev := Revision{Commit: commitOf(c)}
	t, err := newTree(r.mirror.objects, c, r.cfg.Path)
	if err != nil {
		return rev, fmt.Errorf("commit %s of %s: %w", h.String()[:12], r.Repo(), err)
	}
	rev.Tree = t
	return rev, nil
}

func commitOf(c *object.Commit) state.Commit {
	subject, _, _ := strings.Cut(strings.TrimSpace(c.Message), "\n")
	return state.Commit{
		Hash:    c.Hash.String(),
		Subject: bounded(subject, 200),
		Author:  bounded(c.Author.Name, 100),
		Time:    c.Committer.When.UTC(),
	}
}

// bounded makes s printable text of at most n bytes: it comes from anybody who can push.
func bounded(s string, n int) string {
	s = strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return ' '
		}
		return c
	}, strings.ToValidUTF8(s, "\uFFFD"))
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "") + "…"
	}
	return strings.TrimSpace(s)
}
