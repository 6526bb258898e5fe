package ndp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// A Conn is a packet socket that hears router solicitations on one interface.
type Conn struct {
	raw *packet.Conn
	mac net.HardwareAddr
}

// allRouters is the multicast group ff02::2, as Ethernet has it (RFC 2464 section 7).
var allRouters = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 2}

// Listen opens a Conn. It needs CAP_NET_RAW.
func Listen(_ context.Context, iface string) (*Conn, error) {
	ifi, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, fmt.Errorf("interface %q: %w", iface, err)
	}
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: etherLen + 6, Size: 1}, // next header
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protocolICMP, SkipTrue: 3},
		bpf.LoadAbsolute{Off: icmpOff, Size: 1}, // ICMP type
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: typeSolicitation, SkipTrue: 1},
		bpf.RetConstant{Val: 2048},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return nil, fmt.Errorf("assembling a packet filter: %w", err)
	}
	raw, err := packet.Listen(ifi, packet.Raw, etherTypeIPv6, &packet.Config{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("opening a packet socket on %s: %w", iface, err)
	}
	if err := raw.JoinGroup(allRouters); err != nil {
		return nil, errors.Join(fmt.Errorf("joining all routers on %s: %w", iface, err), raw.Close())
	}
	return &Conn{raw: raw, mac: ifi.HardwareAddr}, nil
}

// MAC is the hardware address of the interface.
func (c *Conn) MAC() net.HardwareAddr { return c.mac }

// Receive implements Transport.
func (c *Conn) Receive(buf []byte) (int, error) {
	n, _, err := c.raw.ReadFrom(buf)
	if errors.Is(err, unix.EBADF) || errors.Is(err, os.ErrClosed) { // what the library has for a closed socket
		err = fmt.Errorf("%w: %w", net.ErrClosed, err)
	}
	return n, err
}

// Send implements Transport.
func (c *Conn) Send(frame []byte) error {
	_, err := c.raw.WriteTo(frame, &packet.Addr{HardwareAddr: net.HardwareAddr(frame[0:6])})
	return err
}

// Close implements Transport.
func (c *Conn) Close() error { return c.raw.Close() }
