package load

import (
	"bytes"
	"unicode"
	"unicode/utf8"
)

// A clause is the package clause of a CUE file.
type clause struct {
	name         string
	line, column int // of the name, from 1; columns count bytes
}

// packageClause finds the package clause at the head of a file: after comments and attributes, and before all else. A
// file without one has the zero clause. ok is false where the head is no CUE, or too unusual: then only an evaluation
// can tell.
//
// CUE's own scanner calls itself for each bracket in an attribute, and a file of 15 MiB of them ends the process that
// asks it: no recover catches a stack overflow. This one reads in a loop, and no further than the clause.
func packageClause(text []byte) (c clause, ok bool) {
	r := clauseReader{text: text}
	if bom := "\ufeff"; r.has(bom) {
		r.at = len(bom)
	}
	for {
		r.space(true)
		if !r.has("@") {
			break
		}
		if !r.attribute() {
			return clause{}, false
		}
	}
	if r.has(",") { // after an attribute
		return clause{}, false
	}
	if r.word() != "package" {
		return clause{}, true
	}
	r.space(false)
	before := text[:r.at]
	if c.name = r.word(); c.name == "" {
		return clause{}, false
	}
	c.line = bytes.Count(before, []byte("\n")) + 1
	c.column = len(before) - bytes.LastIndexByte(before, '\n')
	return c, true
}

// A clauseReader is the reading of a file's head.
type clauseReader struct {
	text []byte
	at   int
}

func (r *clauseReader) has(s string) bool { return bytes.HasPrefix(r.text[r.at:], []byte(s)) }

// space skips blanks; with lines also comments and the ends of lines.
func (r *clauseReader) space(lines bool) {
	for r.at < len(r.text) {
		switch c := r.text[r.at]; {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n' && lines:
			r.at++
		case lines && r.has("//"):
			r.line()
		default:
			return
		}
	}
}

// line skips the rest of a line, but not its end.
func (r *clauseReader) line() {
	if n := bytes.IndexByte(r.text[r.at:], '\n'); n >= 0 {
		r.at += n
		return
	}
	r.at = len(r.text)
}

// word skips an identifier, and returns it; "" where there is none.
func (r *clauseReader) word() string {
	start := r.at
	for r.at < len(r.text) {
		c, n := utf8.DecodeRune(r.text[r.at:])
		switch {
		case unicode.IsLetter(c), c == '_', c == '$':
		case unicode.IsDigit(c) && r.at > start:
		case c == '#' && bytes.Trim(r.text[start:r.at], "_") == nil: // of a definition, hidden or not
		default:
			return string(r.text[start:r.at])
		}
		r.at += n
	}
	return string(r.text[start:r.at])
}

// attribute skips "@name(…)", and says whether it could: each bracket in it has its partner, and of strings there are
// only those on one line, without # around them and without interpolations.
func (r *clauseReader) attribute() bool {
	r.at++
	r.word()
	if r.space(true); !r.has("(") {
		return false
	}
	var open []byte // the brackets that are still to come
	for r.at < len(r.text) {
		switch c := r.text[r.at]; c {
		case '/':
			if r.has("//") {
				r.line()
				continue
			}
		case '#', '@':
			return false
		case '"', '\'':
			if !r.quoted(c) {
				return false
			}
			continue
		case '(':
			open = append(open, ')')
		case '[', '{':
			open = append(open, c+2)
		case ')', ']', '}':
			last := len(open) - 1
			if open[last] != c {
				return false
			}
			open = open[:last]
		}
		if r.at++; len(open) == 0 {
			return true
		}
	}
	return false
}

// quoted skips a string, and says whether it is a simple one.
func (r *clauseReader) quoted(quote byte) bool {
	if r.has(string([]byte{quote, quote, quote})) {
		return false
	}
	for r.at++; r.at < len(r.text); r.at++ {
		switch r.text[r.at] {
		case quote:
			r.at++
			return true
		case '\n':
			return false
		case '\\':
			if r.at++; r.has("(") {
				return false
			}
		}
	}
	return false
}
