package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"sigs.k8s.io/yaml"

	"github.com/troupe-dev/troupe/internal/qemu"
	"github.com/troupe-dev/troupe/testbed"
)

func newLabDownCommand(dir *string) *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "End a lab and remove all that is left of it",
		Long: `Switches the machines off, ends the server and the network, and removes the lab's
directory: disks, images, repo and logs. With --keep the directory stays, and
another lab up finds disks and images as they were.`,
		Example: "  troupe lab down\n  troupe lab down --keep",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), labTime)
			defer cancel()
			did, err := labDown(ctx, *dir, keep)
			if err != nil {
				return err
			}
			_, err = io.WriteString(cmd.OutOrStdout(), did+"\n")
			return err
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "keep the lab's directory")
	return cmd
}

// labDown ends the lab in dir, removes the directory unless it shall be kept, and says what it did.
func labDown(ctx context.Context, dir string, keep bool) (string, error) {
	lab, err := testbed.Open(dir)
	ran := err == nil
	switch {
	case ran:
		if err := lab.Down(ctx); err != nil {
			return "", err
		}
	case !errors.Is(err, testbed.ErrNoLab):
		return "", err
	}
	if _, err := os.Stat(dir); os.IsNotExist(err) {
		return "no lab in " + dir, nil
	}
	switch {
	case keep && ran:
		return fmt.Sprintf("lab %s ended; its directory is kept", dir), nil
	case keep:
		return "no lab runs in " + dir, nil
	}
	if err := testbed.Remove(dir); err != nil {
		return "", err
	}
	if ran {
		return fmt.Sprintf("lab %s ended and is removed", dir), nil
	}
	return fmt.Sprintf("lab %s did not run and is removed", dir), nil
}

func newLabStatusCommand(dir *string) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show a lab's machines and server",
		Example: "  troupe lab status\n  troupe lab status -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"table", "json", "yaml"}, output) {
				return fmt.Errorf("flag -o %q: want table, json or yaml", output)
			}
			lab, err := testbed.Open(*dir)
			if err != nil {
				return err
			}
			status, err := lab.Status(cmd.Context())
			if err != nil {
				return err
			}
			return printLab(cmd.OutOrStdout(), status, output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table, json or yaml")
	return cmd
}

func printLab(w io.Writer, s testbed.Status, output string) error {
	if output != "table" {
		b, err := json.MarshalIndent(s, "", "  ")
		if err == nil && output == "yaml" {
			b, err = yaml.JSONToYAML(b)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", bytes.TrimSpace(b))
		return err
	}
	text := fmt.Sprintf("network %s  accelerator %s\nserver %s", s.Router.Masked(), qemu.AccelText(s.Accel, s.Why), serverText(s.Serve))
	if s.Page != "" {
		text += "  page " + s.Page
	}
	if _, err := io.WriteString(w, text+"\n"); err != nil {
		return err
	}
	return printNodes(w, s.Nodes)
}

func newLabRunCommand(dir *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run -- COMMAND [ARGUMENTS]",
		Short: "Run a command in a lab's network",
		Long: `Runs a command that sees the lab's network instead of the host's, with the files,
the terminal and the processes of the host. Its exit status is that of lab run.
TROUPE_SERVER names the lab's server, so that troupe's own verbs ask that one.`,
		Example: `  troupe lab run -- troupe status
  troupe lab run -- ping -c 1 10.77.0.11
  troupe lab run -- sh`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			lab, err := testbed.Open(*dir)
			if err != nil {
				return err
			}
			return lab.Enter(args)
		},
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func newLabPowerCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "power NODE on|off|reset|cycle",
		Short: "Switch a machine on or off, or reset it",
		Long: `Does what a machine's buttons do: off is at once, as by pulling the plug, and its
disk stays; reset is of a machine that is on; cycle is off and on.`,
		Example:   "  troupe lab power n1 off\n  troupe lab power n1 cycle",
		Args:      cobra.ExactArgs(2),
		ValidArgs: []string{"on", "off", "reset", "cycle"},
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := testbed.Open(*dir)
			if err != nil {
				return err
			}
			return lab.Power(cmd.Context(), args[0], testbed.PowerAction(args[1]))
		},
	}
}

func newLabLinkCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:     "link NODE up|down",
		Short:   "Plug a machine's network cable in, or pull it out",
		Example: "  troupe lab link n1 down",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[1] != "up" && args[1] != "down" {
				return fmt.Errorf("link %q: want up or down", args[1])
			}
			lab, err := testbed.Open(*dir)
			if err != nil {
				return err
			}
			return lab.Link(cmd.Context(), args[0], args[1] == "up")
		},
	}
}

func newLabConsoleCommand(dir *string) *cobra.Command {
	var all, dump bool
	cmd := &cobra.Command{
		Use:   "console NODE",
		Short: "Show a machine's console, and type on it",
		Long: `Shows what a machine's console said since it was last switched on, and goes on with
what it says. On a terminal, what is typed goes to the machine; Ctrl-] leaves.`,
		Example: "  troupe lab console n1\n  troupe lab console n1 --dump | less",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			lab, err := testbed.Open(*dir)
			if err != nil {
				return err
			}
			from, err := consoleStart(cmd.Context(), lab, args[0], all)
			if err != nil {
				return err
			}
			in, isFile := cmd.InOrStdin().(*os.File)
			switch {
			case dump:
				return dumpConsole(cmd.OutOrStdout(), lab, args[0], from)
			case isFile && term.IsTerminal(int(in.Fd())):
				return attachConsole(cmd.Context(), lab, args[0], from, in, cmd.OutOrStdout())
			}
			return untilInterrupt(lab.FollowConsole(cmd.Context(), args[0], from, cmd.OutOrStdout()))
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "begin with the first time that the machine was switched on")
	cmd.Flags().BoolVar(&dump, "dump", false, "show what was said so far, and end")
	return cmd
}

// consoleStart is where in a console's output to begin. It is an error if there is no such machine.
func consoleStart(ctx context.Context, lab *testbed.Client, node string, all bool) (int64, error) {
	status, err := lab.Status(ctx)
	if err != nil {
		return 0, err
	}
	var names []string
	for _, n := range status.Nodes {
		if n.Name == node && all {
			return 0, nil
		}
		if n.Name == node {
			return n.Booted, nil
		}
		names = append(names, n.Name)
	}
	return 0, fmt.Errorf("the lab has no node %q, only %s", node, strings.Join(names, ", "))
}

func dumpConsole(w io.Writer, lab *testbed.Client, node string, from int64) error {
	said, err := lab.Console(node)
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, said[min(int(from), len(said)):])
	return err
}

// untilInterrupt makes nothing of Ctrl-C, which is how somebody stops to look.
func untilInterrupt(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// leaveKey is Ctrl-], as in telnet.
const leaveKey = 0x1d

// attachConsole connects the terminal with the machine until either goes.
func attachConsole(ctx context.Context, lab *testbed.Client, node string, from int64, in *os.File, out io.Writer) error {
	conn, err := lab.AttachConsole(ctx, node)
	if err != nil {
		return fmt.Errorf("node %q is off: %w", node, err)
	}
	defer conn.Close()
	if err := dumpConsole(out, lab, node, from); err != nil {
		return err
	}
	old, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return fmt.Errorf("preparing the terminal: %w", err)
	}
	defer func() { _ = term.Restore(int(in.Fd()), old) }()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	// The reader of the terminal cannot be stopped; it ends with the program.
	go func() {
		defer conn.Close()
		typeInto(conn, in)
	}()
	_, err = io.Copy(out, conn)
	_, _ = fmt.Fprintf(out, "\r\nleft the console of %s\r\n", node)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// typeInto copies what is typed until somebody wants to leave.
func typeInto(w io.Writer, in io.Reader) {
	buf := make([]byte, 256)
	for {
		n, err := in.Read(buf)
		keys, _, leave := bytes.Cut(buf[:n], []byte{leaveKey})
		if _, werr := w.Write(keys); err != nil || werr != nil || leave {
			return
		}
	}
}
