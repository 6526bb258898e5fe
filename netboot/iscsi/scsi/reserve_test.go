package scsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A keeper keeps in memory, and counts.
type keeper struct {
	kept  []byte
	saves int
	err   error
}

func (k *keeper) Load() ([]byte, error) { return k.kept, k.err }

func (k *keeper) Save(b []byte) error {
	if k.err != nil {
		return k.err
	}
	k.kept, k.saves = bytes.Clone(b), k.saves+1
	return nil
}

// A cluster is a unit and three nexuses to it: a, b and c.
type cluster3 struct {
	*bench
	a, b, c *Nexus
	keeper  *keeper
	aborted map[string]int
}

const targetName = "iqn.2026-11.dev.troupe:disks,t,0x0001"

func portName(host string) string { return "iqn.2026-11.dev.troupe:" + host + ",i,0x00023d000001" }

func newCluster(t *testing.T) *cluster3 {
	t.Helper()
	return clusterOn(t, &keeper{})
}

func clusterOn(t *testing.T, k *keeper) *cluster3 {
	t.Helper()
	b := benchOn(t, newMemory(blocksOfBench*blockSize), Config{Serial: "1", Keep: k})
	c := &cluster3{bench: b, keeper: k, aborted: map[string]int{}}
	for host, n := range map[string]**Nexus{"a": &c.a, "b": &c.b, "c": &c.c} {
		*n = b.unit.Attach(Port{Name: portName(host), Target: targetName, RelativeID: 1}, func() { c.aborted[host]++ })
		wantSense(t, do(*n, opTestUnitReady6(), nil), attentionPowerOn)
	}
	return c
}

// out sends a PERSISTENT RESERVE OUT; more is added to the list of 24 bytes.
func out(n *Nexus, action, kind byte, key, actionKey uint64, flags byte, more ...byte) *Command {
	list := binary.BigEndian.AppendUint64(nil, key)
	list = binary.BigEndian.AppendUint64(list, actionKey)
	list = append(list, 0, 0, 0, 0, flags, 0, 0, 0)
	return outList(n, action, kind, append(list, more...))
}

func outList(n *Nexus, action, kind byte, list []byte) *Command {
	cdb := []byte{opPersistentOut, action, kind, 0, 0}
	cdb = append(binary.BigEndian.AppendUint32(cdb, uint32(len(list))), 0)
	return do(n, cdb, list)
}

func (c *cluster3) register(n *Nexus, key uint64) {
	c.Helper()
	wantGood(c.T, out(n, outRegisterIgnore, 0, 0, key, 0))
}

func (c *cluster3) reserve(n *Nexus, key uint64, kind byte) {
	c.Helper()
	wantGood(c.T, out(n, outReserve, kind, key, 0, 0))
}

func in(n *Nexus, action byte) *Command {
	return do(n, []byte{opPersistentIn, action, 0, 0, 0, 0, 0, 0xff, 0xff, 0}, nil)
}

// keys are what READ KEYS says, without the generation.
func (c *cluster3) keys() []uint64 {
	c.Helper()
	r := in(c.a, inReadKeys)
	wantGood(c.T, r)
	var keys []uint64
	for b := r.In[8:]; len(b) > 0; b = b[8:] {
		keys = append(keys, binary.BigEndian.Uint64(b))
	}
	return keys
}

func (c *cluster3) wantKeys(want ...uint64) {
	c.Helper()
	if diff := cmp.Diff(want, c.keys()); diff != "" {
		c.Errorf("keys (-want +got)\n%s", diff)
	}
}

func (c *cluster3) generation() uint32 {
	c.Helper()
	r := in(c.a, inReadKeys)
	wantGood(c.T, r)
	return binary.BigEndian.Uint32(r.In)
}

// wantReserved wants READ RESERVATION to tell a key and a type; 0 is none.
func (c *cluster3) wantReserved(key uint64, kind byte) {
	c.Helper()
	r := in(c.a, inReadReservation)
	wantGood(c.T, r)
	var want []byte
	if kind != 0 {
		want = append(binary.BigEndian.AppendUint64(nil, key), 0, 0, 0, 0, 0, kind, 0, 0)
	}
	if got := r.In[8:]; !bytes.Equal(got, want) || int(binary.BigEndian.Uint32(r.In[4:])) != len(want) {
		c.Errorf("reservation % x, want % x", r.In, want)
	}
}

func tur(n *Nexus) *Command { return do(n, opTestUnitReady6(), nil) }

func (c *cluster3) wantAttention(n *Nexus, want ...Sense) {
	c.Helper()
	for _, s := range want {
		wantSense(c.T, tur(n), s)
	}
	wantGood(c.T, tur(n))
}

func TestRegister(t *testing.T) {
	c := newCluster(t)
	wantStatus(t, out(c.a, outRegister, 0, 5, 1, 0), ReservationConflict)
	wantGood(t, out(c.a, outRegister, 0, 0, 0, 0))
	c.wantKeys()
	wantGood(t, out(c.a, outRegister, 0, 0, 1, 0))
	wantGood(t, out(c.b, outRegister, 0, 0, 1, 0))
	c.wantKeys(1, 1)
	wantStatus(t, out(c.a, outRegister, 0, 0, 2, 0), ReservationConflict)
	wantGood(t, out(c.a, outRegister, 0, 1, 2, 0))
	wantGood(t, out(c.b, outRegisterIgnore, 0, 77, 3, 0))
	c.wantKeys(2, 3)
	if g := c.generation(); g != 4 {
		t.Errorf("generation %d, want 4", g)
	}
	wantGood(t, out(c.a, outRegister, 0, 2, 0, 0))
	c.wantKeys(3)
	for _, n := range []*Nexus{c.a, c.b, c.c} {
		c.wantAttention(n)
	}
}

func TestReserveAccess(t *testing.T) {
	type access struct{ registeredRead, registeredWrite, strangerRead, strangerWrite bool }
	for kind, want := range map[byte]access{
		writeExclusive:                 {true, false, true, false},
		exclusiveAccess:                {false, false, false, false},
		writeExclusiveRegistrantsOnly:  {true, true, true, false},
		exclusiveAccessRegistrantsOnly: {true, true, false, false},
		writeExclusiveAllRegistrants:   {true, true, true, false},
		exclusiveAccessAllRegistrants:  {true, true, false, false},
	} {
		t.Run(fmt.Sprint(kind), func(t *testing.T) {
			c := newCluster(t)
			c.register(c.a, 1)
			c.register(c.b, 2)
			c.reserve(c.a, 1, kind)
			reads := func(n *Nexus) bool { return do(n, cdb10(opRead10, 0, 0, 1), nil).Status == Good }
			writes := func(n *Nexus) bool { return do(n, cdb10(opWrite10, 0, 0, 1), fill(1, blockSize)).Status == Good }
			if !reads(c.a) || !writes(c.a) {
				t.Error("the holder is kept out")
			}
			if got := (access{reads(c.b), writes(c.b), reads(c.c), writes(c.c)}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
			for _, cdb := range [][]byte{
				opTestUnitReady6(), inquiry(0, 0, 36), readCapacity16(32), append(reportLUNs(0, 16), 0, 0),
				{opStartStop, 0, 0, 0, startStart, 0},
				{opPersistentIn, inFullStatus, 0, 0, 0, 0, 0, 0, 8, 0},
			} {
				wantGood(t, do(c.c, cdb, nil))
			}
			wantStatus(t, do(c.c, []byte{opStartStop, 0, 0, 0, 0, 0}, nil), ReservationConflict)
			wantStatus(t, do(c.c, cdb10(opSyncCache10, 0, 0, 0), nil), ReservationConflict)
		})
	}
}

func TestReserveConflicts(t *testing.T) {
	c := newCluster(t)
	wantStatus(t, out(c.a, outReserve, writeExclusive, 0, 0, 0), ReservationConflict)
	c.register(c.a, 1)
	c.register(c.b, 2)
	wantStatus(t, out(c.a, outReserve, writeExclusive, 2, 0, 0), ReservationConflict)
	for _, kind := range []byte{0, 2, 4, 9, 15} {
		wantSense(t, out(c.a, outReserve, kind, 1, 0, 0), invalidCDB(2, 3))
	}
	wantSense(t, out(c.a, outReserve, 0x10|writeExclusive, 1, 0, 0), invalidCDB(2, 7))
	c.reserve(c.a, 1, writeExclusive)
	c.reserve(c.a, 1, writeExclusive)
	wantStatus(t, out(c.a, outReserve, exclusiveAccess, 1, 0, 0), ReservationConflict)
	wantStatus(t, out(c.b, outReserve, writeExclusive, 2, 0, 0), ReservationConflict)
	c.wantReserved(1, writeExclusive)
	if g := c.generation(); g != 2 {
		t.Errorf("generation %d: RESERVE counts", g)
	}
}

func TestRelease(t *testing.T) {
	for kind, told := range map[byte][]Sense{
		writeExclusive:                 nil,
		exclusiveAccess:                nil,
		writeExclusiveRegistrantsOnly:  {attentionReleased},
		exclusiveAccessRegistrantsOnly: {attentionReleased},
		writeExclusiveAllRegistrants:   {attentionReleased},
		exclusiveAccessAllRegistrants:  {attentionReleased},
	} {
		t.Run(fmt.Sprint(kind), func(t *testing.T) {
			c := newCluster(t)
			c.register(c.a, 1)
			c.register(c.b, 2)
			c.reserve(c.a, 1, kind)
			if !allRegistrants(kind) {
				wantGood(t, out(c.b, outRelease, kind, 2, 0, 0))
			}
			wantSense(t, out(c.a, outRelease, 9-kind, 1, 0, 0), senseInvalidRelease)
			wantStatus(t, out(c.c, outRelease, kind, 0, 0, 0), ReservationConflict)
			wantGood(t, out(c.a, outRelease, kind, 1, 0, 0))
			c.wantReserved(0, 0)
			c.wantAttention(c.a)
			c.wantAttention(c.b, told...)
			c.wantAttention(c.c)
			wantGood(t, out(c.a, outRelease, kind, 1, 0, 0))
		})
	}
}

func TestUnregisteringTheHolderReleases(t *testing.T) {
	for kind, told := range map[byte][]Sense{
		writeExclusive:                 nil,
		exclusiveAccess:                nil,
		writeExclusiveRegistrantsOnly:  {attentionReleased},
		exclusiveAccessRegistrantsOnly: {attentionReleased},
	} {
		c := newCluster(t)
		c.register(c.a, 1)
		c.register(c.b, 2)
		c.reserve(c.a, 1, kind)
		wantGood(t, out(c.a, outRegister, 0, 1, 0, 0))
		c.wantReserved(0, 0)
		c.wantAttention(c.a)
		c.wantAttention(c.b, told...)
	}
	for _, kind := range []byte{writeExclusiveAllRegistrants, exclusiveAccessAllRegistrants} {
		c := newCluster(t)
		c.register(c.a, 1)
		c.register(c.b, 2)
		c.reserve(c.b, 2, kind)
		wantGood(t, out(c.b, outRegister, 0, 2, 0, 0))
		c.wantReserved(0, kind)
		wantGood(t, out(c.a, outRegister, 0, 1, 0, 0))
		c.wantReserved(0, 0)
	}
}

func TestClear(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	c.register(c.b, 2)
	c.reserve(c.a, 1, exclusiveAccess)
	wantStatus(t, out(c.c, outClear, 0, 0, 0, 0), ReservationConflict)
	wantGood(t, out(c.b, outClear, 0, 2, 0, 0))
	c.wantAttention(c.a, attentionPreempted)
	c.wantAttention(c.b)
	c.wantAttention(c.c)
	c.wantKeys()
	c.wantReserved(0, 0)
	if g := c.generation(); g != 3 {
		t.Errorf("generation %d, want 3", g)
	}
}

func TestPreemptRegistrations(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	c.register(c.b, 2)
	c.register(c.c, 2)
	wantSense(t, out(c.a, outPreempt, writeExclusive, 1, 0, 0), invalidParameter(8, -1))
	wantStatus(t, out(c.a, outPreempt, writeExclusive, 1, 9, 0), ReservationConflict)
	wantGood(t, out(c.a, outPreempt, writeExclusive, 1, 2, 0))
	c.wantAttention(c.a)
	c.wantAttention(c.b, attentionUnregister)
	c.wantAttention(c.c, attentionUnregister)
	c.wantKeys(1)
	c.wantReserved(0, 0)
	if g := c.generation(); g != 4 {
		t.Errorf("generation %d, want 4", g)
	}
	if len(c.aborted) != 0 {
		t.Errorf("PREEMPT aborts tasks: %v", c.aborted)
	}
}

func TestPreemptReservation(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	c.register(c.b, 2)
	c.register(c.c, 3)
	c.reserve(c.a, 1, writeExclusive)
	wantSense(t, out(c.b, outPreempt, 2, 2, 1, 0), invalidCDB(2, 3))
	wantGood(t, out(c.b, outPreemptAbort, exclusiveAccess, 2, 1, 0))
	c.wantAttention(c.a, attentionUnregister)
	c.wantAttention(c.b)
	c.wantAttention(c.c, attentionReleased)
	c.wantKeys(2, 3)
	c.wantReserved(2, exclusiveAccess)
	if diff := cmp.Diff(map[string]int{"a": 1}, c.aborted); diff != "" {
		t.Errorf("aborted (-want +got)\n%s", diff)
	}
	// To preempt oneself changes the type.
	wantGood(t, out(c.b, outPreempt, writeExclusiveRegistrantsOnly, 2, 2, 0))
	c.wantAttention(c.c, attentionReleased)
	c.wantKeys(2, 3)
	c.wantReserved(2, writeExclusiveRegistrantsOnly)
}

func TestPreemptAllRegistrants(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	c.register(c.b, 2)
	c.register(c.c, 3)
	c.reserve(c.a, 1, writeExclusiveAllRegistrants)
	wantGood(t, out(c.b, outPreempt, writeExclusive, 2, 3, 0))
	c.wantAttention(c.c, attentionUnregister)
	c.wantReserved(0, writeExclusiveAllRegistrants)
	c.wantKeys(1, 2)
	wantGood(t, out(c.b, outPreempt, exclusiveAccess, 2, 0, 0))
	c.wantAttention(c.a, attentionUnregister)
	c.wantKeys(2)
	c.wantReserved(2, exclusiveAccess)
}

func transportID(name string) []byte { return appendTransportID(nil, name) }

// move sends a REGISTER AND MOVE.
func move(n *Nexus, key, actionKey uint64, flags byte, port uint16, id []byte) *Command {
	list := binary.BigEndian.AppendUint64(nil, key)
	list = binary.BigEndian.AppendUint64(list, actionKey)
	list = binary.BigEndian.AppendUint16(append(list, 0, flags), port)
	list = binary.BigEndian.AppendUint32(list, uint32(len(id)))
	return outList(n, outRegisterMove, 0, append(list, id...))
}

func TestRegisterAndMove(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	b := transportID(portName("b"))
	wantStatus(t, move(c.a, 1, 2, 0, 1, b), ReservationConflict)
	c.reserve(c.a, 1, exclusiveAccess)
	wantStatus(t, move(c.a, 9, 2, 0, 1, b), ReservationConflict)
	wantSense(t, move(c.a, 1, 0, 0, 1, b), invalidParameter(8, -1))
	wantSense(t, move(c.a, 1, 2, 0, 7, b), invalidParameter(18, -1))
	wantSense(t, move(c.a, 1, 2, 0, 1, b[:20]), invalidParameter(24, -1))
	wantSense(t, move(c.a, 1, 2, 0, 1, transportID(portName("a"))), invalidParameter(24, -1))
	wantSense(t, move(c.a, 1, 2, 0, 1, transportID("iqn.2026-11.dev.troupe:b")), invalidParameter(24, -1))
	wantGood(t, move(c.a, 1, 2, outUnreg, 1, b))
	c.wantKeys(2)
	c.wantReserved(2, exclusiveAccess)
	wantStatus(t, do(c.a, cdb10(opRead10, 0, 0, 1), nil), ReservationConflict)
	wantGood(t, do(c.b, cdb10(opRead10, 0, 0, 1), nil))
	wantGood(t, move(c.b, 2, 3, 0, 1, transportID(portName("c"))))
	c.wantKeys(2, 3)
	c.wantReserved(3, exclusiveAccess)
	wantGood(t, do(c.c, cdb10(opRead10, 0, 0, 1), nil))
}

// SCOPE and TYPE mean something where a reservation is made, released or preempted, and else nothing (SPC-4 5.13.7, 5.13.8).
func TestScopeAndTypeThatMeanNothing(t *testing.T) {
	const scopeAndType = 0x1f
	c := newCluster(t)
	for _, action := range []byte{outReserve, outRelease, outPreempt, outPreemptAbort} {
		wantSense(t, out(c.a, action, scopeAndType, 0, 0, 0), invalidCDB(2, 7))
	}
	wantGood(t, out(c.a, outRegister, scopeAndType, 0, 1, 0))
	wantGood(t, out(c.b, outRegisterIgnore, scopeAndType, 0, 2, 0))
	c.reserve(c.a, 1, exclusiveAccess)
	list := binary.BigEndian.AppendUint64(nil, 1)
	list = append(binary.BigEndian.AppendUint64(list, 2), 0, 0, 0, 1)
	b := transportID(portName("b"))
	list = append(binary.BigEndian.AppendUint32(list, uint32(len(b))), b...)
	wantGood(t, outList(c.a, outRegisterMove, scopeAndType, list))
	c.wantReserved(2, exclusiveAccess)
	wantGood(t, out(c.b, outClear, scopeAndType, 2, 0, 0))
	c.wantAttention(c.a, attentionPreempted)
	c.wantKeys()
}

func specify(ids ...[]byte) []byte {
	all := bytes.Join(ids, nil)
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(all))), all...)
}

func TestRegisterForOthers(t *testing.T) {
	c := newCluster(t)
	b, d := transportID(portName("b")), transportID(portName("d"))
	wantSense(t, out(c.a, outRegisterIgnore, 0, 0, 5, outSpecIPT, specify(b)...), invalidParameter(20, 3))
	wantSense(t, out(c.a, outRegister, 0, 0, 5, outSpecIPT, specify(b)[:20]...), invalidParameter(24, -1))
	wantSense(t, out(c.a, outRegister, 0, 0, 5, outSpecIPT, specify(b, b)...), invalidParameter(24, -1))
	wantSense(t, out(c.a, outRegister, 0, 0, 5, outSpecIPT), invalidParameter(24, -1))
	wantSense(t, out(c.a, outRegister, 0, 0, 5, 0, specify(b)...), senseListLength)
	c.wantKeys()
	wantGood(t, out(c.a, outRegister, 0, 0, 5, outSpecIPT, specify(b, d)...))
	c.wantKeys(5, 5, 5)
	c.reserve(c.b, 5, exclusiveAccess)
	wantSense(t, out(c.a, outRegister, 0, 5, 6, outSpecIPT, specify(b)...), invalidParameter(20, 3))
	wantStatus(t, out(c.a, outRegister, 0, 9, 6, outSpecIPT, specify(b)...), ReservationConflict)
}

func TestRegisterForAllTargetPorts(t *testing.T) {
	c := newCluster(t)
	second := Port{Name: portName("a"), Target: "iqn.2026-11.dev.troupe:other,t,0x0002", RelativeID: 2}
	n := c.unit.Attach(second, func() {})
	wantSense(t, tur(n), attentionPowerOn)
	wantGood(t, out(c.a, outRegister, 0, 0, 5, outAllTgPt))
	c.reserve(n, 5, exclusiveAccess)
	wantGood(t, do(n, cdb10(opRead10, 0, 0, 1), nil))
	wantGood(t, do(c.a, cdb10(opRead10, 0, 0, 1), nil))
	wantStatus(t, do(c.b, cdb10(opRead10, 0, 0, 1), nil), ReservationConflict)
}

func TestFullStatusAndCapabilities(t *testing.T) {
	c := newCluster(t)
	if got := in(c.a, inCapabilities).In; !bytes.Equal(got, unhex(t, "0008 0d 80 ea01 0000")) {
		t.Errorf("capabilities % x", got)
	}
	c.register(c.a, 0x0102030405060708)
	wantGood(t, out(c.b, outRegister, 0, 0, 2, outAllTgPt|outAPTPL))
	c.reserve(c.a, 0x0102030405060708, writeExclusive)
	if got := in(c.a, inCapabilities).In; got[3] != 0x81 {
		t.Errorf("capabilities % x: PTPL_A is not set", got)
	}
	id := "45 00 002c" + fmt.Sprintf("%x", portName("a")) + strings.Repeat("00", 44-len(portName("a")))
	idB := "45 00 002c" + fmt.Sprintf("%x", portName("b")) + strings.Repeat("00", 44-len(portName("b")))
	want := "00000002 00000090" +
		"0102030405060708 00000000 01 01 00000000 0001 00000030" + id +
		"0000000000000002 00000000 02 00 00000000 0001 00000030" + idB
	if got := in(c.a, inFullStatus).In; !bytes.Equal(got, unhex(t, want)) {
		t.Errorf("\n got % x\nwant % x", got, unhex(t, want))
	}
	wantSense(t, in(c.a, 4), invalidCDB(1, 4))
	wantSense(t, out(c.a, 8, 0, 1, 1, 0), invalidCDB(1, 4))
}

func TestReservationsSurviveRestart(t *testing.T) {
	c := newCluster(t)
	wantGood(t, out(c.a, outRegister, 0, 0, 1, outAPTPL))
	wantGood(t, out(c.b, outRegister, 0, 0, 2, outAPTPL))
	c.reserve(c.a, 1, exclusiveAccess)

	again := clusterOn(t, &keeper{kept: c.keeper.kept})
	again.wantKeys(1, 2)
	again.wantReserved(1, exclusiveAccess)
	wantStatus(t, do(again.b, cdb10(opRead10, 0, 0, 1), nil), ReservationConflict)
	wantGood(t, do(again.a, cdb10(opRead10, 0, 0, 1), nil))
	if g := again.generation(); g != 0 {
		t.Errorf("generation %d after a restart", g)
	}

	// Who registers without APTPL ends that for all (SPC-4 5.13.5).
	wantGood(t, out(again.b, outRegister, 0, 2, 3, 0))
	third := clusterOn(t, &keeper{kept: again.keeper.kept})
	third.wantKeys()
	third.wantReserved(0, 0)
}

func TestWithoutAPTPLNothingIsKept(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	c.reserve(c.a, 1, exclusiveAccess)
	if c.keeper.saves != 0 {
		t.Errorf("kept %d times", c.keeper.saves)
	}
	b := newBench(t)
	wantSense(t, out(b.nexus, outRegister, 0, 0, 1, outAPTPL), invalidParameter(20, 0))
	if got := in(b.nexus, inCapabilities).In; got[2]&1 != 0 {
		t.Error("PTPL_C without a Keeper")
	}
}

func TestWhatCannotBeKeptDoesNotHold(t *testing.T) {
	c := newCluster(t)
	c.keeper.err = errors.New("no space")
	wantSense(t, out(c.a, outRegister, 0, 0, 1, outAPTPL), senseInternal)
	c.wantKeys()
	c.keeper.err = nil
	wantGood(t, out(c.a, outRegister, 0, 0, 1, outAPTPL))
	c.keeper.err = errors.New("no space")
	wantSense(t, out(c.a, outReserve, exclusiveAccess, 1, 0, 0), senseInternal)
	c.wantReserved(0, 0)
}

func TestDamagedReservationsAreAnError(t *testing.T) {
	for name, kept := range map[string]string{
		"no JSON":           "{",
		"no key":            `{"registrations":[{"initiator":"a","key":0}]}`,
		"no initiator":      `{"registrations":[{"key":1}]}`,
		"unknown type":      `{"registrations":[{"initiator":"a","key":1}],"type":2}`,
		"no holder":         `{"registrations":[{"initiator":"a","key":1}],"type":1,"holder":1}`,
		"negative holder":   `{"registrations":[{"initiator":"a","key":1}],"type":1,"holder":-1}`,
		"holder of nothing": `{"registrations":[{"initiator":"a","key":1}],"holder":1}`,
		"long name":         `{"registrations":[{"initiator":"` + strings.Repeat("a", 300) + `","key":1}]}`,
		"too many":          `{"registrations":[` + strings.Repeat(`{"initiator":"a","key":1},`, maxRegistrations) + `{"initiator":"a","key":1}]}`,
		"too long":          `{"registrations":[]}` + strings.Repeat(" ", maxKept),
	} {
		if _, err := NewUnit(newMemory(512), Config{Serial: "1", Keep: &keeper{kept: []byte(kept)}}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := NewUnit(newMemory(512), Config{Serial: "1", Keep: &keeper{err: errors.New("no disk")}}); err == nil {
		t.Error("no error where loading fails")
	}
}

func TestRegistrationsAreBounded(t *testing.T) {
	c := newCluster(t)
	var ids [][]byte
	for i := range maxRegistrations - 1 {
		ids = append(ids, transportID(portName(fmt.Sprint("n", i))))
	}
	wantGood(t, out(c.a, outRegister, 0, 0, 1, outSpecIPT, specify(ids...)...))
	wantSense(t, out(c.b, outRegister, 0, 0, 2, 0), senseNoRegistration)
	if n := len(c.keys()); n != maxRegistrations {
		t.Errorf("%d registrations", n)
	}
	if r := in(c.a, inFullStatus); len(r.In) > 0xffff {
		t.Errorf("%d bytes of status", len(r.In))
	}
}

func TestParameterListOfReserveOut(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	wantSense(t, outList(c.a, outReserve, writeExclusive, make([]byte, 23)), senseListLength)
	wantSense(t, outList(c.a, outReserve, writeExclusive, make([]byte, 25)), senseListLength)
	wantSense(t, outList(c.a, outRegister, 0, make([]byte, maxOutLength+1)), senseListLength)
}

func TestRegistrationOutlivesNexus(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	c.reserve(c.a, 1, exclusiveAccess)
	c.a.Detach()
	c.unit.Reset()
	wantSense(t, tur(c.b), attentionReset)
	wantStatus(t, do(c.b, cdb10(opRead10, 0, 0, 1), nil), ReservationConflict)
	c.a = c.attach(strings.ToUpper(portName("a")[:4]) + portName("a")[4:])
	wantGood(t, do(c.a, cdb10(opRead10, 0, 0, 1), nil))
}

// RESERVE and RELEASE of SPC-2.
func TestLegacyReserve(t *testing.T) {
	for name, k := range map[string]struct{ reserve, release []byte }{
		"6":  {[]byte{opReserve6, 5: 0}, []byte{opRelease6, 5: 0}},
		"10": {[]byte{opReserve10, 9: 0}, []byte{opRelease10, 9: 0}},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			wantGood(t, do(c.a, k.reserve, nil))
			wantGood(t, do(c.a, k.reserve, nil))
			for _, cdb := range [][]byte{
				k.reserve, opTestUnitReady6(), modeSense6(0, 0x3f, 0, 255), cdb10(opRead10, 0, 0, 1), cdb10(opWrite10, 0, 0, 1),
				{opPersistentIn, inReadKeys, 9: 0},
				cdb10(opSyncCache10, 0, 0, 0),
			} {
				wantStatus(t, do(c.b, cdb, fill(0, blockSize)), ReservationConflict)
			}
			for _, cdb := range [][]byte{
				inquiry(0, 0, 36), {opRequestSense, 0, 0, 0, 18, 0}, append(reportLUNs(0, 16), 0, 0), cdb10(opReadCapacity10, 0, 0, 0), k.release,
			} {
				wantGood(t, do(c.b, cdb, nil))
			}
			wantStatus(t, tur(c.b), ReservationConflict)
			wantGood(t, do(c.a, cdb10(opRead10, 0, 0, 1), nil))
			wantStatus(t, out(c.a, outRegister, 0, 0, 1, 0), ReservationConflict)
			wantGood(t, do(c.a, k.release, nil))
			wantGood(t, tur(c.b))

			wantGood(t, do(c.a, k.reserve, nil))
			c.a.Detach()
			wantGood(t, tur(c.b))
			wantGood(t, do(c.b, k.reserve, nil))
			c.unit.Reset()
			wantSense(t, tur(c.c), attentionReset)
			wantGood(t, tur(c.c))

			c.register(c.c, 1)
			wantStatus(t, do(c.c, k.reserve, nil), ReservationConflict)
			third := bytes.Clone(k.reserve)
			third[1] = thirdParty
			wantSense(t, do(c.c, third, nil), invalidCDB(1, 4))
		})
	}
}

// A conflict comes before a unit attention, which stays.
func TestConflictComesBeforeUnitAttention(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	c.reserve(c.a, 1, exclusiveAccess)
	c.unit.LUNsChanged()
	wantStatus(t, do(c.b, cdb10(opRead10, 0, 0, 1), nil), ReservationConflict)
	c.wantAttention(c.b, attentionLUNs)
}
