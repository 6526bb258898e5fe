package scsi

import "encoding/binary"

// The bits of byte 4 of START STOP UNIT.
const (
	startCondition = 0xf0
	startNoFlush   = 0x04
	startEject     = 0x02
	startStart     = 0x01
)

// prepareStartStop is START STOP UNIT (SBC-3 5.25). A unit on files has no power conditions and ejects nothing; to stop
// it is to write its cache. It stays ready, since others may use it.
func prepareStartStop(n *Nexus, c *Command) {
	flags := c.CDB[4]
	start := flags&(startCondition|startStart) == startStart
	switch {
	case !start && n.barred.Load()&writes != 0: // SBC-3 table 13: only to start is no conflict
		c.end(ReservationConflict)
	case flags&startCondition != 0:
		c.fail(invalidCDB(4, 7))
	case flags&startEject != 0:
		c.fail(invalidCDB(4, 1))
	case start, flags&startNoFlush != 0, n.unit.readOnly:
		c.succeed()
	}
}

// preparePrefetch is PRE-FETCH (10) and (16): SBC-3 5.13 and 5.14. The system reads ahead on its own; the status GOOD says
// that there may be no room in the cache.
func preparePrefetch(n *Nexus, c *Command) {
	c.extent()
	if n.unit.within(c, n.unit.blocks) {
		c.succeed()
	}
}

// prepareDefects10 is READ DEFECT DATA (10), SBC-3 5.18: a medium of files has no list of defects.
func prepareDefects10(_ *Nexus, c *Command) {
	c.reply([]byte{0, c.CDB[2] & 0x1f, 0, 0}, uint64(binary.BigEndian.Uint16(c.CDB[7:])))
}

// prepareDefects12 is READ DEFECT DATA (12), SBC-3 5.19.
func prepareDefects12(_ *Nexus, c *Command) {
	c.reply([]byte{0, c.CDB[1] & 0x1f, 0, 0, 0, 0, 0, 0}, uint64(binary.BigEndian.Uint32(c.CDB[6:])))
}

// prepareDiagnostic is SEND DIAGNOSTIC (SPC-4 6.42): the default self-test passes, and there is no other.
func prepareDiagnostic(_ *Nexus, c *Command) {
	switch {
	case c.CDB[1]&0xe0 != 0:
		c.fail(invalidCDB(1, 7))
	case binary.BigEndian.Uint16(c.CDB[3:]) != 0:
		c.fail(invalidCDB(3, -1))
	default:
		c.succeed()
	}
}
