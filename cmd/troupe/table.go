package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/troupe-dev/troupe/internal/digest"
)

// A table is text in aligned columns. What it shows may come from machines that anybody plugged in: control characters,
// which would command the terminal, are taken out.
type table struct {
	header []string
	rows   [][]string
	shrink int                                  // the column whose cells are cut where the terminal is too narrow; 0: none
	colour func(column int, text string) string // of a cell, on a terminal; nil: none
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// write writes the table; without rows, it writes empty as one line.
func (t *table) write(w io.Writer, empty string) error {
	if len(t.rows) == 0 {
		_, err := fmt.Fprintln(w, empty)
		return err
	}
	rows := t.rows
	if len(t.header) > 0 {
		rows = append([][]string{t.header}, rows...)
	}
	widths := t.fit(widthsOf(rows), w)
	colours := t.colour != nil && isTerminal(w) && os.Getenv("NO_COLOR") == ""
	var b strings.Builder
	for i, row := range rows {
		var line strings.Builder
		for col, cell := range row {
			text := cut(plain(cell), widths[col])
			pad := strings.Repeat(" ", widths[col]-utf8.RuneCountInString(text)+columnGap)
			if colours && (i > 0 || len(t.header) == 0) {
				text = t.colour(col, text)
			}
			line.WriteString(text + pad)
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// columnGap is between two columns, minColumn what is left of one that shrinks.
const (
	columnGap = 3
	minColumn = 16
)

func widthsOf(rows [][]string) []int {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(plain(cell)))
		}
	}
	return widths
}

// fit takes from the column that shrinks what the terminal w is too narrow for.
func (t *table) fit(widths []int, w io.Writer) []int {
	f, ok := w.(*os.File)
	if !ok || t.shrink == 0 || t.shrink >= len(widths) {
		return widths
	}
	have, _, err := term.GetSize(int(f.Fd()))
	if err != nil { // it is no terminal
		return widths
	}
	over := columnGap*(len(widths)-1) - have
	for _, width := range widths {
		over += width
	}
	if over > 0 {
		widths[t.shrink] = max(min(minColumn, widths[t.shrink]), widths[t.shrink]-over)
	}
	return widths
}

// plain is s in one line without control characters.
func plain(s string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case c == '\n' || c == '\t':
			return ' '
		case unicode.IsControl(c) || unicode.Is(unicode.Cf, c):
			return '\uFFFD'
		}
		return c
	}, s)
}

// isTerminal says whether a person sees what is written to w.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// cut shortens s to at most most characters.
func cut(s string, most int) string {
	if utf8.RuneCountInString(s) <= most {
		return s
	}
	return string([]rune(s)[:most-1]) + "…"
}

// ago says how long before now t was; "-" for the zero time.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(now.Sub(t)) + " ago"
}

// span writes d as people say it: in its largest unit, and whole.
func span(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

// exact writes a duration with the digits that count for something that took it.
func exact(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 100*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// or is s, or alternative where s is empty.
func or(s, alternative string) string {
	if s == "" {
		return alternative
	}
	return s
}

// short is a digest for people; "-" for none.
func short(d digest.Digest) string { return or(d.Short(), "-") }

// shortHash is a commit's hash for people.
func shortHash(hash string) string { return hash[:min(len(hash), 10)] }
