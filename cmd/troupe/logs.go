package main

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

func newLogsCommand() *cobra.Command {
	var o remote
	var follow bool
	cmd := &cobra.Command{
		Use:   "logs [build] [NAME|RECIPE]",
		Short: "Print the output of a build",
		Long: `Prints the output of the last build of an image, a role or a recipe; without a name,
of the build that runs, or else of the one that ran last.`,
		Example: `  troupe logs
  troupe logs build web --follow`,
		Args: cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && args[0] == "build" {
				args = args[1:]
			}
			if len(args) > 1 {
				return fmt.Errorf("logs takes one name, not %q", args)
			}
			c, err := o.client()
			if err != nil {
				return err
			}
			ref, err := buildToShow(cmd, c, args)
			if err != nil {
				return err
			}
			log, err := c.BuildLog(cmd.Context(), ref, follow)
			if err != nil {
				return err
			}
			defer log.Close()
			if _, err := io.Copy(cmd.OutOrStdout(), log); err != nil && cmd.Context().Err() == nil {
				return fmt.Errorf("reading the log of %s: %w", ref, err)
			}
			return nil
		},
	}
	o.flags(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the build ends")
	return cmd
}

// buildToShow is the recipe of the build that is named, or that is of most interest.
func buildToShow(cmd *cobra.Command, c *api.Client, args []string) (string, error) {
	if len(args) == 1 {
		i, err := c.Image(cmd.Context(), args[0])
		return i.Recipe.String(), err
	}
	all, err := c.Images(cmd.Context())
	if err != nil {
		return "", err
	}
	started := slices.DeleteFunc(all, func(i api.Image) bool { return i.Started.IsZero() })
	if len(started) == 0 {
		return "", errors.New("nothing was built yet")
	}
	if i := slices.IndexFunc(started, func(i api.Image) bool { return i.Phase == state.BuildRunning }); i >= 0 {
		return started[i].Recipe.String(), nil
	}
	return started[0].Recipe.String(), nil
}
