package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/schema"
)

// RouterOf is the server's address in a fleet's network, and that network's size. Where the fleet names no router it is the
// network's first address.
func RouterOf(f *schema.Fleet) netip.Prefix {
	addr := f.Network.Router
	if !addr.IsValid() {
		addr = f.Network.Subnet.Masked().Addr().Next()
	}
	return netip.PrefixFrom(addr, f.Network.Subnet.Bits())
}

// NodesOf is a machine for each host of a fleet, by name.
func NodesOf(f *schema.Fleet) []Node {
	var nodes []Node
	for name, h := range f.Hosts {
		nodes = append(nodes, Node{Name: name, MAC: h.MAC, UUID: h.UUID, Serial: h.Serial})
	}
	slices.SortFunc(nodes, func(a, b Node) int { return strings.Compare(a.Name, b.Name) })
	return nodes
}

// ServeArgs are the arguments with which troupe follows a repo in the lab that lives in dir. The server's data lies in that
// directory, too.
func ServeArgs(dir, repo, branch, path string) []string {
	return []string{
		"serve", "--repo", repo, "--branch", branch, "--path", path, "--data", filepath.Join(dir, "serve"),
		"--interface", Bridge, "--listen", fmt.Sprintf(":%d", ServePort),
	}
}

// WaitServer waits until the lab's server answers HTTP. It fails as soon as the server has ended.
func (c *Client) WaitServer(ctx context.Context) error {
	tick := time.NewTicker(100 * time.Millisecond) // a server that starts tells nobody when it listens
	defer tick.Stop()
	client := c.HTTP()
	for {
		if answers(ctx, client, c.ServerURL()) {
			return nil
		}
		st, err := c.Status(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("waiting for the server: %w", err)
		case !st.Serve.Running:
			said, _ := tailFile(c.ServeLog(), 10)
			return fmt.Errorf("the server ended (%s) before it answered; it said last:\n%s", st.Serve.Ended, said)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the server: %w", context.Cause(ctx))
		}
	}
}

func answers(ctx context.Context, client *http.Client, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, url, nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return true
}

// A Git is a working copy of a repo, with its own identity and nothing of the user's configuration.
type Git struct{ Dir string }

// Run runs git in the working copy. Its output is part of the error.
func (g Git) Run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = g.Dir
	cmd.Env = append(os.Environ(),
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=troupe lab", "GIT_AUTHOR_EMAIL=lab@localhost",
		"GIT_COMMITTER_NAME=troupe lab", "GIT_COMMITTER_EMAIL=lab@localhost",
	)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("git %s: %w: %s", args[0], err, bytes.TrimSpace(out))
	}
	return string(bytes.TrimSpace(out)), nil
}

// Commit records all that changed in the working copy, and pushes it.
func (g Git) Commit(ctx context.Context, message string) error {
	for _, args := range [][]string{{"add", "--all"}, {"commit", "--quiet", "-m", message}, {"push", "--quiet", "origin", "HEAD"}} {
		if _, err := g.Run(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// MakeRepo makes a bare repo, and a working copy of it at work whose branch main has one commit: what is in the
// directory from, but for a Git repo there. Neither path may exist.
func MakeRepo(ctx context.Context, bare, work, from string) (Git, error) {
	g := Git{Dir: work}
	for _, path := range []string{bare, work} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			return g, errors.Join(fmt.Errorf("making repo %q: %q is there already", bare, path), err)
		}
		if err := os.MkdirAll(path, 0o755); err != nil {
			return g, err
		}
	}
	if _, err := (Git{Dir: bare}).Run(ctx, "init", "--quiet", "--bare", "--initial-branch=main"); err != nil {
		return g, err
	}
	if _, err := g.Run(ctx, "clone", "--quiet", bare, "."); err != nil {
		return g, err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return g, err
	}
	for _, e := range entries {
		if e.Name() == ".git" {
			continue
		}
		if err := copyTree(filepath.Join(from, e.Name()), filepath.Join(work, e.Name()), e); err != nil {
			return g, err
		}
	}
	return g, g.Commit(ctx, "the first fleet")
}

func copyTree(from, to string, e os.DirEntry) error {
	if e.IsDir() {
		return os.CopyFS(to, os.DirFS(from))
	}
	if !e.Type().IsRegular() {
		return fmt.Errorf("copying %q: neither a file nor a directory", from)
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}
