package dhcp

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"time"
)

// A Network is the one that addresses are given out on.
type Network struct {
	Subnet      netip.Prefix
	Router      netip.Addr // the zero Addr: none
	DNS, NTP    []netip.Addr
	Domain      string
	First, Last netip.Addr    // the dynamic range, both included; zero Addrs: machines that are not declared get no address
	Lease       time.Duration // of every address; 0 is DefaultLease
}

// DefaultLease is how long an address is given for where a Network does not say.
const DefaultLease = time.Hour

func (n Network) lease() time.Duration {
	if n.Lease <= 0 {
		return DefaultLease
	}
	return n.Lease
}

func (n Network) hasRange() bool {
	return n.First.Is4() && n.Last.Is4() && n.First.Compare(n.Last) <= 0 && n.Subnet.Contains(n.First) && n.Subnet.Contains(n.Last)
}

func (n Network) dynamic(a netip.Addr) bool {
	return n.hasRange() && n.First.Compare(a) <= 0 && a.Compare(n.Last) <= 0
}

// reserved says whether a is no machine's: the router's, or the first or last address of the subnet.
func (n Network) reserved(a netip.Addr) bool {
	if a == n.Router || a == n.Subnet.Masked().Addr() {
		return true
	}
	return !n.Subnet.Contains(a.Next())
}

// A Host is what a fleet declares of a machine, as far as DHCP goes.
type Host struct {
	Name    string     // its host name
	Address netip.Addr // the zero Addr: it gets one of the dynamic range
}

// Addresses says who gets which address. It is asked for every packet, so what it says may change at any time, and it
// answers from memory.
type Addresses interface {
	// Network is the network that is served; ok is false while none is known, and then nobody gets an address.
	Network() (n Network, ok bool)
	// Lookup finds the declared host that a machine is, by its MAC or by its UUID ("" where it is not known).
	Lookup(mac net.HardwareAddr, uuid string) (Host, bool)
	// Declared says whether a is some host's address. Such a one is given to nobody else.
	Declared(a netip.Addr) bool
}

// A Lease is an address of the dynamic range, given to a machine. A declared address needs none.
type Lease struct {
	MAC      string // lower case, colons
	Address  netip.Addr
	Hostname string // as the machine calls itself; it chose it, so trust it with nothing
	Expires  time.Time
}

// A LeaseStore keeps leases while the server is down. There is one lease for each MAC.
type LeaseStore interface {
	Load(ctx context.Context) ([]Lease, error)
	// Put returns once l is kept. The machine is told of its address only then.
	Put(ctx context.Context, l Lease) error
	// Delete of a MAC that has no lease is not an error.
	Delete(ctx context.Context, mac string) error
}

// noStore is used where no LeaseStore is set.
type noStore struct{}

func (noStore) Load(context.Context) ([]Lease, error) { return nil, nil }
func (noStore) Put(context.Context, Lease) error      { return nil }
func (noStore) Delete(context.Context, string) error  { return nil }

// toIPs takes at most limit addresses, so that an answer stays within the size that every client can take.
func toIPs(as []netip.Addr, limit int) []net.IP {
	var ips []net.IP
	for _, a := range as[:min(len(as), limit)] {
		if a.Is4() {
			ips = append(ips, a.AsSlice())
		}
	}
	return slices.Clip(ips)
}

func addrOf(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip)
	if a = a.Unmap(); !ok || !a.Is4() || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}
