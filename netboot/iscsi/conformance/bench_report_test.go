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

// ratio is the median, over the rounds, of what one contestant came to as a multiple of another, maybe in another measure. A
// round's two samples are of the same minute, so what else the machine does weighs on both.
func ratio(a *measure, whoA string, b *measure, whoB string) float64 {
	var all []float64
	for i := range min(len(a.samples[whoA]), len(b.samples[whoB])) {
		all = append(all, a.samples[whoA][i]/b.samples[whoB][i])
	}
	return medianOf(all)
}

// table prints a line for each measure, with the contestants' medians and the first one as a multiple of the second.
func (r *report) table(title, first, second string) {
	r.printf("")
	r.printf("%-64s %9s %9s %7s  %s", title, first, second, "ratio", "goal")
	for _, m := range r.rows {
		if len(m.samples[first]) == 0 {
			continue
		}
		of := "-"
		if v := ratio(m, first, m, second); v != 0 {
			of = fmt.Sprintf("%.2f", v)
		}
		r.printf("%-64s %9s %9s %7s  %s", m.title, m.number(m.median(first)), m.number(m.median(second)), of, m.goal)
	}
}

// share prints one measure of a contestant as a multiple of another of its own.
func (r *report) share(what string, value float64, goal string) {
	r.printf("%-64s %9s %9s %7.2f  %s", what, "", "", value, goal)
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
			r.printf("%-56s %-6s%s", m.title, who, line.String())
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
