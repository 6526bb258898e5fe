package scsi

import (
	"bytes"
	"encoding/binary"
)

// The bits of byte 1 of WRITE SAME and UNMAP.
const (
	sameAnchor  = 0x10
	sameUnmap   = 0x08
	sameData    = 0x06 // PBDATA and LBDATA of SBC-2
	sameNoData  = 0x01 // NDOB, of WRITE SAME (16) alone
	unmapAnchor = 0x01
)

// prepareWriteSame is WRITE SAME (10) and (16): SBC-3 5.43 and 5.44.
func prepareWriteSame(n *Nexus, c *Command) {
	c.extent()
	flags := c.CDB[1]
	switch {
	case !c.protection():
		return
	case flags&sameAnchor != 0: // ANC_SUP of VPD page B2h is zero
		c.fail(invalidCDB(1, 4))
		return
	case flags&sameData != 0:
		c.fail(invalidCDB(1, 2))
		return
	case c.CDB[0] == opWriteSame10 && flags&sameNoData != 0:
		c.fail(invalidCDB(1, 0))
		return
	case !n.unit.within(c, maxWriteSame):
		return
	case c.blocks == 0: // WSNZ of VPD page B0h is one
		c.fail(invalidCDB(c.lengthAt(), -1))
		return
	}
	if flags&sameNoData == 0 {
		c.OutLength = blockSize
	}
	if c.Expected != int64(c.OutLength) {
		c.fail(senseInformationUnit)
	}
}

// executeWriteSame unmaps only what then reads as the block that came: SBC-3 has a read behave as if it had been written.
func executeWriteSame(n *Nexus, c *Command) {
	u, p := n.unit, spanOf(c.lba, c.blocks)
	if len(c.Out) < c.OutLength {
		c.fail(senseInformationUnit)
		return
	}
	u.stripes.share(p)
	defer u.stripes.unshare(p)
	var ok bool
	if isZero(c.Out) {
		ok = u.zero(c, c.lba, c.blocks, c.CDB[1]&sameUnmap != 0)
	} else {
		ok = u.repeat(c, c.Out)
	}
	if ok && u.settle(c) {
		c.succeed()
	}
}

func isZero(b []byte) bool { return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1]) }

// zero makes blocks read as zeros.
func (u *Unit) zero(c *Command, lba, blocks uint64, unmap bool) bool {
	if err := u.medium.Zero(offset(lba), offset(blocks), unmap); err != nil {
		c.fail(mediumSense(err, senseWriteError).information(lba))
		return false
	}
	return true
}

// repeat writes one block to all blocks of c.
func (u *Unit) repeat(c *Command, block []byte) bool {
	total := offset(c.blocks)
	buf := bytes.Repeat(block, int(min(c.blocks, chunk/blockSize))) //nolint:gosec // it is bounded
	for done := int64(0); done < total; {
		b := buf[:min(int64(len(buf)), total-done)]
		if _, err := u.medium.WriteAt(b, offset(c.lba)+done); err != nil {
			c.fail(mediumSense(err, senseWriteError).information(c.lba + uint64(done)/blockSize))
			return false
		}
		done += int64(len(b))
	}
	return true
}

// prepareUnmap is UNMAP (SBC-3 5.30).
func prepareUnmap(_ *Nexus, c *Command) {
	if c.CDB[1]&unmapAnchor != 0 {
		c.fail(invalidCDB(1, 0))
		return
	}
	c.OutLength = int(binary.BigEndian.Uint16(c.CDB[7:]))
	switch {
	case c.OutLength == 0:
		c.succeed()
	case c.OutLength < unmapHeader:
		c.fail(senseListLength)
	}
}

// The parameter list of UNMAP:
//
//	0-1   length of what follows
//	2-3   length of the ranges
//	8     ranges of 16 bytes: address (8), blocks (4), 4 reserved
const (
	unmapHeader = 8
	unmapRange  = 16
)

// An extent is some blocks in a row.
type extent struct{ lba, blocks uint64 }

func executeUnmap(n *Nexus, c *Command) {
	u := n.unit
	ranges, refusal := u.unmapRanges(c.Out)
	if refusal != (Sense{}) {
		c.fail(refusal)
		return
	}
	for _, r := range ranges {
		p := spanOf(r.lba, r.blocks)
		u.stripes.share(p)
		ok := u.zero(c, r.lba, r.blocks, true)
		u.stripes.unshare(p)
		if !ok {
			return
		}
	}
	if u.settle(c) {
		c.succeed()
	}
}

// unmapRanges takes the ranges out of a parameter list; a last one that is cut off is none. It refuses the list as a whole,
// before anything is unmapped.
func (u *Unit) unmapRanges(list []byte) ([]extent, Sense) {
	if len(list) < unmapHeader {
		return nil, senseListLength
	}
	b := list[unmapHeader:]
	b = b[:min(len(b), int(binary.BigEndian.Uint16(list[2:])))]
	if len(b)/unmapRange > maxUnmapRanges {
		return nil, invalidParameter(2, -1)
	}
	var ranges []extent
	total := uint64(0)
	for at := uint16(unmapHeader); len(b) >= unmapRange; b, at = b[unmapRange:], at+unmapRange {
		r := extent{binary.BigEndian.Uint64(b), uint64(binary.BigEndian.Uint32(b[8:]))}
		if r.lba > u.blocks || r.blocks > u.blocks-r.lba {
			return nil, senseOutOfRange
		}
		if total += r.blocks; total > maxUnmap {
			return nil, invalidParameter(at+8, -1)
		}
		if r.blocks > 0 {
			ranges = append(ranges, r)
		}
	}
	return ranges, Sense{}
}
