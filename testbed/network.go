package testbed

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
)

// Bridge is the interface inside the lab that has the router's address.
const Bridge = "br0"

// makeNetwork makes a bridge with the router's address, and taps in it, in the network namespace of the caller, which
// must be an empty one.
func makeNetwork(router netip.Prefix, taps []string) error {
	if err := refuseUsed(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("setting lo up: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = Bridge
	// Without snooping, multicast goes to every machine, as on a plain switch.
	snoop := false
	br := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snoop}
	if err := netlink.LinkAdd(br); err != nil {
		return fmt.Errorf("making bridge %s: %w", Bridge, err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP: router.Addr().AsSlice(), Mask: net.CIDRMask(router.Bits(), router.Addr().BitLen()),
	}}
	if err := netlink.AddrAdd(br, addr); err != nil {
		return fmt.Errorf("giving bridge %s the address %s: %w", Bridge, router, err)
	}
	for _, name := range taps {
		if err := addTap(br, name); err != nil {
			return fmt.Errorf("making tap %s: %w", name, err)
		}
	}
	if err := netlink.LinkSetUp(br); err != nil {
		return fmt.Errorf("setting bridge %s up: %w", Bridge, err)
	}
	return nil
}

// refuseUsed is an error if there is any interface but lo: then this is somebody else's network.
func refuseUsed() error {
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("listing interfaces: %w", err)
	}
	for _, l := range links {
		// The kernel puts fallback tunnels, down, into every new namespace where their modules are loaded.
		if l.Flags&net.FlagLoopback == 0 && l.Flags&net.FlagUp != 0 {
			return fmt.Errorf("network namespace has interface %s already: it is not the lab's own", l.Name)
		}
	}
	return nil
}

func addTap(br netlink.Link, name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	tap := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(tap); err != nil {
		if os.IsPermission(err) {
			return fmt.Errorf("%w (a user needs read and write permission on /dev/net/tun)", err)
		}
		return err
	}
	if err := netlink.LinkSetMaster(tap, br); err != nil {
		return fmt.Errorf("joining %s: %w", br.Attrs().Name, err)
	}
	return netlink.LinkSetUp(tap)
}
