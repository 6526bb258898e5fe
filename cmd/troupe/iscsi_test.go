package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestReadingProgress(t *testing.T) {
	var said strings.Builder
	now := time.Unix(1e9, 0)
	p := &readingProgress{w: &said, now: func() time.Time { return now }}
	for i := range int64(12) {
		p.report("a.img", i<<30, 40<<30)
		now = now.Add(time.Second)
	}
	p.report("b.img", 1<<30, 2<<30)
	want := "reading a.img once, to know it again: 5 GiB of 40 GiB\nreading a.img once, to know it again: 10 GiB of 40 GiB\n"
	if diff := cmp.Diff(want, said.String()); diff != "" {
		t.Error(diff)
	}
}
