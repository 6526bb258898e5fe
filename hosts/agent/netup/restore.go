package netup

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Restore sets the lease again as far as it is gone: the interface is down, the address is missing, or no route leads to
// peer from it. It returns whether there was something to do.
func (l *Lease) Restore(peer netip.Addr, log *slog.Logger) (bool, error) {
	link, err := l.link()
	if err != nil {
		return false, err
	}
	isDown := link.Attrs().RawFlags&unix.IFF_UP == 0
	if isDown {
		if err := netlink.LinkSetUp(link); err != nil {
			return true, fmt.Errorf("setting %s up: %w", link.Attrs().Name, err)
		}
	}
	gone, err := l.Missing()
	if err != nil {
		return isDown, err
	}
	if !isDown && !gone && reaches(peer) {
		return false, nil
	}
	if err := l.Apply(log); err != nil || reaches(peer) {
		return true, err
	}
	// The kernel sets the route to the link with the address, and not again where only that was taken away.
	own := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet(l.Address.Masked()), Src: l.Address.Addr().AsSlice(), Protocol: unix.RTPROT_KERNEL, Scope: netlink.SCOPE_LINK}
	if err := netlink.RouteReplace(own); err != nil {
		return true, fmt.Errorf("setting the route to the network of %s: %w", l.Address, err)
	}
	return true, l.Apply(log)
}

// reaches says whether the kernel knows a way to peer. Only where it says that there is none, there is none.
func reaches(peer netip.Addr) bool {
	_, err := netlink.RouteGet(peer.AsSlice())
	return !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH)
}

// Assume sets the lease of an earlier boot on its interface, which may have no carrier yet.
func (l *Lease) Assume(log *slog.Logger) error {
	link, err := l.link()
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", link.Attrs().Name, err)
	}
	return l.Apply(log)
}
