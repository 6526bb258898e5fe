package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// streams are what a command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// newRootCommand is the whole command line. Each verb has a file of its own.
func newRootCommand(std streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "troupe",
		Short: "GitOps for bare metal and VMs",
		Long: `troupe watches a Git repo of CUE, builds immutable images in one place, and
netboots machines from them. git push changes the fleet; git revert is the rollback.

Exit status: 0 fine; 1 invalid, different or not converged; 2 could not run.
Every flag can also be given as an environment variable: --data as TROUPE_DATA.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return flagsFromEnv(cmd.Flags()) },
	}
	root.SetIn(std.in)
	root.SetOut(std.out)
	root.SetErr(std.err)
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(newServeCommand(), newLabCommand(), newDemoCommand(), newVersionCommand(), newVetCommand(), newEvalCommand())
	root.AddCommand(newStatusCommand(), newGetCommand(), newDescribeCommand(), newEventsCommand(), newPlanCommand(), newLogsCommand(), newImageCommand(), newResetCommand(), newDeltaCommand(), newISCSICommand())
	explainUsage(root)
	return root
}

// explainUsage has every verb below cmd that refuses its arguments say which it takes.
func explainUsage(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		explainUsage(c)
	}
	check := cmd.Args
	if check == nil || cmd.HasSubCommands() { // whose only mistake is a verb that is not there
		return
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if check(cmd, args) == nil {
			return nil
		}
		return fmt.Errorf("usage: %s (see %s --help)", cmd.UseLine(), cmd.CommandPath())
	}
}

// flagsFromEnv sets every flag that the command line left alone from TROUPE_<NAME>, where that is set.
func flagsFromEnv(flags *pflag.FlagSet) error {
	var first error
	flags.VisitAll(func(f *pflag.Flag) {
		name := "TROUPE_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		v, ok := os.LookupEnv(name)
		if !ok || f.Changed || first != nil {
			return
		}
		if err := flags.Set(f.Name, v); err != nil {
			first = fmt.Errorf("environment variable %s: %w", name, err)
		}
	})
	return first
}
