package iscsi

import "fmt"

// A PDU begins with a header of 48 bytes (RFC 7143 section 11). Those of a login (sections 11.12 and 11.13), numbers
// with the high byte first:
//
//	     request                       response
//	 0   43h                           23h
//	 1   T C 0 0 CSG(2) NSG(2)         the same
//	 2   Version-max, Version-min      Version-max, Version-active
//	 4   length of AHS: 0              the same
//	 5   length of data (3)            the same
//	 8   ISID (6), TSIH (2)            the same
//	16   task tag (4)                  the same
//	20   CID (2)
//	24   CmdSN (4), set by the kernel  StatSN (4)
//	28   ExpStatSN (4), the same       ExpCmdSN (4)
//	32                                 MaxCmdSN (4)
//	36                                 status class, status detail
const headerSize = 48

type header [headerSize]byte

// Opcodes; opImmediate may be added to those of an initiator.
const (
	opImmediate      = 0x40
	opLogin          = 0x03
	opLogout         = 0x06
	opLoginResponse  = 0x23
	opLogoutResponse = 0x26
	opAsync          = 0x32
)

// Flags of byte 1 of a login.
const (
	flagTransit  = 0x80
	flagContinue = 0x40
)

// A stage of a login.
type stage byte

const (
	stageSecurity    stage = 0
	stageOperational stage = 1
	stageFull        stage = 3
)

// maxLoginData is MaxRecvDataSegmentLength before it is negotiated, in bytes.
const maxLoginData = 8192

// loginRequest makes the header of one request with n bytes of data.
func loginRequest(isid [6]byte, flags byte, now, next stage, n int) header {
	var h header
	h[0] = opImmediate | opLogin
	h[1] = flags | byte(now)<<2
	if flags&flagTransit != 0 {
		h[1] |= byte(next)
	}
	h.setDataLength(n)
	copy(h[8:], isid[:])
	return h
}

// logoutRequest asks to close the session (section 11.14, reason 0).
func logoutRequest() header {
	var h header
	h[0] = opImmediate | opLogout
	h[1] = 0x80
	return h
}

func (h *header) setDataLength(n int) {
	h[5], h[6], h[7] = byte(n>>16), byte(n>>8), byte(n) //nolint:gosec // n is at most maxLoginData
}

func (h header) opcode() byte { return h[0] & 0x3f }

func (h header) dataLength() int { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }

// A loginResponse is what one says, but for its data.
type loginResponse struct {
	flags         byte
	now, next     stage
	isid          [6]byte
	class, detail byte
}

func parseLoginResponse(h header) (loginResponse, error) {
	if h.opcode() != opLoginResponse {
		return loginResponse{}, fmt.Errorf("login: the target answers with a PDU of opcode %#02x", h.opcode())
	}
	r := loginResponse{
		flags: h[1] & (flagTransit | flagContinue), now: stage(h[1] >> 2 & 3), next: stage(h[1] & 3),
		isid: [6]byte(h[8:14]), class: h[36], detail: h[37],
	}
	if r.class == 0 && h[3] != 0 {
		return loginResponse{}, fmt.Errorf("login: the target speaks version %d, want 0", h[3])
	}
	return r, nil
}

// asyncEvent is the event of an Asynchronous Message (section 11.9).
func (h header) asyncEvent() byte { return h[36] }

// Events by which the target says that the connection ends.
const (
	asyncLogout        = 1
	asyncDropsOne      = 2
	asyncDropsAll      = 3
	asyncRenegotiation = 4
)
