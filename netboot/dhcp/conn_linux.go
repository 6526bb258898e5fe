package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// A Conn is a UDP port on one interface, and a packet socket beside it for answers to clients that have no address yet.
type Conn struct {
	ifi  *net.Interface
	port uint16
	udp  *ipv4.PacketConn
	raw  *packet.Conn

	mu     sync.Mutex
	local  []netip.Addr
	lookAt time.Time // when local is looked up again
}

const (
	etherTypeIPv4 = 0x0800
	localFor      = time.Second // how long the interface's addresses are believed
)

// Listen opens a UDP port, ServerPort or PXEPort, on the interface named iface, and on no other. It needs CAP_NET_RAW and
// CAP_NET_BIND_SERVICE. A program that serves the port on another interface does no harm; one on all interfaces takes it.
func Listen(ctx context.Context, iface string, port uint16) (*Conn, error) {
	ifi, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, fmt.Errorf("interface %q: %w", iface, err)
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return bindTo(c, iface) }}
	pc, err := lc.ListenPacket(ctx, "udp4", ":"+strconv.Itoa(int(port)))
	if err != nil {
		return nil, fmt.Errorf("listening for DHCP on %s, port %d: %w", iface, port, err)
	}
	udp := ipv4.NewPacketConn(pc)
	if err := udp.SetControlMessage(ipv4.FlagInterface|ipv4.FlagDst, true); err != nil {
		return nil, errors.Join(fmt.Errorf("asking for the destination of packets on %s: %w", iface, err), pc.Close())
	}
	// It only sends: a filter that lets nothing in keeps the kernel from queueing every packet of the interface here.
	nothing, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{Val: 0}})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("assembling a packet filter: %w", err), pc.Close())
	}
	raw, err := packet.Listen(ifi, packet.Raw, etherTypeIPv4, &packet.Config{Filter: nothing})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening a packet socket on %s: %w", iface, err), pc.Close())
	}
	return &Conn{ifi: ifi, port: port, udp: udp, raw: raw}, nil
}

func bindTo(c syscall.RawConn, iface string) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		err = errors.Join(
			unix.BindToDevice(int(fd), iface),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1))
	})
	return errors.Join(cerr, err)
}

// Receive implements Transport.
func (c *Conn) Receive(buf []byte) (Packet, error) {
	n, cm, from, err := c.udp.ReadFrom(buf)
	if err != nil {
		return Packet{}, err
	}
	p := Packet{Data: buf[:n], Port: c.port, Local: c.addrs()}
	if u, ok := from.(*net.UDPAddr); ok {
		a := u.AddrPort()
		p.From = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	if cm != nil {
		p.To = addrOf(cm.Dst)
	}
	return p, nil
}

// addrs are the interface's IPv4 addresses, which may change while we serve.
func (c *Conn) addrs() []netip.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if now.Before(c.lookAt) {
		return c.local
	}
	c.lookAt = now.Add(localFor)
	as, err := c.ifi.Addrs()
	if err != nil {
		return c.local // the interface is going away, or coming back; what was known is the best there is
	}
	c.local = nil
	for _, a := range as {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil {
			c.local = append(c.local, addrOf(n.IP))
		}
	}
	return c.local
}

// Send implements Transport.
func (c *Conn) Send(r Reply) error {
	if r.MAC == nil {
		cm := &ipv4.ControlMessage{Src: r.From.AsSlice(), IfIndex: c.ifi.Index}
		_, err := c.udp.WriteTo(r.Data, cm, net.UDPAddrFromAddrPort(r.To))
		return err
	}
	f := frame(c.ifi.HardwareAddr, r.MAC, netip.AddrPortFrom(r.From, c.port), r.To, r.Data)
	_, err := c.raw.WriteTo(f, &packet.Addr{HardwareAddr: r.MAC})
	return err
}

// Close implements Transport.
func (c *Conn) Close() error { return errors.Join(c.udp.Close(), c.raw.Close()) }
