package agent

import (
	"cmp"
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/watchdog"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// armWatchdog has the machine reset where the system's init hangs, and returns the name of what does that; "" where nothing
// does. A system that runs from LUNs is left alone: it stands still while the server is away, for as long as that takes.
func (b *boot) armWatchdog(a agentapi.Assignment) string {
	if b.cmd.Watchdog < 0 || a.ISCSI != nil {
		return ""
	}
	dog := watchdog.Dog{Log: b.log}
	limit := cmp.Or(b.cmd.Watchdog, watchdog.BootTime)
	name, err := dog.Arm(limit, func() error { return b.mods.Load("softdog") })
	if err != nil {
		b.log.Warn("nothing resets the machine where its system hangs", "error", err)
		return ""
	}
	b.log.Info("the machine is reset where its system does not come up", "watchdog", name, "after", limit)
	return name
}

// petWatchdog pets what the boot armed, until ctx is done.
func (s *service) petWatchdog(ctx context.Context, name string) {
	err := watchdog.Dog{Log: s.log}.Run(ctx, name, s.goesDown)
	switch {
	case errors.Is(err, unix.EBUSY):
		s.log.Warn("another program has the watchdog: it is left to that", "error", err)
	case err != nil:
		s.log.Error("the watchdog is not petted", "error", err)
	}
}
