package scsi

import "encoding/binary"

// The service actions of PERSISTENT RESERVE IN (SPC-4 6.15) and OUT (6.16).
const (
	inReadKeys        = 0
	inReadReservation = 1
	inCapabilities    = 2
	inFullStatus      = 3

	outRegister       = 0
	outReserve        = 1
	outRelease        = 2
	outClear          = 3
	outPreempt        = 4
	outPreemptAbort   = 5
	outRegisterIgnore = 6
	outRegisterMove   = 7
)

// The parameter list of PERSISTENT RESERVE OUT (SPC-4 6.16.3):
//
//	0-7   reservation key
//	8-15  service action reservation key
//	20    SPEC_I_PT, ALL_TG_PT, APTPL
//	24-27 with SPEC_I_PT: length of the TransportIDs, which follow
//
// and with REGISTER AND MOVE (6.16.4):
//
//	17    UNREG, APTPL
//	18-19 relative target port identifier
//	20-23 length of the TransportID, which follows
const (
	outLength    = 24
	outSpecIPT   = 0x08
	outAllTgPt   = 0x04
	outAPTPL     = 0x01
	outUnreg     = 0x02
	maxOutLength = 64 << 10
)

// prepareReserveOut checks the CDB of PERSISTENT RESERVE OUT.
func prepareReserveOut(_ *Nexus, c *Command) {
	length := binary.BigEndian.Uint32(c.CDB[5:])
	switch action := c.CDB[1] & 0x1f; {
	case c.CDB[2]&0xf0 != 0 && scoped(action):
		c.fail(invalidCDB(2, 7)) // no scope but that of the logical unit
	case length < outLength || length > maxOutLength:
		c.fail(senseListLength)
	case length > outLength && action != outRegister && action != outRegisterIgnore && action != outRegisterMove:
		c.fail(senseListLength)
	default:
		c.OutLength = int(length)
	}
}

// scoped says whether a service action looks at SCOPE and TYPE (SPC-4 5.13.7, 5.13.8 and 6.16.2).
func scoped(action byte) bool {
	switch action {
	case outReserve, outRelease, outPreempt, outPreemptAbort:
		return true
	}
	return false
}

// executeReserveOut works out what the reservations are to be, keeps that, and lets it hold.
func executeReserveOut(n *Nexus, c *Command) {
	u := n.unit
	u.changing.Lock()
	aborts, v := u.changeReservations(n, c)
	u.changing.Unlock()
	for _, abort := range aborts {
		abort()
	}
	switch v.status {
	case Good:
		c.succeed()
	case CheckCondition:
		c.fail(v.sense)
	default:
		c.end(v.status)
	}
}

// changeReservations lets a PERSISTENT RESERVE OUT take effect. changing is held: it keeps such commands apart while one
// waits for the Keeper, without keeping others from mu.
func (u *Unit) changeReservations(n *Nexus, c *Command) (aborts []func(), v verdict) {
	if len(c.Out) < outLength || len(c.Out) < c.OutLength {
		return nil, refused(senseListLength)
	}
	u.mu.Lock()
	legacy := u.reserved != nil
	t := &transition{persistence: u.persistent.clone(), me: n.port, ports: u.targetPorts()}
	u.mu.Unlock()
	if legacy {
		return nil, conflict
	}
	before := u.persistent.keep
	if v := t.do(c.CDB[1]&0x1f, c.CDB[2]&0x0f, c.Out, u.config.Keep != nil); v != granted {
		return nil, v
	}
	if u.config.Keep != nil && (before || t.keep) {
		if err := t.save(u.config.Keep); err != nil {
			return nil, refused(senseInternal)
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.persistent = t.persistence
	for other := range u.nexuses {
		if other == n {
			continue
		}
		if s, ok := t.noticeFor(other.port); ok {
			other.attend(s)
		}
		if t.abortsTasksOf(other.port) {
			aborts = append(aborts, other.abort)
		}
	}
	u.barAll()
	return aborts, granted
}

// targetPorts are the target ports that the unit is used through, by their relative identifiers. The unit's mu is held.
func (u *Unit) targetPorts() map[uint16]string {
	ports := map[uint16]string{}
	for n := range u.nexuses {
		ports[n.port.RelativeID] = n.port.Target
	}
	return ports
}

// prepareReserveIn is PERSISTENT RESERVE IN (SPC-4 6.15).
func prepareReserveIn(n *Nexus, c *Command) {
	u := n.unit
	u.mu.Lock()
	p := u.persistent
	u.mu.Unlock()
	var b []byte
	switch c.CDB[1] & 0x1f {
	case inReadKeys:
		b = p.readKeys()
	case inReadReservation:
		b = p.readReservation()
	case inCapabilities:
		b = p.capabilities(u.config.Keep != nil)
	case inFullStatus:
		b = p.fullStatus()
	}
	c.reply(b, uint64(binary.BigEndian.Uint16(c.CDB[7:])))
}

// header is what three of the answers begin with: the generation, and room for the length of what follows.
func (p *persistence) header() []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(p.generation)<<32)
}

func withLength(b []byte) []byte {
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-8)) //nolint:gosec // maxRegistrations bounds it
	return b
}

func (p *persistence) readKeys() []byte {
	b := p.header()
	for _, r := range p.Registrations {
		b = binary.BigEndian.AppendUint64(b, r.Key)
	}
	return withLength(b)
}

// readReservation has the holder's key, which is 0 where all registrants hold it (SPC-4 6.15.3.2), and the type.
func (p *persistence) readReservation() []byte {
	b := p.header()
	if p.Type == 0 {
		return b
	}
	key := uint64(0)
	if !allRegistrants(p.Type) {
		key = p.Registrations[p.Holder].Key
	}
	b = binary.BigEndian.AppendUint64(b, key)
	return withLength(append(b, 0, 0, 0, 0, 0, p.Type, 0, 0))
}

// capabilities has the length, SIP_C, ATP_C and PTPL_C, TMV and PTPL_A, and the types (SPC-4 6.15.4).
func (p *persistence) capabilities(keeps bool) []byte {
	b := []byte{0, 8, 0x08 | 0x04, 0x80, 0, 0, 0, 0}
	if keeps {
		b[2] |= 0x01
	}
	if p.keep {
		b[3] |= 0x01
	}
	// Bit by bit the types 0 to 7, then those from 8 on.
	b[4], b[5] = byte(reservationTypes&0xff), byte(reservationTypes>>8)
	return b
}

// fullStatus has for each registration 24 bytes and its TransportID (SPC-4 6.15.5).
func (p *persistence) fullStatus() []byte {
	b := p.header()
	for i, r := range p.Registrations {
		b = binary.BigEndian.AppendUint64(b, r.Key)
		d := [16]byte{}
		if r.Target == "" {
			d[4] |= 0x02
		}
		if p.holds(i) {
			d[4] |= 0x01
			d[5] = p.Type
		}
		binary.BigEndian.PutUint16(d[10:], r.Port)
		id := appendTransportID(nil, r.Initiator)
		binary.BigEndian.PutUint32(d[12:], uint32(len(id))) //nolint:gosec // padName bounds it
		b = append(append(b, d[:]...), id...)
	}
	return withLength(b)
}

// The bits of RESERVE and RELEASE for others and for parts of a unit, which SPC-3 took away.
const (
	thirdParty = 0x10
	extentBit  = 0x01
	longID     = 0x02
)

func prepareLegacyReserve(_ *Nexus, c *Command) {
	switch {
	case c.CDB[1]&thirdParty != 0:
		c.fail(invalidCDB(1, 4))
	case c.CDB[1]&longID != 0:
		c.fail(invalidCDB(1, 1))
	case c.CDB[1]&extentBit != 0:
		c.fail(invalidCDB(1, 0))
	}
}

// executeReserve is RESERVE (6) and (10): SPC-2 7.21. Where anybody is registered it is a conflict, since CRH is zero.
// That another nexus holds a reservation was seen before.
func executeReserve(n *Nexus, c *Command) { n.unit.reserveFor(n, c, true) }

// executeRelease is RELEASE (6) and (10): SPC-2 7.16. Who holds no reservation releases none, and that is fine.
func executeRelease(n *Nexus, c *Command) { n.unit.reserveFor(n, c, false) }

func (u *Unit) reserveFor(n *Nexus, c *Command, on bool) {
	u.changing.Lock()
	defer u.changing.Unlock()
	u.mu.Lock()
	defer u.mu.Unlock()
	_, attached := u.nexuses[n]
	switch {
	case len(u.persistent.Registrations) > 0, on && u.reserved != nil && u.reserved != n, !attached:
		c.end(ReservationConflict)
		return
	case on:
		u.reserved = n
	case u.reserved == n:
		u.reserved = nil
	}
	u.barAll()
	c.succeed()
}
