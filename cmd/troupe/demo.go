package main

import (
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/troupe-dev/troupe/testbed/demo"
)

func newDemoCommand() *cobra.Command {
	var opts demo.Options
	var verbose bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show it all: boot three machines, switch one by a push, and back by git revert",
		Long: `Runs a lab with three blank machines (two BIOS, one UEFI). They boot into their
roles; n2 is switched from idle to web by a commit and a push, then back by
git revert, from its cache. Each stage is printed as it happens, and last a table of
what it took.

Where standard input is a terminal the lab then stays up until Ctrl-C.`,
		Example: "  troupe demo\n  troupe demo --lab ./demo </dev/null",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in, isFile := cmd.InOrStdin().(*os.File)
			opts.Stay = isFile && term.IsTerminal(int(in.Fd()))
			opts.Out = cmd.OutOrStdout()
			logTo := io.Discard
			if verbose {
				logTo = cmd.ErrOrStderr()
			}
			opts.Log = slog.New(slog.NewTextHandler(logTo, nil))
			if opts.Dir != "" {
				dir, err := filepath.Abs(opts.Dir)
				if err != nil {
					return err
				}
				opts.Dir = dir
			}
			return demo.Run(cmd.Context(), opts)
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.Dir, "lab", "", "new directory for the lab, which is kept (default: one that is removed in the end)")
	f.StringVar(&opts.Page, "page", "127.0.0.1:0", `address on the host for the server's web page; "" for none`)
	f.DurationVar(&opts.Timeout, "timeout", 30*time.Minute, "how long all of it may take, downloads of packages included")
	f.BoolVarP(&verbose, "verbose", "v", false, "log what the lab does")
	return cmd
}
