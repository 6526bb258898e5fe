package scsi

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
)

// blockSize is the size of a logical block, in bytes.
const blockSize = 512

// maxBlocks is how many blocks one command moves.
const maxBlocks = MaxTransfer / blockSize

// A Unit is a logical unit: a direct access block device.
//
// Who owns what: Medium, config and table are fixed. mu guards the nexuses, the reservations and the mode parameters.
// What the commands that read and write need of these is beside them in atomics, which change only with mu held, so
// that these commands take no lock but the stripes of the blocks that they write.
type Unit struct {
	medium   Medium
	config   Config
	commands *table
	blocks   uint64
	readOnly bool // the medium

	mode    modeFlags
	stripes stripes

	changing sync.Mutex // held by commands that change reservations, before mu and over what they keep

	mu         sync.Mutex
	nexuses    map[*Nexus]struct{}
	reserved   *Nexus       // by RESERVE (6) or (10)
	persistent *persistence // replaced as a whole, with changing held too
}

// NewUnit makes a unit of a medium, with the persistent reservations that were kept.
func NewUnit(m Medium, c Config) (*Unit, error) {
	size := m.Size()
	if size <= 0 || size%blockSize != 0 {
		return nil, fmt.Errorf("medium of %d bytes: not a positive multiple of %d", size, blockSize)
	}
	if err := c.complete(); err != nil {
		return nil, err
	}
	u := &Unit{
		medium:   m,
		config:   c,
		commands: commands,
		blocks:   uint64(size) / blockSize,
		readOnly: m.ReadOnly(),
		nexuses:  map[*Nexus]struct{}{},

		persistent: &persistence{},
	}
	if c.Keep != nil {
		if err := u.persistent.load(c.Keep); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// The longest fields of Config, in bytes. VPD page 83h has the serial number in a designator of at most 255.
const (
	vendorLength   = 8
	productLength  = 16
	revisionLength = 4
	serialLength   = 128
)

func (c *Config) complete() error {
	if c.Serial == "" {
		return errors.New("a unit needs a serial number")
	}
	if c.PhysicalBlock == 0 {
		c.PhysicalBlock = 4096
	}
	if p := c.PhysicalBlock; p < blockSize || p > 65536 || p&(p-1) != 0 {
		return fmt.Errorf("physical block of %d bytes: not a power of two from %d to 65536", p, blockSize)
	}
	for _, f := range []struct {
		name     string
		value    *string
		standard string
		longest  int
	}{
		{"vendor", &c.Vendor, "TROUPE", vendorLength},
		{"product", &c.Product, "VIRTUAL-DISK", productLength},
		{"revision", &c.Revision, "1", revisionLength},
		{"serial number", &c.Serial, "", serialLength},
	} {
		if *f.value == "" {
			*f.value = f.standard
		}
		if len(*f.value) > f.longest {
			return fmt.Errorf("%s %q: longer than %d bytes", f.name, *f.value, f.longest)
		}
		for _, b := range []byte(*f.value) {
			// Graphic ASCII and the space (SPC-4 4.4.1).
			if b < 0x20 || b > 0x7e {
				return fmt.Errorf("%s %q: byte %#x is no printable ASCII", f.name, *f.value, b)
			}
		}
	}
	return nil
}

// physicalShift is the physical block as a power of two of logical ones.
func (u *Unit) physicalShift() byte {
	return byte(bits.TrailingZeros(uint(u.config.PhysicalBlock / blockSize))) //nolint:gosec // from 0 to 7
}

// Medium is what the unit keeps its blocks on.
func (u *Unit) Medium() Medium { return u.medium }

// Reset is a logical unit reset (SAM-5 6.3.3): a RESERVE ends, mode parameters are what they were at first, and each
// nexus is told. Persistent reservations stay. It aborts no tasks.
func (u *Unit) Reset() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.reserved = nil
	u.mode.reset()
	for n := range u.nexuses {
		n.attend(attentionReset)
	}
	u.barAll()
}

// LUNsChanged tells each nexus that REPORT LUNS has something new to say.
func (u *Unit) LUNsChanged() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for n := range u.nexuses {
		n.attend(attentionLUNs)
	}
}

// TasksCleared tells the nexus that another one ended its tasks without a word (SAM-5 5.14, COMMANDS CLEARED BY ANOTHER
// INITIATOR).
func (n *Nexus) TasksCleared() {
	n.unit.mu.Lock()
	defer n.unit.mu.Unlock()
	n.attend(attentionCleared)
}

// maxAttentions bounds what a nexus that sends no command is to be told. Those of one kind count once, and there are
// fewer kinds than that.
const maxAttentions = 8

// A Nexus is the relation of one initiator port to a Unit, through one target port. Its methods may be called from any
// goroutine.
type Nexus struct {
	unit  *Unit
	port  Port
	abort func()

	// barred is what this nexus may not do now: bits of a command's flags. It changes with unit.mu held.
	barred atomic.Uint32

	attentions []Sense // oldest first; guarded by unit.mu
}

// Attach begins an I_T nexus. abort ends all its tasks on this unit; it is called without a lock, by a command of another
// nexus or of this one.
func (u *Unit) Attach(p Port, abort func()) *Nexus {
	n := &Nexus{unit: u, port: p, abort: abort}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.nexuses[n] = struct{}{}
	n.attend(attentionPowerOn)
	u.bar(n)
	return n
}

// Detach ends an I_T nexus: its RESERVE ends (SPC-2 5.5.1), its persistent registration and reservation stay.
func (n *Nexus) Detach() {
	u := n.unit
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.nexuses, n)
	if u.reserved == n {
		u.reserved = nil
		u.barAll()
	}
}

// attend queues a unit attention, once of each kind. The unit's mu is held.
func (n *Nexus) attend(s Sense) {
	if slices.Contains(n.attentions, s) {
		return
	}
	// A reset says more than all that was before it (SAM-5 5.14.2).
	if s.ofReset() {
		n.attentions = n.attentions[:0]
	}
	if len(n.attentions) < maxAttentions {
		n.attentions = append(n.attentions, s)
	}
	n.barred.Store(n.barred.Load() | attention)
}

// attention takes the oldest unit attention out of the queue; with reset only one of a reset, which is the oldest always.
func (n *Nexus) attention(reset bool) (Sense, bool) {
	u := n.unit
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(n.attentions) == 0 || reset && !n.attentions[0].ofReset() {
		return Sense{}, false
	}
	s := n.attentions[0]
	n.attentions = slices.Delete(n.attentions, 0, 1)
	u.bar(n)
	return s, true
}

// LUNsReported forgets the unit attention that LUNsChanged queued: the initiator has just asked for them (SPC-4 6.33).
func (n *Nexus) LUNsReported() {
	u := n.unit
	u.mu.Lock()
	defer u.mu.Unlock()
	n.attentions = slices.DeleteFunc(n.attentions, func(s Sense) bool { return s == attentionLUNs })
	u.bar(n)
}

// barAll works out anew what each nexus may not do. The unit's mu is held.
func (u *Unit) barAll() {
	for n := range u.nexuses {
		u.bar(n)
	}
}

// bar works out what one nexus may not do. The unit's mu is held.
func (u *Unit) bar(n *Nexus) {
	var b uint32
	if len(n.attentions) > 0 {
		b |= attention
	}
	if u.reserved != nil && u.reserved != n {
		b |= reserve
	}
	b |= u.persistent.bars(n.port)
	n.barred.Store(b)
}
