package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/testbed"
)

func newLabServerCommand(dir *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Start, stop or kill a lab's server",
		Long: `Ends the server of a lab that goes on, or starts it again as lab up started it: with
the same flags, state and proxy.`,
		Example: "  troupe lab server kill\n  troupe lab server start",
		Args:    cobra.NoArgs, // what is no verb below is a mistake
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		newLabServerVerb(dir, "start", "Start the server if it does not run, and wait until it answers", startLabServer),
		newLabServerVerb(dir, "stop", "End the server (SIGTERM), and wait until it has ended", endLabServer((*testbed.Client).ServeStop)),
		newLabServerVerb(dir, "kill", "Kill the server as kill -9 does", endLabServer((*testbed.Client).ServeKill)),
	)
	return cmd
}

// A labServerVerb is told how a lab's server was, and says what it did.
type labServerVerb func(ctx context.Context, lab *testbed.Client, was testbed.ServeStatus) (string, error)

func newLabServerVerb(dir *string, name, short string, do labServerVerb) *cobra.Command {
	return &cobra.Command{
		Use: name, Short: short, Args: cobra.NoArgs, Example: "  troupe lab server " + name,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), labTime)
			defer cancel()
			lab, err := testbed.Open(*dir)
			if err != nil {
				return err
			}
			status, err := lab.Status(ctx)
			if err != nil {
				return err
			}
			if status.Serve.Since.IsZero() {
				return errors.New("the lab has no server: it was started without --fleet and --repo")
			}
			did, err := do(ctx, lab, status.Serve)
			if err != nil {
				return err
			}
			_, err = io.WriteString(cmd.OutOrStdout(), did+"\n")
			return err
		},
	}
}

func startLabServer(ctx context.Context, lab *testbed.Client, was testbed.ServeStatus) (string, error) {
	if was.Running {
		return fmt.Sprintf("the server runs already, as process %d", was.PID), nil
	}
	if err := lab.ServeStart(ctx); err != nil {
		return "", err
	}
	if err := lab.WaitServer(ctx); err != nil {
		return "", err
	}
	status, err := lab.Status(ctx)
	return fmt.Sprintf("the server runs, as process %d", status.Serve.PID), err
}

// endLabServer ends the server by one of the Client's ways.
func endLabServer(end func(*testbed.Client, context.Context) error) labServerVerb {
	return func(ctx context.Context, lab *testbed.Client, was testbed.ServeStatus) (string, error) {
		if !was.Running {
			return "the server does not run: it " + serverText(was), nil
		}
		if err := end(lab, ctx); err != nil {
			return "", err
		}
		status, err := lab.Status(ctx)
		return fmt.Sprintf("the server, process %d, %s", was.PID, serverText(status.Serve)), err
	}
}

// serverText is how a lab's server is.
func serverText(s testbed.ServeStatus) string {
	switch {
	case s.Running:
		return fmt.Sprintf("runs (process %d)", s.PID)
	case s.Ended != "":
		return "ended: " + s.Ended + " (troupe lab server start starts it again)"
	}
	return "none"
}
