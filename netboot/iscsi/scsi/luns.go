package scsi

import "encoding/binary"

// prepareReportLUNs answers for a unit that stands alone; a target of several answers itself, with ReportLUNs.
func prepareReportLUNs(n *Nexus, c *Command) {
	ReportLUNs(c, []uint16{0})
	n.LUNsReported()
}

// ReportLUNs completes REPORT LUNS (SPC-4 6.33) with the logical units of a target, in rising order.
func ReportLUNs(c *Command, luns []uint16) {
	if len(c.CDB) < 12 {
		c.fail(senseInvalidOpcode)
		return
	}
	switch c.CDB[2] {
	case 0x00, 0x02:
	case 0x01, 0x10, 0x11, 0x12: // well known and administrative logical units, of which there are none
		luns = nil
	default:
		c.fail(invalidCDB(2, -1))
		return
	}
	allocation := binary.BigEndian.Uint32(c.CDB[6:])
	if allocation < 16 {
		c.fail(invalidCDB(6, -1))
		return
	}
	b := make([]byte, 8, 8+8*len(luns))
	binary.BigEndian.PutUint32(b, uint32(8*len(luns))) //nolint:gosec // there are at most 16384 LUNs
	for _, l := range luns {
		b = binary.BigEndian.AppendUint16(b, encodeLUN(l))
		b = append(b, 0, 0, 0, 0, 0, 0)
	}
	c.reply(b, uint64(allocation))
}

// encodeLUN is the first level of a LUN: peripheral device addressing up to 255, flat space addressing above (SAM-5 4.7.7).
func encodeLUN(l uint16) uint16 {
	if l < 256 {
		return l
	}
	return 0x4000 | l&0x3fff
}

// Absent completes a command to a LUN without a unit (SPC-4 6.6.1, 6.39): INQUIRY tells that there is none, REQUEST SENSE
// and all other commands that none is supported.
func Absent(c *Command) {
	switch {
	case len(c.CDB) >= 6 && c.CDB[0] == opInquiry && c.CDB[1]&3 == 0 && c.CDB[2] == 0:
		b := make([]byte, 36)
		b[0] = 0x7f // qualifier 011b, type 1Fh
		b[2], b[3], b[4] = 0x06, 0x12, 36-5
		for i := 8; i < 36; i++ {
			b[i] = ' '
		}
		c.reply(b, uint64(binary.BigEndian.Uint16(c.CDB[3:])))
	case len(c.CDB) >= 6 && c.CDB[0] == opInquiry:
		c.fail(invalidCDB(1, 0))
	case len(c.CDB) >= 6 && c.CDB[0] == opRequestSense:
		s := senseNotSupported
		s.Descriptor = c.CDB[1]&1 != 0
		c.reply(s.Append(nil), uint64(c.CDB[4]))
	default:
		c.fail(senseNotSupported)
	}
}

// prepareRequestSense is REQUEST SENSE (SPC-4 6.39): the oldest unit attention, which it takes, or no sense.
func prepareRequestSense(n *Nexus, c *Command) {
	s, _ := n.attention(false)
	s.Descriptor = c.CDB[1]&1 != 0
	c.reply(s.Append(nil), uint64(c.CDB[4]))
}
