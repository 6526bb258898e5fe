package scsi

import (
	"encoding/binary"
	"sync/atomic"
)

// modeFlags are the mode parameters that can be changed. They are those of all nexuses, and change with the unit's mu
// held.
type modeFlags struct {
	writeThrough    atomic.Bool // WCE is zero
	descriptorSense atomic.Bool // D_SENSE
	softProtect     atomic.Bool // SWP
}

// reset sets what holds after a reset: a write cache, fixed format sense data, no write protection.
func (m *modeFlags) reset() {
	m.writeThrough.Store(false)
	m.descriptorSense.Store(false)
	m.softProtect.Store(false)
}

// protected says whether the unit refuses to be written, and why.
func (u *Unit) protected() (Sense, bool) {
	if u.readOnly {
		return senseWriteProtected, true
	}
	if u.mode.softProtect.Load() {
		return senseSoftProtected, true
	}
	return Sense{}, false
}

// The mode pages (SPC-4 7.5, SBC-3 6.5).
const (
	pageRecovery   = 0x01
	pageCaching    = 0x08
	pageControl    = 0x0a
	pageExceptions = 0x1c
	pageAll        = 0x3f
)

// What MODE SENSE is asked for: the PC field (SPC-4 6.11.1).
const (
	currentValues = iota
	changeableValues
	defaultValues
	savedValues
)

// A modePage is one mode page: its bytes as they are by default, and which of their bits can be changed.
type modePage struct {
	code       byte
	defaults   []byte
	changeable []byte
}

// The bits that can be changed, and where they are in their pages.
const (
	cachingWCE    = 0x04 // byte 2
	controlDSense = 0x04 // byte 2
	controlSWP    = 0x08 // byte 4
)

// modePages are all mode pages, in rising order. They never change.
var modePages = []modePage{
	// Read-write error recovery (SBC-3 6.5.8): nothing is reassigned, nothing is retried.
	{pageRecovery, []byte{pageRecovery, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 12)},
	// Caching (SBC-3 6.5.5): WCE.
	{
		pageCaching,
		[]byte{pageCaching, 0x12, cachingWCE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		[]byte{2: cachingWCE, 19: 0},
	},
	// Control (SPC-4 7.5.8): commands may be reordered, no limit to the time that a busy unit stays so.
	{
		pageControl,
		[]byte{pageControl, 0x0a, 0, 0x10, 0, 0, 0, 0, 0xff, 0xff, 0, 0},
		[]byte{2: controlDSense, 4: controlSWP, 11: 0},
	},
	// Informational exceptions control (SPC-4 7.5.12): none are reported.
	{pageExceptions, []byte{pageExceptions, 0x0a, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 12)},
}

// current is the page as it is now.
func (u *Unit) current(p modePage) []byte {
	b := append([]byte(nil), p.defaults...)
	switch p.code {
	case pageCaching:
		setBit(b, 2, cachingWCE, !u.readOnly && !u.mode.writeThrough.Load())
	case pageControl:
		setBit(b, 2, controlDSense, u.mode.descriptorSense.Load())
		setBit(b, 4, controlSWP, u.mode.softProtect.Load())
	}
	return b
}

func setBit(b []byte, at int, bit byte, on bool) {
	b[at] &^= bit
	if on {
		b[at] |= bit
	}
}

// pages appends the mode pages that MODE SENSE is asked for; ok is false where there is no such page.
func (u *Unit) pages(b []byte, control, code, subpage byte) (_ []byte, ok bool) {
	// All pages, or all with their subpages, of which there are none.
	if subpage != 0 && (subpage != 0xff || code != pageAll) {
		return b, false
	}
	for _, p := range modePages {
		if code != p.code && code != pageAll {
			continue
		}
		ok = true
		switch control {
		case changeableValues:
			b = append(b, p.defaults[:2]...)
			for i := 2; i < len(p.changeable); i++ {
				b = append(b, u.changeable(p, i))
			}
		case defaultValues:
			b = append(b, p.defaults...)
			if p.code == pageCaching && u.readOnly {
				b[len(b)-len(p.defaults)+2] &^= cachingWCE
			}
		default:
			b = append(b, u.current(p)...)
		}
	}
	return b, ok
}

// deviceSpecific is the device-specific parameter of the header (SBC-3 6.5.1): WP and DPOFUA.
func (u *Unit) deviceSpecific() byte {
	b := byte(0x10)
	if _, protected := u.protected(); protected {
		b |= 0x80
	}
	return b
}

// prepareModeSense6 is MODE SENSE (6): SPC-4 6.11. The header is the length of what follows it, the medium type, the
// device-specific parameter, the length of the block descriptor.
func prepareModeSense6(n *Nexus, c *Command) {
	descriptor := n.unit.blockDescriptor(c.CDB[1]&0x08 != 0, false)
	b := append([]byte{0, 0, n.unit.deviceSpecific(), byte(len(descriptor))}, descriptor...) //nolint:gosec // 0, 8 or 16
	b, ok := n.modeSense(c, b)
	if ok {
		b[0] = byte(len(b) - 1) //nolint:gosec // all pages have fewer than 100 bytes
		c.reply(b, uint64(c.CDB[4]))
	}
}

// prepareModeSense10 is MODE SENSE (10): SPC-4 6.12. The header is the length of what follows it in two bytes, the medium
// type, the device-specific parameter, LONGLBA, a byte, the length of the block descriptor in two bytes.
func prepareModeSense10(n *Nexus, c *Command) {
	long := c.CDB[1]&0x10 != 0
	descriptor := n.unit.blockDescriptor(c.CDB[1]&0x08 != 0, long)
	b := []byte{0, 0, 0, n.unit.deviceSpecific(), 0, 0, 0, byte(len(descriptor))} //nolint:gosec // 0, 8 or 16
	if long && len(descriptor) > 0 {
		b[4] = 1
	}
	b, ok := n.modeSense(c, append(b, descriptor...))
	if ok {
		binary.BigEndian.PutUint16(b, uint16(len(b)-2)) //nolint:gosec // all pages have fewer than 100 bytes
		c.reply(b, uint64(binary.BigEndian.Uint16(c.CDB[7:])))
	}
}

func (n *Nexus) modeSense(c *Command, b []byte) ([]byte, bool) {
	control := c.CDB[2] >> 6
	if control == savedValues {
		c.fail(senseSavingParameters)
		return nil, false
	}
	b, ok := n.unit.pages(b, control, c.CDB[2]&0x3f, c.CDB[3])
	if !ok {
		c.fail(invalidCDB(2, 5))
	}
	return b, ok
}

// blockDescriptor is the mode parameter block descriptor (SBC-3 6.5.2): the number of blocks and their size. The short
// one has 8 bytes, the long one 16.
func (u *Unit) blockDescriptor(none, long bool) []byte {
	if none {
		return nil
	}
	if long {
		b := binary.BigEndian.AppendUint64(nil, u.blocks)
		return binary.BigEndian.AppendUint32(append(b, 0, 0, 0, 0), blockSize)
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(min(u.blocks, 0xffffffff))) //nolint:gosec // it is bounded
	return binary.BigEndian.AppendUint32(b, blockSize)
}
