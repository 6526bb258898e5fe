package scsi

import "encoding/binary"

// A Sense is why a command was refused or failed (SPC-4 4.5).
type Sense struct {
	Key       byte
	ASC, ASCQ byte
	// Information is the address or offset that the sense is about, where HasInformation says that it is about one.
	Information    uint64
	HasInformation bool
	// Field is the part of the CDB or of the parameter list that was refused; its zero value names none.
	Field Field
	// Descriptor asks for descriptor format (SPC-4 4.5.2), as the D_SENSE bit of the control mode page says.
	Descriptor bool
}

// A Field points at what was refused (SPC-4 4.5.2.4.2).
type Field struct {
	In   FieldOf
	Byte uint16
	Bit  int8 // the field's most significant bit, 7 to 0; -1: the byte as a whole
}

// A FieldOf is what a Field is a part of.
type FieldOf byte

// What a Field may be a part of.
const (
	NoField FieldOf = iota
	CDBField
	ParameterField
)

// The sense keys that occur here (SPC-4 4.5.6).
const (
	NoSense        = 0x0
	NotReady       = 0x2
	MediumError    = 0x3
	HardwareError  = 0x4
	IllegalRequest = 0x5
	UnitAttention  = 0x6
	DataProtect    = 0x7
	CopyAborted    = 0xa
	AbortedCommand = 0xb
	Miscompare     = 0xe
)

// The lengths of sense data in its two formats.
const (
	fixedLength      = 18
	descriptorHeader = 8
)

// Append appends the sense data to b, in the format that s asks for.
//
// Fixed format (SPC-4 4.5.3), 18 bytes:
//
//	0     VALID, response code 70h
//	2     sense key
//	3-6   INFORMATION, where VALID
//	7     additional length, 10
//	12    additional sense code
//	13    its qualifier
//	15-17 SKSV, sense key specific
//
// Descriptor format (SPC-4 4.5.2), 8 bytes and the descriptors:
//
//	0     response code 72h
//	1     sense key
//	2     additional sense code
//	3     its qualifier
//	7     additional length
//	8     descriptors: information (type 00h, 12 bytes), sense key specific (type 02h, 8 bytes)
func (s Sense) Append(b []byte) []byte {
	if s.Descriptor {
		return s.appendDescriptors(b)
	}
	start := len(b)
	b = append(b, make([]byte, fixedLength)...)
	f := b[start:]
	f[0] = 0x70
	f[2] = s.Key
	// Four bytes hold no larger address: the VALID bit then stays zero (SPC-4 4.5.3).
	if s.HasInformation && s.Information <= 0xffffffff {
		f[0] |= 0x80
		binary.BigEndian.PutUint32(f[3:], uint32(s.Information))
	}
	f[7] = fixedLength - 8
	f[12], f[13] = s.ASC, s.ASCQ
	s.Field.put(f[15:18])
	return b
}

func (s Sense) appendDescriptors(b []byte) []byte {
	start := len(b)
	b = append(b, 0x72, s.Key, s.ASC, s.ASCQ, 0, 0, 0, 0)
	if s.HasInformation {
		b = append(b, 0x00, 10, 0x80, 0)
		b = binary.BigEndian.AppendUint64(b, s.Information)
	}
	if s.Field.In != NoField {
		b = append(b, 0x02, 6, 0, 0, 0, 0, 0, 0)
		s.Field.put(b[len(b)-4 : len(b)-1])
	}
	b[start+7] = byte(len(b) - start - descriptorHeader) //nolint:gosec // two descriptors, 20 bytes
	return b
}

// put writes the field pointer into the three bytes of sense key specific data: SKSV, C/D, BPV and the bit, then the byte.
func (f Field) put(b []byte) {
	if f.In == NoField {
		return
	}
	b[0] = 0x80
	if f.In == CDBField {
		b[0] |= 0x40
	}
	if f.Bit >= 0 {
		b[0] |= 0x08 | byte(f.Bit&7)
	}
	binary.BigEndian.PutUint16(b[1:], f.Byte)
}

// invalidCDB is the sense of a CDB with a value that is not supported, at that byte and its field's highest bit; bit -1
// is the whole byte.
func invalidCDB(at uint16, bit int8) Sense {
	return Sense{Key: IllegalRequest, ASC: 0x24, Field: Field{In: CDBField, Byte: at, Bit: bit}}
}

// invalidParameter is the same of a parameter list.
func invalidParameter(at uint16, bit int8) Sense {
	return Sense{Key: IllegalRequest, ASC: 0x26, Field: Field{In: ParameterField, Byte: at, Bit: bit}}
}

// information gives s an address or an offset.
func (s Sense) information(v uint64) Sense {
	s.Information, s.HasInformation = v, true
	return s
}

// The senses that take nothing more to say.
var (
	senseInvalidOpcode    = Sense{Key: IllegalRequest, ASC: 0x20}
	senseOutOfRange       = Sense{Key: IllegalRequest, ASC: 0x21}
	senseNotSupported     = Sense{Key: IllegalRequest, ASC: 0x25}
	senseListLength       = Sense{Key: IllegalRequest, ASC: 0x1a}
	senseInformationUnit  = Sense{Key: IllegalRequest, ASC: 0x0e, ASCQ: 0x03}
	senseInvalidRelease   = Sense{Key: IllegalRequest, ASC: 0x26, ASCQ: 0x04}
	senseNoRegistration   = Sense{Key: IllegalRequest, ASC: 0x55, ASCQ: 0x04}
	senseSavingParameters = Sense{Key: IllegalRequest, ASC: 0x39}
	senseWriteProtected   = Sense{Key: DataProtect, ASC: 0x27}
	senseSoftProtected    = Sense{Key: DataProtect, ASC: 0x27, ASCQ: 0x02}
	senseNoSpace          = Sense{Key: DataProtect, ASC: 0x27, ASCQ: 0x07}
	senseReadError        = Sense{Key: MediumError, ASC: 0x11}
	senseWriteError       = Sense{Key: MediumError, ASC: 0x0c}
	senseInternal         = Sense{Key: HardwareError, ASC: 0x44}
	senseMiscompare       = Sense{Key: Miscompare, ASC: 0x1d}
)

// The unit attentions (SPC-4 table D.1). A new nexus hears of "power on, reset, or bus device reset": 2901h would say more, but
// some initiators, as libiscsi's tools, try again after 2900h alone.
var (
	attentionPowerOn     = Sense{Key: UnitAttention, ASC: 0x29, ASCQ: 0x00}
	attentionReset       = Sense{Key: UnitAttention, ASC: 0x29, ASCQ: 0x03}
	attentionModeChanged = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x01}
	attentionPreempted   = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x03}
	attentionReleased    = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x04}
	attentionUnregister  = Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: 0x05}
	attentionCleared     = Sense{Key: UnitAttention, ASC: 0x2f, ASCQ: 0x00}
	attentionLUNs        = Sense{Key: UnitAttention, ASC: 0x3f, ASCQ: 0x0e}
)

// ofReset says that a unit attention is one of power on, reset, and the like.
func (s Sense) ofReset() bool { return s.ASC == 0x29 }
