package scsi

import (
	"encoding/binary"
	"errors"
	"syscall"
)

// The bits of byte 1 of the CDBs of READ, WRITE and their kin.
const (
	cdbProtect = 0xe0 // RDPROTECT, WRPROTECT or VRPROTECT
	cdbFUA     = 0x08
)

// extent takes the address and the number of blocks out of the CDB of a command that has them where READ has, by the
// group of its operation code (SPC-4 4.2.5.1).
func (c *Command) extent() {
	b := c.CDB
	switch b[0] >> 5 {
	case 0:
		c.lba = uint64(binary.BigEndian.Uint32(b[0:])) & 0x1fffff
		// No block is not among what six bytes can say (SBC-3 5.7).
		if c.blocks = uint64(b[4]); c.blocks == 0 {
			c.blocks = 256
		}
	case 1, 2:
		c.lba, c.blocks = uint64(binary.BigEndian.Uint32(b[2:])), uint64(binary.BigEndian.Uint16(b[7:]))
	case 4:
		c.lba, c.blocks = binary.BigEndian.Uint64(b[2:]), uint64(binary.BigEndian.Uint32(b[10:]))
	case 5:
		c.lba, c.blocks = uint64(binary.BigEndian.Uint32(b[2:])), uint64(binary.BigEndian.Uint32(b[6:]))
	}
}

// lengthAt is the byte of the CDB that the number of blocks begins at.
func (c *Command) lengthAt() uint16 {
	switch c.CDB[0] >> 5 {
	case 0:
		return 4
	case 1, 2:
		return 7
	case 4:
		return 10
	default:
		return 6
	}
}

// within checks c's extent against the capacity and against the most that one such command may cover.
func (u *Unit) within(c *Command, most uint64) bool {
	if c.lba >= u.blocks || c.blocks > u.blocks-c.lba {
		c.fail(senseOutOfRange)
		return false
	}
	if c.blocks > most {
		c.fail(invalidCDB(c.lengthAt(), -1))
		return false
	}
	return true
}

// protection looks at byte 1 of a CDB of more than six bytes: there is no protection information here to be checked.
func (c *Command) protection() bool {
	if c.CDB[1]&cdbProtect != 0 {
		c.fail(invalidCDB(1, 7))
		return false
	}
	return true
}

// accessBits takes FUA out of byte 1 and refuses to check protection information. Six bytes have room for neither. DPO is
// a hint about the cache, which is the system's own and knows better.
func (c *Command) accessBits() bool {
	if c.CDB[0] == opRead6 || c.CDB[0] == opWrite6 {
		return true
	}
	c.fua = c.CDB[1]&cdbFUA != 0
	return c.protection()
}

// prepareRead is READ (6), (10), (12) and (16): SBC-3 5.7 to 5.10.
func prepareRead(n *Nexus, c *Command) {
	c.extent()
	if !c.accessBits() || !n.unit.within(c, MaxRead/blockSize) {
		return
	}
	// What was read with FUA is to be there after a loss of power, so what is in the cache goes out first.
	if c.fua && !n.unit.readOnly {
		return
	}
	c.readBlocks()
}

func (c *Command) readBlocks() {
	c.Read.Off, c.Read.N = offset(c.lba), offset(c.blocks)
	c.succeed()
}

func executeRead(n *Nexus, c *Command) {
	if err := n.unit.medium.Sync(); err != nil {
		// What is there for good cannot be told any more: the read failed, also where space is what is missing.
		c.fail(readSense(err).information(c.lba))
		return
	}
	c.readBlocks()
}

// prepareWrite is WRITE (6), (10), (12) and (16): SBC-3 5.36 to 5.39.
func prepareWrite(n *Nexus, c *Command) {
	c.extent()
	if !c.accessBits() || !n.unit.within(c, maxBlocks) {
		return
	}
	if c.blocks == 0 {
		c.succeed()
		return
	}
	c.OutLength = int(offset(c.blocks))
}

func executeWrite(n *Nexus, c *Command) {
	u, p, data := n.unit, spanOf(c.lba, c.blocks), c.data()
	// A last block that came in part is read and written, so it has to be alone.
	take, leave := u.stripes.share, u.stripes.unshare
	if len(data)%blockSize != 0 {
		take, leave = u.stripes.lock, u.stripes.unlock
	}
	take(p)
	ok := u.put(c, c.lba, data)
	leave(p)
	if ok && u.settle(c) {
		c.succeed()
	}
}

// data is the data-out of c, as far as it came: an initiator may send less than the CDB says, and has what it sent written
// all the same; the residual tells it what was not.
func (c *Command) data() []byte { return c.Out[:min(len(c.Out), c.OutLength)] }

// put writes to the medium, from a block on. A last block that is not whole keeps the rest of what it had.
func (u *Unit) put(c *Command, lba uint64, b []byte) bool {
	whole := b[:len(b)-len(b)%blockSize]
	if !u.putBlocks(c, lba, whole) {
		return false
	}
	rest := b[len(whole):]
	if len(rest) == 0 {
		return true
	}
	lba += uint64(len(whole)) / blockSize
	last := make([]byte, blockSize)
	if !u.read(c, last, offset(lba)) {
		return false
	}
	copy(last, rest)
	return u.putBlocks(c, lba, last)
}

func (u *Unit) putBlocks(c *Command, lba uint64, b []byte) bool {
	if len(b) == 0 {
		return true
	}
	if _, err := u.medium.WriteAt(b, offset(lba)); err != nil {
		c.fail(mediumSense(err, senseWriteError).information(lba))
		return false
	}
	return true
}

// settle makes what was written durable, where the command has FUA or there is no write cache.
func (u *Unit) settle(c *Command) bool {
	if !c.fua && !u.mode.writeThrough.Load() {
		return true
	}
	if err := u.medium.Sync(); err != nil {
		c.fail(mediumSense(err, senseWriteError).information(c.lba))
		return false
	}
	return true
}

// prepareSync is SYNCHRONIZE CACHE (10) and (16): SBC-3 5.28 and 5.29. The medium is synchronized as a whole, and the
// status comes when that is done, with IMMED too.
func prepareSync(n *Nexus, c *Command) {
	c.extent()
	if !n.unit.within(c, n.unit.blocks) {
		return
	}
	if n.unit.readOnly {
		c.succeed()
	}
}

func executeSync(n *Nexus, c *Command) {
	if err := n.unit.medium.Sync(); err != nil {
		c.fail(mediumSense(err, senseWriteError))
		return
	}
	c.succeed()
}

// offset is where a block begins, in bytes. The address was checked against the capacity, which an int64 holds.
func offset(block uint64) int64 { return int64(block * blockSize) } //nolint:gosec // see above

// readSense is the sense of an error of the Medium under a command that only reads.
func readSense(err error) Sense {
	if errors.Is(err, ErrMedium) {
		return senseReadError
	}
	return mediumSense(err, senseReadError)
}

// mediumSense is the sense of an error of the Medium; medium is that of one in a part of itself.
func mediumSense(err error, medium Sense) Sense {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return senseNoSpace
	case errors.Is(err, ErrMedium):
		return medium
	}
	return senseInternal
}
