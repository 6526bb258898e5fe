package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/plan"
)

func newPlanCommand() *cobra.Command {
	var o remote
	var revision string
	cmd := &cobra.Command{
		Use:   "plan [DIR | --revision REV]",
		Short: "Say what a fleet would change: builds, stages, reboots, and why",
		Long: `plan compares a fleet with what runs: the one in DIR (default: the working
directory), or a revision of the repo as the server knows it (a commit, branch or
tag). It prints what would be built, which hosts would reboot, how much each would
fetch, and why. It changes nothing.

Exit status: 0 nothing would change; 1 something would, or the fleet is invalid;
2 the fleet could not be read, or the server not asked.`,
		Example: `  troupe plan
  troupe plan ./fleet -o json
  troupe plan --revision main~1`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := makePlan(cmd, &o, args, revision)
			if err != nil {
				return refused(err)
			}
			if err := o.print(cmd, p, func(w io.Writer) error { return writePlan(w, p) }); err != nil {
				return err
			}
			if !p.Empty() {
				return differs(nil)
			}
			return nil
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	cmd.Flags().StringVar(&revision, "revision", "", "a revision of the fleet's repo instead of DIR")
	return cmd
}

func makePlan(cmd *cobra.Command, o *remote, args []string, revision string) (plan.Plan, error) {
	if len(args) > 0 && revision != "" {
		return plan.Plan{}, errors.New("plan takes a directory or --revision, not both")
	}
	c, err := o.client()
	if err != nil {
		return plan.Plan{}, err
	}
	if revision != "" {
		return c.PlanRevision(cmd.Context(), revision)
	}
	dir := "."
	if len(args) > 0 {
		dir = args[0]
	}
	fleet, err := loadFleet(cmd.Context(), dir)
	if err != nil {
		return plan.Plan{}, err
	}
	return c.Plan(cmd.Context(), fleet)
}

func writePlan(w io.Writer, p plan.Plan) error {
	if err := writePlannedBuilds(w, p.Builds); err != nil {
		return err
	}
	if err := writePlannedHosts(w, p.Hosts); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, planSummary(p))
	return err
}

func writePlannedBuilds(w io.Writer, builds []plan.Build) error {
	if len(builds) == 0 {
		return nil
	}
	t := table{header: []string{"BUILD", "KIND", "RECIPE", "STATE", "FOR"}}
	for _, b := range builds {
		state := string(b.State)
		if b.State == plan.BuildMissing {
			state = "to do"
		}
		if b.Error != "" {
			state += ": " + cut(b.Error, 60)
		}
		t.add(b.Name, string(b.Kind), b.Recipe.Short(), state, or(someHosts(b.Hosts), "discovery"))
	}
	if err := t.write(w, ""); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w)
	return err
}

// someHosts is a list of hosts that does not grow without bounds.
func someHosts(names []string) string {
	const most = 8
	if len(names) <= most {
		return strings.Join(names, ",")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ","), len(names)-most)
}

// actions are plan.Action in the words of a person, in the order in which they interest one.
var actions = []struct {
	action plan.Action
	text   string
}{
	{plan.Leave, "leave the fleet"},
	{plan.StageAndReboot, "stage and reboot"},
	{plan.Reboot, "reboot"},
	{plan.Restart, "restart apps"},
	{plan.AwaitBuild, "wait for a build"},
	{plan.RolledBack, "stay rolled back"},
	{plan.Claim, "be claimed"},
	{plan.Boot, "boot"},
	{plan.Update, "update as it runs"},
	{plan.Absent, "boot when seen"},
	{plan.None, "nothing"},
}

func actionText(a plan.Action) string {
	for _, known := range actions {
		if known.action == a {
			return known.text
		}
	}
	return string(a)
}

func writePlannedHosts(w io.Writer, hosts []plan.Host) error {
	t := table{header: []string{"HOST", "ACTION", "ROLE", "GENERATION", "REBOOT", "FETCH", "WHY"}}
	for _, h := range hosts {
		if h.Action == plan.None || h.Action == plan.Absent && !h.Changed {
			continue
		}
		fetch := "-"
		switch {
		case h.FetchBytes < 0:
			fetch = "not known yet"
		case h.FetchBytes > 0:
			fetch = api.Bytes(h.FetchBytes)
		}
		reboot := "no"
		if h.Reboot {
			reboot = "yes"
		}
		t.add(h.Name, actionText(h.Action), or(fromTo(h.FromRole, h.ToRole), "-"), or(generation(h.Generation), "-"), reboot, fetch, strings.Join(h.Why, "; "))
	}
	if len(t.rows) == 0 {
		return nil
	}
	if err := t.write(w, ""); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w)
	return err
}

// planSummary is a plan in one line.
func planSummary(p plan.Plan) string {
	s := p.Summary()
	total := 0
	for _, n := range s.Hosts {
		total += n
	}
	quiet := s.Hosts[plan.None]
	if s.Builds == 0 && s.Changed == 0 && quiet+s.Hosts[plan.Absent] == total {
		return fmt.Sprintf("nothing would change for %s", count(total, "host"))
	}
	parts := []string{
		count(s.Changed, "host") + " of " + fmt.Sprint(total) + " changed", count(s.Reboots, "reboot"), toFetch(p, s) + " to fetch",
		count(s.Builds, "build"),
	}
	return strings.Join(parts, ", ")
}

// toFetch is how much all hosts would fetch, as far as that is known: what is not built has no size yet.
func toFetch(p plan.Plan, s plan.Summary) string {
	if !slices.ContainsFunc(p.Hosts, func(h plan.Host) bool { return h.FetchBytes < 0 }) {
		return api.Bytes(s.FetchBytes)
	}
	if s.FetchBytes <= 0 {
		return "unknown bytes"
	}
	return api.Bytes(s.FetchBytes) + " and unknown bytes"
}
