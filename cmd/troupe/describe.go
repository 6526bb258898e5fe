package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

func newDescribeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "describe",
		Args:  cobra.NoArgs, // what is no verb below is a mistake
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Short: "Say all about one host, role, image or release",
		Example: `  troupe describe host n1
  troupe describe image debian`,
	}
	cmd.AddCommand(newDescribeHostCommand(), newDescribeRoleCommand(),
		newDescribeImageCommand("image", "Say all about one image"), newDescribeReleaseCommand())
	return cmd
}

func newDescribeHostCommand() *cobra.Command {
	var o remote
	var boots int
	cmd := &cobra.Command{
		Use:   "host NAME|MAC",
		Short: "Say all about one host: what it shall run and why, what it runs, and how it booted",
		Example: `  troupe describe host n1
  troupe describe host 52:54:00:77:00:09 --boots 10`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			h, err := c.Host(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return o.print(cmd, h, func(w io.Writer) error { return writeHost(w, h, boots, time.Now()) })
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	cmd.Flags().IntVar(&boots, "boots", 3, "how many boots to show, the newest first")
	return cmd
}

// fields are names and values, those without a value left out.
type fields struct{ table }

func (f *fields) set(name, value string) {
	if value != "" && name != "" {
		name += ":"
	}
	if value != "" {
		f.add(name, value)
	}
}

// list sets a name with a value on each line.
func (f *fields) list(name string, values []string) {
	for _, v := range values {
		f.set(name, v)
		name = ""
	}
}

func writeHost(w io.Writer, h api.HostDetail, boots int, now time.Time) error {
	var f fields
	f.set("Name", h.Name)
	f.set("State", stateText(h.Host))
	f.set("Role", fromTo(h.RunningRole, h.Role))
	f.set("MAC", h.MAC)
	f.set("UUID", h.UUID)
	f.set("Serial", h.Serial)
	if h.Address.IsValid() {
		f.set("Address", h.Address.String())
	}
	for i, k := range slices.Sorted(maps.Keys(h.Labels)) {
		f.set([]string{"Labels", ""}[min(i, 1)], k+"="+h.Labels[k])
	}
	hostFields(&f, h, now)
	if h.Machine != nil {
		seen := h.Host
		seen.Inventory = h.Machine.Inventory
		f.list("Machine", api.Summary(seen))
		f.set("First seen", ago(now, h.Machine.FirstSeen))
	}
	if h.ISCSI != nil {
		targetFields(&f, *h.ISCSI)
		f.set("Its session", sessionText(h.Node))
	}
	if h.Entry != "" {
		f.set("Host entry", "troupe get hosts "+h.MAC+" -o cue")
	}
	if err := f.write(w, ""); err != nil {
		return err
	}
	for _, b := range h.Boots[:min(max(boots, 0), len(h.Boots))] {
		if err := writeBoot(w, b, now); err != nil {
			return err
		}
	}
	return nil
}

// hostFields are those about what the host runs and shall run.
func hostFields(f *fields, h api.HostDetail, now time.Time) {
	f.set("Generation", fromTo(generation(h.RunningGeneration), generation(h.Generation)))
	if h.Why != "" {
		f.set("Why", fmt.Sprintf("%s (commit %s, %s)", h.Why, shortHash(h.Commit), ago(now, h.Since)))
	}
	if h.Target != "" {
		f.set("Target", h.Target.String())
	}
	if h.Running != "" {
		f.set("Running", h.Running.String())
	}
	if h.Staged != "" {
		f.set("Staged", h.Staged.String())
	}
	if h.Fetch != nil && h.Fetch.Total > 0 {
		f.set("Fetching", fmt.Sprintf("%s of %s", api.Bytes(h.Fetch.Done), api.Bytes(h.Fetch.Total)))
	}
	f.list("Failing", h.Failing)
	f.set("Error", h.Error)
	if h.Node != nil {
		f.list("Bad", badLines(h.Node.Bad, now))
		if h.Node.Good != "" {
			f.set("Good", h.Node.Good.String())
		}
		f.list("Warnings", h.Node.Warnings)
	}
	if h.Node != nil && len(h.Node.Cached) > 0 {
		var cached []string
		for _, d := range h.Node.Cached {
			cached = append(cached, d.Short())
		}
		f.set("Cached", strings.Join(cached, " "))
	}
	if h.Running != "" && !h.Booted.IsZero() && h.State != api.HostLost {
		f.set("Uptime", span(now.Sub(h.Booted)))
	}
	f.set("Last seen", strings.Replace(ago(now, h.LastSeen), "-", "never", 1))
	if h.Lease != nil {
		f.set("Lease", fmt.Sprintf("%s until %s", h.Lease.Address, h.Lease.Expires.Local().Format(time.DateTime)))
	}
}

// badLines are the releases that do not work on a host.
func badLines(all []agentapi.BadRelease, now time.Time) []string {
	var lines []string
	for _, b := range all {
		line := fmt.Sprintf("%s, role %s, generation %d, %s: %s", b.Release.Short(), b.Role, b.Generation, ago(now, b.When), b.Why)
		if b.Again {
			line += "; it was good before, and is tried again"
		}
		lines = append(lines, line)
	}
	return lines
}

// targetFields are those about what the host has on the server's iSCSI target.
func targetFields(f *fields, t api.Target) {
	f.set("iSCSI target", t.Name)
	f.set("Initiator", t.Initiator)
	if t.Resetting {
		f.set("Reset", "under way: its disk is still in use")
	}
	f.set("Waits for", t.Waiting)
	var luns, sessions []string
	for _, l := range t.LUNs {
		line := fmt.Sprintf("%d: %s, %s", l.LUN, lunText(l), api.Bytes(l.Size))
		if l.Kind != api.LUNImage {
			line += ", " + api.Bytes(l.Delta) + " written"
		}
		luns = append(luns, line)
	}
	f.list("LUNs", luns)
	for _, s := range t.Sessions {
		sessions = append(sessions, fmt.Sprintf("%s since %s, %s read, %s written, %d commands",
			s.Peer, s.Since.Local().Format(time.DateTime), api.Bytes(clamp(s.BytesOut)), api.Bytes(clamp(s.BytesIn)), s.Commands))
	}
	f.list("Sessions", sessions)
}

// sessionText is how a node's agent sees its session; "" where it runs from no LUNs.
func sessionText(n *state.Node) string {
	if n == nil || n.Session == nil {
		return ""
	}
	s := n.Session
	text := "down"
	if s.Up {
		text = "up"
	}
	if again := s.Logins - 1; again > 0 {
		text += ", logged in again " + count(again, "time")
	}
	if s.Error != "" {
		text += ": " + s.Error
	}
	return text
}

// lunText says what a LUN is.
func lunText(l api.LUN) string {
	text := string(l.Kind)
	if l.Image != "" {
		text += " " + strings.TrimSpace(l.Name+" "+l.Image.Short())
	}
	return text
}

func clamp(n uint64) int64 { return int64(min(n, math.MaxInt64)) } //nolint:gosec // it fits

// writeBoot writes the timeline of one boot.
func writeBoot(w io.Writer, b api.Boot, now time.Time) error {
	outcome := "not healthy yet"
	switch {
	case b.Healthy && slices.ContainsFunc(b.Marks, func(m api.Mark) bool { return m.Stage == string(netboot.StageBooted) }):
		outcome = "booted after " + exact(b.Took)
	case b.Healthy:
		outcome = "healthy after " + exact(b.Took)
	case b.Error != "":
		outcome = b.Error
	}
	_, err := fmt.Fprintf(w, "\nBoot %s, %s (%s): %s, %s of images fetched\n",
		b.ID, b.Started.Local().Format(time.DateTime), ago(now, b.Started), plain(outcome), api.Bytes(b.Bytes))
	if err != nil {
		return err
	}
	t := table{header: []string{"  STAGE", "AT", "TOOK", "BYTES", "DETAIL"}}
	for _, m := range b.Marks {
		bytes := "-"
		if m.Bytes > 0 {
			bytes = api.Bytes(m.Bytes)
		}
		detail := m.Detail
		if m.Error != "" {
			detail = strings.TrimSpace(detail + " ERROR: " + m.Error)
		}
		at, took := exact(m.At), "+"+exact(m.Took)
		if m.Later {
			at, took = m.Time.Local().Format(time.DateTime), "-"
		}
		t.add("  "+m.Stage, at, took, bytes, withoutQuery(detail))
	}
	return t.write(w, "  no stage was reached")
}

var urlQuery = regexp.MustCompile(`(https?://[^\s?]*)\?[^\s,;)]*`)

// withoutQuery cuts the queries off the URLs in text: what a machine says of itself there stands elsewhere already.
func withoutQuery(text string) string { return urlQuery.ReplaceAllString(text, "$1") }

func newDescribeImageCommand(use, what string) *cobra.Command {
	var o remote
	var packages, sbom bool
	cmd := &cobra.Command{
		Use:   use + " NAME|RECIPE",
		Short: what,
		Long: what + `. It is named by the name of the image or of the role, or by the
first six or more hex digits of its recipe or of its digest. With --packages and --sbom a
release may be named, too.`,
		Example: "  troupe describe image debian\n  troupe image show web",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			if packages || sbom {
				return o.showContents(cmd, args[0], sbom)
			}
			i, err := c.Image(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return o.print(cmd, i, func(w io.Writer) error { return writeImage(w, i, time.Now()) })
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	cmd.Flags().BoolVar(&packages, "packages", false, "only the packages, with their versions; of a role with those of its image")
	cmd.Flags().BoolVar(&sbom, "sbom", false, "the SBOM of a release, or of a role's newest one, as SPDX 2.3")
	cmd.MarkFlagsMutuallyExclusive("packages", "sbom")
	return cmd
}

func writeImage(w io.Writer, i api.ImageDetail, now time.Time) error {
	var f fields
	f.set("Name", i.Name)
	f.set("Kind", i.Kind)
	f.set("Recipe", i.Recipe.String())
	f.set("State", phaseText(i.Image))
	f.set("Error", i.Error)
	f.list("Last lines", i.Tail)
	if i.Attempts > 1 {
		f.set("Attempts", fmt.Sprint(i.Attempts))
	}
	if !i.Retry.IsZero() && i.Phase == state.BuildFailed {
		f.set("Tried again", "at "+i.Retry.Local().Format(time.DateTime))
	}
	if !i.Started.IsZero() {
		f.set("Started", i.Started.Local().Format(time.DateTime)+" ("+ago(now, i.Started)+")")
	}
	if i.Finished.After(i.Started) && i.Phase != state.BuildRunning {
		f.set("Took", exact(i.Finished.Sub(i.Started)))
	}
	if i.Digest != "" {
		f.set("Digest", i.Digest.String())
		f.set("Size", api.Bytes(i.Size))
	}
	if b := i.Base; b != nil {
		f.set("Kernel", b.Version+", "+api.Bytes(b.Kernel.Size))
		f.set("Modules", api.Bytes(b.Modules.Size))
		f.list("Packages", b.Packages)
	}
	if d := i.Disk; d != nil {
		f.set("Made of", fmt.Sprintf("a file of %s, %s", api.Bytes(d.File), d.Format))
	}
	if d := i.Delta; d != nil {
		f.set("Lies over", d.Base.Digest.String())
		f.list("Packages", d.Packages)
	}
	var releases []string
	for _, r := range i.Releases {
		releases = append(releases, r.Short())
	}
	f.list("Releases", releases)
	return f.write(w, "")
}

func newDescribeRoleCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:     "role NAME",
		Short:   "Say all about one role",
		Example: "  troupe describe role web",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			is := func(r api.Role, name string) bool { return r.Name == name }
			return describe(cmd, &o, args[0], (*api.Client).Roles, is, writeRole)
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

func writeRole(w io.Writer, r api.Role, _ time.Time) error {
	var f fields
	f.set("Name", r.Name)
	f.set("OS", r.OS)
	f.set("Boot", r.Boot)
	f.set("Release", or(r.Release.String(), r.Waiting))
	f.set("Recipes", recipesText(r.BaseRecipe, r.DeltaRecipe))
	f.set("Hosts", fmt.Sprintf("%d, %d healthy", len(r.Hosts), r.Healthy))
	f.list("", r.Hosts)
	f.list("Packages", r.Spec.Packages)
	f.list("Services", r.Spec.Services.Enable)
	var files []string
	for _, path := range slices.Sorted(maps.Keys(r.Spec.Files)) {
		file := r.Spec.Files[path]
		files = append(files, fmt.Sprintf("%s (%04o, %s)", path, file.Mode, api.Bytes(int64(len(file.Content)))))
	}
	f.list("Files", files)
	f.list("Run", r.Spec.Run)
	f.list("Run after boot", r.Spec.Build.Boot)
	f.list("Kernel args", r.Spec.Kernel.Args)
	var checks []string
	for _, c := range r.Spec.Healthy {
		switch {
		case c.HTTP != nil:
			checks = append(checks, fmt.Sprintf("http port %d %s answers %d", c.HTTP.Port, c.HTTP.Path, c.HTTP.Status))
		case c.TCP != nil:
			checks = append(checks, fmt.Sprintf("tcp port %d", c.TCP.Port))
		case c.Unit != "":
			checks = append(checks, "unit "+c.Unit)
		default:
			checks = append(checks, "exec "+strings.Join(c.Exec, " "))
		}
	}
	f.list("Healthy if", checks)
	return f.write(w, "")
}

func newDescribeReleaseCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:     "release ID",
		Short:   "Say all about one release, by the first six or more hex digits of its id",
		Example: "  troupe describe release 79a242ee3021",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return describe(cmd, &o, args[0], (*api.Client).Releases, isRelease, writeRelease)
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

// recipesText names the recipes of a release; delta is "" where its image is booted as it is.
func recipesText(base, delta images.RecipeID) string {
	if delta == "" {
		return base.Short() + " (disk)"
	}
	return base.Short() + " (base), " + delta.Short() + " (delta)"
}

// isRelease says whether id names r: six hex digits at least, with or without "sha256:".
func isRelease(r api.Release, id string) bool {
	hex := strings.TrimPrefix(id, digest.Prefix)
	return len(hex) >= 6 && strings.HasPrefix(r.ID.Hex(), hex)
}

func writeRelease(w io.Writer, r api.Release, now time.Time) error {
	var f fields
	f.set("Release", r.ID.String())
	f.set("Roles", strings.Join(r.Roles, ", "))
	f.set("Made", r.Created.Local().Format(time.DateTime)+" ("+ago(now, r.Created)+")")
	c := r.Content
	for _, part := range []struct {
		name string
		blob images.Blob
	}{{"Base", c.Base.Blob}, {"Delta", c.Delta.Blob}, {"Kernel", c.Kernel}, {"Modules", c.Modules}, {"Disk", c.Disk}} {
		if part.blob.Digest != "" {
			f.set(part.name, fmt.Sprintf("%s, %s", part.blob.Digest, api.Bytes(part.blob.Size)))
		}
	}
	f.set("Kernel args", strings.Join(c.KernelArgs, " "))
	f.set("Recipes", recipesText(r.BaseRecipe, r.DeltaRecipe))
	f.set("Assigned", or(strings.Join(r.Assigned, ", "), "to no host"))
	f.set("Running", or(strings.Join(r.Running, ", "), "on no host"))
	return f.write(w, "")
}

// describe finds one of a list, and prints it.
func describe[T any](cmd *cobra.Command, o *remote, name string, ask func(*api.Client, context.Context) ([]T, error),
	is func(T, string) bool, write func(io.Writer, T, time.Time) error,
) error {
	c, err := o.client()
	if err != nil {
		return err
	}
	all, err := ask(c, cmd.Context())
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(v T) bool { return !is(v, name) })
	switch len(all) {
	case 0:
		return fmt.Errorf("there is no %s %q", cmd.Name(), name)
	case 1:
		return o.print(cmd, all[0], func(w io.Writer) error { return write(w, all[0], time.Now()) })
	}
	return fmt.Errorf("there are %d of %s %q: give more of it", len(all), cmd.Name(), name)
}
