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
	b := binary.BigEndian.AppendUint32(nil, uint32(last)) //nolint:gosec // it is bounded
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
	b[13] = n.unit.physicalShift()
	if !n.unit.readOnly {
		b[14] = 0x80 | 0x40
	}
	c.reply(b, uint64(binary.BigEndian.Uint32(c.CDB[10:])))
}

// maxExtents bounds what GET LBA STATUS tells at once, and how often it asks the medium for that.
const maxExtents = 256

// prepareLBAStatus is GET LBA STATUS (SBC-3 5.6). Asking the medium may take time.
func prepareLBAStatus(n *Nexus, c *Command) {
	c.extent()
	c.blocks = 0 // the field is the allocation length
	n.unit.within(c, 0)
}

// executeLBAStatus answers with the extents from the address on:
//
//	0-3   length of what follows
//	8     extents of 16 bytes: address (8), blocks (4), 0 mapped or 1 deallocated
func executeLBAStatus(n *Nexus, c *Command) {
	allocation := uint64(binary.BigEndian.Uint32(c.CDB[10:]))
	b := make([]byte, 8)
	for i, lba := uint64(0), c.lba; lba < n.unit.blocks && i < maxExtents && uint64(len(b)) < max(allocation, 24); i++ {
		blocks, mapped := n.unit.mapped(lba)
		b = binary.BigEndian.AppendUint64(b, lba)
		b = binary.BigEndian.AppendUint32(b, uint32(blocks)) //nolint:gosec // mapped bounds it
		b = append(b, 0, 0, 0, 0)
		if !mapped {
			b[len(b)-4] = 1
		}
		lba += blocks
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4)) //nolint:gosec // at most maxExtents of 16 bytes
	c.reply(b, allocation)
}

// mapped says whether a block takes space, and for how many blocks, fewer than 1<<32, that is so. A block that takes
// space in part is mapped.
func (u *Unit) mapped(lba uint64) (blocks uint64, mapped bool) {
	rest := min(u.blocks-lba, 0xffffffff)
	if u.readOnly {
		return rest, true
	}
	n, mapped := u.medium.Mapped(offset(lba))
	blocks = uint64(max(n, 0)) / blockSize
	switch {
	case mapped && n%blockSize != 0:
		blocks++
	case blocks == 0:
		blocks, mapped = 1, true
	}
	return min(blocks, rest), mapped
}
