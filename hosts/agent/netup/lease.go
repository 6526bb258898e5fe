package netup

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"
)

// A Lease is an address that a DHCP server gave to an interface, with what else it said. It goes through JSON: the
// service of the booted OS renews the lease that the initramfs got.
type Lease struct {
	Interface string        `json:"interface"`
	MAC       string        `json:"mac"`
	Address   netip.Prefix  `json:"address"`
	Server    netip.Addr    `json:"server"` // the DHCP server
	Routes    []Route       `json:"routes,omitempty"`
	DNS       []netip.Addr  `json:"dns,omitempty"`
	Domain    string        `json:"domain,omitempty"`
	MTU       int           `json:"mtu,omitempty"` // bytes; 0 where the server did not say
	Duration  time.Duration `json:"duration"`      // nanoseconds; 0 means for ever
	Asked     time.Duration `json:"asked"`         // nanoseconds of CLOCK_BOOTTIME: when it was asked for, from which it counts
	ACK       []byte        `json:"ack"`           // the server's last answer, as it came
}

// Kept is the lease as a later boot takes it up, which may hear of no DHCP server: it has run out, so that the first thing that
// a Keeper does is to ask for its address anew.
func (l *Lease) Kept() *Lease {
	k := *l
	k.Duration, k.Asked, k.ACK = time.Nanosecond, 0, nil
	return &k
}

// A Route is one that the DHCP server gave.
type Route struct {
	To  netip.Prefix `json:"to"`
	Via netip.Addr   `json:"via,omitzero"` // not set: on the link
}

// newLease reads an acknowledgement of what was asked for at that time of bootClock.
func newLease(link Link, ack *dhcpv4.DHCPv4, asked time.Duration) (*Lease, error) {
	addr, ok := netip.AddrFromSlice(ack.YourIPAddr.To4())
	if !ok || addr.IsUnspecified() {
		return nil, fmt.Errorf("DHCP answer on %s: no address in it", link.Name)
	}
	bits := 32
	if m := ack.SubnetMask(); len(m) == 4 {
		ones, size := m.Size()
		if size != 32 {
			return nil, fmt.Errorf("DHCP answer on %s: netmask %v has gaps", link.Name, m)
		}
		bits = ones
	}
	l := &Lease{
		Interface: link.Name, MAC: link.MAC.String(), Address: netip.PrefixFrom(addr, bits),
		Routes: routes(ack), Domain: domain(ack.DomainName()), Duration: ack.IPAddressLeaseTime(0), Asked: asked, ACK: ack.ToBytes(),
	}
	l.Server, _ = netip.AddrFromSlice(ack.ServerIdentifier().To4())
	for _, ip := range ack.DNS() {
		if a, ok := netip.AddrFromSlice(ip.To4()); ok {
			l.DNS = append(l.DNS, a)
		}
	}
	// RFC 791 asks for 576 at least; less is a broken server.
	if mtu, err := dhcpv4.GetUint16(dhcpv4.OptionInterfaceMTU, ack.Options); err == nil && mtu >= 576 {
		l.MTU = int(mtu)
	}
	return l, nil
}

// routes are the classless ones or else the router's: RFC 3442 says that the former replace the latter.
func routes(ack *dhcpv4.DHCPv4) []Route {
	var out []Route
	for _, r := range ack.ClasslessStaticRoute() {
		to, ok := netip.AddrFromSlice(r.Dest.IP.To4())
		ones, _ := r.Dest.Mask.Size()
		if !ok {
			continue
		}
		via, _ := netip.AddrFromSlice(r.Router.To4())
		if via.IsUnspecified() {
			via = netip.Addr{}
		}
		out = append(out, Route{To: netip.PrefixFrom(to, ones).Masked(), Via: via})
	}
	if len(out) > 0 {
		return out
	}
	for _, ip := range ack.Router() {
		if via, ok := netip.AddrFromSlice(ip.To4()); ok && !via.IsUnspecified() {
			return []Route{{To: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Via: via}}
		}
	}
	return nil
}

// domain lets through only what may stand in resolv.conf: the option comes from the network.
func domain(s string) string {
	s = strings.Trim(strings.TrimRight(s, "\x00"), ".")
	if len(s) > 253 {
		return ""
	}
	for _, r := range s {
		named := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.' || r == '_'
		if !named {
			return ""
		}
	}
	return s
}

// ResolvConf is resolv.conf(5) for this lease; "" where the server named no name server.
func (l *Lease) ResolvConf() string {
	if len(l.DNS) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString(ResolvConfMark)
	if l.Domain != "" {
		fmt.Fprintf(&b, "search %s\n", l.Domain)
	}
	for _, a := range l.DNS[:min(3, len(l.DNS))] { // glibc looks at no more (MAXNS)
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	return b.String()
}

// ResolvConfMark is the first line of a ResolvConf: a file without it is somebody else's.
const ResolvConfMark = "# written by troupe from its DHCP lease\n"

// renewAfter is when to renew: half of the lease (RFC 2131 section 4.4.5), but not more often than each 5 s. A lease
// without end is looked after once an hour.
func (l *Lease) renewAfter() time.Duration {
	if l.Duration <= 0 {
		return time.Hour
	}
	return max(5*time.Second, l.Duration/2)
}

// rebinding says whether any server may renew it by now, and not only the one that gave it, which may have got another
// address: after 7/8 of the lease (RFC 2131 section 4.4.5), or, where it has no end, once it could not be renewed.
func (l *Lease) rebinding() bool {
	if l.Duration <= 0 {
		return l.age() > 2*l.renewAfter()
	}
	return l.age() >= l.Duration/8*7
}

func (l *Lease) expired() bool { return l.Duration > 0 && l.age() >= l.Duration }

func (l *Lease) age() time.Duration { return bootClock() - l.Asked }

// bootClock is CLOCK_BOOTTIME: both lives of the agent count by it, and nobody sets it.
func bootClock() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // the clock is there since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}
