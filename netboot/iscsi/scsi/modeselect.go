package scsi

import (
	"encoding/binary"
	"math/bits"
)

// The bits of byte 1 of MODE SELECT.
const (
	selectPageFormat = 0x10
	selectRevert     = 0x02
	selectSave       = 0x01
)

// The lengths of the headers of mode parameter lists.
const (
	modeHeader6  = 4
	modeHeader10 = 8
)

// prepareModeSelect is MODE SELECT (6) and (10): SPC-4 6.9 and 6.10.
func prepareModeSelect(_ *Nexus, c *Command) {
	length := int(c.CDB[4])
	if c.CDB[0] == opModeSelect10 {
		length = int(binary.BigEndian.Uint16(c.CDB[7:]))
	}
	switch {
	case c.CDB[1]&selectSave != 0: // no page can be saved
		c.fail(invalidCDB(1, 0))
	case c.CDB[1]&selectRevert != 0:
		c.fail(invalidCDB(1, 1))
	case length == 0:
		c.succeed()
	case c.CDB[1]&selectPageFormat == 0:
		c.fail(invalidCDB(1, 4))
	default:
		c.OutLength = length
	}
}

// executeModeSelect changes what can be changed, or refuses the list as a whole. The other nexuses are told.
func executeModeSelect(n *Nexus, c *Command) {
	u := n.unit
	u.mu.Lock()
	refusal := u.selectPages(n, c)
	u.mu.Unlock()
	if refusal != (Sense{}) {
		c.fail(refusal)
		return
	}
	// Without a write cache, what was written before is not in one either.
	if u.mode.writeThrough.Load() && !u.readOnly {
		executeSync(n, c)
		return
	}
	c.succeed()
}

// selectPages checks a mode parameter list and lets it take effect. The unit's mu is held.
func (u *Unit) selectPages(n *Nexus, c *Command) Sense {
	at, refusal := u.modeHeader(c)
	if refusal != (Sense{}) {
		return refusal
	}
	b := c.Out
	var changes [][]byte
	for at < len(b) {
		page, refusal := u.checkPage(b, at)
		if refusal != (Sense{}) {
			return refusal
		}
		changes = append(changes, page)
		at += len(page)
	}
	changed := false
	for _, page := range changes {
		changed = u.mode.set(page) || changed
	}
	if !changed {
		return Sense{}
	}
	for other := range u.nexuses {
		if other != n {
			other.attend(attentionModeChanged)
		}
	}
	return Sense{}
}

// modeHeader checks the header and the block descriptor of a list, and tells where its pages begin.
func (u *Unit) modeHeader(c *Command) (pages int, _ Sense) {
	b, header := c.Out, modeHeader6
	if c.CDB[0] == opModeSelect10 {
		header = modeHeader10
	}
	if len(b) < header || len(b) < c.OutLength {
		return 0, senseListLength
	}
	descriptor, long := int(b[3]), false
	if header == modeHeader10 {
		descriptor, long = int(binary.BigEndian.Uint16(b[6:])), b[4]&1 != 0
	}
	want := u.blockDescriptor(false, long)
	switch {
	case descriptor == 0:
		return header, Sense{}
	case descriptor != len(want):
		return 0, invalidParameter(uint16(header-2), -1)
	case len(b) < header+descriptor:
		return 0, senseListLength
	}
	// The capacity and the size of blocks stay what they are; a number of blocks of zero says so too (SBC-3 6.5.2). Of
	// the four bytes of the size, a short descriptor has three.
	got, count := b[header:header+descriptor], descriptor/2
	if binary.BigEndian.Uint32(got[descriptor-4:])&0xffffff != blockSize {
		return 0, invalidParameter(uint16(header+descriptor-4), -1) //nolint:gosec // at most 24
	}
	if n := got[:count]; !isZero(n) && string(n) != string(want[:count]) {
		return 0, invalidParameter(uint16(header), -1)
	}
	return header + descriptor, Sense{}
}

// checkPage checks the page at an offset of a list, and gives its bytes.
func (u *Unit) checkPage(b []byte, at int) ([]byte, Sense) {
	where := uint16(at) //nolint:gosec // a list has at most 65535 bytes
	if len(b) < at+2 {
		return nil, senseListLength
	}
	if b[at]&0x40 != 0 { // SPF: no page has subpages
		return nil, invalidParameter(where, 6)
	}
	for _, p := range modePages {
		if p.code != b[at]&0x3f {
			continue
		}
		if b[at+1] != p.defaults[1] {
			return nil, invalidParameter(where+1, -1)
		}
		if len(b) < at+len(p.defaults) {
			return nil, senseListLength
		}
		page, now := b[at:at+len(p.defaults)], u.current(p)
		for i := 2; i < len(page); i++ {
			if wrong := (page[i] ^ now[i]) &^ u.changeable(p, i); wrong != 0 {
				return nil, invalidParameter(where+uint16(i), int8(7-bits.LeadingZeros8(wrong))) //nolint:gosec // fewer than 20; 0 to 7
			}
		}
		return page, Sense{}
	}
	return nil, invalidParameter(where, 5)
}

// changeable is the mask of the bits of a byte of a page that can be changed. What is read-only has no write cache.
func (u *Unit) changeable(p modePage, at int) byte {
	if p.code == pageCaching && u.readOnly {
		return 0
	}
	return p.changeable[at]
}

// set lets a page that was checked take effect, and says whether it changed anything.
func (m *modeFlags) set(page []byte) (changed bool) {
	switch page[0] & 0x3f {
	case pageCaching:
		on := page[2]&cachingWCE == 0
		changed = m.writeThrough.Swap(on) != on
	case pageControl:
		descriptor, protect := page[2]&controlDSense != 0, page[4]&controlSWP != 0
		changed = m.descriptorSense.Swap(descriptor) != descriptor
		changed = m.softProtect.Swap(protect) != protect || changed
	}
	return changed
}
