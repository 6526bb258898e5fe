package iscsi

import (
	"encoding/binary"
	"fmt"
	"strconv"
)

// What goes between a process and the kernel's iSCSI transport class is a netlink message (netlink(7)) that holds one
// struct iscsi_uevent (include/scsi/iscsi_if.h), in the machine's byte order, and maybe data:
//
//	 0   nlmsghdr: length (4), type (2), flags (2), sequence (4), port (4)
//	16   type (4), error (4), transport handle (8)
//	32   what the process says: 24 bytes
//	56   what the kernel says: 16 bytes
//	72   data
//
//	message          process says, from 32                       kernel says, from 56
//	create session   CmdSN (4), commands (2), depth (2)          session (4), host (4)
//	create conn.     session (4), CID (4)                        session (4), CID (4)
//	bind             session, CID, socket (8), leading (4)       return code (4)
//	set parameter    session, CID, parameter (4), length (4)     return code; data: a string with its NUL
//	send PDU         session, CID, header (4), data (4)          return code; data: header, data
//	start            session, CID                                return code
//	stop             session, CID, - (8), flag (4)               return code
//	destroy conn.    session, CID                                return code
//	destroy session  session                                     -
//	failed, PDU      -                                           session, CID, error (4) or handle (8); data: header, data
//	destroyed        -                                           host (4), session (4)
const (
	nlHeader  = 16
	eventSize = 56
	saysAt    = 16 // in an iscsi_uevent
	answerAt  = 40
)

// A kind is the type of a message.
type kind uint32

const (
	createSession  kind = 11
	destroySession kind = 12
	createConn     kind = 13
	destroyConn    kind = 14
	bindConn       kind = 15
	setParam       kind = 16
	startConn      kind = 17
	stopConn       kind = 18
	sendPDU        kind = 19

	pduReceived      kind = 101
	connFailed       kind = 102
	requestFailed    kind = 103
	sessionDestroyed kind = 104
)

// A param is a parameter of a session or connection (enum iscsi_param).
type param uint32

const (
	paramMaxRecv      param = 0
	paramMaxXmit      param = 1
	paramHeaderDigest param = 2
	paramDataDigest   param = 3
	paramInitialR2T   param = 4
	paramMaxR2T       param = 5
	paramImmediate    param = 6
	paramFirstBurst   param = 7
	paramMaxBurst     param = 8
	paramPDUInOrder   param = 9
	paramDataInOrder  param = 10
	paramERL          param = 11
	paramTarget       param = 15
	paramTPGT         param = 16
	paramAddress      param = 17
	paramPort         param = 18
	paramRecovery     param = 19
	paramFastAbort    param = 26
	paramAbort        param = 27
	paramLUReset      param = 28
	paramPing         param = 30
	paramRecv         param = 31
	paramInitiator    param = 34
	paramTargetReset  param = 35
)

// Flags of stopConn.
const (
	stopTerminate = 1
	stopRecover   = 3
)

// An event is one struct iscsi_uevent with what follows it.
type event struct {
	kind  kind
	error uint32
	raw   [eventSize]byte
	data  []byte
}

// request begins a message of a process.
func request(k kind, words ...uint32) event {
	e := event{kind: k}
	for i, w := range words {
		binary.NativeEndian.PutUint32(e.raw[saysAt+4*i:], w)
	}
	return e
}

// createSessionRequest allows for that many commands at once in all, and on one disk.
func createSessionRequest(commands, depth uint16) event {
	e := request(createSession)
	binary.NativeEndian.PutUint16(e.raw[saysAt+4:], commands)
	binary.NativeEndian.PutUint16(e.raw[saysAt+6:], depth)
	return e
}

func bindRequest(session uint32, fd uintptr) event {
	e := request(bindConn, session, 0)
	binary.NativeEndian.PutUint64(e.raw[saysAt+8:], uint64(fd))
	binary.NativeEndian.PutUint32(e.raw[saysAt+16:], 1)
	return e
}

func stopRequest(session, flag uint32) event { return request(stopConn, session, 0, 0, 0, flag) }

func paramRequest(session uint32, p param, value string) event {
	e := request(setParam, session, 0, uint32(p), uint32(len(value)+1)) //nolint:gosec // a name or a number
	e.data = append([]byte(value), 0)
	return e
}

func numberRequest(session uint32, p param, n uint64) event {
	return paramRequest(session, p, strconv.FormatUint(n, 10))
}

func pduRequest(session uint32, h header, data []byte) event {
	e := request(sendPDU, session, 0, headerSize, uint32(len(data))) //nolint:gosec // at most maxLoginData
	e.data = append(append([]byte(nil), h[:]...), data...)
	return e
}

// word is what the kernel says, in 4 bytes each.
func (e event) word(i int) uint32 { return binary.NativeEndian.Uint32(e.raw[answerAt+4*i:]) }

// session is which one an event is about.
func (e event) session() uint32 {
	if e.kind == sessionDestroyed {
		return e.word(1)
	}
	return e.word(0)
}

// code is the return code of a request: 0, or the negative of an errno.
func (e event) code() int32 { return int32(e.word(0)) } //nolint:gosec // the kernel's own conversion

// pdu is a PDU that was received.
func (e event) pdu() (h header, data []byte, err error) {
	if len(e.data) < headerSize {
		return h, nil, fmt.Errorf("a PDU of %d bytes from the kernel, want %d at least", len(e.data), headerSize)
	}
	h, data = header(e.data[:headerSize]), e.data[headerSize:]
	if n := h.dataLength(); n <= len(data) { // the message is padded
		return h, data[:n], nil
	}
	return h, nil, fmt.Errorf("a PDU with %d bytes of %d from the kernel", len(data), h.dataLength())
}

// encode makes the netlink message.
func (e event) encode(transport uint64, sequence uint32) []byte {
	n := nlHeader + eventSize + len(e.data)
	b := make([]byte, nlHeader, n)
	const isRequest = 1                                  // NLM_F_REQUEST
	binary.NativeEndian.PutUint32(b, uint32(n))          //nolint:gosec // far below 4 GiB
	binary.NativeEndian.PutUint16(b[4:], uint16(e.kind)) //nolint:gosec // a small number
	binary.NativeEndian.PutUint16(b[6:], isRequest)
	binary.NativeEndian.PutUint32(b[8:], sequence)
	b = append(b, e.raw[:]...)
	binary.NativeEndian.PutUint32(b[nlHeader:], uint32(e.kind))
	binary.NativeEndian.PutUint64(b[nlHeader+8:], transport)
	return append(b, e.data...)
}

// decodeEvents reads what one receive brought.
func decodeEvents(b []byte) ([]event, error) {
	var out []event
	for len(b) > 0 {
		if len(b) < nlHeader {
			return out, fmt.Errorf("netlink message of %d bytes, want %d at least", len(b), nlHeader)
		}
		n := int(binary.NativeEndian.Uint32(b))
		if n < nlHeader+eventSize || n > len(b) {
			return out, fmt.Errorf("netlink message of %d bytes in %d, want %d at least", n, len(b), nlHeader+eventSize)
		}
		m := b[nlHeader:n]
		out = append(out, event{
			kind: kind(binary.NativeEndian.Uint32(m)), error: binary.NativeEndian.Uint32(m[4:]),
			raw: [eventSize]byte(m[:eventSize]), data: append([]byte(nil), m[eventSize:]...),
		})
		b = b[min(len(b), (n+3)&^3):]
	}
	return out, nil
}
