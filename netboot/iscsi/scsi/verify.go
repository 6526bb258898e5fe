package scsi

import (
	"bytes"
	"encoding/binary"
)

// chunk is how much of the medium a command that looks at much of it has in memory at once, in bytes.
const chunk = 256 << 10

// maxVerify is how many blocks a VERIFY without data may cover: 1 GiB, which takes seconds.
const maxVerify = 1 << 21

// What BYTCHK asks VERIFY to compare (SBC-3 5.32).
const (
	compareNothing = 0
	compareAll     = 1
	compareOne     = 3 // each block with the same one
)

// byteCheck is the BYTCHK field of VERIFY and WRITE AND VERIFY.
func (c *Command) byteCheck() byte { return c.CDB[1] >> 1 & 3 }

// prepareVerify is VERIFY (10), (12) and (16): SBC-3 5.32 to 5.34.
func prepareVerify(n *Nexus, c *Command) {
	c.extent()
	most := uint64(maxVerify)
	if c.byteCheck() == compareAll {
		most = maxBlocks
	}
	if !c.protection() || !n.unit.within(c, most) {
		return
	}
	switch c.byteCheck() {
	case compareNothing:
	case compareAll:
		c.OutLength = int(offset(c.blocks))
	case compareOne:
		c.OutLength = blockSize
	default:
		c.fail(invalidCDB(1, 2))
		return
	}
	if c.blocks == 0 {
		c.OutLength = 0
		c.succeed()
	}
}

func executeVerify(n *Nexus, c *Command) {
	check := c.byteCheck()
	if check == compareOne && len(c.Out) < blockSize {
		c.fail(senseInformationUnit)
		return
	}
	if n.unit.verify(c, check, c.Out) {
		c.succeed()
	}
}

// verify reads the blocks of c and compares them as check says. Where less data came than the blocks are, it compares the
// whole blocks that came.
func (u *Unit) verify(c *Command, check byte, want []byte) bool {
	total := offset(c.blocks)
	if check == compareAll {
		total = min(total, int64(len(want)-len(want)%blockSize))
	}
	buf := make([]byte, min(total, chunk))
	for done := int64(0); done < total; {
		b := buf[:min(int64(len(buf)), total-done)]
		if !u.read(c, b, offset(c.lba)+done) {
			return false
		}
		at := -1
		switch check {
		case compareAll:
			at = mismatch(b, want[done:])
		case compareOne:
			for i := 0; at < 0 && i < len(b); i += blockSize {
				if at = mismatch(b[i:i+blockSize], want); at >= 0 {
					at += i
				}
			}
		}
		if at >= 0 {
			c.fail(senseMiscompare.information(c.lba + uint64(done+int64(at))/blockSize))
			return false
		}
		done += int64(len(b))
	}
	return true
}

// mismatch is the offset of the first byte of a that b has otherwise; -1 where there is none. b is no shorter than a.
func mismatch(a, b []byte) int {
	if bytes.Equal(a, b[:len(a)]) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// read reads a part of the medium.
func (u *Unit) read(c *Command, b []byte, off int64) bool {
	if _, err := u.medium.ReadAt(b, off); err != nil {
		c.fail(mediumSense(err, senseReadError).information(uint64(off) / blockSize)) //nolint:gosec // no offset is negative
		return false
	}
	return true
}

// prepareWriteVerify is WRITE AND VERIFY (10), (12) and (16): SBC-3 5.40 to 5.42.
func prepareWriteVerify(n *Nexus, c *Command) {
	if c.byteCheck() > compareAll {
		c.fail(invalidCDB(1, 2))
		return
	}
	c.extent()
	if !c.protection() || !n.unit.within(c, maxBlocks) {
		return
	}
	c.OutLength = int(offset(c.blocks))
	if c.blocks == 0 {
		c.succeed()
	}
}

// executeWriteVerify has the blocks alone, so that it finds its own data.
func executeWriteVerify(n *Nexus, c *Command) {
	u, p := n.unit, spanOf(c.lba, c.blocks)
	data := c.data()
	c.blocks = uint64(len(data)) / blockSize // to verify: those that came whole
	u.stripes.lock(p)
	defer u.stripes.unlock(p)
	if u.put(c, c.lba, data) && u.settle(c) && u.verify(c, c.byteCheck(), data) {
		c.succeed()
	}
}

// prepareCompareAndWrite is COMPARE AND WRITE (SBC-3 5.2): the data to compare with comes first, the data to write after
// it.
func prepareCompareAndWrite(n *Nexus, c *Command) {
	c.lba, c.blocks = binary.BigEndian.Uint64(c.CDB[2:]), uint64(c.CDB[13])
	c.fua = c.CDB[1]&cdbFUA != 0
	if !c.protection() || !n.unit.within(c, maxCompare) {
		return
	}
	// Half of something else than what the CDB tells would be compared and written.
	c.OutLength = 2 * int(offset(c.blocks))
	if c.Expected != int64(c.OutLength) {
		c.fail(invalidCDB(13, -1))
		return
	}
	if c.blocks == 0 {
		c.succeed()
	}
}

func executeCompareAndWrite(n *Nexus, c *Command) {
	u, half := n.unit, int(offset(c.blocks))
	if len(c.Out) < 2*half {
		c.fail(senseInformationUnit)
		return
	}
	found := make([]byte, half)
	p := spanOf(c.lba, c.blocks)
	u.stripes.lock(p)
	defer u.stripes.unlock(p)
	if !u.read(c, found, offset(c.lba)) {
		return
	}
	if at := mismatch(found, c.Out); at >= 0 {
		c.fail(senseMiscompare.information(uint64(at)))
		return
	}
	if u.putBlocks(c, c.lba, c.Out[half:2*half]) && u.settle(c) {
		c.succeed()
	}
}

// executeOrWrite is ORWRITE (16): SBC-3 5.17. What came is combined with a piece of the medium at a time.
func executeOrWrite(n *Nexus, c *Command) {
	u, p := n.unit, spanOf(c.lba, c.blocks)
	data := c.data()
	buf := make([]byte, min(c.OutLength, chunk))
	u.stripes.lock(p)
	defer u.stripes.unlock(p)
	for lba := c.lba; len(data) > 0; lba += chunk / blockSize {
		piece := data[:min(len(data), chunk)]
		b := buf[:(len(piece)+blockSize-1)&^(blockSize-1)]
		if !u.read(c, b, offset(lba)) {
			return
		}
		for i, v := range piece {
			b[i] |= v
		}
		if !u.putBlocks(c, lba, b) {
			return
		}
		data = data[len(piece):]
	}
	if u.settle(c) {
		c.succeed()
	}
}
