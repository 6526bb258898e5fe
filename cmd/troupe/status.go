package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

type statusOptions struct {
	remote
	wait    bool
	commit  string
	timeout time.Duration
}

func newStatusCommand() *cobra.Command {
	var o statusOptions
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say whether the fleet is what its repo says",
		Long: `status prints the commit in force, the newest commit with its errors if that is
another one, and what keeps the fleet from being what the newest commit says.

With --wait it has the server look at the repo, and waits until the fleet has
converged on the newest commit, or on that of --commit; it gives up at once where
only another commit can help.

Exit status: 0 converged; 1 not converged; 2 the server could not be asked.`,
		Example: `  troupe status
  git push && troupe status --wait --commit "$(git rev-parse HEAD)"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	o.flags(cmd, "table", "json", "yaml")
	cmd.Flags().BoolVarP(&o.wait, "wait", "w", false, "wait until the fleet has converged")
	cmd.Flags().StringVar(&o.commit, "commit", "", "with --wait: until it has converged on this commit (a hash, or the start of one)")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 15*time.Minute, "with --wait: how long at most")
	return cmd
}

func (o *statusOptions) run(cmd *cobra.Command) error {
	c, err := o.client()
	if err != nil {
		return err
	}
	st, err := o.status(cmd, c)
	if err != nil {
		return err
	}
	if err := o.print(cmd, st, func(w io.Writer) error { return writeStatus(w, st) }); err != nil {
		return err
	}
	if !st.Converged || !o.is(st.Applied) {
		return differs(nil)
	}
	return nil
}

// status asks once, or waits.
func (o *statusOptions) status(cmd *cobra.Command, c *api.Client) (api.Status, error) {
	if !o.wait {
		return c.Status(cmd.Context())
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), o.timeout)
	defer cancel()
	if err := look(ctx, c); err != nil {
		return api.Status{}, err
	}
	show := newProgress(cmd.ErrOrStderr())
	var last api.Status
	err := c.Follow(ctx, func(s *api.Snapshot) bool {
		last = s.Status
		show.snapshot(s)
		return o.over(last)
	})
	show.end()
	if errors.Is(err, context.DeadlineExceeded) && cmd.Context().Err() == nil {
		return last, nil // it was told what is missing
	}
	return last, err
}

// look has the server look at the repo, so that what it says after that is not about the commit before the newest.
func look(ctx context.Context, c *api.Client) error {
	err := c.Look(ctx)
	var e *api.Error
	if errors.As(err, &e) && e.Status == http.StatusNotImplemented {
		return nil // it follows no repo
	}
	return err
}

// over says whether waiting on would change nothing: the fleet is there, or only another commit can help.
func (o *statusOptions) over(st api.Status) bool {
	if o.commit == "" { // the newest one, which the server has looked for
		return st.Converged || len(st.Problems) > 0
	}
	if o.is(st.Applied) {
		return st.Converged || len(st.Problems) > 0 && st.Attempted == nil
	}
	return len(st.Problems) > 0 && o.is(st.Attempted)
}

// is says whether c is the commit that is waited for.
func (o *statusOptions) is(c *state.Commit) bool {
	return o.commit == "" || c != nil && strings.HasPrefix(c.Hash, o.commit)
}

func writeStatus(w io.Writer, st api.Status) error {
	t := table{}
	t.add("repo", st.Repo)
	t.add("branch", st.Branch)
	if st.Path != "" && st.Path != "." {
		t.add("path", st.Path)
	}
	t.add("in force", or(commitLine(st.Applied, st.Time), "no commit yet"))
	if st.Attempted != nil {
		t.add("attempted", commitLine(st.Attempted, st.Time))
	}
	for _, p := range st.Problems {
		t.add("", p.String())
	}
	if st.FetchError != "" {
		t.add("repo error", st.FetchError)
		t.add("", "it last answered "+ago(st.Time, st.Fetched))
	}
	t.add("hosts", hostsLine(st.Hosts))
	if line := buildsLine(st.Builds); line != "" {
		t.add("builds", line)
	}
	for _, f := range st.Builds.Failures {
		t.add("", failureLine(f, st.Time))
	}
	verdict := "yes"
	if !st.Converged {
		verdict = "no"
	}
	t.add("converged", verdict)
	for _, line := range st.Waiting {
		t.add("", line)
	}
	return t.write(w, "")
}

// commitLine is a commit in one line; "" for none.
func commitLine(c *state.Commit, now time.Time) string {
	if c == nil {
		return ""
	}
	return fmt.Sprintf("%s %s (%s, %s)", shortHash(c.Hash), c.Subject, c.Author, ago(now, c.Time))
}

func hostsLine(h api.HostCounts) string {
	line := fmt.Sprintf("%d of %d healthy", h.Serving, h.Total)
	switch n := h.Serving - h.Healthy; {
	case n == 1:
		line += ", 1 not yet at its release"
	case n > 1:
		line += fmt.Sprintf(", %d not yet at their release", n)
	}
	if h.Unclaimed > 0 {
		line += fmt.Sprintf("; %s unclaimed", count(h.Unclaimed, "machine"))
	}
	return line
}

// failureLine says which build failed, at what, and when it is tried again.
func failureLine(f api.Failure, now time.Time) string {
	line := f.Name
	if f.Step != "" {
		line += " failed at " + f.Step
	}
	if f.Error != "" {
		line += ": " + cut(f.Error, 80)
	}
	switch left := f.Retry.Sub(now); {
	case f.Retry.IsZero():
	case left < time.Second:
		line += "; tried again now"
	default:
		line += "; tried again in " + span(left)
	}
	return line + "; see troupe logs " + f.Name
}

func buildsLine(b api.BuildCounts) string {
	var parts []string
	for _, p := range []struct {
		n    int
		word string
	}{{b.Running, "running"}, {b.Queued, "queued"}, {b.Failed, "failed"}} {
		if p.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", p.n, p.word))
		}
	}
	return strings.Join(parts, ", ")
}
