package scsi

import (
	"encoding/binary"
	"hash/fnv"
)

// The pages of vital product data.
const (
	vpdSupported       = 0x00
	vpdSerial          = 0x80
	vpdIdentification  = 0x83
	vpdBlockLimits     = 0xb0
	vpdCharacteristics = 0xb1
	vpdProvisioning    = 0xb2
)

// inquiryLength is that of the standard INQUIRY data with its version descriptors.
const inquiryLength = 96

// prepareInquiry is INQUIRY (SPC-4 6.6).
func prepareInquiry(n *Nexus, c *Command) {
	allocation := uint64(binary.BigEndian.Uint16(c.CDB[3:]))
	if c.CDB[1]&0x02 != 0 { // CMDDT of SPC-2, obsolete
		c.fail(invalidCDB(1, 1))
		return
	}
	if c.CDB[1]&1 == 0 {
		if c.CDB[2] != 0 {
			c.fail(invalidCDB(2, -1))
			return
		}
		c.reply(n.unit.inquiry(), allocation)
		return
	}
	page, ok := n.vitalProductData(c.CDB[2])
	if !ok {
		c.fail(invalidCDB(2, -1))
		return
	}
	c.reply(page, allocation)
}

// inquiry is the standard INQUIRY data (SPC-4 6.6.2):
//
//	0     qualifier 000b, device type 00h
//	2     version 06h, SPC-4
//	3     HISUP, response data format 2
//	4     additional length
//	7     CMDQUE
//	8-15  vendor
//	16-31 product
//	32-35 revision
//	58-73 version descriptors
func (u *Unit) inquiry() []byte {
	b := make([]byte, inquiryLength)
	b[2] = 0x06
	b[3] = 0x10 | 0x02
	b[4] = inquiryLength - 5
	b[7] = 0x02
	putText(b[8:16], u.config.Vendor)
	putText(b[16:32], u.config.Product)
	putText(b[32:36], u.config.Revision)
	// SAM-5, iSCSI, SPC-4 and SBC-3, none of a certain revision (SPC-4 table 139).
	for i, v := range []uint16{0x00a0, 0x0960, 0x0460, 0x04c0} {
		binary.BigEndian.PutUint16(b[58+2*i:], v)
	}
	return b
}

// putText writes text, filled up with spaces (SPC-4 4.4.1).
func putText(b []byte, text string) {
	for i := copy(b, text); i < len(b); i++ {
		b[i] = ' '
	}
}

// vitalProductData is a page: its code, its length in two bytes from byte 2, its data.
func (n *Nexus) vitalProductData(page byte) ([]byte, bool) {
	b := []byte{0, page, 0, 0}
	switch page {
	case vpdSupported:
		b = append(b, vpdSupported, vpdSerial, vpdIdentification, vpdBlockLimits, vpdCharacteristics, vpdProvisioning)
	case vpdSerial:
		b = append(b, n.unit.config.Serial...)
	case vpdIdentification:
		b = n.appendDesignators(b)
	case vpdBlockLimits:
		b = n.unit.appendBlockLimits(b)
	case vpdCharacteristics:
		b = appendCharacteristics(b)
	case vpdProvisioning:
		b = n.unit.appendProvisioning(b)
	default:
		return nil, false
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-4)) //nolint:gosec // no page has more than some 800 bytes
	return b, true
}

// appendDesignators appends the device identification (SPC-4 7.8.6): of the logical unit a designator with the vendor and
// the serial number, and a locally assigned NAA of it; of the target port its relative identifier and its name.
func (n *Nexus) appendDesignators(b []byte) []byte {
	const (
		binaryCode, asciiCode, utf8Code = 1, 2, 3
		ofUnit, ofPort                  = 0x00, 0x80 | 0x10 // PIV and the association
		t10, naa, relative, name        = 1, 3, 4, 8
		iscsi                           = 0x50
	)
	vendor := make([]byte, vendorLength)
	putText(vendor, n.unit.config.Vendor)
	b = appendDesignator(b, asciiCode, ofUnit|t10, append(vendor, n.unit.config.Serial...))
	b = appendDesignator(b, binaryCode, ofUnit|naa, n.unit.naa())
	if n.port.RelativeID != 0 {
		b = appendDesignator(b, iscsi|binaryCode, ofPort|relative, binary.BigEndian.AppendUint32(nil, uint32(n.port.RelativeID)))
	}
	if name := n.port.Target; name != "" {
		b = appendDesignator(b, iscsi|utf8Code, ofPort|8, padName(name))
	}
	return b
}

func appendDesignator(b []byte, protocolAndCode, kind byte, designator []byte) []byte {
	b = append(b, protocolAndCode, kind, 0, byte(len(designator))) //nolint:gosec // all are bounded by what Config and padName let through
	return append(b, designator...)
}

// maxName is the longest SCSI name string: an iSCSI name of 223 bytes and ",t,0x0001" (RFC 7143 4.2.7.1), with its end
// and filling.
const maxName = 236

// padName ends a name with a zero and fills it up to four bytes (SPC-4 7.8.6.11).
func padName(name string) []byte {
	name = name[:min(len(name), maxName-1)]
	b := make([]byte, (len(name)+1+3)&^3)
	copy(b, name)
	return b
}

// naa is a locally assigned designator of 64 bits (NAA 3h, SPC-4 7.8.6.6.4), drawn from what tells this unit from others.
func (u *Unit) naa() []byte {
	h := fnv.New64a()
	// A hash takes everything.
	_, _ = h.Write([]byte(u.config.Vendor + "\x00" + u.config.Serial))
	return binary.BigEndian.AppendUint64(nil, h.Sum64()&0x0fffffffffffffff|0x3000000000000000)
}

// The limits that VPD page B0h tells, in blocks.
const (
	maxCompare     = 255     // COMPARE AND WRITE; its CDB has no room for more
	maxWriteSame   = 0xfff8  // some 32 MiB: whole physical blocks, and within what WRITE SAME (10) can say
	maxUnmap       = 1 << 20 // 512 MiB, of all descriptors of an UNMAP
	maxUnmapRanges = 256
	optimalBlocks  = 2048 // 1 MiB
	granularity    = 8    // of transfers and of UNMAP: the clusters of a copy-on-write medium, 4 KiB
)

// appendBlockLimits appends the block limits (SBC-3 6.6.4), 60 bytes.
func (u *Unit) appendBlockLimits(b []byte) []byte {
	p := make([]byte, 64) // offsets as in the standard, with the four bytes of the header
	p[5] = maxCompare
	p[4] = 1 // WSNZ: WRITE SAME says how many blocks
	binary.BigEndian.PutUint16(p[6:], granularity)
	binary.BigEndian.PutUint32(p[8:], maxBlocks)
	binary.BigEndian.PutUint32(p[12:], optimalBlocks)
	if !u.readOnly {
		binary.BigEndian.PutUint32(p[20:], maxUnmap)
		binary.BigEndian.PutUint32(p[24:], maxUnmapRanges)
		binary.BigEndian.PutUint32(p[28:], granularity)
		binary.BigEndian.PutUint32(p[32:], 0x80000000) // UGAVALID, alignment 0
	}
	binary.BigEndian.PutUint64(p[36:], maxWriteSame)
	return append(b, p[4:]...)
}

// appendCharacteristics appends the block device characteristics (SBC-3 6.6.2), 60 bytes: no medium that rotates.
func appendCharacteristics(b []byte) []byte {
	p := make([]byte, 60)
	binary.BigEndian.PutUint16(p, 1)
	return append(b, p...)
}

// appendProvisioning appends the logical block provisioning (SBC-3 6.6.5): UNMAP, WRITE SAME (10) and (16) unmap, what is
// unmapped reads as zeros, and the unit is thin provisioned. A read-only one is not provisioned at all.
func (u *Unit) appendProvisioning(b []byte) []byte {
	if u.readOnly {
		return append(b, 0, 0, 0, 0)
	}
	return append(b, 0, 0x80|0x40|0x20|0x04, 0x02, 0)
}
