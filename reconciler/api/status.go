package api

import (
	"fmt"
	"slices"
	"strings"

	"github.com/troupe-dev/troupe/reconciler/state"
)

// Status sums up hosts and builds as hosts and images are.
func (r *Records) Status(hosts []Host, images []Image) Status {
	src := r.Source
	st := Status{
		Version: r.Version, Time: r.Now,
		Repo: src.Repo, Branch: src.Branch, Path: src.Path,
		Applied: src.Applied, AppliedAt: src.AppliedAt,
		FetchError: src.FetchError, Fetched: src.Fetched, Rewritten: src.Rewritten,
		Problems: src.Problems,
		Hosts:    countHosts(hosts),
		Builds:   countBuilds(images),
	}
	if src.Attempted != nil && (src.Applied == nil || src.Attempted.Hash != src.Applied.Hash) {
		st.Attempted = src.Attempted
	}
	st.Waiting = r.missing(st, hosts)
	st.Converged = len(st.Waiting) == 0
	return st
}

func countHosts(hosts []Host) HostCounts {
	c := HostCounts{ByState: map[HostState]int{}}
	for _, h := range hosts {
		c.ByState[h.State]++
		if h.State == HostUnclaimed {
			c.Unclaimed++
			continue
		}
		c.Total++
		if h.Serves() {
			c.Serving++
		}
		if h.State.Fine() {
			c.Healthy++
		}
	}
	return c
}

// maxFailures bounds what a Status names.
const maxFailures = 10

// countBuilds leaves out what no fleet in force wants any more, but is not cleared away.
func countBuilds(images []Image) BuildCounts {
	var c BuildCounts
	for _, i := range images {
		if !i.Declared {
			continue
		}
		switch i.Phase {
		case state.BuildQueued:
			c.Queued++
		case state.BuildRunning:
			c.Running++
		case state.BuildFailed:
			c.Failed++
			if len(c.Failures) < maxFailures {
				c.Failures = append(c.Failures, Failure{i.Name, i.Recipe, i.Step, i.Error, i.Attempts, i.Retry})
			}
		}
	}
	return c
}

// missing says, one line each, what keeps the fleet from being what its repo says.
func (r *Records) missing(st Status, hosts []Host) []string {
	var lines []string
	switch {
	case st.FetchError != "":
		lines = append(lines, "the repo cannot be followed: "+st.FetchError)
	case st.Applied == nil && st.Attempted == nil:
		lines = append(lines, "no commit was seen yet")
	}
	switch {
	case st.Attempted != nil && len(st.Problems) > 0:
		lines = append(lines, "commit "+shortHash(st.Attempted.Hash)+" is not in force: it has "+count(len(st.Problems), "problem"))
	case st.Attempted != nil:
		lines = append(lines, "commit "+shortHash(st.Attempted.Hash)+" is being loaded")
	case len(st.Problems) > 0:
		lines = append(lines, "the fleet has "+count(len(st.Problems), "problem"))
	}
	if st.Applied != nil && r.Planned != st.Applied.Hash {
		lines = append(lines, "commit "+shortHash(st.Applied.Hash)+" is being planned")
	}
	if n := st.Builds.Failed; n > 0 {
		lines = append(lines, count(n, "build")+" failed")
	}
	return append(lines, missingHosts(hosts)...)
}

// missingHosts says, one line for each state, which declared hosts are not healthy.
func missingHosts(hosts []Host) []string {
	names := map[HostState][]string{}
	var order []HostState
	for _, h := range hosts {
		if h.State.Fine() || h.State == HostUnclaimed {
			continue
		}
		if names[h.State] == nil {
			order = append(order, h.State)
		}
		names[h.State] = append(names[h.State], h.Name)
	}
	slices.Sort(order)
	lines := make([]string, 0, len(order))
	for _, s := range order {
		lines = append(lines, fmt.Sprintf("%s %s: %s", count(len(names[s]), "host"), s, some(names[s], 5)))
	}
	return lines
}

// some lists the first most of names, and says how many more there are.
func some(names []string, most int) string {
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// count is "1 host", "2 hosts".
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func shortHash(hash string) string { return hash[:min(len(hash), 10)] }
