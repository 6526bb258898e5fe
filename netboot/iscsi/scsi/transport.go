package scsi

import (
	"encoding/binary"
	"strings"
)

// The TransportID of an iSCSI initiator port (SPC-4 7.6.4.6):
//
//	0     format (2 bits: 00b a device, 01b a port), protocol identifier 5h
//	2-3   length of what follows, a multiple of 4, at least 20
//	4     the name, its end and filling
const (
	transportPort   = 0x45
	transportDevice = 0x05
	transportHeader = 4
	transportLeast  = 20
)

// appendTransportID appends the TransportID of a port of that name.
func appendTransportID(b []byte, name string) []byte {
	kind := byte(transportDevice)
	if isPortName(name) {
		kind = transportPort
	}
	padded := padName(name)
	for len(padded) < transportLeast {
		padded = append(padded, 0)
	}
	b = append(b, kind, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(padded))) //nolint:gosec // padName bounds it
	return append(b, padded...)
}

func isPortName(name string) bool { return strings.Contains(name, ",i,0x") }

// parseTransportID takes the TransportID of a port from the start of b. Those of devices stand for ports that nobody can
// list, and are refused.
func parseTransportID(b []byte) (name string, rest []byte, ok bool) {
	if len(b) < transportHeader+transportLeast || b[0] != transportPort {
		return "", nil, false
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	if n < transportLeast || n%4 != 0 || n > maxName || n > len(b)-transportHeader {
		return "", nil, false
	}
	name, _, ended := strings.Cut(string(b[transportHeader:transportHeader+n]), "\x00")
	if !ended || !isPortName(name) {
		return "", nil, false
	}
	return name, b[transportHeader+n:], true
}
