package source

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/go-git/go-git/v5/plumbing/transport"
)

// newRemote makes the remote that cfg.Repo names.
func newRemote(cfg Config, s *scrubber) (remote, error) {
	if strings.TrimSpace(cfg.Repo) == "" {
		return nil, errors.New("no repository given")
	}
	if !strings.Contains(cfg.Repo, "://") {
		if ep, ok := hostPath(cfg.Repo); ok {
			return newSSHRemote(cfg, ep)
		}
		return newLocal(cfg.Repo)
	}
	u, err := url.Parse(cfg.Repo)
	if err != nil {
		return nil, errors.New("not a valid URL") // err quotes it, with what secrets it has
	}
	switch u.Scheme {
	case "file":
		if u.Host != "" && u.Host != "localhost" {
			return nil, fmt.Errorf("file URL names the host %q: use ssh:// or https://", u.Host)
		}
		return newLocal(u.Path)
	case "http", "https", "ssh":
		if u.Hostname() == "" {
			return nil, errors.New("URL names no host")
		}
		ep, err := transport.NewEndpoint(cfg.Repo)
		if err != nil {
			return nil, err
		}
		if u.Scheme == "ssh" {
			return newSSHRemote(cfg, ep)
		}
		return newHTTPRemote(cfg, ep, s)
	}
	return nil, fmt.Errorf("scheme %q: want https, http, ssh or file", u.Scheme)
}

// hostPath recognizes [user@]host:path as Git does: a colon before the first slash, and no file of that name.
func hostPath(s string) (*transport.Endpoint, bool) {
	before, path, ok := strings.Cut(s, ":")
	if !ok || strings.Contains(before, "/") || path == "" {
		return nil, false
	}
	if _, err := os.Lstat(s); err == nil {
		return nil, false
	}
	user, host, ok := strings.Cut(before, "@")
	if !ok {
		user, host = "", before
	}
	if host == "" {
		return nil, false
	}
	return &transport.Endpoint{Protocol: "ssh", User: user, Host: host, Path: path}, true
}

// gitDir finds what holds the objects and branches of the repository at dir: dir itself where it is bare, its .git, or
// where a .git file points (gitrepository-layout(5)): of a linked worktree, the directory that it shares with the others.
func gitDir(dir string) (string, error) {
	found := dir
	dotGit := filepath.Join(dir, ".git")
	switch fi, err := os.Stat(dotGit); {
	case err == nil && fi.IsDir():
		found = dotGit
	case err == nil:
		b, err := readSmall(dotGit)
		if err != nil {
			return "", err
		}
		target, ok := strings.CutPrefix(strings.TrimSpace(string(b)), "gitdir: ")
		if !ok {
			return "", fmt.Errorf("%q: want a line that begins with %q", dotGit, "gitdir: ")
		}
		found = join(dir, target)
	}
	if b, err := readSmall(filepath.Join(found, "commondir")); err == nil {
		found = join(found, strings.TrimSpace(string(b)))
	}
	for _, name := range []string{"objects", "HEAD"} {
		if _, err := os.Lstat(filepath.Join(found, name)); err != nil {
			if _, derr := os.Stat(dir); derr != nil {
				return "", derr
			}
			return "", fmt.Errorf("%q is not a Git repository: %w", dir, err)
		}
	}
	return found, nil
}

// join is path seen from base.
func join(base, path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(base, path)
}

// readSmall reads a file of one line; the files of a repository's directory that are read so are never long.
func readSmall(name string) ([]byte, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > 8<<10 {
		return nil, fmt.Errorf("%q: not a small regular file", name)
	}
	return os.ReadFile(name)
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) || c == ' ' })
}
