package scsi

import (
	"bytes"
	"testing"
)

func TestUnitAttentionIsReportedOnceAndInOrder(t *testing.T) {
	b := newBench(t)
	b.unit.LUNsChanged()
	b.unit.LUNsChanged()
	other := b.attach("iqn.2026-11.dev.troupe:b,i,0x1")
	wantGood(t, b.modeSelect(other, with(caching, 2, 0)...))
	b.good(inquiry(0, 0, 36), nil)

	wantSense(t, b.do(cdb10(opRead10, 0, 0, 1), nil), attentionLUNs)
	wantSense(t, b.do(cdb10(opRead10, 0, 0, 1), nil), attentionModeChanged)
	b.good(cdb10(opRead10, 0, 0, 1), nil)

	b.unit.LUNsChanged()
	b.unit.Reset()
	wantSense(t, b.do(opTestUnitReady6(), nil), attentionReset)
	b.good(opTestUnitReady6(), nil)
}

// TestResetComesBeforeConflict has two things bar a command: that the unit was reset is said first, all else after that it
// is reserved (SAM-5 5.3.3).
func TestResetComesBeforeConflict(t *testing.T) {
	c := newCluster(t)
	c.register(c.a, 1)
	c.reserve(c.a, 1, exclusiveAccess)
	read := func(n *Nexus) *Command { return do(n, cdb10(opRead10, 0, 0, 1), nil) }

	c.unit.Reset()
	c.unit.LUNsChanged()
	wantSense(t, read(c.b), attentionReset)
	wantStatus(t, read(c.b), ReservationConflict)
	wantStatus(t, read(c.b), ReservationConflict)
	wantSense(t, do(c.b, opTestUnitReady6(), nil), attentionLUNs)

	late := c.unit.Attach(Port{Name: portName("d"), Target: targetName, RelativeID: 1}, func() {})
	wantSense(t, read(late), attentionPowerOn)
	wantStatus(t, read(late), ReservationConflict)
}

func TestRequestSenseTakesUnitAttention(t *testing.T) {
	b := newBench(t)
	b.unit.Reset()
	cdb := []byte{opRequestSense, 1, 0, 0, 252, 0}
	if got := b.good(cdb, nil).In; !bytes.Equal(got, descriptors(attentionReset).Append(nil)) {
		t.Errorf("% x", got)
	}
	cdb[1] = 0
	if got := b.good(cdb, nil).In; !bytes.Equal(got, Sense{}.Append(nil)) {
		t.Errorf("% x", got)
	}
	b.good(opTestUnitReady6(), nil)
}

func TestReportLUNsForgetsThatTheyChanged(t *testing.T) {
	b := newBench(t)
	b.unit.LUNsChanged()
	b.good(append(reportLUNs(0, 64), 0, 0), nil)
	b.good(opTestUnitReady6(), nil)
}

func TestUnitAttentionsAreBounded(t *testing.T) {
	b := newBench(t)
	b.unit.mu.Lock()
	for i := range 100 {
		b.nexus.attend(Sense{Key: UnitAttention, ASC: 0x2a, ASCQ: byte(i)})
	}
	n := len(b.nexus.attentions)
	b.unit.mu.Unlock()
	if n != maxAttentions {
		t.Errorf("%d unit attentions are kept, want %d", n, maxAttentions)
	}
}

func TestUnknownCommands(t *testing.T) {
	b := newBench(t)
	for _, op := range []byte{0x04, 0x1e, 0x83, 0x9c, 0xc0, 0xff} {
		wantSense(t, b.do(append([]byte{op}, make([]byte, 15)...), nil), senseInvalidOpcode)
	}
	for _, cdb := range [][]byte{nil, {opRead10}, make([]byte, 5), cdb10(opRead16, 0, 0, 1), make([]byte, 2)} {
		wantSense(t, b.do(cdb, nil), senseInvalidOpcode)
	}
	wantSense(t, b.do([]byte{opTestUnitReady, 0, 0, 0, 0, 0x04}, nil), invalidCDB(5, 2))
}

func TestTasksClearedIsToldToTheirNexus(t *testing.T) {
	b := newBench(t)
	other := b.attach("iqn.2026-11.dev.troupe:b,i,0x1")
	other.TasksCleared()
	other.TasksCleared()
	b.good(opTestUnitReady6(), nil)
	wantSense(t, do(other, opTestUnitReady6(), nil), attentionCleared)
	wantGood(t, do(other, opTestUnitReady6(), nil))
}
