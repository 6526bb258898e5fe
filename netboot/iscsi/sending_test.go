package iscsi

import (
	"os"
	"testing"
	"time"
)

// believe has the residency table go on saying what it was told once: no time passes for it.
func (f *fixture) believe() {
	f.srv.mu.Lock() // connections take it when they begin
	defer f.srv.mu.Unlock()
	f.srv.residency.start = time.Time{} // time.Since is then the longest there is
}

// attend has the unit attention of a LUN behind it.
func (i *initiator) attend(lun LUN) {
	i.t.Helper()
	i.do(i.on(lun, i.command(testUnitReady(), 0, nil)))
}

// Little data of a file that was cut short costs the connection, as much data does, and not the process.
func TestLittleOfImageThatIsCutShort(t *testing.T) {
	for name, n := range map[string]int{"a block": 1, "a block behind a whole segment": 3} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, nil)
			f.believe()
			path := f.image(1, pattern(1<<20, 2))
			i := f.login("MaxRecvDataSegmentLength=1024")
			i.attend(1)
			i.expectGood(i.do(i.on(1, i.command(read10(2048-3, uint16(n)), n*512, nil))))
			if err := os.Truncate(path, 4096); err != nil {
				t.Fatal(err)
			}
			i.send(i.on(1, i.command(read10(2048-3, uint16(n)), n*512, nil)))
			i.closed()
			again := f.login()
			again.attend(1)
			if r := again.do(again.on(1, again.command(read10(2048-3, uint16(n)), n*512, nil))); r.sense[:2] != "3/" {
				t.Errorf("sense %s, want MEDIUM ERROR", r.sense)
			}
		})
	}
}
