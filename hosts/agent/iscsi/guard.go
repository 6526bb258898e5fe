package iscsi

import (
	"context"
	"log/slog"
	"time"

	"github.com/vishvananda/netlink"
)

// guardEvery is how often the address is looked after where the kernel tells of no change.
const guardEvery = 5 * time.Second

// A guard keeps the network that the disks are reached through: whatever takes the address or the route away, or the
// interface down, as network managers do when they start and when the system shuts down, would wait for its own next
// page from the root, and so for ever.
type guard struct {
	log  *slog.Logger
	load func() (Config, error)
}

// maxRestores is how often between two looks at the clock the network is set: where that does not help, its own changes
// are no reason to do it again at once.
const maxRestores = 8

// run looks at each change, until ctx is done.
func (g *guard) run(ctx context.Context) {
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	for {
		g.watch(ctx, tick.C)
		if ctx.Err() != nil {
			return
		}
	}
}

// watch returns when ctx is done, or when changes were lost and have to be subscribed to again.
func (g *guard) watch(ctx context.Context, tick <-chan time.Time) {
	done := make(chan struct{})
	addrs, links, routes := make(chan netlink.AddrUpdate, 8), make(chan netlink.LinkUpdate, 8), make(chan netlink.RouteUpdate, 8)
	failed := func(err error) { g.log.Debug("changes of the network were lost", "error", err) }
	err1 := netlink.AddrSubscribeWithOptions(addrs, done, netlink.AddrSubscribeOptions{ErrorCallback: failed})
	err2 := netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{ErrorCallback: failed})
	err3 := netlink.RouteSubscribeWithOptions(routes, done, netlink.RouteSubscribeOptions{ErrorCallback: failed})
	for _, ch := range []struct {
		err   error
		close func()
	}{{err1, func() { close(addrs) }}, {err2, func() { close(links) }}, {err3, func() { close(routes) }}} {
		if ch.err != nil {
			g.log.Warn("changes of the network are not told", "error", ch.err)
			ch.close()
		}
	}
	defer func() { // the library's own goroutines end with done
		close(done)
		for range addrs {
		}
		for range links {
		}
		for range routes {
		}
	}()
	restores := 0
	for {
		if restores < maxRestores && g.look() {
			restores++
		}
		ok := true
		select {
		case <-ctx.Done():
			return
		case <-tick:
			restores = 0
		case _, ok = <-addrs:
		case _, ok = <-links:
		case _, ok = <-routes:
		}
		if !ok {
			select {
			case <-ctx.Done():
			case <-tick:
			}
			return
		}
	}
}

// look sets right what is not, and returns whether there was something.
func (g *guard) look() bool {
	cfg, err := g.load()
	if err != nil || cfg.Lease == nil {
		return false
	}
	changed, err := cfg.Lease.Restore(cfg.Portal.Addr(), g.log)
	switch {
	case err != nil:
		g.log.Warn("the address of the iSCSI session cannot be kept", "address", cfg.Lease.Address, "error", err)
	case changed:
		g.log.Warn("the network of the iSCSI session was taken away, and is set again", "address", cfg.Lease.Address)
	}
	return changed
}
