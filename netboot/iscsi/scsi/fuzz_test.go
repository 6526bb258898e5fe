package scsi

import (
	"math/rand/v2"
	"sync"
	"testing"
)

// checkOutcome checks what holds for the outcome of any command.
func checkOutcome(t *testing.T, u *Unit, c *Command) {
	t.Helper()
	switch {
	case !c.Done:
		t.Fatalf("CDB % x: not done", c.CDB)
	case c.Status == CheckCondition && (c.Sense.Key == NoSense || c.Sense.Key > Miscompare):
		t.Fatalf("CDB % x: sense %+v", c.CDB, c.Sense)
	case c.Status != Good && (len(c.In) > 0 || c.Read.N != 0):
		t.Fatalf("CDB % x: status %#x with data", c.CDB, c.Status)
	case c.Status != Good && c.Status != CheckCondition && c.Status != ReservationConflict:
		t.Fatalf("CDB % x: status %#x", c.CDB, c.Status)
	case c.Read.N < 0 || c.Read.N > MaxRead || c.Read.Off < 0 || c.Read.Off+c.Read.N > u.medium.Size():
		t.Fatalf("CDB % x: reads %+v", c.CDB, c.Read)
	}
	if c.Status == CheckCondition {
		b := c.Sense.Append(nil)
		if len(b) < 8 || len(b) != 8+int(b[7]) || b[0]&0x70 != 0x70 {
			t.Fatalf("CDB % x: sense data % x", c.CDB, b)
		}
	}
}

// run brings a command through and checks it on the way.
func run(t *testing.T, n *Nexus, cdb, data []byte) *Command {
	t.Helper()
	c := &Command{CDB: cdb, Expected: int64(len(data))}
	n.Prepare(c)
	if !c.Done {
		if c.OutLength < 0 || c.OutLength > MaxTransfer {
			t.Fatalf("CDB % x: takes %d bytes", cdb, c.OutLength)
		}
		c.Out = data[:min(len(data), c.OutLength)]
		n.Execute(c)
	}
	checkOutcome(t, n.unit, c)
	if a, ok := allocationOf(cdb); ok && len(c.In) > a {
		t.Fatalf("CDB % x: %d bytes, allocation length %d", cdb, len(c.In), a)
	}
	return c
}

// allocationOf is the allocation length of some CDBs.
func allocationOf(cdb []byte) (int, bool) {
	if len(cdb) < 16 {
		return 0, false
	}
	switch cdb[0] {
	case opInquiry:
		return int(cdb[3])<<8 | int(cdb[4]), true
	case opModeSense6, opRequestSense:
		return int(cdb[4]), true
	case opModeSense10, opPersistentIn:
		return int(cdb[7])<<8 | int(cdb[8]), true
	case opReportLUNs, opMaintenanceIn:
		return int(cdb[6])<<24 | int(cdb[7])<<16 | int(cdb[8])<<8 | int(cdb[9]), true
	case opServiceActionIn:
		return int(cdb[10])<<24 | int(cdb[11])<<16 | int(cdb[12])<<8 | int(cdb[13]), true
	}
	return 0, false
}

// FuzzCommand sends any two CDBs with any data by two nexuses. The Medium panics where it is touched outside.
func FuzzCommand(f *testing.F) {
	for _, r := range commands.rows {
		cdb := append([]byte{r.opcode}, r.usage...)
		if r.action != noAction {
			cdb[1] = byte(r.action)
		}
		f.Add(cdb, make([]byte, 24), cdb, make([]byte, 512))
		f.Add(append(cdb[:2:2], make([]byte, 14)...), make([]byte, 24), cdb, make([]byte, 1024))
	}
	f.Fuzz(func(t *testing.T, first, data, second, more []byte) {
		for _, readOnly := range []bool{false, true} {
			m := newMemory(1021 * blockSize)
			m.readOnly = readOnly
			u, err := NewUnit(m, Config{Serial: "1", Keep: &keeper{}})
			if err != nil {
				t.Fatal(err)
			}
			a, b := u.Attach(Port{Name: portName("a")}, func() {}), u.Attach(Port{Name: portName("b")}, func() {})
			run(t, a, opTestUnitReady6(), nil)
			run(t, a, first, data)
			run(t, b, opTestUnitReady6(), nil)
			run(t, b, second, more)
			run(t, a, second, data)
			if err := u.persistent.check(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// randomCommand is a command that is mostly right, so that it gets far.
func randomCommand(r *rand.Rand) (cdb, data []byte) {
	row := commands.rows[r.IntN(len(commands.rows))]
	cdb = append([]byte{row.opcode}, row.usage...)
	for i := 1; i < len(cdb); i++ {
		cdb[i] &= byte(r.Uint32())
		if r.IntN(3) > 0 && i != len(cdb)-2 {
			cdb[i] = 0
		}
	}
	if row.action != noAction {
		cdb[1] = cdb[1]&^0x1f | byte(row.action)
	}
	data = make([]byte, []int{0, 24, 512, 1024, 4096}[r.IntN(5)])
	for i := range data {
		if r.IntN(8) == 0 {
			data[i] = byte(r.Uint32())
		}
	}
	return cdb, data
}

// Nexuses come, send all sorts of commands and go, all at once.
func TestManyNexusesAtOnce(t *testing.T) {
	m := newMemory(1 << 20)
	u, err := NewUnit(m, Config{Serial: "1", Keep: &keeper{}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for range 20 {
				n := u.Attach(Port{Name: portName(string(rune('a' + w))), Target: targetName, RelativeID: 1}, func() {})
				for range 50 {
					cdb, data := randomCommand(r)
					run(t, n, cdb, data)
				}
				n.Detach()
			}
		})
	}
	for range 100 {
		u.LUNsChanged()
		u.Reset()
	}
	wg.Wait()
	if len(u.nexuses) != 0 || u.reserved != nil {
		t.Errorf("%d nexuses and reservation of %v are left", len(u.nexuses), u.reserved)
	}
}

// One nexus is used by many goroutines, as a connection's workers do.
func TestManyCommandsOfOneNexus(t *testing.T) {
	b := newBench(t)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 2))
			for range 300 {
				cdb, data := randomCommand(r)
				run(t, b.nexus, cdb, data)
			}
		})
	}
	wg.Wait()
}

func BenchmarkPrepareRead(b *testing.B) {
	benchCommand(b, cdb16(opRead16, 0, 3, 8), (*Nexus).Prepare)
}

// BenchmarkWrite is what a Unit adds to the medium, which here does nothing.
func BenchmarkWrite(b *testing.B) {
	data := make([]byte, 4096)
	benchCommand(b, cdb16(opWrite16, 0, 3, 8), func(n *Nexus, c *Command) {
		n.Prepare(c)
		c.Out = data
		n.Execute(c)
	})
}

// benchCommand does one command over and over, in parallel.
func benchCommand(b *testing.B, cdb []byte, do func(*Nexus, *Command)) {
	b.Helper()
	n := benchNexus(b)
	b.RunParallel(func(pb *testing.PB) {
		c := &Command{}
		for pb.Next() {
			c.Reset()
			c.CDB = cdb
			do(n, c)
		}
	})
}

// nothing is a medium that takes no time.
type nothing struct{ *memory }

func (nothing) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

func benchNexus(b *testing.B) *Nexus {
	b.Helper()
	u, err := NewUnit(nothing{newMemory(1 << 20)}, Config{Serial: "1"})
	if err != nil {
		b.Fatal(err)
	}
	n := u.Attach(Port{Name: "a"}, func() {})
	n.Execute(&Command{CDB: opTestUnitReady6()})
	return n
}

// FuzzReservations sends a PERSISTENT RESERVE OUT with any list to a unit with registrations, and has a second unit load what
// the first one kept.
func FuzzReservations(f *testing.F) {
	id := transportID(portName("c"))
	f.Add(byte(outRegister), byte(0), append(make([]byte, 24), specify(id)...))
	f.Add(byte(outRegisterIgnore), byte(0), append(make([]byte, 15), 1, 0, 0, 0, 0, outAPTPL, 0, 0, 0))
	f.Add(byte(outPreemptAbort), byte(exclusiveAccess), append(make([]byte, 7), 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0))
	f.Add(byte(outRegisterMove), byte(0), append(append(make([]byte, 7), 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, outAPTPL, 0, 1, 0, 0, 0, byte(len(id))), id...))
	f.Fuzz(func(t *testing.T, action, kind byte, list []byte) {
		for _, held := range []byte{0, writeExclusive, exclusiveAccessRegistrantsOnly, writeExclusiveAllRegistrants} {
			k := &keeper{}
			u, err := NewUnit(newMemory(blockSize), Config{Serial: "1", Keep: k})
			if err != nil {
				t.Fatal(err)
			}
			a := u.Attach(Port{Name: portName("a"), Target: targetName, RelativeID: 1}, func() {})
			b := u.Attach(Port{Name: portName("b"), Target: targetName, RelativeID: 1}, func() {})
			for i, n := range []*Nexus{a, b} {
				run(t, n, opTestUnitReady6(), nil)
				wantGood(t, out(n, outRegister, 0, 0, uint64(i+1), outAPTPL))
			}
			if held != 0 {
				wantGood(t, out(a, outReserve, held, 1, 0, 0))
			}
			checkOutcome(t, u, outList(a, action&0x1f, kind, list))
			if err := u.persistent.check(); err != nil {
				t.Fatal(err)
			}
			for action := range byte(4) {
				checkOutcome(t, u, in(b, action))
			}
			again, err := NewUnit(newMemory(blockSize), Config{Serial: "1", Keep: k})
			if err != nil {
				t.Fatalf("what was kept: %v", err)
			}
			if u.persistent.keep && len(again.persistent.Registrations) != len(u.persistent.Registrations) {
				t.Fatalf("%d registrations of %d are kept", len(again.persistent.Registrations), len(u.persistent.Registrations))
			}
		}
	})
}
