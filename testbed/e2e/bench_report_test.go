package e2e

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// An owner is whose time a part of a journey is.
type owner string

const (
	nobody     owner = "" // of a journey's first point
	byTroupe   owner = "troupe"
	byFirmware owner = "firmware"
	byLoading  owner = "loading"
	byKernel   owner = "kernel"
	bySystemd  owner = "systemd"
	byFloor    owner = "init"
	afterwards owner = "-" // the role is healthy already
)

// Names of parts that a switch and the floor both have.
const (
	bootFirmware  = "start of the kernel, decompression"
	bootKernel    = "kernel, unpacking of the initramfs"
	bootSystemd   = "switch root, systemd's first word"
	bootMultiUser = "multi-user reached"
)

// Names of parts that the report goes by.
const (
	lastReport    = "the agent's last report"
	readyToSwitch = "agent: last word before the switch of root"
)

// A journey is a sequence of points, each with the name and the owner of what led to it.
type journey struct {
	title string
	bytes int64 // of images that were fetched
	parts []part
}

type part struct {
	name  string
	whose owner
	at    time.Time
	took  time.Duration // since the point before; 0 where this one came first
}

// add adds a point. One that came before the last one took no time: it went on beside that.
func (j *journey) add(name string, whose owner, at time.Time) {
	p := part{name: name, whose: whose, at: at}
	if n := len(j.parts); n > 0 {
		last := j.parts[n-1].at
		p.took = max(0, at.Sub(last))
		if at.Before(last) {
			p.at = last
		}
	}
	j.parts = append(j.parts, p)
}

// of sums up what is whose.
func (j *journey) of(whose owner) (sum time.Duration) {
	for _, p := range j.parts {
		if p.whose == whose {
			sum += p.took
		}
	}
	return sum
}

// between is the time from one point to another.
func (j *journey) between(from, to string) time.Duration { return j.at(to).Sub(j.at(from)) }

// at is the time of a point; the zero time where the journey has none of that name.
func (j *journey) at(name string) time.Time {
	for _, p := range j.parts {
		if p.name == name {
			return p.at
		}
	}
	return time.Time{}
}

// took is how long a part took; ok is false where the journey has none of that name and owner.
func (j *journey) took(name string, whose owner) (d time.Duration, ok bool) {
	for _, p := range j.parts {
		if p.name == name && p.whose == whose {
			return p.took, true
		}
	}
	return 0, false
}

// A table is journeys beside each other, and the medians of those that count.
type table struct {
	title string
	cols  []journey
	skip  int // so many of the first ones do not count
	lines []string
}

func (t *table) printf(format string, args ...any) {
	t.lines = append(t.lines, strings.TrimRight("│ "+fmt.Sprintf(format, args...), " "))
}

// row is a name, whose it is, a value for each journey (NaN where it has none is left empty), and the median.
func (t *table) row(name string, whose owner, value func(j *journey) (time.Duration, bool)) time.Duration {
	var line strings.Builder
	fmt.Fprintf(&line, "  %-46s %-9s", name, whose)
	var counted []time.Duration
	for i := range t.cols {
		d, ok := value(&t.cols[i])
		if !ok {
			line.WriteString("       -")
			continue
		}
		fmt.Fprintf(&line, " %7.2f", d.Seconds())
		if i >= t.skip {
			counted = append(counted, d)
		}
	}
	m := median(counted)
	t.printf("%s %9.2f", line.String(), m.Seconds())
	return m
}

// head names the columns.
func (t *table) head() {
	t.printf("")
	t.printf("%s", t.title)
	var line strings.Builder
	fmt.Fprintf(&line, "  %-46s %-9s", "", "whose")
	for _, j := range t.cols {
		fmt.Fprintf(&line, " %7s", j.title)
	}
	t.printf("%s %9s", line.String(), "median")
}

// stages is a row for each part that any of the journeys has.
func (t *table) stages() {
	type row struct {
		name  string
		whose owner
	}
	var rows []row
	for _, j := range t.cols {
		at := 0 // where the next part goes that is new
		for _, p := range j.parts[1:] {
			r := row{p.name, p.whose}
			if i := slices.Index(rows, r); i >= 0 {
				at = i + 1
				continue
			}
			rows = slices.Insert(rows, at, r)
			at++
		}
	}
	for _, r := range rows {
		t.row(r.name, r.whose, func(j *journey) (time.Duration, bool) { return j.took(r.name, r.whose) })
	}
}

// report prints both tables, and what they come to.
func (r *rig) report(switches, floors *table) {
	r.b.Helper()
	script, files := r.answers()
	floors.head()
	floors.stages()
	floors.printf("")
	bottom := floors.row("floor: QEMU starts to multi-user", nobody, func(j *journey) (time.Duration, bool) {
		return j.between("QEMU starts", bootMultiUser), true
	})
	var leaving []time.Duration
	for _, j := range floors.cols {
		d, _ := j.took(bootSystemd, bySystemd)
		leaving = append(leaving, d)
	}
	beyond := func(j *journey) time.Duration {
		d, _ := j.took(bootSystemd, bySystemd)
		return max(0, d-median(leaving))
	}
	accel, _ := r.lab.Accel()
	t := switches
	t.title += "; accelerator " + accel
	t.head()
	t.stages()
	t.printf("")
	total := t.row("push to healthy", nobody, func(j *journey) (time.Duration, bool) { return j.between("push", "healthy"), true })
	for _, whose := range []owner{byFirmware, byLoading, byKernel, bySystemd} {
		t.row("  of that", whose, func(j *journey) (time.Duration, bool) { return j.of(whose), true })
	}
	t.row("  of that, up to the reboot", byTroupe, func(j *journey) (time.Duration, bool) { return j.between("push", lastReport), true })
	t.row("  of that, the agent in the initramfs", byTroupe, func(j *journey) (time.Duration, bool) { return j.between(bootKernel, readyToSwitch), true })
	t.row("  of that, leaving it, beyond the floor's", byTroupe, func(j *journey) (time.Duration, bool) { return beyond(j), true })
	t.row("  of that, from the service to healthy", byTroupe, func(j *journey) (time.Duration, bool) { return j.took("healthy", byTroupe) })
	t.printf("  %-46s %-9s script %.3f, kernel and initramfs %.3f", "our HTTP answers, within firmware and loading", byTroupe, script.Seconds(), files.Seconds())
	own := t.row("our own share, with these answers; goal < 3", byTroupe, func(j *journey) (time.Duration, bool) {
		return j.of(byTroupe) + beyond(j) + script + files, true
	})
	t.printf("")
	boot := t.row("reset to multi-user", nobody, func(j *journey) (time.Duration, bool) { return j.between("shutdown", bootMultiUser), true })
	t.printf("  %-46s %-9s %.2f", "the floor's boot to multi-user", nobody, bottom.Seconds())
	ratio := boot.Seconds() / bottom.Seconds()
	t.printf("  %-46s %-9s %.2f", "ratio", nobody, ratio)
	fmt.Print(t.String() + floors.String())
	r.b.ReportMetric(0, "ns/op") // it says nothing here
	r.b.ReportMetric(total.Seconds(), "push-to-healthy-s")
	r.b.ReportMetric(own.Seconds(), "own-share-s")
	r.b.ReportMetric(bottom.Seconds(), "floor-s")
	r.b.ReportMetric(ratio, "boot/floor")
}

func (t *table) String() string { return strings.Join(t.lines, "\n") + "\n" }

func median(all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	s := slices.SortedFunc(slices.Values(all), cmp.Compare[time.Duration])
	if len(s)%2 == 0 {
		return (s[len(s)/2-1] + s[len(s)/2]) / 2
	}
	return s[len(s)/2]
}
