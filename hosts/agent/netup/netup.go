// Package netup gives a machine its network: it finds the interface, asks for an address with DHCP (RFC 2131), sets
// it with its routes through netlink, and keeps the lease for as long as the machine runs.
package netup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/backoff"
)

// VendorClass is option 60 of what the agent sends: it tells the server that this is no firmware and wants no boot file.
const VendorClass = "troupe-agent"

// A Link is a network interface of the machine.
type Link struct {
	Name  string
	MAC   net.HardwareAddr
	Index int
}

// Links are the Ethernet interfaces, in the order of their index, the one with the MAC address first ("" for none).
func Links(mac string) ([]Link, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing network interfaces: %w", err)
	}
	var out []Link
	for _, l := range all {
		if a := l.Attrs(); ethernet(l) {
			out = append(out, Link{Name: a.Name, MAC: a.HardwareAddr, Index: a.Index})
		}
	}
	slices.SortStableFunc(out, func(a, b Link) int {
		if x, y := strings.EqualFold(a.MAC.String(), mac), strings.EqualFold(b.MAC.String(), mac); x != y {
			if x {
				return -1
			}
			return 1
		}
		return a.Index - b.Index
	})
	return out, nil
}

// ethernet says whether l has an address of 6 bytes and is no bridge, bond, or tunnel: those have a type of their own. A
// veth is let in: tests and containers boot from one.
func ethernet(l netlink.Link) bool {
	return l.Attrs().EncapType == "ether" && len(l.Attrs().HardwareAddr) == 6 && (l.Type() == "device" || l.Type() == "veth")
}

// A Finder gets the first lease of a boot.
type Finder struct {
	MAC string // of the interface to prefer: the one that the machine booted from; "" for none
	Log *slog.Logger
	// Drivers is closed once the drivers were loaded: until then the preferred interface is waited for. Nil for done.
	Drivers <-chan struct{}
	// Rescan is called before each look for interfaces: drivers may come late. Nil for nothing.
	Rescan func()

	vain map[string]int // by MAC: how many leases were given up
}

// Find tries the interfaces in turn until one has a lease, and sets the address. It returns only with a lease or with
// ctx's error. The preferred interface gets the first two turns alone, while it is there; it then goes first, and those
// whose leases were given up go last.
func (f *Finder) Find(ctx context.Context) (*Lease, error) {
	if err := f.await(ctx); err != nil {
		return nil, err
	}
	wait := backoff.Backoff{First: 200 * time.Millisecond, Limit: 5 * time.Second}
	for round := 0; ; round++ {
		l, err := f.round(ctx, round)
		if err == nil {
			return l, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		f.Log.Warn("no network yet, trying again", "error", err)
		if err := wait.Wait(ctx); err != nil {
			return nil, err
		}
		if f.Rescan != nil {
			f.Rescan()
		}
	}
}

// GiveUp takes l from the machine: whoever is looked for is not on that network. The next Find tries its interface again,
// but after all others.
func (f *Finder) GiveUp(l *Lease) error {
	if f.vain == nil {
		f.vain = map[string]int{}
	}
	f.vain[l.MAC]++
	return l.remove()
}

// await waits until the preferred interface is there, or all are that there will be.
func (f *Finder) await(ctx context.Context) error {
	if f.Drivers == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	updates := make(chan netlink.LinkUpdate, 16)
	if err := netlink.LinkSubscribe(updates, ctx.Done()); err != nil {
		return fmt.Errorf("watching network interfaces: %w", err)
	}
	for {
		links, err := Links(f.MAC)
		if err == nil && len(links) > 0 && strings.EqualFold(links[0].MAC.String(), f.MAC) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.Drivers:
			return nil
		case _, ok := <-updates:
			if !ok {
				return nil // a broken subscription must not hold up the boot
			}
		}
	}
}

func (f *Finder) round(ctx context.Context, n int) (*Lease, error) {
	links, err := Links(f.MAC)
	if err != nil {
		return nil, err
	}
	if len(links) == 0 {
		return nil, errors.New("the machine has no network interface that the kernel knows")
	}
	if n < 2 && strings.EqualFold(links[0].MAC.String(), f.MAC) {
		links = links[:1]
	}
	slices.SortStableFunc(links, func(a, b Link) int { return f.vain[a.MAC.String()] - f.vain[b.MAC.String()] })
	var errs []error
	for _, l := range links {
		if err := up(ctx, l); err != nil {
			errs = append(errs, err)
			continue
		}
		lease, err := Ask(ctx, l)
		if err == nil {
			err = lease.Apply(f.Log)
		}
		if err == nil {
			return lease, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// carrierWait is how long a port may take to see its cable: a switch that checks for loops first takes longer, and is
// met by the tries that follow.
const carrierWait = 6 * time.Second

// up raises an interface and waits for its carrier.
func up(ctx context.Context, l Link) error {
	link, err := netlink.LinkByIndex(l.Index)
	if err != nil {
		return fmt.Errorf("interface %s: %w", l.Name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, carrierWait)
	defer cancel()
	updates := make(chan netlink.LinkUpdate, 16)
	if err := netlink.LinkSubscribe(updates, ctx.Done()); err != nil {
		return fmt.Errorf("watching interface %s: %w", l.Name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("raising interface %s: %w", l.Name, err)
	}
	if now, err := netlink.LinkByIndex(l.Index); carrier(l.Name) || err == nil && running(now) {
		return nil
	}
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("interface %s: no carrier", l.Name)
		case u, ok := <-updates:
			if !ok {
				return fmt.Errorf("interface %s: no carrier", l.Name)
			}
			if int(u.Index) == l.Index && u.Link != nil && running(u.Link) {
				return nil
			}
		}
	}
}

// carrier asks the driver. IFF_RUNNING says the same, but up to a second later where the cable was seen before the
// interface was raised: the kernel publishes such changes once a second (net/core/link_watch.c).
func carrier(name string) bool {
	b, err := os.ReadFile("/sys/class/net/" + name + "/carrier")
	return err == nil && len(b) > 0 && b[0] == '1'
}

func running(l netlink.Link) bool { return l.Attrs().RawFlags&unix.IFF_RUNNING != 0 }

// Ask gets a lease for an interface that is up, and sets nothing. It gives up after some 7 s.
func Ask(ctx context.Context, l Link) (*Lease, error) { return ask(ctx, l) }

// ask is Ask with more to say in the DHCPDISCOVER.
func ask(ctx context.Context, l Link, discover ...dhcpv4.Modifier) (*Lease, error) {
	c, err := client(l.Name)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	offer, err := c.DiscoverOffer(ctx, append(modifiers(), discover...)...)
	if err != nil {
		return nil, fmt.Errorf("DHCP on %s: %w", l.Name, err)
	}
	asked := bootClock()
	got, err := c.RequestFromOffer(ctx, offer, modifiers()...)
	if err != nil {
		return nil, fmt.Errorf("DHCP on %s: %w", l.Name, err)
	}
	return newLease(l, got.ACK, asked)
}

func client(name string) (*nclient4.Client, error) {
	c, err := nclient4.New(name, nclient4.WithTimeout(time.Second), nclient4.WithRetry(3))
	if err != nil {
		return nil, fmt.Errorf("DHCP on %s: %w", name, err)
	}
	return c, nil
}

func modifiers() []dhcpv4.Modifier {
	return []dhcpv4.Modifier{
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier(VendorClass)),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer,
			dhcpv4.OptionDomainName, dhcpv4.OptionInterfaceMTU, dhcpv4.OptionClasslessStaticRoute),
	}
}

// link is the interface that the lease was given to, by its MAC address: the booted OS may rename it, even while it is up
// (since Linux 6.2). One that a bond gave another address is known by its permanent one.
func (l *Lease) link() (netlink.Link, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing network interfaces: %w", err)
	}
	var found netlink.Link
	for _, link := range all {
		a := link.Attrs()
		switch {
		case !ethernet(link):
		case strings.EqualFold(a.PermHWAddr.String(), l.MAC):
			return link, nil
		case strings.EqualFold(a.HardwareAddr.String(), l.MAC) && (found == nil || a.Name == l.Interface):
			found = link
		}
	}
	if found == nil {
		return nil, fmt.Errorf("interface %s: no interface has its MAC address %s any more", l.Interface, l.MAC)
	}
	return found, nil
}

// Apply sets the address, the routes and the MTU. The kernel is told no lifetime: whether an address is kept is
// decided by who renews it, and a root file system may depend on it. Only an address that cannot be set is an error: what
// else the server told may not fit this machine, as an MTU that its interface does not have, and is no reason to go
// without a network. That is logged.
func (l *Lease) Apply(log *slog.Logger) error {
	link, err := l.link()
	if err != nil {
		return err
	}
	if l.MTU > 0 && l.MTU != link.Attrs().MTU {
		if err := netlink.LinkSetMTU(link, l.MTU); err != nil {
			log.Warn("the MTU of the DHCP answer cannot be set", "interface", link.Attrs().Name, "mtu", l.MTU, "error", err)
		}
	}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ipnet(l.Address)}); err != nil {
		return fmt.Errorf("setting address %s on %s: %w", l.Address, link.Attrs().Name, err)
	}
	// What is on the link first: the others' gateways must be reachable when they are set.
	rs := slices.Clone(l.Routes)
	slices.SortStableFunc(rs, func(a, b Route) int { return btoi(a.Via.IsValid()) - btoi(b.Via.IsValid()) })
	for _, r := range rs {
		if err := setRoute(link, l.Address, r); err != nil {
			log.Warn("a route of the DHCP answer cannot be set", "error", err)
		}
	}
	return nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func setRoute(link netlink.Link, self netip.Prefix, r Route) error {
	nr := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet(r.To), Protocol: unix.RTPROT_DHCP, Scope: netlink.SCOPE_LINK}
	if r.Via.IsValid() {
		nr.Gw, nr.Scope = r.Via.AsSlice(), netlink.SCOPE_UNIVERSE
		if !self.Contains(r.Via) { // as with a /32 address
			nr.Flags = int(netlink.FLAG_ONLINK)
		}
	}
	if err := netlink.RouteReplace(nr); err != nil {
		return fmt.Errorf("setting route to %s via %s on %s: %w", r.To, r.Via, link.Attrs().Name, err)
	}
	return nil
}

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// Missing says whether the leased address is not on its interface.
func (l *Lease) Missing() (bool, error) {
	link, err := l.link()
	if err != nil {
		return false, err
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return false, fmt.Errorf("listing addresses of %s: %w", l.Interface, err)
	}
	return !slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		return a.IP.Equal(l.Address.Addr().AsSlice())
	}), nil
}

// remove takes the address from its interface; its routes go with it.
func (l *Lease) remove() error {
	link, err := l.link()
	if err != nil {
		return err
	}
	err = netlink.AddrDel(link, &netlink.Addr{IPNet: ipnet(l.Address)})
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("removing address %s from %s: %w", l.Address, l.Interface, err)
	}
	return nil
}
