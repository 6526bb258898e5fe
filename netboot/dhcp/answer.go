package dhcp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"github.com/troupe-dev/troupe/internal/quiet"
)

// A responder is a Server at work.
type responder struct {
	cfg   *Server
	log   *slog.Logger
	pool  *pool
	boots *boots
	ids   *identities
}

func newResponder(ctx context.Context, s *Server) (*responder, error) {
	log := quiet.New(s.Log)
	var store LeaseStore = noStore{}
	if s.Leases != nil {
		store = s.Leases
	}
	p, err := loadPool(ctx, store, log)
	if err != nil {
		return nil, err
	}
	return &responder{cfg: s, log: log, pool: p, boots: newBoots(), ids: newIdentities()}, nil
}

func (r *responder) workers() int {
	if r.cfg.Workers > 0 {
		return r.cfg.Workers
	}
	return defaultWorkers
}

// A request is a packet that was understood, and what is known for answering it.
type request struct {
	*dhcpv4.DHCPv4
	Client
	mac     string
	to      netip.Addr // where the client sent it
	local   []netip.Addr
	server  netip.Addr // who we are to this client
	network Network    // the zero Network in ModeProxy
}

// answer is the reply to a packet; ok is false where there is none.
func (r *responder) answer(ctx context.Context, p Packet) (reply Reply, ok bool) {
	q, err := parse(p)
	if err != nil {
		r.log.Warn("not a DHCP request", "from", p.From, "err", err)
		return Reply{}, false
	}
	if r.cfg.Booting != nil && q.Program == IPXE && q.MessageType() == dhcpv4.MessageTypeDiscover {
		r.cfg.Booting(q.MAC)
	}
	var m *dhcpv4.DHCPv4
	if r.cfg.Mode == ModeProxy {
		m, err = r.proxy(q, p.Port)
	} else {
		m, err = r.serve(ctx, q)
	}
	if err != nil {
		r.log.Warn("DHCP request not answered", "mac", q.mac, "type", q.MessageType().String(), "err", err)
		return Reply{}, false
	}
	if m == nil {
		return Reply{}, false
	}
	to, mac := destination(q.DHCPv4, m, p)
	return Reply{Data: m.ToBytes(), From: q.server, To: to, MAC: mac}, true
}

// parse accepts what RFC 2131 calls a request of a client on Ethernet.
func parse(p Packet) (*request, error) {
	// Some firmware fills the packet to its last byte and leaves out the end option; an additional one does no harm.
	req, err := dhcpv4.FromBytes(append(slices.Clip(p.Data), dhcpv4.OptionEnd.Code()))
	if err != nil {
		return nil, fmt.Errorf("%d bytes: %w", len(p.Data), err)
	}
	switch {
	case req.OpCode != dhcpv4.OpcodeBootRequest:
		return nil, fmt.Errorf("op code is %d, want 1", req.OpCode)
	case req.HWType != iana.HWTypeEthernet || len(req.ClientHWAddr) != 6:
		return nil, fmt.Errorf("hardware type is %d with %d address bytes, want Ethernet's 1 and 6", req.HWType, len(req.ClientHWAddr))
	case req.ClientHWAddr[0]&1 != 0 || req.ClientHWAddr.String() == "00:00:00:00:00:00":
		return nil, fmt.Errorf("hardware address %s is no machine's", req.ClientHWAddr)
	case req.MessageType() == dhcpv4.MessageTypeNone:
		return nil, errors.New("no message type: plain BOOTP")
	}
	c := clientOf(req)
	return &request{DHCPv4: req, Client: c, mac: c.MAC.String(), to: p.To, local: p.Local}, nil
}

// serve answers as the network's DHCP server.
func (r *responder) serve(ctx context.Context, q *request) (*dhcpv4.DHCPv4, error) {
	if err := r.place(q); err != nil {
		return nil, err
	}
	switch q.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return r.discover(q)
	case dhcpv4.MessageTypeRequest:
		return r.request(ctx, q)
	case dhcpv4.MessageTypeInform:
		m, err := r.reply(q, dhcpv4.MessageTypeAck, netip.Addr{}, r.lookup(q))
		if err != nil {
			return nil, err
		}
		_, _ = r.boot(m, q.Client, q.server) // without boot options it still has those of the network
		return m, nil
	case dhcpv4.MessageTypeDecline:
		r.decline(ctx, q)
	case dhcpv4.MessageTypeRelease:
		a := addrOf(q.ClientIPAddr)
		if l, ok := r.pool.record(q.mac); ok && l.Address == a {
			r.pool.forgetLease(ctx, q.mac, func(l Lease) bool { return l.Address == a })
			r.log.Info("address released", "mac", q.mac, "address", l.Address)
		}
	}
	return nil, nil // a DECLINE or RELEASE has no answer, and the other types are those of servers
}

// place finds out who we are to a client, and whether the network that it is on is the one that is served: a server that
// answered on another one would give machines addresses that work nowhere.
func (r *responder) place(q *request) error {
	n, ok := r.cfg.Addresses.Network()
	if !ok {
		return errors.New("no network is known yet")
	}
	if !n.Subnet.IsValid() || !n.Subnet.Addr().Is4() {
		return fmt.Errorf("the network %s is not an IPv4 one", n.Subnet)
	}
	q.network = n
	if q.server = serverAddr(q.to, q.local, n.Subnet); !q.server.IsValid() {
		return errors.New("the interface has no IPv4 address")
	}
	link, what := q.server, "the interface's address"
	switch relay, ciaddr := addrOf(q.GatewayIPAddr), addrOf(q.ClientIPAddr); {
	case relay.IsValid():
		link, what = relayLink(q.DHCPv4, relay), "the relay's link"
	case ciaddr.IsValid() && q.to == q.server:
		return nil // it has an address and sent this through routers
	}
	if !n.Subnet.Contains(link) {
		return fmt.Errorf("%s %s lies outside of the fleet's subnet %s", what, link, n.Subnet)
	}
	return nil
}

// relayLink is the network that a relayed client is on: the link selection suboption (RFC 3527) if there is one.
func relayLink(req *dhcpv4.DHCPv4, giaddr netip.Addr) netip.Addr {
	if info := req.RelayAgentInfo(); info != nil {
		if a := addrOf(info.Get(dhcpv4.LinkSelectionSubOption)); a.IsValid() {
			return a
		}
	}
	return giaddr
}

// serverAddr is the address that the client used; for a broadcast, the interface's own on the served network.
func serverAddr(to netip.Addr, local []netip.Addr, subnet netip.Prefix) netip.Addr {
	if slices.Contains(local, to) {
		return to
	}
	for _, a := range local {
		if subnet.IsValid() && subnet.Contains(a) {
			return a
		}
	}
	if len(local) > 0 {
		return local[0]
	}
	return netip.Addr{}
}

// lookup finds the declared host; the zero Host where the machine is not declared. Most programs tell their MAC alone:
// the UUID that firmware told before stands in for what they leave out.
func (r *responder) lookup(q *request) Host {
	uuids := q.UUIDs
	if len(uuids) == 0 {
		uuids = r.ids.get(q.mac)
	}
	if len(uuids) == 0 {
		h, _ := r.cfg.Addresses.Lookup(q.MAC, "")
		return h
	}
	for _, id := range uuids {
		if h, ok := r.cfg.Addresses.Lookup(q.MAC, id); ok {
			r.ids.put(q.mac, uuids)
			return h
		}
	}
	return Host{}
}

func (r *responder) discover(q *request) (*dhcpv4.DHCPv4, error) {
	h := r.lookup(q)
	a := h.Address
	if !a.IsValid() {
		var err error
		if a, err = r.pool.propose(q.mac, addrOf(q.RequestedIPAddress()), q.network, r.taken(q)); err != nil {
			r.observe(q, netip.Addr{}, "", err) // answer logs it
			return nil, err
		}
	}
	m, err := r.reply(q, dhcpv4.MessageTypeOffer, a, h)
	if err != nil {
		return nil, err
	}
	r.addBoot(m, q, a)
	return m, nil
}

// addBoot adds the boot options to an offer. A machine for which there are none still gets its address.
func (r *responder) addBoot(m *dhcpv4.DHCPv4, q *request, a netip.Addr) {
	detail, err := r.boot(m, q.Client, q.server)
	if err != nil || detail != "" && r.boots.begins(q.mac, q.Program, q.TransactionID) {
		r.tell(q, a, detail, err)
	}
}

// taken says which addresses are not for the pool to give.
func (r *responder) taken(q *request) func(netip.Addr) bool {
	return func(a netip.Addr) bool {
		return q.network.reserved(a) || slices.Contains(q.local, a) || r.cfg.Addresses.Declared(a)
	}
}

// request answers a REQUEST. Its four kinds are told apart as in RFC 2131 section 4.3.6, table 4.
func (r *responder) request(ctx context.Context, q *request) (*dhcpv4.DHCPv4, error) {
	sid, want, ciaddr := addrOf(q.ServerIdentifier()), addrOf(q.RequestedIPAddress()), addrOf(q.ClientIPAddr)
	switch {
	case sid.IsValid() && !slices.Contains(q.local, sid):
		r.pool.forgetOffer(q.mac) // it chose another server
		return nil, nil
	case !sid.IsValid() && ciaddr.IsValid(): // renewing or rebinding
		want = ciaddr
	}
	if !want.IsValid() {
		return nil, errors.New("a REQUEST for no address")
	}
	h := r.lookup(q)
	if h.Address.IsValid() {
		if want != h.Address {
			return r.nak(q, fmt.Sprintf("%s is declared to have %s, not %s", h.Name, h.Address, want))
		}
		r.pool.forgetOffer(q.mac)
		r.pool.forgetLease(ctx, q.mac, func(Lease) bool { return true }) // of the time before it was declared
		return r.ack(q, want, h)
	}
	if !q.network.dynamic(want) || r.taken(q)(want) {
		return r.nak(q, fmt.Sprintf("%s is not an address of the dynamic range", want))
	}
	if l, ok := r.pool.record(q.mac); !sid.IsValid() && (!ok || l.Address != want) {
		if !ok && !slices.Contains(q.local, q.to) {
			// RFC 2131 section 4.3.2: a server that has no record of the client is silent; another one may have it.
			return nil, nil
		}
		return r.nak(q, fmt.Sprintf("%s is not leased to %s", want, q.mac))
	}
	return r.lease(ctx, q, want, h)
}

func (r *responder) lease(ctx context.Context, q *request, a netip.Addr, h Host) (*dhcpv4.DHCPv4, error) {
	// The machine may use the address until the lease ends on its own clock, which starts when it sent the request.
	const grace = 10 * time.Second
	err := r.pool.claim(ctx, q.mac, a, clean(q.HostName()), q.network.lease()+grace)
	if errors.Is(err, errHeld) {
		return r.nak(q, fmt.Sprintf("%s is not free", a))
	}
	if err != nil {
		return nil, err // no answer: the machine asks again
	}
	return r.ack(q, a, h)
}

func (r *responder) ack(q *request, a netip.Addr, h Host) (*dhcpv4.DHCPv4, error) {
	m, err := r.reply(q, dhcpv4.MessageTypeAck, a, h)
	if err != nil {
		return nil, err
	}
	_, _ = r.boot(m, q.Client, q.server) // told when it was offered
	r.log.Debug("address given", "mac", q.mac, "address", a, "host", h.Name, "program", q.Program.String())
	return m, nil
}

// nak refuses; the client starts over with a DISCOVER. RFC 2131 table 3: nothing but the reason and who says so.
func (r *responder) nak(q *request, why string) (*dhcpv4.DHCPv4, error) {
	m, err := dhcpv4.NewReplyFromRequest(q.DHCPv4,
		dhcpv4.WithMessageType(dhcpv4.MessageTypeNak),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(q.server.AsSlice())),
		dhcpv4.WithOption(dhcpv4.OptMessage(why)))
	if err != nil {
		return nil, fmt.Errorf("making a NAK: %w", err)
	}
	r.log.Info("address refused", "mac", q.mac, "why", why)
	return m, nil
}

// decline tells the log alone of an address that two machines use: RFC 2131 (table 5) leaves no room in a DECLINE for what
// tells firmware apart.
func (r *responder) decline(ctx context.Context, q *request) {
	a := addrOf(q.RequestedIPAddress())
	if h := r.lookup(q); h.Address.IsValid() && h.Address == a {
		r.log.Warn("another machine uses the address of a host", "mac", q.mac, "address", a, "host", h.Name)
		return
	}
	if r.pool.decline(ctx, q.mac, a) {
		r.log.Warn("another machine uses an address of the dynamic range", "mac", q.mac, "address", a, "not_given_for", declineHold)
	}
}

// maxServers bounds the lists in an answer.
const maxServers = 4

// reply is an OFFER or ACK of a, or, where a is the zero Addr, an ACK of the network's options alone.
func (r *responder) reply(q *request, t dhcpv4.MessageType, a netip.Addr, h Host) (*dhcpv4.DHCPv4, error) {
	n := q.network
	m, err := dhcpv4.NewReplyFromRequest(q.DHCPv4,
		dhcpv4.WithMessageType(t),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(q.server.AsSlice())),
		dhcpv4.WithOption(dhcpv4.OptSubnetMask(net.CIDRMask(n.Subnet.Bits(), 32))))
	if err != nil {
		return nil, fmt.Errorf("making an answer: %w", err)
	}
	if a.IsValid() {
		m.YourIPAddr = a.AsSlice()
		m.UpdateOption(dhcpv4.OptIPAddressLeaseTime(n.lease()))
	}
	if t == dhcpv4.MessageTypeAck {
		m.ClientIPAddr = q.ClientIPAddr
	}
	if n.Router.Is4() {
		m.UpdateOption(dhcpv4.OptRouter(n.Router.AsSlice()))
	}
	if ips := toIPs(n.DNS, maxServers); len(ips) > 0 {
		m.UpdateOption(dhcpv4.OptDNS(ips...))
	}
	if ips := toIPs(n.NTP, maxServers); len(ips) > 0 {
		m.UpdateOption(dhcpv4.OptNTPServers(ips...))
	}
	if n.Domain != "" {
		m.UpdateOption(dhcpv4.OptDomainName(n.Domain))
	}
	if h.Name != "" {
		m.UpdateOption(dhcpv4.OptHostName(h.Name))
	}
	echoMachineID(m, q.DHCPv4)
	return m, nil
}

// echoMachineID: firmware drops a PXE offer that does not carry its own UUID back.
func echoMachineID(m, req *dhcpv4.DHCPv4) {
	if id := req.Options.Get(dhcpv4.OptionClientMachineIdentifier); id != nil {
		m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, id))
	}
}

// tell reports to the observer and the log.
func (r *responder) tell(q *request, a netip.Addr, detail string, err error) {
	if err != nil {
		r.log.Warn("DHCP", "mac", q.mac, "program", q.Program.String(), "err", err)
	} else {
		r.log.Info("DHCP offer", "mac", q.mac, "address", a, "program", q.Program.String(), "boot", detail)
	}
	r.observe(q, a, detail, err)
}

// observe tells the observer of a machine that asked to boot. What an operating system, a telephone or a printer runs into
// is no stage of a boot: it boots nothing from here.
func (r *responder) observe(q *request, a netip.Addr, detail string, err error) {
	if r.cfg.Observe != nil && q.Program != Other {
		r.cfg.Observe(Event{MAC: q.MAC, Addr: a, Time: time.Now(), Detail: detail, Err: err})
	}
}

// destination is where RFC 2131 section 4.1 sends an answer; a MAC means a frame to a client that has no address yet.
func destination(req, m *dhcpv4.DHCPv4, p Packet) (netip.AddrPort, net.HardwareAddr) {
	broadcast := netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), ClientPort)
	giaddr, ciaddr, yiaddr := addrOf(req.GatewayIPAddr), addrOf(req.ClientIPAddr), addrOf(m.YourIPAddr)
	switch {
	case giaddr.IsValid():
		if m.MessageType() == dhcpv4.MessageTypeNak {
			m.SetBroadcast() // section 4.3.2: the relay must not try to reach the client by an address
		}
		return netip.AddrPortFrom(giaddr, ServerPort), nil
	case p.Port == PXEPort: // the PXE specification answers the port that was spoken from
		return p.From, nil
	case m.MessageType() == dhcpv4.MessageTypeNak:
		return broadcast, nil
	case ciaddr.IsValid():
		return netip.AddrPortFrom(ciaddr, ClientPort), nil
	case req.IsBroadcast() || !yiaddr.IsValid():
		return broadcast, nil
	}
	return netip.AddrPortFrom(yiaddr, ClientPort), req.ClientHWAddr
}
