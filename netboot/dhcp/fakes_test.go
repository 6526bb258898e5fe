package dhcp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var (
	ip     = netip.MustParseAddr
	server = ip("10.9.0.1")
	mac1   = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	mac2   = net.HardwareAddr{2, 0, 0, 0, 0, 2}
	mac3   = net.HardwareAddr{2, 0, 0, 0, 0, 3}
)

// fleet is an Addresses that can change, as a fleet does with a commit.
type fleet struct {
	mu      sync.Mutex
	network Network
	hosts   map[string]Host // by MAC or UUID
	unknown bool            // no commit yet
}

func (f *fleet) Network() (Network, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.network, !f.unknown
}

func (f *fleet) Lookup(mac net.HardwareAddr, uuid string) (Host, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if h, ok := f.hosts[mac.String()]; ok {
		return h, true
	}
	h, ok := f.hosts[uuid]
	return h, ok
}

func (f *fleet) Declared(a netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, h := range f.hosts {
		if h.Address == a {
			return true
		}
	}
	return false
}

func (f *fleet) declare(id string, h Host) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hosts[id] = h
}

func testFleet() *fleet {
	return &fleet{
		network: Network{
			Subnet: netip.MustParsePrefix("10.9.0.0/24"), Router: ip("10.9.0.254"), DNS: []netip.Addr{ip("10.9.0.53")},
			NTP: []netip.Addr{ip("10.9.0.123")}, Domain: "example", First: ip("10.9.0.100"), Last: ip("10.9.0.103"),
		},
		hosts: map[string]Host{},
	}
}

// memStore is a LeaseStore that is a map, and can be told to fail.
type memStore struct {
	mu     sync.Mutex
	leases map[string]Lease
	broken bool
}

var errBroken = errors.New("the store is broken")

func newMemStore() *memStore { return &memStore{leases: map[string]Lease{}} }

func (m *memStore) Load(context.Context) ([]Lease, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ls []Lease
	for _, l := range m.leases {
		ls = append(ls, l)
	}
	return ls, nil
}

func (m *memStore) Put(_ context.Context, l Lease) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken {
		return errBroken
	}
	m.leases[l.MAC] = l
	return nil
}

func (m *memStore) Delete(_ context.Context, mac string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.leases, mac)
	return nil
}

func (m *memStore) get(mac net.HardwareAddr) (Lease, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l, ok := m.leases[mac.String()]
	return l, ok
}

// A desk is a server whose packets are handed over by the test.
type desk struct {
	t      *testing.T
	fleet  *fleet
	store  *memStore
	server *Server
	r      *responder

	mu     sync.Mutex
	events []Event
}

func newDesk(t *testing.T, mode Mode) *desk {
	t.Helper()
	d := &desk{t: t, fleet: testFleet(), store: newMemStore()}
	d.server = &Server{
		Mode: mode, Addresses: d.fleet, Leases: d.store, HTTPPort: 8080,
		HasFile: func(name string) bool { return name != "snponly-arm64.efi" && name != "ipxe-arm64.efi" },
		Observe: func(e Event) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.events = append(d.events, e)
		},
	}
	d.restart()
	return d
}

// restart is what a crash leaves: the store.
func (d *desk) restart() {
	d.t.Helper()
	r, err := newResponder(d.t.Context(), d.server)
	if err != nil {
		d.t.Fatal(err)
	}
	d.r = r
}

var broadcast = ip("255.255.255.255")

// send hands over a message and returns the answer, nil where there is none.
func (d *desk) send(to netip.Addr, port uint16, m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, Reply) {
	d.t.Helper()
	reply, ok := d.r.answer(d.t.Context(), Packet{
		Data: m.ToBytes(), From: netip.AddrPortFrom(netip.IPv4Unspecified(), ClientPort), To: to, Port: port, Local: []netip.Addr{server},
	})
	if !ok {
		return nil, Reply{}
	}
	ans, err := dhcpv4.FromBytes(reply.Data)
	if err != nil {
		d.t.Fatalf("the answer cannot be parsed: %v", err)
	}
	return ans, reply
}

func (d *desk) broadcast(t dhcpv4.MessageType, mac net.HardwareAddr, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	d.t.Helper()
	ans, _ := d.send(broadcast, ServerPort, message(d.t, t, mac, mods...))
	return ans
}

func message(t testing.TB, typ dhcpv4.MessageType, mac net.HardwareAddr, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(mac), dhcpv4.WithMessageType(typ)}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func requested(a netip.Addr) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(a.AsSlice()))
}

func serverID(a netip.Addr) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(a.AsSlice()))
}

func class(s string) dhcpv4.Modifier { return dhcpv4.WithOption(dhcpv4.OptClassIdentifier(s)) }

// lease goes through DISCOVER and REQUEST.
func (d *desk) lease(mac net.HardwareAddr) netip.Addr {
	d.t.Helper()
	offer := d.broadcast(dhcpv4.MessageTypeDiscover, mac)
	if offer == nil || offer.MessageType() != dhcpv4.MessageTypeOffer {
		d.t.Fatalf("DISCOVER of %s: got %v, want an OFFER", mac, offer)
	}
	a := addrOf(offer.YourIPAddr)
	ack := d.broadcast(dhcpv4.MessageTypeRequest, mac, requested(a), serverID(server))
	if ack == nil || ack.MessageType() != dhcpv4.MessageTypeAck || addrOf(ack.YourIPAddr) != a {
		d.t.Fatalf("REQUEST of %s by %s: got %v, want an ACK", a, mac, ack)
	}
	return a
}
