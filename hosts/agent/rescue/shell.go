package rescue

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/core"
	"github.com/u-root/u-root/pkg/core/cat"
	"github.com/u-root/u-root/pkg/core/chmod"
	"github.com/u-root/u-root/pkg/core/cp"
	"github.com/u-root/u-root/pkg/core/find"
	"github.com/u-root/u-root/pkg/core/ls"
	"github.com/u-root/u-root/pkg/core/mkdir"
	"github.com/u-root/u-root/pkg/core/mv"
	"github.com/u-root/u-root/pkg/core/rm"
	"github.com/u-root/u-root/pkg/core/touch"
	"mvdan.cc/sh/v3/interp"
	"mvdan.cc/sh/v3/syntax"
)

// coreutils are u-root's.
func coreutils() map[string]func() core.Command {
	return map[string]func() core.Command{
		"cat": cat.New, "chmod": chmod.New, "cp": cp.New, "find": find.New, "ls": ls.New,
		"mkdir": mkdir.New, "mv": mv.New, "rm": rm.New, "touch": touch.New,
	}
}

// Shell reads commands from in until its end, or exit. With interactive set it shows prompts, and an interrupt
// (SIGINT) ends the command that runs, not the shell.
func Shell(ctx context.Context, in io.Reader, out, errOut io.Writer, interactive bool) error {
	// Commands read from the terminal, too. From anything else they would take the lines that are meant for the shell.
	var stdin io.Reader
	if f, ok := in.(*os.File); ok {
		stdin = f
	}
	runner, err := interp.New(interp.StdIO(stdin, out, errOut), interp.ExecHandlers(handler))
	if err != nil {
		return fmt.Errorf("starting the shell: %w", err)
	}
	parser := syntax.NewParser()
	if !interactive {
		prog, err := parser.Parse(in, "")
		if err != nil {
			return err
		}
		return runner.Run(ctx, prog)
	}
	fmt.Fprintln(out, "troupe rescue shell; the boot goes on behind it. Type help for the commands, exit to leave.")
	prompt := func() { fmt.Fprint(out, "troupe# ") }
	prompt()
	for {
		err := parser.Interactive(in, func(stmts []*syntax.Stmt) bool {
			if parser.Incomplete() {
				fmt.Fprint(out, "> ")
				return true
			}
			for _, s := range stmts {
				runOne(ctx, runner, s, errOut)
				if runner.Exited() {
					return false
				}
			}
			prompt()
			return true
		})
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		fmt.Fprintln(errOut, err) // of syntax: the shell goes on
		prompt()
	}
}

func runOne(ctx context.Context, runner *interp.Runner, s *syntax.Stmt, errOut io.Writer) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	err := runner.Run(ctx, s)
	if _, ok := interp.IsExitStatus(err); err != nil && !ok {
		fmt.Fprintln(errOut, err)
	}
}

// handler runs our commands, and leaves the others to the programs of the initramfs.
func handler(next interp.ExecHandlerFunc) interp.ExecHandlerFunc {
	utils, own := coreutils(), commands()
	return func(ctx context.Context, args []string) error {
		hc := interp.HandlerCtx(ctx)
		var err error
		if mk, ok := utils[args[0]]; ok {
			cmd := mk()
			cmd.SetIO(hc.Stdin, hc.Stdout, hc.Stderr)
			cmd.SetWorkingDir(hc.Dir)
			cmd.SetLookupEnv(func(k string) (string, bool) {
				v := hc.Env.Get(k)
				return v.String(), v.IsSet()
			})
			err = cmd.RunContext(ctx, args[1:]...)
		} else if run, ok := own[args[0]]; ok {
			err = run.run(hc.Stdout, args[1:])
		} else if args[0] == "help" {
			err = help(hc.Stdout, utils, own)
		} else {
			return next(ctx, args)
		}
		if err != nil && !errors.Is(err, context.Canceled) {
			fmt.Fprintf(hc.Stderr, "%s: %v\n", args[0], err)
			return interp.NewExitStatus(1)
		}
		return nil
	}
}

func help(out io.Writer, utils map[string]func() core.Command, own map[string]command) error {
	var names []string
	for n := range utils {
		names = append(names, n)
	}
	slices.Sort(names)
	_, err := fmt.Fprintf(out, "files:    %s\n", strings.Join(names, " "))
	names = names[:0]
	for n := range own {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		_, e := fmt.Fprintf(out, "%-9s %s\n", n, own[n].help)
		err = errors.Join(err, e)
	}
	_, e := fmt.Fprintln(out, "and what POSIX sh has: cd, echo, for, while, pipes, redirections, ...")
	return errors.Join(err, e)
}
