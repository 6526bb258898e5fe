// Package ndp answers the router solicitations (RFC 4861) of an iPXE that boots over IPv4, so that it does not wait for a
// router that is not there.
//
// iPXE configures IPv4 and IPv6 side by side and goes on when both have come to an end. Without a router that is after it
// has asked five times, 16 seconds later (seen with 1.0.0+git-20190125, as QEMU's ROM and as Debian's loaders). One
// advertisement that offers nothing ends the waiting at once. It goes to the one machine that asked, and only to a machine
// that boots: no other host hears of a router, and nobody uses this one, since its lifetime is 0.
package ndp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"
)

// The headers of a frame, in order. All numbers are big-endian.
//
//	Ethernet  6 destination, 6 source, 2 type (0x86dd)
//	IPv6      4 version, class and flow, 2 payload length, 1 next header (58), 1 hop limit (255), 16 source, 16 destination
//	ICMPv6    1 type, 1 code, 2 checksum
//	  solicitation (133)   4 reserved, options
//	  advertisement (134)  1 hop limit, 1 flags, 2 lifetime, 4 reachable time, 4 retransmit time, options
const (
	etherLen = 14
	ipLen    = 40
	icmpOff  = etherLen + ipLen
	advLen   = 16
	solLen   = 8

	etherTypeIPv6 = 0x86dd
	protocolICMP  = 58
	hopLimit      = 255 // RFC 4861 section 6.1: with less, it came through a router

	typeSolicitation  = 133
	typeAdvertisement = 134
)

// A Transport carries whole frames of one interface. A *Conn is one.
type Transport interface {
	// Receive waits for a frame. An error that is net.ErrClosed ends it; any other is of one frame.
	Receive(buf []byte) (n int, err error)
	// Send sends a frame to its destination.
	Send(frame []byte) error
	// Close makes Receive return net.ErrClosed.
	Close() error
}

// A Server answers solicitations. Its fields must not change once Serve was called.
type Server struct {
	MAC     net.HardwareAddr                // of the interface that it answers on. Required
	Booting func(mac net.HardwareAddr) bool // says whether a machine boots just now; others are not answered. Required
	Log     *slog.Logger                    // nil: nothing is logged
}

// Serve answers what comes in by t until ctx ends, and then returns nil. It closes t.
func (s *Server) Serve(ctx context.Context, t Transport) error {
	log := s.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	stop := context.AfterFunc(ctx, func() { _ = t.Close() }) // Receive returns net.ErrClosed
	defer func() {
		if stop() {
			_ = t.Close()
		}
	}()
	buf := make([]byte, 2048)
	for {
		n, err := t.Receive(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("receiving router solicitations: %w", err)
		case err != nil:
			log.Warn("receiving a router solicitation", "err", err)
			if !sleep(ctx, time.Second) { // the interface may be down
				return nil
			}
			continue
		}
		adv, ok := s.answer(buf[:n])
		if !ok {
			continue
		}
		if err := t.Send(adv); err != nil && ctx.Err() == nil {
			log.Warn("sending a router advertisement", "err", err)
		}
	}
}

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

// answer is the advertisement for a solicitation; ok is false for any other frame, and for a machine that does not boot.
func (s *Server) answer(sol []byte) (adv []byte, ok bool) {
	if !isSolicitation(sol) {
		return nil, false
	}
	mac, src := net.HardwareAddr(sol[6:12]), sol[etherLen+8:etherLen+24]
	linkLocal := src[0] == 0xfe && src[1]&0xc0 == 0x80
	if !linkLocal || !s.Booting(bytes.Clone(mac)) {
		return nil, false
	}
	return advertisement(s.MAC, mac, src), true
}

func isSolicitation(b []byte) bool {
	if len(b) < icmpOff+solLen || binary.BigEndian.Uint16(b[12:14]) != etherTypeIPv6 {
		return false
	}
	ip := b[etherLen:]
	return ip[0]>>4 == 6 && ip[6] == protocolICMP && ip[7] == hopLimit && ip[ipLen] == typeSolicitation && ip[ipLen+1] == 0
}

// advertisement says: there is a router, do not use it (lifetime 0), there is no DHCPv6 (flags 0), there are no prefixes.
func advertisement(from, to net.HardwareAddr, dst []byte) []byte {
	b := make([]byte, icmpOff+advLen)
	copy(b[0:6], to)
	copy(b[6:12], from)
	binary.BigEndian.PutUint16(b[12:14], etherTypeIPv6)

	ip := b[etherLen:]
	ip[0] = 6 << 4
	binary.BigEndian.PutUint16(ip[4:6], advLen)
	ip[6], ip[7] = protocolICMP, hopLimit
	copy(ip[8:24], linkLocal(from))
	copy(ip[24:40], dst)

	icmp := ip[ipLen:]
	icmp[0] = typeAdvertisement
	binary.BigEndian.PutUint16(icmp[2:4], checksum(ip[8:40], icmp))
	return b
}

// linkLocal is the address that an interface makes for itself (RFC 4291 appendix A).
func linkLocal(mac net.HardwareAddr) []byte {
	return []byte{0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}
}

// checksum is that of RFC 4443 section 2.3: over the addresses, the length, the protocol and the message.
func checksum(addrs, icmp []byte) uint16 {
	sum := uint32(len(icmp)) + protocolICMP   //nolint:gosec // an advertisement has advLen bytes
	for _, b := range [][]byte{addrs, icmp} { // both of even length
		for ; len(b) >= 2; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
