package iscsi

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// A PDU (RFC 7143 section 11.2) is a basic header segment of 48 bytes, then what that announces:
//
//	bytes
//	48       basic header segment (BHS)
//	0..1020  additional header segments (AHS), whole words of 4 bytes
//	4        header digest, if negotiated: CRC32C of BHS and AHS
//	0..      data segment, padded to a multiple of 4
//	4        data digest, if negotiated and there is data: CRC32C of data and padding
//
// The BHS has these fields in all PDUs; the rest is the opcode's own, and drawn at the opcodes below:
//
//	byte
//	0        .|I|opcode    I: immediate delivery (requests only)
//	1        F|...         F: final; the other bits are the opcode's
//	2-3      opcode's own
//	4        TotalAHSLength in words of 4 bytes, padding included
//	5-7      DataSegmentLength in bytes, padding not included
//	8-15     LUN, or the opcode's own
//	16-19    Initiator Task Tag (ITT); FFFFFFFFh: none
//	20-47    opcode's own
const (
	bhsLength    = 48
	maxAHSLength = 255 * 4
	digestLength = 4
	noTag        = 0xffffffff // the reserved task tag, as ITT and as TTT
)

// The opcodes of an initiator (section 11.2.1.2). All but Data-Out and SNACK carry CmdSN; all carry ExpStatSN.
//
//	         NOP-Out    SCSI Command     Task Management    Login Request      Text Request   Data-Out        Logout Request   SNACK
//	0        .|I|00h    .|I|01h          .|I|02h            .|I|03h            .|I|04h        .|.|05h         .|I|06h          .|.|10h
//	1        F          F|R|W|..|Attr:3  F|Function:7       T|C|..|CSG:2|NSG:2 F|C            F               F|Reason:7       F|...|Type:4
//	2                                                       Version-max
//	3                                                       Version-min
//	8-15     LUN        LUN              LUN                ISID:6 TSIH:2      LUN            LUN                              LUN
//	16-19    ITT        ITT              ITT                ITT                ITT            ITT             ITT              ITT
//	20-23    TTT        EDTL             Referenced tag     CID:2              TTT            TTT             CID:2            TTT or SNACK tag
//	24-27    CmdSN      CmdSN            CmdSN              CmdSN              CmdSN                          CmdSN
//	28-31    ExpStatSN  ExpStatSN        ExpStatSN          ExpStatSN          ExpStatSN      ExpStatSN       ExpStatSN        ExpStatSN
//	32-35               CDB (32-47)      RefCmdSN
//	36-39                                ExpDataSN                                            DataSN
//	40-43                                                                                     Buffer Offset                    BegRun
//	44-47                                                                                                                      RunLength
//	data     ping data  immediate data                      text               text           data
const (
	opNopOut  = 0x00
	opCommand = 0x01
	opTask    = 0x02
	opLogin   = 0x03
	opText    = 0x04
	opDataOut = 0x05
	opLogout  = 0x06
	opSNACK   = 0x10
)

// The opcodes of a target. All carry StatSN (in Data-In only with S; in R2T, and in a NOP-In that is no answer, the next
// one, which it does not use up), ExpCmdSN and MaxCmdSN.
//
//	         NOP-In    SCSI Response      TM Response  Login Response      Text Response  Data-In          Logout Response
//	0        20h       21h                22h          23h                 24h            25h              26h
//	1        1         1|..|o|u|O|U|.     1            T|C|..|CSG:2|NSG:2  F|C            F|A|...|O|U|S    1
//	2                  Response           Response     Version-max                                         Response
//	3                  Status                          Version-active                     Status (with S)
//	8-15     LUN                                       ISID:6 TSIH:2       LUN            LUN
//	16-19    ITT       ITT                ITT          ITT                 ITT            ITT              ITT
//	20-23    TTT       SNACK tag                                           TTT            TTT
//	24-27    StatSN    StatSN             StatSN       StatSN              StatSN         StatSN           StatSN
//	28-31    ExpCmdSN  ExpCmdSN           ExpCmdSN     ExpCmdSN            ExpCmdSN       ExpCmdSN         ExpCmdSN
//	32-35    MaxCmdSN  MaxCmdSN           MaxCmdSN     MaxCmdSN            MaxCmdSN       MaxCmdSN         MaxCmdSN
//	36-39              ExpDataSN                       Status class:1                     DataSN
//	                                                   Status detail:1
//	40-43              bidi read residual                                                 Buffer Offset    Time2Wait:2 Time2Retain:2
//	44-47              residual count                                                     residual count
//	data     ping data SenseLength:2                   text                text           data
//	                   and sense
//
//	         R2T               Asynchronous Message   Reject
//	0        31h               32h                    3Fh
//	1        1                 1                      1
//	2                                                 Reason
//	8-15     LUN               LUN
//	16-19    ITT               FFFFFFFFh              FFFFFFFFh
//	20-23    TTT
//	24-27    StatSN (next)     StatSN                 StatSN
//	28-31    ExpCmdSN          ExpCmdSN               ExpCmdSN
//	32-35    MaxCmdSN          MaxCmdSN               MaxCmdSN
//	36-39    R2TSN             AsyncEvent:1 VCode:1   DataSN or R2TSN
//	                           Parameter1:2
//	40-43    Buffer Offset     Parameter2:2
//	                           Parameter3:2
//	44-47    Desired Length
//	data                       sense and event data   header of the bad PDU
const (
	opNopIn      = 0x20
	opResponse   = 0x21
	opTaskResp   = 0x22
	opLoginResp  = 0x23
	opTextResp   = 0x24
	opDataIn     = 0x25
	opLogoutResp = 0x26
	opR2T        = 0x31
	opAsync      = 0x32
	opReject     = 0x3f

	opMask      = 0x3f
	opImmediate = 0x40
)

// The bits of byte 1.
const (
	flagFinal     = 0x80 // all but Login
	flagTransit   = 0x80 // Login: T
	flagContinue  = 0x40 // Login, Text: C
	flagRead      = 0x40 // SCSI Command
	flagWrite     = 0x20 // SCSI Command
	flagOverflow  = 0x04 // SCSI Response, Data-In: O
	flagUnderflow = 0x02 // SCSI Response, Data-In: U
	flagStatus    = 0x01 // Data-In: S
	maskAttr      = 0x07 // SCSI Command
	maskFunction  = 0x7f // Task Management, Logout
)

// The task attributes of a SCSI Command (section 11.3.1).
const (
	attrUntagged    = 0
	attrSimple      = 1
	attrOrdered     = 2
	attrHeadOfQueue = 3
	attrACA         = 4
)

// The functions of a Task Management Request (section 11.5.1) and the answers to it (section 11.6.1).
const (
	taskAbort       = 1
	taskAbortSet    = 2
	taskClearACA    = 3
	taskClearSet    = 4
	taskLUNReset    = 5
	taskWarmReset   = 6
	taskColdReset   = 7
	taskReassign    = 8
	taskComplete    = 0x00
	taskNotThere    = 0x01
	taskNoLUN       = 0x02
	taskNoReassign  = 0x04
	taskUnsupported = 0x05
	taskRejected    = 0xff
)

// The reasons of a Logout Request (section 11.14.1) and the answers to it (section 11.15.1).
const (
	logoutSession    = 0
	logoutConnection = 1
	logoutRecovery   = 2

	logoutDone       = 0
	logoutNoCID      = 1
	logoutNoRecovery = 2
)

// The reasons of a Reject (section 11.17.1).
const (
	rejectDataDigest   = 0x02
	rejectSNACK        = 0x03
	rejectProtocol     = 0x04
	rejectUnsupported  = 0x05
	rejectTooMany      = 0x06
	rejectInProgress   = 0x07
	rejectInvalidField = 0x09
)

// The events of an Asynchronous Message (section 11.9.1).
const (
	asyncLogout  = 1 // target requests logout; Parameter3: within so many seconds
	asyncDropAll = 3 // target drops all connections of the session
)

// The stages of a login: CSG and NSG (section 11.12.3).
const (
	stageSecurity    = 0
	stageOperational = 1
	stageFullFeature = 3
)

// The types of an AHS (section 11.2.2.1).
const (
	ahsExtendedCDB = 1
	ahsBidiRead    = 2
)

// A bhs is a basic header segment. Its methods read and write the fields by their names in the drawings above; which
// fields a PDU has is its opcode's matter.
type bhs [bhsLength]byte

// A pdu is a PDU without its digests and without padding of the data.
type pdu struct {
	bhs
	ahs  []byte
	data []byte
}

func (h *bhs) opcode() byte        { return h[0] & opMask }
func (h *bhs) immediate() bool     { return h[0]&opImmediate != 0 }
func (h *bhs) flags() byte         { return h[1] }
func (h *bhs) final() bool         { return h[1]&flagFinal != 0 }
func (h *bhs) ahsLength() int      { return int(h[4]) * 4 }
func (h *bhs) dataLength() int     { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }
func (h *bhs) lun() uint64         { return binary.BigEndian.Uint64(h[8:]) }
func (h *bhs) itt() uint32         { return binary.BigEndian.Uint32(h[16:]) }
func (h *bhs) ttt() uint32         { return binary.BigEndian.Uint32(h[20:]) }
func (h *bhs) cmdSN() uint32       { return binary.BigEndian.Uint32(h[24:]) }
func (h *bhs) dataSN() uint32      { return binary.BigEndian.Uint32(h[36:]) }
func (h *bhs) bufferOff() uint32   { return binary.BigEndian.Uint32(h[40:]) }
func (h *bhs) edtl() uint32        { return binary.BigEndian.Uint32(h[20:]) } // SCSI Command: Expected Data Transfer Length
func (h *bhs) cdb() []byte         { return h[32:48] }                        // SCSI Command
func (h *bhs) function() byte      { return h[1] & maskFunction }             // Task Management; Logout: the reason
func (h *bhs) refTag() uint32      { return binary.BigEndian.Uint32(h[20:]) } // Task Management
func (h *bhs) refCmdSN() uint32    { return binary.BigEndian.Uint32(h[32:]) } // Task Management
func (h *bhs) isid() uint64        { return h.lun() >> 16 }                   // Login: 48 bits
func (h *bhs) tsih() uint16        { return binary.BigEndian.Uint16(h[14:]) } // Login
func (h *bhs) cid() uint16         { return binary.BigEndian.Uint16(h[20:]) } // Login, Logout
func (h *bhs) transit() bool       { return h[1]&flagTransit != 0 }           // Login
func (h *bhs) cont() bool          { return h[1]&flagContinue != 0 }          // Login, Text
func (h *bhs) csg() byte           { return h[1] >> 2 & 3 }                   // Login
func (h *bhs) nsg() byte           { return h[1] & 3 }                        // Login
func (h *bhs) versionMax() byte    { return h[2] }                            // Login
func (h *bhs) versionMin() byte    { return h[3] }                            // Login; in its response: Version-active
func (h *bhs) loginStatus() uint16 { return binary.BigEndian.Uint16(h[36:]) } // Login Response: class and detail

// The fields of a target's PDUs, for who reads them.
func (h *bhs) statSN() uint32   { return binary.BigEndian.Uint32(h[24:]) }
func (h *bhs) expCmdSN() uint32 { return binary.BigEndian.Uint32(h[28:]) }
func (h *bhs) maxCmdSN() uint32 { return binary.BigEndian.Uint32(h[32:]) }
func (h *bhs) residual() uint32 { return binary.BigEndian.Uint32(h[44:]) }

func (h *bhs) setDataLength(n int) {
	h[5], h[6], h[7] = byte(n>>16&0xff), byte(n>>8&0xff), byte(n&0xff)
}
func (h *bhs) setLUN(v uint64)         { binary.BigEndian.PutUint64(h[8:], v) }
func (h *bhs) setITT(v uint32)         { binary.BigEndian.PutUint32(h[16:], v) }
func (h *bhs) setTTT(v uint32)         { binary.BigEndian.PutUint32(h[20:], v) }
func (h *bhs) setStatSN(v uint32)      { binary.BigEndian.PutUint32(h[24:], v) }
func (h *bhs) setExpCmdSN(v uint32)    { binary.BigEndian.PutUint32(h[28:], v) }
func (h *bhs) setMaxCmdSN(v uint32)    { binary.BigEndian.PutUint32(h[32:], v) }
func (h *bhs) setDataSN(v uint32)      { binary.BigEndian.PutUint32(h[36:], v) } // also R2TSN, ExpDataSN
func (h *bhs) setBufferOff(v uint32)   { binary.BigEndian.PutUint32(h[40:], v) }
func (h *bhs) setResidual(v uint32)    { binary.BigEndian.PutUint32(h[44:], v) } // also R2T's Desired Length
func (h *bhs) setTSIH(v uint16)        { binary.BigEndian.PutUint16(h[14:], v) } // Login
func (h *bhs) setCID(v uint16)         { binary.BigEndian.PutUint16(h[20:], v) } // Login, Logout
func (h *bhs) setLoginStatus(v uint16) { binary.BigEndian.PutUint16(h[36:], v) } // Login Response

// setISID keeps the TSIH beside it.
func (h *bhs) setISID(v uint64) { h.setLUN(v<<16 | uint64(h.tsih())) }

// padded is the length on the wire of a data segment of n bytes.
func padded(n int) int { return (n + 3) &^ 3 }

// errCDB is the cause of a Reject of a SCSI Command with "invalid PDU field".
var errCDB = errors.New("bad additional header segment")

// commandCDB gives the CDB of a SCSI Command: the 16 bytes of its BHS, with those of an extended CDB AHS after them:
//
//	byte
//	0-1      AHSLength: bytes that follow byte 2, padding not included
//	2        AHSType; 1: extended CDB
//	3        reserved
//	4-       the CDB from its byte 16 on, AHSLength - 1 bytes, padded to a multiple of 4
//
// bidi says that there is an AHS with the expected length of a bidirectional read. More than one AHS of a type, or one
// that does not fit, is an error.
func (p *pdu) commandCDB() (cdb []byte, bidi bool, err error) {
	cdb = p.cdb()
	for ahs := p.ahs; len(ahs) > 0; {
		if len(ahs) < 4 {
			return nil, false, fmt.Errorf("%w: %d bytes", errCDB, len(ahs))
		}
		n := int(binary.BigEndian.Uint16(ahs))
		end := padded(3 + n)
		if n < 1 || end > len(ahs) {
			return nil, false, fmt.Errorf("%w: length %d in %d bytes", errCDB, n, len(ahs))
		}
		switch {
		case ahs[2] == ahsExtendedCDB && len(cdb) == 16:
			cdb = append(cdb[:16:16], ahs[4:3+n]...)
		case ahs[2] == ahsBidiRead && n == 5 && !bidi:
			bidi = true
		default:
			return nil, false, fmt.Errorf("%w: type %d of length %d", errCDB, ahs[2], n)
		}
		ahs = ahs[end:]
	}
	return cdb, bidi, nil
}

// parseLUN gives the number in a LUN field of a single-level LUN structure (SAM-5 4.7.3): the peripheral device
// addressing method (bits 7-6 of the first byte 00b, bus 0, 8 bits of number) and the flat space one (01b, 14 bits).
// ok is false for anything else, which names no unit here.
func parseLUN(v uint64) (lun LUN, ok bool) {
	if v&0xffffffffffff != 0 {
		return 0, false
	}
	first := uint16(v >> 48)
	switch first >> 14 {
	case 0:
		return first, first < 256
	case 1:
		return first & 0x3fff, true
	}
	return 0, false
}

// formatLUN is the LUN field for a number: peripheral device addressing below 256, flat space above.
func formatLUN(lun LUN) uint64 {
	if lun < 256 {
		return uint64(lun) << 48
	}
	return uint64(lun|0x4000) << 48
}
