package scsi

import "encoding/binary"

// prepareNothing is what succeeds: TEST UNIT READY of a medium that is always there (SPC-4 6.47).
func prepareNothing(_ *Nexus, c *Command) { c.succeed() }

// prepareReadCapacity10 is READ CAPACITY (10): SBC-3 5.15. Its address belongs to the obsolete PMI bit.
func prepareReadCapacity10(n *Nexus, c *Command) {
	if c.CDB[8]&1 == 0 && binary.BigEndian.Uint32(c.CDB[2:]) != 0 {
		c.fail(invalidCDB(2, -1))
		return
	}
	last := min(n.unit.blocks-1, 0xffffffff)
	b := binary.BigEndian.AppendUint32(nil, uint32(last))
	c.reply(binary.BigEndian.AppendUint32(b, blockSize), 8)
}

// prepareReadCapacity16 is READ CAPACITY (16): SBC-3 5.16.
//
//	0-7   the last address
//	8-11  bytes of a block
//	12    protection: none
//	13    logical blocks of a physical one, as a power of two
//	14-15 LBPME, LBPRZ, and the lowest aligned address, 0
func prepareReadCapacity16(n *Nexus, c *Command) {
	b := make([]byte, 32)
	binary.BigEndian.PutUint64(b, n.unit.blocks-1)
	binary.BigEndian.PutUint32(b[8:], blockSize)
	b[13] = physicalShift
	if !n.unit.readOnly {
		b[14] = 0x80 | 0x40
	}
	c.reply(b, uint64(binary.BigEndian.Uint32(c.CDB[10:])))
}
