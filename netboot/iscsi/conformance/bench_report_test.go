package conformance

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// A measure is a row of the report: what each contestant came to, round by round.
type measure struct {
	title    string
	goal     string
	samples  map[string][]float64 // by contestant
	decimals int
}

// A report is measures in the order in which they were first taken.
type report struct {
	rows  []*measure
	lines []string
}

// row gives the measure of a title, a new one where there is none.
func (r *report) row(title, goal string) *measure {
	i := slices.IndexFunc(r.rows, func(m *measure) bool { return m.title == title })
	if i < 0 {
		i = len(r.rows)
		r.rows = append(r.rows, &measure{title: title, goal: goal, samples: make(map[string][]float64)})
	}
	return r.rows[i]
}

func (m *measure) add(who string, value float64) { m.samples[who] = append(m.samples[who], value) }

func (m *measure) median(who string) float64 { return medianOf(m.samples[who]) }

func (r *report) printf(format string, args ...any) {
	r.lines = append(r.lines, strings.TrimRight("│ "+fmt.Sprintf(format, args...), " "))
}

// table prints a line for each measure, with the contestants' medians and the first one's share of the second.
func (r *report) table(title, first, second string) {
	r.printf("")
	r.printf("%-58s %11s %11s %8s  %s", title, first, second, "ratio", "goal")
	for _, m := range r.rows {
		a, b := m.median(first), m.median(second)
		ratio := "-"
		if a != 0 && b != 0 {
			ratio = fmt.Sprintf("%.2f", a/b)
		}
		r.printf("%-58s %11s %11s %8s  %s", m.title, m.number(a), m.number(b), ratio, m.goal)
	}
}

// rounds prints what the medians are of.
func (r *report) rounds(contestants ...string) {
	r.printf("")
	r.printf("the rounds, in the order in which they were taken")
	for _, m := range r.rows {
		for _, who := range contestants {
			if len(m.samples[who]) == 0 {
				continue
			}
			var line strings.Builder
			for _, v := range m.samples[who] {
				fmt.Fprintf(&line, " %9s", m.number(v))
			}
			r.printf("%-58s %-6s%s", m.title, who, line.String())
		}
	}
}

func (m *measure) number(v float64) string {
	if v == 0 {
		return "-"
	}
	return fmt.Sprintf("%.*f", m.decimals, v)
}

func (r *report) String() string { return strings.Join(r.lines, "\n") + "\n" }

// medianOf is 0 where there is nothing.
func medianOf(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	s := slices.SortedFunc(slices.Values(all), cmp.Compare[float64])
	if len(s)%2 == 0 {
		return (s[len(s)/2-1] + s[len(s)/2]) / 2
	}
	return s[len(s)/2]
}

// quantile is the least value that so great a part of all is not above.
func quantile(all []float64, part float64) float64 {
	s := slices.SortedFunc(slices.Values(all), cmp.Compare[float64])
	return s[min(len(s)-1, int(part*float64(len(s))))]
}
