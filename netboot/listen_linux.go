package netboot

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/netboot/dhcp"
	"github.com/troupe-dev/troupe/netboot/ndp"
	"github.com/troupe-dev/troupe/netboot/tftp"
)

// Listen opens the ports of DHCP and TFTP on the interface named iface, and on no other: 67 and 69, and 4011 for
// dhcp.ModeProxy; and a packet socket for router solicitations. The whole process must be in the interface's network
// namespace. The interface needs an IPv4 address by the time that machines ask, not before.
func Listen(ctx context.Context, iface string, mode dhcp.Mode) (Sockets, error) {
	ports := map[dhcp.Mode][]uint16{dhcp.ModeServer: {dhcp.ServerPort}, dhcp.ModeProxy: {dhcp.ServerPort, dhcp.PXEPort}}
	var s Sockets
	for _, port := range ports[mode] {
		c, err := dhcp.Listen(ctx, iface, port)
		if err != nil {
			return Sockets{}, errors.Join(err, s.Close())
		}
		s.DHCP = append(s.DHCP, c)
	}
	nc, err := ndp.Listen(ctx, iface)
	if err != nil {
		return Sockets{}, errors.Join(err, s.Close())
	}
	s.NDP, s.MAC = nc, nc.MAC()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), iface) })
		return errors.Join(cerr, err)
	}}
	if s.TFTP, err = lc.ListenPacket(ctx, "udp4", ":"+strconv.Itoa(tftp.Port)); err != nil {
		return Sockets{}, errors.Join(fmt.Errorf("listening for TFTP on %s: %w", iface, err), s.Close())
	}
	return s, nil
}
