package main

import (
	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/schema/load"
)

// newEvalCommand is the child process in which package load evaluates a fleet. It is not for people.
func newEvalCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "eval",
		Short:  "Evaluate CUE for another troupe process",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return load.Evaluate(cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}
