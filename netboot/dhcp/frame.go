package dhcp

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// The headers of a frame, in order. All numbers are big-endian.
//
//	Ethernet  6 destination, 6 source, 2 type (0x0800)
//	IPv4      1 version and length (0x45), 1 service, 2 length, 2 id, 2 flags, 1 TTL, 1 protocol (17), 2 checksum, 4 source, 4 destination
//	UDP       2 source port, 2 destination port, 2 length, 2 checksum
const (
	etherLen = 14
	ipLen    = 20
	udpLen   = 8

	protocolUDP = 17
	ttl         = 64
)

// frame is data as a UDP datagram in an Ethernet frame. The operating system cannot send it: the client does not answer ARP
// for an address that it does not have yet.
func frame(srcMAC, dstMAC net.HardwareAddr, src, dst netip.AddrPort, data []byte) []byte {
	b := make([]byte, etherLen+ipLen+udpLen, etherLen+ipLen+udpLen+len(data))
	b = append(b, data...)
	length := uint16(udpLen + len(data)) //nolint:gosec // an answer of ours is far below 64 KiB

	copy(b[0:6], dstMAC)
	copy(b[6:12], srcMAC)
	binary.BigEndian.PutUint16(b[12:14], 0x0800)

	ip := b[etherLen:]
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:4], ipLen+length)
	ip[8], ip[9] = ttl, protocolUDP
	srcIP, dstIP := src.Addr().As4(), dst.Addr().As4()
	copy(ip[12:16], srcIP[:])
	copy(ip[16:20], dstIP[:])
	binary.BigEndian.PutUint16(ip[10:12], ^sum(0, ip[:ipLen]))

	udp := ip[ipLen:]
	binary.BigEndian.PutUint16(udp[0:2], src.Port())
	binary.BigEndian.PutUint16(udp[2:4], dst.Port())
	binary.BigEndian.PutUint16(udp[4:6], length)
	pseudo := sum(protocolUDP+uint32(length), ip[12:20]) // RFC 768: addresses, protocol and length count too
	check := ^sum(uint32(pseudo), udp)
	if check == 0 {
		check = 0xffff // 0 means that there is none
	}
	binary.BigEndian.PutUint16(udp[6:8], check)
	return b
}

// sum is the one's complement sum of RFC 1071, of b added to acc.
func sum(acc uint32, b []byte) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		acc += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		acc += uint32(b[0]) << 8
	}
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}
