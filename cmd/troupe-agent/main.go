// Command troupe-agent is the node side of troupe: init of the initramfs as PID 1, a service of the booted system
// after that, the keeper of the iSCSI session that its root may lie on, and the rescue shell at the console.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/troupe-dev/troupe/hosts/agent"
	"github.com/troupe-dev/troupe/hosts/agent/iscsi"
	"github.com/troupe-dev/troupe/hosts/agent/rescue"
	"github.com/troupe-dev/troupe/internal/version"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "troupe-agent:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if os.Getpid() == 1 {
		return agent.Init(context.Background()) // nobody signals PID 1
	}
	verb := ""
	if len(args) == 1 {
		verb = args[0]
	}
	switch verb {
	case "service":
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
		defer stop()
		return agent.Serve(ctx, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	case iscsi.Argument:
		return agent.KeepSession(context.Background()) // it ends with the machine
	case rescue.Argument:
		return rescue.Shell(context.Background(), os.Stdin, os.Stdout, os.Stderr, true)
	case "version":
		fmt.Println(version.String())
		return nil
	}
	return fmt.Errorf("want one of service, %s, %s, version (init of an initramfs needs none of them)", iscsi.Argument, rescue.Argument)
}
