package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/api"
)

func newDeltaCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "delta",
		Args:  cobra.NoArgs, // what is no verb below is a mistake
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Short: "Show and drop what a node changed over its release",
		Example: `  troupe delta diff n1
  troupe delta drop n1 /var/lib/app /etc/app.conf`,
	}
	cmd.AddCommand(newDeltaDiffCommand(), newDeltaDropCommand())
	return cmd
}

func newDeltaDiffCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:   "diff HOST",
		Short: "List the paths that a node changed over its release",
		Long: `Asks the node what it added, changed and removed since its release first booted there.
What the fleet itself gave the host is not listed while it is as it was given. The node
answers within some seconds; the list has 5000 paths at most.`,
		Example: "  troupe delta diff n1\n  troupe delta diff n1 -o json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			d, err := c.Delta(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return o.print(cmd, d, func(w io.Writer) error { return writeDelta(w, d) })
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

func writeDelta(w io.Writer, d agentapi.DeltaDiff) error {
	t := table{header: []string{"CHANGE", "TYPE", "SIZE", "PATH"}}
	for _, c := range d.List {
		size := "-"
		if c.Type == "file" {
			size = api.Bytes(c.Size)
		}
		t.add(string(c.Kind), cmp.Or(c.Type, "-"), size, c.Path)
	}
	if err := t.write(w, "nothing is changed"); err != nil || d.More == 0 {
		return err
	}
	_, err := fmt.Fprintf(w, "and %d more; %s in all\n", d.More, api.Bytes(d.Bytes))
	return err
}

func newDeltaDropCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:   "drop HOST [PATH…]",
		Short: "Drop what a node changed, when it boots next",
		Long: `Has a node drop what it changed below each PATH, or all of it, when it boots next. Then
what its release has there shows again. The node goes on as it is until then: nothing can
be taken from under a system that runs. To drop all of it now, reset the host.

PATH is as delta diff shows it: a path over a symbolic link is left as it is.`,
		Example: "  troupe delta drop n1 /var/lib/app\n  troupe delta drop n1",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			host, paths := args[0], args[1:]
			if err := c.Drop(cmd.Context(), host, paths); err != nil {
				return err
			}
			return o.print(cmd, api.DropRequest{Paths: paths}, func(w io.Writer) error {
				what := "all that it wrote"
				if len(paths) > 0 {
					what = strings.Join(paths, " ")
				}
				_, err := fmt.Fprintf(w, "host %s drops %s when it boots next\n", host, what)
				return err
			})
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}
