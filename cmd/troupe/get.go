package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

func newGetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get",
		Args:  cobra.NoArgs, // what is no verb below is a mistake
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Short: "List hosts, roles, images, releases or LUNs",
		Example: `  troupe get hosts
  troupe get hosts 'n[1-5,9]' -o json
  troupe get images`,
	}
	cmd.AddCommand(newGetHostsCommand(), newGetRolesCommand(), newGetImagesCommand("images", "List the images that were built or shall be"), newGetReleasesCommand(), newGetLUNsCommand())
	return cmd
}

// choose keeps those of all that are named, in the order of their names on the command line; all if none is named.
func choose[T any](all []T, args []string, key func(T) []string) ([]T, error) {
	names, err := hostlist(args)
	if err != nil || len(names) == 0 {
		return all, err
	}
	var chosen []T
	for _, name := range names {
		i := slices.IndexFunc(all, func(v T) bool { return slices.Contains(key(v), name) })
		if i < 0 {
			return nil, fmt.Errorf("there is no %q", name)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

type getHosts struct {
	remote
	unclaimed bool
	role      string
}

func newGetHostsCommand() *cobra.Command {
	var o getHosts
	cmd := &cobra.Command{
		Use:     "hosts [NAME…]",
		Aliases: []string{"host"},
		Short:   "List hosts, and machines that no host declares",
		Long: `Lists the declared hosts and the machines that no host declares. NAME is a host's
name, a machine's MAC, or a list of names as in n[1-5,9].

CHANGES is how many paths a node changed over its release, as it counted last: see
troupe delta.

-o wide adds the last stage that a host's boot reached, its address and its MAC.

With -o cue it prints host entries to paste into the fleet's repo, for unclaimed
machines. A fleet with such an entry is invalid until somebody chose its role:
--role does it for all.`,
		Example: `  troupe get hosts
  troupe get hosts 'n[1-5,9]'
  troupe get hosts --unclaimed
  troupe get hosts --unclaimed -o cue --role web >> hosts.cue`,
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args) },
	}
	o.flags(cmd, "table", "wide", "json", "yaml", "cue")
	cmd.Flags().BoolVar(&o.unclaimed, "unclaimed", false, "only machines that no host declares")
	cmd.Flags().StringVar(&o.role, "role", "", "with -o cue: the role of the entries")
	return cmd
}

func (o *getHosts) run(cmd *cobra.Command, args []string) error {
	c, err := o.client()
	if err != nil {
		return err
	}
	if o.role != "" && o.output != "cue" {
		return errors.New("flag --role goes with -o cue only")
	}
	hosts, err := c.Hosts(cmd.Context(), o.unclaimed || o.output == "cue")
	if err != nil {
		return err
	}
	hosts, err = choose(hosts, args, func(h api.Host) []string { return []string{h.Name, h.MAC} })
	if err != nil {
		return err
	}
	now := time.Now()
	switch {
	case o.output == "cue":
		if err := o.roleExists(cmd.Context(), c); err != nil {
			return err
		}
		return writeEntries(cmd.OutOrStdout(), hosts, o.role)
	case o.unclaimed:
		return o.print(cmd, orEmpty(hosts), func(w io.Writer) error { return writeUnclaimed(w, hosts, now) })
	}
	return o.print(cmd, orEmpty(hosts), func(w io.Writer) error { return writeHosts(w, hosts, o.output == "wide", now) })
}

// roleExists refuses a role that the fleet in force does not have: its entries would make the fleet invalid.
func (o *getHosts) roleExists(ctx context.Context, c *api.Client) error {
	if o.role == "" {
		return nil
	}
	roles, err := c.Roles(ctx)
	if err != nil {
		return err
	}
	var names []string
	for _, r := range roles {
		if r.Name == o.role {
			return nil
		}
		names = append(names, r.Name)
	}
	return fmt.Errorf("flag --role %q: the fleet in force has no such role; it has %s", o.role, or(strings.Join(names, ", "), "none"))
}

// changes is how many paths a node changed over its release.
func changes(h api.Host) string {
	switch {
	case h.Changes == nil:
		return "-"
	case h.Dropping:
		return strconv.Itoa(h.Changes.Changes) + ", dropping"
	}
	return strconv.Itoa(h.Changes.Changes)
}

// orEmpty keeps JSON from having null for an empty list.
func orEmpty[T any](all []T) []T {
	if all == nil {
		return []T{}
	}
	return all
}

// writeEntries writes CUE that declares machines.
func writeEntries(w io.Writer, hosts []api.Host, role string) error {
	for i, h := range hosts {
		if i > 0 {
			if _, err := fmt.Fprintln(w); err != nil {
				return err
			}
		}
		if _, err := io.WriteString(w, api.HostEntry(h, cmp.Or(role, api.RoleToChoose))); err != nil {
			return err
		}
	}
	return nil
}

func writeHosts(w io.Writer, hosts []api.Host, wide bool, now time.Time) error {
	t := table{header: []string{"NAME", "ROLE", "STATE", "GENERATION", "RELEASE", "TARGET", "CHANGES", "UPTIME", "LAST-SEEN"}}
	if wide {
		t.header = append(t.header, "STAGE", "ADDRESS", "MAC")
	}
	const state = 2
	t.shrink = state
	t.colour = func(column int, text string) string {
		if column != state {
			return text
		}
		return colourOf(text)
	}
	for _, h := range hosts {
		uptime := "-"
		if h.Running != "" && !h.Booted.IsZero() && h.State != api.HostLost {
			uptime = span(now.Sub(h.Booted))
		}
		cells := []string{
			h.Key(), or(fromTo(h.RunningRole, h.Role), "-"), cut(stateText(h), 200),
			or(fromTo(generation(h.RunningGeneration), generation(h.Generation)), "-"), short(h.Running), short(h.Target),
			changes(h), uptime, ago(now, h.LastSeen),
		}
		if wide {
			cells = append(cells, or(h.Stage, "-"), addressOf(h), or(h.MAC, "-"))
		}
		t.add(cells...)
	}
	return t.write(w, "no hosts")
}

// fromTo is to, with from before it where that is something else.
func fromTo(from, to string) string {
	if from == "" || from == to || to == "" {
		return or(to, from)
	}
	return from + "→" + to
}

func generation(n uint64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

// colourOf colours the word that text starts with, where it is a state.
func colourOf(text string) string {
	word, _, _ := strings.Cut(text, " ")
	const red, green, yellow, blue, violet = "31", "32", "33", "34", "35"
	colour := map[string]string{
		"healthy": green, "booted": green, "done": green, "unhealthy": red, "failed": red, "lost": red, "rolled-back": red, "waiting": yellow, "queued": yellow,
		"booting": blue, "staging": blue, "rebooting": blue, "running": blue, "unclaimed": violet,
	}[word]
	if colour == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// addressOf is a host's address; "-" for none.
func addressOf(h api.Host) string {
	if !h.Address.IsValid() {
		return "-"
	}
	return h.Address.String()
}

func writeUnclaimed(w io.Writer, hosts []api.Host, now time.Time) error {
	t := table{header: []string{"MAC", "ADDRESS", "MACHINE", "CPUS", "MEMORY", "DISKS", "FIRMWARE", "STAGE", "LAST-SEEN"}}
	for _, h := range hosts {
		address, inv := addressOf(h), h.Inventory
		if inv == nil {
			t.add(h.MAC, address, "-", "-", "-", "-", "-", or(h.Stage, "-"), ago(now, h.LastSeen))
			continue
		}
		var disks []string
		for _, d := range inv.Disks {
			disks = append(disks, fmt.Sprintf("%s %s (%s)", d.Name, api.Bytes(d.Size), d.Holds))
		}
		t.add(h.MAC, address, cut(or(strings.TrimSpace(inv.SMBIOS.Vendor+" "+inv.SMBIOS.Product), "-"), 40), strconv.Itoa(inv.CPU.Threads),
			api.Bytes(inv.Memory), or(cut(strings.Join(disks, ", "), 60), "-"), inv.Firmware, h.Stage, ago(now, h.LastSeen))
	}
	return t.write(w, "no unclaimed machines")
}

func newGetRolesCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:     "roles [NAME…]",
		Aliases: []string{"role"},
		Short:   "List the declared roles",
		Example: "  troupe get roles",
		RunE: func(cmd *cobra.Command, args []string) error {
			return list(cmd, &o, args, (*api.Client).Roles, func(r api.Role) []string { return []string{r.Name} }, writeRoles)
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

// list is what all verbs do that print a list: ask, choose, print.
func list[T any](cmd *cobra.Command, o *remote, args []string, ask func(*api.Client, context.Context) ([]T, error),
	key func(T) []string, write func(io.Writer, []T, time.Time) error,
) error {
	c, err := o.client()
	if err != nil {
		return err
	}
	all, err := ask(c, cmd.Context())
	if err != nil {
		return err
	}
	all, err = choose(all, args, key)
	if err != nil {
		return err
	}
	return o.print(cmd, orEmpty(all), func(w io.Writer) error { return write(w, all, time.Now()) })
}

func writeRoles(w io.Writer, roles []api.Role, _ time.Time) error {
	t := table{header: []string{"NAME", "OS", "BOOT", "HOSTS", "HEALTHY", "RELEASE", ""}}
	for _, r := range roles {
		t.add(r.Name, r.OS, r.Boot, strconv.Itoa(len(r.Hosts)), strconv.Itoa(r.Healthy), short(r.Release), r.Waiting)
	}
	return t.write(w, "no roles")
}

func newGetImagesCommand(use, what string) *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:     use + " [NAME…]",
		Short:   what,
		Example: "  troupe get images\n  troupe image ls",
		RunE: func(cmd *cobra.Command, args []string) error {
			key := func(i api.Image) []string { return []string{i.Name, i.Recipe.Short()} }
			return list(cmd, &o, args, (*api.Client).Images, key, writeImages)
		},
	}
	if use == "images" {
		cmd.Aliases = []string{"image"}
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

func writeImages(w io.Writer, all []api.Image, now time.Time) error {
	t := table{header: []string{"NAME", "KIND", "RECIPE", "STATE", "SIZE", "TOOK", "BUILT", "USED"}}
	const phase = 3
	t.shrink = phase
	t.colour = func(column int, text string) string {
		if column != phase {
			return text
		}
		return colourOf(text)
	}
	for _, i := range all {
		size, took, used := "-", "-", "-"
		if i.Size > 0 {
			size = api.Bytes(i.Size)
		}
		if i.Finished.After(i.Started) && !i.Started.IsZero() && i.Phase != state.BuildRunning {
			took = exact(i.Finished.Sub(i.Started))
		}
		if i.Used {
			used = "yes"
		}
		t.add(i.Name, i.Kind, i.Recipe.Short(), cut(phaseText(i), 60), size, took, ago(now, i.Finished), used)
	}
	return t.write(w, "no images")
}

// phaseText is where a build is, with the step that it is in or failed at.
func phaseText(i api.Image) string {
	if i.Step == "" || i.Phase == state.BuildDone {
		return string(i.Phase)
	}
	return fmt.Sprintf("%s (%s)", i.Phase, i.Step)
}

func newGetReleasesCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:     "releases [ID…]",
		Aliases: []string{"release"},
		Short:   "List the releases that were made",
		Example: "  troupe get releases",
		RunE: func(cmd *cobra.Command, args []string) error {
			key := func(r api.Release) []string { return []string{r.ID.Short(), r.ID.String()} }
			return list(cmd, &o, args, (*api.Client).Releases, key, writeReleases)
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

func writeReleases(w io.Writer, all []api.Release, now time.Time) error {
	t := table{header: []string{"RELEASE", "ROLES", "BASE", "DELTA", "SIZE", "MADE", "ASSIGNED", "RUNNING"}}
	for _, r := range all {
		base, delta := r.Content.Base.Digest.Short(), r.Content.Delta.Digest.Short()
		if d := r.Content.Disk.Digest; d != "" {
			base, delta = d.Short(), "-"
		}
		t.add(r.ID.Short(), strings.Join(r.Roles, ","), base, delta,
			api.Bytes(r.Size), ago(now, r.Created), strconv.Itoa(len(r.Assigned)), strconv.Itoa(len(r.Running)))
	}
	return t.write(w, "no releases")
}
