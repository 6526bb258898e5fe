package lun

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
)

// A life is a delta in a recorder and what was asked of it.
type life struct {
	t       *testing.T
	base    memory
	h       *header
	f       *recorder
	begin   blocks
	history *history
	d       *Delta
	boot    string
}

// lifeBase is the base of all lives; it ends in the map's second sector.
var lifeBase = sync.OnceValue(func() []byte { return randomBytes(int(perSector+200) * clusterSize) })

func newLife(t *testing.T) *life {
	t.Helper()
	base := memory(lifeBase())
	l := &life{t: t, base: base, h: testHeader(t, base), boot: "first"}
	l.f = newRecorder(t, l.h)
	l.begin = maps.Clone(l.f.now)
	l.history = newHistory(base, l.f.done)
	l.open()
	return l
}

// open opens the delta, of which no other goroutine may do anything, again: the process that had it was killed.
func (l *life) open() {
	l.t.Helper()
	d, err := newDelta("recorded", l.f, l.h, l.base, l.boot)
	if err != nil {
		l.t.Fatal(err)
	}
	l.d = d
}

// replay plays a crash after each operation of the file, by a loss of power in some ways and by a kill. Where a sync failed
// only what was synced is believed, also after a kill.
func (l *life) replay(ways int) {
	l.t.Helper()
	p := newPlayer(l.begin)
	for at := 0; ; at++ {
		if at == 0 || !l.f.ops[at-1].failed { // the moment that a Delta says is not looked after
			l.check(crash{at, l.d.lost.err() != nil}, p.kill(), l.boot, 0)
		}
		withNext := p
		if at < len(l.f.ops) && !l.f.ops[at].isSync() { // on its way
			withNext = p.clone()
			withNext.play(l.f.ops[at])
		}
		for way := range ways {
			share := []float64{0.5, 0.9, 0.1, rand.Float64()}[way%4]
			l.check(crash{at, true}, withNext.lose(share), fmt.Sprint("after ", at), 2)
		}
		if at == len(l.f.ops) || l.t.Failed() {
			return
		}
		p.play(l.f.ops[at])
	}
}

// check opens what a crash left. again is how many more times the power is lost while that is done.
func (l *life) check(c crash, left disk, boot string, again int) {
	l.t.Helper()
	f := recorded(left, l.h.fileSize())
	d := l.reopened(c, f, boot)
	if err := l.history.check(d, hot(l.h.size), c); err != nil {
		l.t.Fatal(err)
	}
	if boot == l.boot && (l.d.lost.err() != nil || rand.IntN(8) == 0) {
		l.checkLasting(c, f, d)
	}
	if again == 0 || rand.IntN(4) > 0 {
		return
	}
	p := newPlayer(left.stable)
	for range rand.IntN(len(f.ops) + 1) {
		p.play(f.ops[0])
		f.ops = f.ops[1:]
	}
	l.check(c, p.lose(rand.Float64()), boot+" again", again-1)
}

// reopened is the delta in f, which a crash left.
func (l *life) reopened(c crash, f *recorder, boot string) *Delta {
	l.t.Helper()
	page := make([]byte, pageSize)
	if _, err := f.ReadAt(page, 0); err != nil {
		l.t.Fatal(err)
	}
	h, err := parseHeader(page)
	if err != nil {
		l.t.Fatalf("%+v: %v", c, err)
	}
	d, err := newDelta("replayed", f, h, l.base, boot)
	if err != nil {
		l.t.Fatalf("%+v: %v", c, err)
	}
	return d
}

// checkLasting has what is read of d, which was just opened and so was synced, be what storage has.
func (l *life) checkLasting(c crash, f *recorder, d *Delta) {
	l.t.Helper()
	later := l.reopened(c, recorded(onDisk(f.stable), l.h.fileSize()), "after a loss of power")
	read, kept := make([]byte, clusterSize), make([]byte, clusterSize)
	for _, cluster := range hot(l.h.size) {
		n := min(clusterSize, l.h.size-cluster*clusterSize)
		_, err := d.ReadAt(read[:n], cluster*clusterSize)
		if err == nil {
			_, err = later.ReadAt(kept[:n], cluster*clusterSize)
		}
		if err != nil {
			l.t.Fatal(err)
		}
		if at, same := firstDifference(kept, read); !same {
			l.t.Fatalf("%+v: cluster %d, opened and synced, is another after a loss of power from byte %d on", c, cluster, at)
		}
	}
}

// TestCrashAnywhere has one writer, killed now and then, and a crash at every operation.
func TestCrashAnywhere(t *testing.T) {
	for _, syncs := range []int{1, 4, 20} {
		for round := range 2 {
			t.Run(fmt.Sprintf("syncs %d of %d, %d", syncs, 10+syncs, round), func(t *testing.T) {
				t.Parallel()
				l := newLife(t)
				for range 150 {
					if err := l.history.random(l.d, syncs); err != nil {
						t.Fatal(err)
					}
					if rand.IntN(40) == 0 {
						l.open()
					}
				}
				l.replay(4)
			})
		}
	}
}

// TestCrashAmongWriters has several writers, and a crash at every operation.
func TestCrashAmongWriters(t *testing.T) {
	for round := range 4 {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			t.Parallel()
			l := newLife(t)
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range 50 {
						if err := l.history.random(l.d, 8); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			l.replay(4)
		})
	}
}
