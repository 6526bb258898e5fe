package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

func newImageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Args:  cobra.NoArgs, // what is no verb below is a mistake
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Short: "List, show, build, compare and copy images",
		Example: `  troupe image ls
  troupe image show debian
  troupe image build web --wait`,
	}
	cmd.AddCommand(newGetImagesCommand("ls", "List the images that were built or shall be"),
		newDescribeImageCommand("show", "Say all about one image"), newImageBuildCommand(),
		newImageDiffCommand(), newImagePushCommand(), newImagePullCommand(), newImageVerifyCommand(), newImageGCCommand())
	return cmd
}

type imageBuild struct {
	remote
	wait    bool
	timeout time.Duration
}

func newImageBuildCommand() *cobra.Command {
	var o imageBuild
	cmd := &cobra.Command{
		Use:   "build NAME",
		Short: "Have an image or a role built now",
		Long: `Has the server build an image of the fleet or, where none has that name, what the
role of that name adds to its image, now: also where a build failed and waits before it
is tried again, and where no host needs it. What is built already is not built twice. A
role needs its image, which is built with it.

It has the server look at the repo first. With --wait, a newest commit that is
refused ends it.

Exit status: 0 it is noted, or with --wait: it is built; 1 the build failed,
or the newest commit is refused; 2 the
server could not be asked.`,
		Example: "  troupe image build web --wait",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			return o.run(cmd, c, args[0])
		},
	}
	o.flags(cmd)
	cmd.Flags().BoolVarP(&o.wait, "wait", "w", false, "wait until it is built")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 30*time.Minute, "with --wait: how long at most")
	return cmd
}

func (o *imageBuild) run(cmd *cobra.Command, c *api.Client, name string) error {
	if err := o.look(cmd, c); err != nil {
		return err
	}
	before, err := c.Images(cmd.Context())
	if err != nil {
		return err
	}
	noted, err := c.BuildImage(cmd.Context(), name)
	if err != nil {
		return err
	}
	if !o.wait {
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "noted; see troupe logs %s --follow\n", name)
		return err
	}
	built, err := o.await(cmd, c, name, noted.Recipes, before)
	if err != nil {
		return err
	}
	if built.Phase == state.BuildFailed {
		for _, line := range built.Tail {
			if _, err := fmt.Fprintln(cmd.ErrOrStderr(), plain(line)); err != nil {
				return err
			}
		}
		at := ""
		if built.Step != "" {
			at = " at " + built.Step
		}
		return differs(fmt.Errorf("the build of %s failed%s: %s", built.Name, at, built.Error))
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s %s %s\n", name, built.Digest, api.Bytes(built.Size))
	return err
}

// look has the server see what was just pushed. To wait for an image of a fleet that is not in force is a mistake.
func (o *imageBuild) look(cmd *cobra.Command, c *api.Client) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), o.timeout)
	defer cancel()
	if err := look(ctx, c); err != nil || !o.wait {
		return err
	}
	st, err := c.Status(ctx)
	if err != nil || st.Attempted == nil || len(st.Problems) == 0 {
		return err
	}
	if _, err := fmt.Fprintf(cmd.ErrOrStderr(), "commit %s is not in force:\n", shortHash(st.Attempted.Hash)); err != nil {
		return err
	}
	return differs(schema.Problems(st.Problems))
}

// await waits until the recipes that were asked for are built, or a build of one failed that had not in before. It
// returns the image of the last one, or the one whose build failed: for a role that may be its OS image.
func (o *imageBuild) await(
	cmd *cobra.Command, c *api.Client, name string, recipes []digest.Digest, before []api.Image,
) (api.Image, error) {
	ctx, cancel := context.WithTimeout(cmd.Context(), o.timeout)
	defer cancel()
	old := map[digest.Digest]api.Image{}
	for _, i := range before {
		old[i.Recipe] = i
	}
	show := newProgress(cmd.ErrOrStderr())
	defer show.end()
	var built api.Image
	err := c.Follow(ctx, func(s *api.Snapshot) bool {
		parts := partsOf(s.Images, recipes)
		show.snapshot(&api.Snapshot{Status: s.Status, Images: parts})
		done := len(parts) > 0
		for _, i := range parts {
			if built = i; failedAnew(i, old[i.Recipe]) {
				return true
			}
			done = done && i.Phase == state.BuildDone
		}
		return done
	})
	if errors.Is(err, context.DeadlineExceeded) && cmd.Context().Err() == nil {
		return built, differs(fmt.Errorf("%s was not built within %s", name, o.timeout))
	}
	return built, err
}

// failedAnew says whether a build failed and had not when it was old. One that was asked for, and that a later commit takes
// out of the fleet before it begins, fails without having finished.
func failedAnew(i, old api.Image) bool {
	return i.Phase == state.BuildFailed &&
		(old.Phase != state.BuildFailed || i.Error != old.Error || !i.Finished.Equal(old.Finished))
}

// partsOf are the images of recipes, in their order; none before all are known.
func partsOf(images []api.Image, recipes []digest.Digest) []api.Image {
	var parts []api.Image
	for _, recipe := range recipes {
		at := slices.IndexFunc(images, func(i api.Image) bool { return i.Recipe == recipe })
		if at < 0 {
			return nil // the server has not come to it yet
		}
		i := images[at]
		i.Declared = true // asked for, which is as good
		parts = append(parts, i)
	}
	return parts
}
