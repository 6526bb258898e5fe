package lun

import (
	"testing"

	"golang.org/x/sys/unix"
)

// What is written in sequence gets its space sixteen clusters at a time, and nothing is read of that.
func TestAhead(t *testing.T) {
	l := newLife(t)
	const begin, full, zeroed = 100, 130, 133
	l.through(full)
	l.through(zeroed)
	if err := l.history.zero(l.d, zeroed*8, 8); err != nil {
		t.Fatal(err)
	}
	if err := l.history.sync(l.d); err != nil {
		t.Fatal(err)
	}
	var clusters, got []int64
	for c := range int64(40) {
		if c+begin != full { // that would be no new space
			got = append(got, int64(l.through(begin+c)))
		}
		for more := range int64(20) {
			clusters = append(clusters, begin+c+more)
		}
		if err := l.history.check(l.d, clusters, crash{l.f.done(), false}); err != nil {
			t.Fatal(err)
		}
		clusters = clusters[:0]
	}
	for at, pages := range got {
		want := int64(2) // data and map
		switch at {
		case 1:
			want += aheadClusters
		case 1 + aheadClusters + 1: // cluster 118, up to the one that is full
			want += full - 119
		case 30: // cluster 131, which goes on behind that one; also what was zeroed has space again
			want += aheadClusters
		}
		if pages != want {
			t.Errorf("write %d: %d pages, want %d", at, pages, want)
		}
	}
	l.replay(2)
}

// Space that is not there is asked for in vain, and what is behind the end of the disk is not asked for.
func TestAheadOfLittleSpace(t *testing.T) {
	l := newLife(t)
	refused := 0
	l.f.fault = func(o op) error {
		if len(o.data) > clusterSize {
			refused++
			return unix.ENOSPC
		}
		return nil
	}
	last := (l.h.size - 1) / clusterSize
	for c := last - 20; c <= last; c++ {
		if pages := l.through(c); pages != 2 && c != last-19 && c != last-2 {
			t.Errorf("cluster %d: %d pages, want 2", c, pages)
		}
	}
	if refused != 2 {
		t.Errorf("space was asked for %d times, want 2", refused)
	}
	if err := l.history.check(l.d, []int64{last - 20, last - 19, last - 18, last - 1, last}, crash{l.f.done(), false}); err != nil {
		t.Error(err)
	}
}

// Only what goes on where a write ended is in sequence, for eight sequences at a time.
func TestStreams(t *testing.T) {
	var s streams
	for i := range int64(8) {
		if n := s.follow(1000*(i+1), 1000*(i+1)+1); n != 0 {
			t.Errorf("the first write of a sequence: %d clusters ahead, want none", n)
		}
	}
	for i := range int64(8) {
		if n := s.follow(1000*(i+1)+1, 1000*(i+1)+3); n != aheadClusters {
			t.Errorf("the second write of sequence %d: %d clusters ahead, want %d", i, n, aheadClusters)
		}
	}
	if n := s.follow(1003, 1004); n != 0 {
		t.Errorf("a write to where space is: %d clusters ahead, want none", n)
	}
	if n := s.follow(5, 6); n != 0 { // the eldest is forgotten
		t.Errorf("a write elsewhere: %d clusters ahead, want none", n)
	}
	if n := s.follow(1004, 1005); n != 0 {
		t.Errorf("a write to a sequence that was forgotten: %d clusters ahead, want none", n)
	}
}
