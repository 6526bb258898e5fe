// Command troupe is GitOps for machines: the server, its command line and its lab, in one program.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/troupe-dev/troupe/images/build/vm"
)

// Exit statuses, the same for every verb.
const (
	exitOK      = 0
	exitDiffers = 1 // invalid, different, or not converged
	exitFailed  = 2 // could not run
)

// An exitError ends the program with a status of its own.
type exitError struct {
	status int
	err    error // nil: everything was said already
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// differs is the error of a verb that ran and has a "no" for an answer.
func differs(err error) error { return &exitError{status: exitDiffers, err: err} }

func main() {
	if vm.IsGuest(os.Args) {
		os.Exit(vm.RunGuest(os.Args))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := run(ctx, os.Args[1:], streams{in: os.Stdin, out: os.Stdout, err: os.Stderr})
	stop()
	os.Exit(status)
}

// run executes one command line and returns the exit status.
func run(ctx context.Context, args []string, std streams) int {
	root := newRootCommand(std)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var exit *exitError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		if exit.err != nil {
			_, _ = fmt.Fprintln(std.err, exit.err)
		}
		return exit.status
	}
	_, _ = fmt.Fprintln(std.err, "troupe:", err)
	return exitFailed
}
