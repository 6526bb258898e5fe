package dhcp

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// proxy answers as a ProxyDHCP server (PXE specification 2.1, section 2.2.3): a client that boots is offered a file beside
// the address that the network's own server offers. Port 67 hears DISCOVER as the real server does; what is sent to port
// 4011 is meant for us alone. Anybody who does not boot gets no answer.
func (r *responder) proxy(q *request, port uint16) (*dhcpv4.DHCPv4, error) {
	if q.Program == Other {
		return nil, nil
	}
	var t dhcpv4.MessageType
	switch mt := q.MessageType(); {
	case mt == dhcpv4.MessageTypeDiscover:
		t = dhcpv4.MessageTypeOffer
	case port == PXEPort && (mt == dhcpv4.MessageTypeRequest || mt == dhcpv4.MessageTypeInform):
		t = dhcpv4.MessageTypeAck
	default:
		return nil, nil // a REQUEST on port 67 goes to the server that gives the address
	}
	if q.server = serverAddr(q.to, q.local, netip.Prefix{}); !q.server.IsValid() {
		return nil, errors.New("the interface has no IPv4 address")
	}
	m, err := dhcpv4.NewReplyFromRequest(q.DHCPv4,
		dhcpv4.WithMessageType(t),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(q.server.AsSlice())))
	if err != nil {
		return nil, fmt.Errorf("making an answer: %w", err)
	}
	echoMachineID(m, q.DHCPv4)
	detail, err := r.boot(m, q.Client, q.server)
	if err != nil {
		r.tell(q, addrOf(q.ClientIPAddr), "", err)
		return nil, nil
	}
	if t == dhcpv4.MessageTypeOffer && r.boots.begins(q.mac, q.Program, q.TransactionID) {
		r.tell(q, netip.Addr{}, detail, nil)
	}
	return m, nil
}
