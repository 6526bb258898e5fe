package scsi

import "encoding/binary"

// A verdict is what becomes of a PERSISTENT RESERVE OUT.
type verdict struct {
	status Status
	sense  Sense
}

// The verdicts that say no more than a status.
var (
	granted  = verdict{}
	conflict = verdict{status: ReservationConflict}
)

func refused(s Sense) verdict { return verdict{CheckCondition, s} }

// A transition is one PERSISTENT RESERVE OUT at work: the state that is to be, and whom that concerns.
type transition struct {
	*persistence
	me    Port
	ports map[uint16]string // the names of the target ports, by relative identifier

	key, actionKey uint64
	before         byte // the type of the reservation that is preempted
	notices        []notice
	aborts         []registration
}

// A notice is a unit attention for the nexuses of a registration.
type notice struct {
	who  registration
	what Sense
}

// noticeFor is the unit attention that a nexus is to get.
func (t *transition) noticeFor(p Port) (Sense, bool) {
	for _, n := range t.notices {
		if n.who.of(p) {
			return n.what, true
		}
	}
	return Sense{}, false
}

func (t *transition) abortsTasksOf(p Port) bool {
	for _, r := range t.aborts {
		if r.of(p) {
			return true
		}
	}
	return false
}

// do applies a service action with its parameter list of outLength bytes or more.
func (t *transition) do(action, kind byte, list []byte, canKeep bool) verdict {
	t.key, t.actionKey = binary.BigEndian.Uint64(list), binary.BigEndian.Uint64(list[8:])
	mine := t.find(t.me)
	if action == outRegister || action == outRegisterIgnore {
		return t.register(mine, action == outRegister, list, canKeep)
	}
	if mine < 0 || t.Registrations[mine].Key != t.key {
		return conflict
	}
	switch action {
	case outReserve:
		return t.reserve(mine, kind)
	case outRelease:
		return t.releaseOwn(mine, kind)
	case outClear:
		return t.clearAll()
	case outPreempt, outPreemptAbort:
		return t.preempt(mine, kind, action == outPreemptAbort)
	default:
		return t.registerAndMove(mine, list, canKeep)
	}
}

// register is REGISTER and REGISTER AND IGNORE EXISTING KEY (SPC-4 5.13.7).
func (t *transition) register(mine int, checked bool, list []byte, canKeep bool) verdict {
	have := uint64(0)
	if mine >= 0 {
		have = t.Registrations[mine].Key
	}
	if checked && have != t.key {
		return conflict // whatever else the list says
	}
	flags := list[20]
	if flags&outAPTPL != 0 && !canKeep {
		return refused(invalidParameter(20, 0))
	}
	if flags&outSpecIPT != 0 && (!checked || mine >= 0) {
		return refused(invalidParameter(20, 3))
	}
	if flags&outSpecIPT == 0 && len(list) != outLength {
		return refused(senseListLength)
	}
	switch {
	case mine < 0 && t.actionKey == 0:
		return granted
	case mine < 0:
		if v := t.registerNew(flags, list); v != granted {
			return v
		}
	case t.actionKey == 0:
		t.unregister(mine)
	default:
		t.Registrations[mine].Key = t.actionKey
	}
	t.keep = flags&outAPTPL != 0
	t.generation++
	return granted
}

// registerNew registers this nexus, and those that SPEC_I_PT names: all of them or none.
func (t *transition) registerNew(flags byte, list []byte) verdict {
	target, port := t.me.Target, t.me.RelativeID
	if flags&outAllTgPt != 0 {
		target = ""
	}
	names := []string{t.me.Name}
	if flags&outSpecIPT != 0 {
		more, ok := transportNames(list)
		if !ok {
			return refused(invalidParameter(24, -1))
		}
		names = append(names, more...)
	}
	for _, name := range names {
		r := registration{Initiator: name, Target: target, Port: port, Key: t.actionKey}
		if at := t.indexOf(r); at >= 0 {
			// It has a key already, which only it can change.
			return refused(invalidParameter(24, -1))
		}
		if len(t.Registrations) >= maxRegistrations {
			return refused(senseNoRegistration)
		}
		t.Registrations = append(t.Registrations, r)
	}
	return granted
}

func (t *transition) indexOf(r registration) int {
	for i, have := range t.Registrations {
		if have.same(r) {
			return i
		}
	}
	return -1
}

// transportNames reads the list of TransportIDs of a parameter list.
func transportNames(list []byte) (names []string, ok bool) {
	if len(list) < outLength+4 {
		return nil, false
	}
	b := list[outLength+4:]
	if uint64(binary.BigEndian.Uint32(list[outLength:])) != uint64(len(b)) {
		return nil, false
	}
	for len(b) > 0 {
		var name string
		if name, b, ok = parseTransportID(b); !ok {
			return nil, false
		}
		names = append(names, name)
	}
	return names, true
}

// unregister ends a registration. If it held a reservation for registrants only, they are told that it is released.
func (t *transition) unregister(i int) {
	if t.Type != 0 && t.Holder == i && registrantsOnly(t.Type) {
		t.tellOthers(i, attentionReleased)
	}
	t.remove(func(at int) bool { return at == i })
}

// tellOthers has all registered nexuses but one get a unit attention.
func (t *transition) tellOthers(but int, s Sense) {
	for i, r := range t.Registrations {
		if i != but {
			t.notices = append(t.notices, notice{r, s})
		}
	}
}

// reserve is RESERVE (SPC-4 5.13.9).
func (t *transition) reserve(mine int, kind byte) verdict {
	switch {
	case !validType(kind):
		return refused(invalidCDB(2, 3))
	case t.Type == 0:
		t.Type, t.Holder = kind, mine
	case !t.holds(mine) || t.Type != kind:
		return conflict
	}
	if allRegistrants(kind) {
		t.Holder = 0
	}
	return granted
}

// releaseOwn is RELEASE (SPC-4 5.13.11.2.2).
func (t *transition) releaseOwn(mine int, kind byte) verdict {
	if !t.holds(mine) {
		return granted
	}
	if t.Type != kind {
		return refused(senseInvalidRelease)
	}
	if registrantsOnly(kind) || allRegistrants(kind) {
		t.tellOthers(mine, attentionReleased)
	}
	t.release()
	return granted
}

// clearAll is CLEAR (SPC-4 5.13.11.2.5).
func (t *transition) clearAll() verdict {
	t.tellOthers(t.find(t.me), attentionPreempted)
	t.Registrations = nil
	t.release()
	t.generation++
	return granted
}

// preempt is PREEMPT and PREEMPT AND ABORT (SPC-4 5.13.11.2.3 and .4): it takes the registrations with the service action
// reservation key away, and the reservation too if one of these held it.
func (t *transition) preempt(mine int, kind byte, abort bool) verdict {
	all := allRegistrants(t.Type)
	takes := t.Type != 0 && (all && t.actionKey == 0 || !all && t.Registrations[t.Holder].Key == t.actionKey)
	switch {
	case t.actionKey == 0 && !all:
		return refused(invalidParameter(8, -1))
	case takes && !validType(kind):
		return refused(invalidCDB(2, 3))
	}
	gone := func(i int) bool {
		if takes && i == mine {
			return false
		}
		return takes && all || t.Registrations[i].Key == t.actionKey
	}
	if lost := t.unregisterAll(gone, abort); lost == 0 && !takes {
		return conflict
	}
	if takes {
		t.takeOver(kind)
	}
	t.generation++
	return granted
}

// unregisterAll takes registrations away, tells their nexuses, and counts them.
func (t *transition) unregisterAll(gone func(i int) bool, abort bool) (lost int) {
	for i, r := range t.Registrations {
		if !gone(i) {
			continue
		}
		lost++
		t.notices = append(t.notices, notice{r, attentionUnregister})
		if abort {
			t.aborts = append(t.aborts, r)
		}
	}
	t.before = t.Type
	t.remove(gone)
	return lost
}

// takeOver gives this nexus the reservation that it preempted. If that is of another type now, those that are still
// registered are told; who lost its registration hears only that.
func (t *transition) takeOver(kind byte) {
	mine := t.find(t.me)
	t.Type, t.Holder = kind, mine
	if allRegistrants(kind) {
		t.Holder = 0
	}
	if t.before != kind {
		t.tellOthers(mine, attentionReleased)
	}
}

// registerAndMove is REGISTER AND MOVE (SPC-4 5.13.8): the reservation goes over to another nexus.
func (t *transition) registerAndMove(mine int, list []byte, canKeep bool) verdict {
	if !t.holds(mine) || allRegistrants(t.Type) {
		return conflict
	}
	to, v := t.destination(list)
	flags := list[17]
	switch {
	case v != granted:
		return v
	case flags&outAPTPL != 0 && !canKeep:
		return refused(invalidParameter(17, 0))
	case t.Registrations[mine].of(to):
		return refused(invalidParameter(24, -1))
	}
	at := t.find(to)
	if at < 0 {
		if len(t.Registrations) >= maxRegistrations {
			return refused(senseNoRegistration)
		}
		t.Registrations = append(t.Registrations, registration{Initiator: to.Name, Target: to.Target, Port: to.RelativeID})
		at = len(t.Registrations) - 1
	}
	t.Registrations[at].Key = t.actionKey
	t.Holder = at
	if flags&outUnreg != 0 {
		t.remove(func(i int) bool { return i == mine })
	}
	t.keep = flags&outAPTPL != 0
	t.generation++
	return granted
}

// destination is the nexus that a reservation is to go over to.
func (t *transition) destination(list []byte) (Port, verdict) {
	relative := binary.BigEndian.Uint16(list[18:])
	target, known := t.ports[relative]
	name, rest, ok := parseTransportID(list[outLength:])
	switch {
	case t.actionKey == 0:
		return Port{}, refused(invalidParameter(8, -1))
	case !known:
		return Port{}, refused(invalidParameter(18, -1))
	case int64(binary.BigEndian.Uint32(list[20:])) != int64(len(list)-outLength):
		return Port{}, refused(senseListLength)
	case !ok || len(rest) > 0:
		return Port{}, refused(invalidParameter(24, -1))
	}
	return Port{Name: name, Target: target, RelativeID: relative}, granted
}
