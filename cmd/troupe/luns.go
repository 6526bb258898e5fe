package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/reconciler/api"
)

func newGetLUNsCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:     "luns [HOST…]",
		Aliases: []string{"lun"},
		Short:   "List what hosts have on the server's iSCSI target",
		Long: `Lists the logical units of hosts that run from the server. ro is an image, read by
all hosts that have it; cow an image with what this host wrote to it; rw a disk that
began blank. DELTA is how much what the host wrote takes on the server.`,
		Example: "  troupe get luns\n  troupe get luns n1",
		RunE:    func(cmd *cobra.Command, args []string) error { return getLUNs(cmd, &o, args) },
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

func getLUNs(cmd *cobra.Command, o *remote, args []string) error {
	c, err := o.client()
	if err != nil {
		return err
	}
	all, err := c.LUNs(cmd.Context())
	if err != nil {
		return err
	}
	hosts, err := hostlist(args)
	if err != nil {
		return err
	}
	chosen := all
	if len(hosts) > 0 {
		chosen = nil
	}
	for _, host := range hosts {
		before := len(chosen)
		for _, l := range all {
			if l.Host == host {
				chosen = append(chosen, l)
			}
		}
		if len(chosen) == before {
			return fmt.Errorf("host %q has no LUNs", host)
		}
	}
	return o.print(cmd, orEmpty(chosen), func(w io.Writer) error { return writeLUNs(w, chosen) })
}

func writeLUNs(w io.Writer, all []api.LUN) error {
	t := table{header: []string{"HOST", "LUN", "KIND", "IMAGE", "SIZE", "DELTA", "SESSIONS"}}
	for _, l := range all {
		image, delta := "-", "-"
		if l.Image != "" {
			image = strings.TrimSpace(l.Name + " " + l.Image.Short())
		}
		if l.Kind != api.LUNImage {
			delta = api.Bytes(l.Delta)
		}
		t.add(l.Host, strconv.Itoa(int(l.LUN)), string(l.Kind), image, api.Bytes(l.Size), delta, strconv.Itoa(l.Sessions))
	}
	return t.write(w, "no LUNs")
}

type resetOptions struct {
	remote
	force, wait bool
	timeout     time.Duration
}

func newResetCommand() *cobra.Command {
	var o resetOptions
	cmd := &cobra.Command{
		Use:   "reset HOST",
		Short: "Drop what a host wrote, and have it begin anew",
		Long: `Has a host begin anew, as it was when its release first booted there. All that it
wrote is lost, in its other releases, too. A node that runs is told to reboot; one that
is off begins anew when it boots next. Nothing is downloaded for that.

A host that runs from the server gets a new disk there, and loses its old one when it
reboots, or after a minute. Nobody can tell a system that was booted from an image of kind "disk":
while it is logged in that takes --force, after which all that it reads and writes
fails until somebody boots it again.`,
		Example: `  troupe reset n1
  troupe reset n1 --wait
  troupe reset vm1 --force`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args[0]) },
	}
	o.flags(cmd, "table", "json", "yaml")
	f := cmd.Flags()
	f.BoolVar(&o.force, "force", false, "also where that takes the disk from a system that runs")
	f.BoolVar(&o.wait, "wait", false, "wait until what was is gone")
	f.DurationVar(&o.timeout, "timeout", 5*time.Minute, "with --wait: give up after this time")
	return cmd
}

func (o *resetOptions) run(cmd *cobra.Command, host string) error {
	c, err := o.client()
	if err != nil {
		return err
	}
	t, err := c.Reset(cmd.Context(), host, o.force)
	if err != nil {
		return err
	}
	if o.wait && t.Resetting {
		if t, err = o.await(cmd.Context(), c, t); err != nil {
			return err
		}
	}
	return o.print(cmd, t, func(w io.Writer) error {
		line := fmt.Sprintf("host %s begins with a new disk when it boots next\n", host)
		switch {
		case t.Name == "" && t.Resetting:
			line = fmt.Sprintf("host %s reboots, and begins anew; where it is off, when it boots next\n", host)
		case t.Name == "":
			line = fmt.Sprintf("host %s has begun anew\n", host)
		case t.Resetting:
			line = fmt.Sprintf("host %s is told to reboot; it begins with a new disk then, or in a minute\n", host)
		}
		_, err := io.WriteString(w, line)
		return err
	})
}

// await asks until the disk that was is gone.
func (o *resetOptions) await(ctx context.Context, c *api.Client, t api.Target) (api.Target, error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	old := t.Disk
	wait := backoff.Backoff{First: 200 * time.Millisecond, Limit: 2 * time.Second}
	for t.Resetting && t.Disk == old {
		if err := wait.Wait(ctx); err != nil {
			return t, fmt.Errorf("waiting for host %s to let go of its disk: %w", t.Host, err)
		}
		h, err := c.Host(ctx, t.Host)
		if err != nil {
			return t, err
		}
		if t.Name == "" { // its disk is its own
			t.Resetting = h.Dropping
			continue
		}
		t = *cmp.Or(h.ISCSI, &api.Target{Host: t.Host})
	}
	return t, nil
}
