// Package dhcp answers DHCPv4 (RFC 2131) with the options that boot a machine from the network (RFC 4578 and the PXE
// specification 2.1; UEFI HTTP boot; iPXE's own). It is a whole server, or a ProxyDHCP server beside a foreign one.
//
// Who gets which declared address is asked for every packet and answered from memory. Only what a machine was told
// outlives the packet: a lease of the dynamic range is stored before the machine hears of it.
//
//	client                     server (port 67)                        what is kept
//	DISCOVER  ------------->   an address is looked up or found        the offer, in memory, for a minute
//	          <-------------   OFFER, boot options if it boots
//	REQUEST   ------------->   the same address again?                 the lease, in the LeaseStore
//	          <-------------   ACK, or NAK: start over
//
//	PXE firmware  ->  TFTP file iPXE  ->  iPXE asks again  ->  HTTP URL of its script
//	HTTP firmware ->  HTTP URL of iPXE -> iPXE asks again  ->  HTTP URL of its script
package dhcp

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
)

// A Mode is what a Server is to its network.
type Mode uint8

// The modes.
const (
	ModeServer Mode = iota // gives out addresses and boot options
	ModeProxy              // gives boot options alone, beside a DHCP server that gives the addresses
	ModeOff                // answers nobody: another server does all of DHCP
)

// The ports of RFC 2131 section 4.1, and the one of PXE boot servers.
const (
	ServerPort = 67
	ClientPort = 68
	PXEPort    = 4011
)

const (
	defaultWorkers = 16
	queueLength    = 64 // packets for one worker; a client whose packet finds no room sends it again
	sweepEvery     = 10 * time.Minute
	maxPacket      = 4096
)

// A Server answers DHCP requests. Its fields must not change once Serve was called.
type Server struct {
	Mode      Mode
	Addresses Addresses  // required in ModeServer; not asked in ModeProxy
	Leases    LeaseStore // nil: leases are forgotten when Serve returns

	// URL is where machines reach the HTTP server, e.g. "http://boot.example:8080". "": the address of the interface by
	// which the machine came, and HTTPPort; so each of several networks gets an address that it can reach.
	URL      string
	HTTPPort uint16 // 0 is 80

	// HasFile says whether TFTP and HTTP serve a boot loader of this name. nil: they serve all.
	HasFile func(name string) bool

	// Observe is told of what concerns a machine that asked to boot. It must not block. nil: nobody is told.
	Observe func(Event)
	// Booting is told of each iPXE that asks for an offer, every time. It must not block. nil: nobody is told.
	Booting func(mac net.HardwareAddr)

	Workers int          // how many packets are answered at once; 0 is 16
	Log     *slog.Logger // nil: nothing is logged
}

// An Event is something that happened to one machine that asked to boot.
type Event struct {
	MAC    net.HardwareAddr
	Addr   netip.Addr // that it was offered, or has; the zero Addr where there is none
	Time   time.Time
	Detail string // for people
	Err    error  // nil: the machine was offered a boot loader, and a new boot begins. Else none does
}

// A Packet is a datagram that came in.
type Packet struct {
	Data  []byte
	From  netip.AddrPort
	To    netip.Addr   // broadcast, or an address of this machine
	Port  uint16       // that it came in on
	Local []netip.Addr // the IPv4 addresses of the interface that it came in by
}

// A Reply is a datagram to send.
type Reply struct {
	Data []byte
	From netip.Addr // an address of this machine
	To   netip.AddrPort
	// MAC is where the frame is sent, for a client that does not answer ARP yet; nil: the operating system finds out.
	MAC net.HardwareAddr
}

// A Transport carries datagrams of one interface and port. A *Conn is one.
type Transport interface {
	// Receive waits for one datagram, whose Data lies in buf. An error that is net.ErrClosed ends it; any other is of one datagram.
	Receive(buf []byte) (Packet, error)
	// Send may be called by several goroutines.
	Send(Reply) error
	// Close makes Receive return net.ErrClosed.
	Close() error
}

// Serve answers what comes in by ts until ctx ends, and then returns nil; or until it cannot go on. It closes ts. It
// may be called once.
//
// Each Transport has a goroutine that receives. It gives each packet to the worker that its MAC hashes to, so that the
// packets of one machine are answered in their order, one at a time.
func (s *Server) Serve(ctx context.Context, ts ...Transport) error {
	switch {
	case s.Mode == ModeServer && s.Addresses == nil:
		return errors.New("dhcp: no Addresses to give out")
	case s.Mode == ModeOff:
		return errors.New("dhcp: a server that is off serves nobody")
	}
	r, err := newResponder(ctx, s)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	queues := make([]chan job, r.workers())
	for i := range queues {
		queues[i] = make(chan job, queueLength)
		g.Go(func() error { return r.work(ctx, queues[i]) })
	}
	for _, t := range ts {
		g.Go(func() error { return r.receive(ctx, t, queues) })
	}
	g.Go(func() error { return r.sweep(ctx) })
	g.Go(func() error {
		<-ctx.Done()
		for _, t := range ts {
			_ = t.Close() // receive sees net.ErrClosed; there is nobody to tell of more
		}
		return nil
	})
	return g.Wait()
}

type job struct {
	Packet
	via Transport
}

// receive hands on what t gets. An error of one datagram costs a log line and, since it may be the interface that is
// down, a pause that grows; a closed socket is the end.
func (r *responder) receive(ctx context.Context, t Transport, queues []chan job) error {
	buf := make([]byte, maxPacket)
	seed := maphash.MakeSeed()
	pause := time.Duration(0)
	for {
		p, err := t.Receive(buf)
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // the socket was closed because ctx ended
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("receiving DHCP packets: %w", err)
		case err != nil:
			r.log.Warn("receiving a DHCP packet", "err", err)
			pause = min(max(2*pause, 10*time.Millisecond), time.Second)
			if !sleep(ctx, pause) {
				return nil
			}
			continue
		}
		pause = 0
		p.Data = append([]byte(nil), p.Data...)
		select {
		case queues[maphash.Bytes(seed, chaddr(p.Data))%uint64(len(queues))] <- job{p, t}:
		default:
			r.log.Warn("dropped a DHCP packet: too many at once", "from", p.From)
		}
	}
}

// chaddr is the client's hardware address as it stands in a packet, which may be no packet at all.
func chaddr(b []byte) []byte {
	if len(b) < 34 {
		return nil
	}
	return b[28:34]
}

func (r *responder) work(ctx context.Context, jobs <-chan job) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case j := <-jobs:
			reply, ok := r.answer(ctx, j.Packet)
			if !ok {
				continue
			}
			if err := j.via.Send(reply); err != nil && ctx.Err() == nil {
				r.log.Warn("sending a DHCP answer", "to", reply.To, "mac", reply.MAC, "err", err)
			}
		}
	}
}

func (r *responder) sweep(ctx context.Context) error {
	for sleep(ctx, sweepEvery) {
		r.pool.sweep(ctx)
		r.boots.sweep()
	}
	return nil
}

// sleep returns false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
