package load

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/ast"
	cueerrors "cuelang.org/go/cue/errors"
	"cuelang.org/go/cue/token"
)

// This file makes problems of CUE's errors: at a place in the user's files, and in words about the fleet.

// explain adds a problem for each error in err.
func (e *evaluation) explain(err error) {
	e.explainSome(err, func([]string) bool { return true })
}

// explainSome explains only the errors whose paths are wanted.
func (e *evaluation) explainSome(err error, wanted func(path []string) bool) {
	var unplaced []cueerrors.Error
	before := e.faults
	for list := cueerrors.Errors(err); len(list) > 0; {
		n := groupLen(list)
		group, first, path := list[:n], list[0], userPath(list[0])
		list = list[n:]
		switch {
		case !wanted(path):
		case isDisjunction(first):
			e.explainDisjunction(path, group)
		case isClosed(first) && !e.userPlace(first).IsValid():
			unplaced = append(unplaced, first) // mostly follows from another
		default:
			e.explainOne(path, first)
		}
	}
	if e.faults == before {
		for _, u := range unplaced {
			e.explainOne(userPath(u), u)
		}
	}
}

// groupLen is how many errors at the head of list are about one thing: a disjunction's error is followed by why the value
// is not each of the things that it can be.
func groupLen(list []cueerrors.Error) int {
	n := 1
	if isDisjunction(list[0]) {
		for path := userPath(list[0]); n < len(list) && below(userPath(list[n]), path); {
			n++
		}
	}
	return n
}

// Formats of CUE's errors that get words of ours.
const (
	formatDisjunction = "%d errors in empty disjunction:"
	formatClosed      = "field not allowed"
	formatRequired    = "field is required but not present"
	formatIncomplete  = "incomplete value %v"
	formatConflict    = "conflicting values %s and %s"
	formatInvalid     = "invalid value %v"
	formatNumber      = "illegal integer number"
)

func format(err cueerrors.Error) string { f, _ := err.Msg(); return f }

func isDisjunction(err cueerrors.Error) bool { return format(err) == formatDisjunction }
func isClosed(err cueerrors.Error) bool      { return format(err) == formatClosed }

// below says whether path is prefix or lies below it.
func below(path, prefix []string) bool {
	return len(path) >= len(prefix) && slices.EqualFunc(path[:len(prefix)], prefix, func(a, b string) bool { return unquote(a) == unquote(b) })
}

// notInNode says whether path is not that of a role's node, which has definite values only once #host is known.
func notInNode(path []string) bool {
	return len(path) < 3 || path[0] != "roles" || path[2] != "node"
}

// userPath is the path of an error in the fleet.
func userPath(err cueerrors.Error) []string {
	path := err.Path()
	if len(path) > 0 && path[0] == "#Fleet" {
		path = path[1:]
	}
	return path
}

// userPlace is the last of an error's positions that lies in the user's files: with two values in conflict, the one
// that came second.
func (e *evaluation) userPlace(err cueerrors.Error) token.Pos {
	all := e.userPlaces(err)
	if len(all) == 0 {
		return token.NoPos
	}
	return all[len(all)-1]
}

func (e *evaluation) userPlaces(err cueerrors.Error) []token.Pos {
	var out []token.Pos
	for _, pos := range append([]token.Pos{err.Position()}, err.InputPositions()...) {
		if e.place(pos) != (place{}) {
			out = append(out, pos)
		}
	}
	slices.SortFunc(out, func(a, b token.Pos) int { return a.Compare(b) })
	return slices.Compact(out)
}

// explainOne adds the problem of one error.
func (e *evaluation) explainOne(path []string, err cueerrors.Error) {
	f := format(err)
	pos := e.userPlace(err)
	if !pos.IsValid() {
		pos = e.posOf(path...)
	}
	say := func(text string, args ...any) {
		text = fmt.Sprintf(text, args...)
		if len(path) > 0 {
			text = pathText(path) + ": " + text
		}
		e.add(pos, "%s", text)
	}
	switch {
	case f == formatNumber:
		say("%s: an octal number is written like 0o755", f)
	case f == formatClosed:
		say("%s", e.unknownField(path))
	case f == formatRequired:
		say("missing")
	case f == formatIncomplete && !e.at(path).Exists():
		say("missing")
	case f == formatIncomplete:
		say("has no definite value: it is only known to be %s%s", e.written(path), e.hostHint(path))
	case strings.HasPrefix(f, formatConflict) || strings.HasPrefix(f, formatInvalid):
		e.explainValue(path, err, say)
	default:
		text, _ := strings.CutPrefix(err.Error(), strings.Join(err.Path(), ".")+": ")
		say("%s%s", brief(text), e.hostHint(path))
	}
}

// hostHint says where what depends on #host belongs, about a value of a role that declares #host.
func (e *evaluation) hostHint(path []string) string {
	if len(path) < 3 || path[0] != "roles" || path[2] == "node" || path[2] == "#host" {
		return ""
	}
	if !e.at(path[:2]).LookupPath(hostPath).Exists() {
		return ""
	}
	return "; what depends on #host goes into node"
}

// explainValue explains a value that is not what another one, or the schema, wants.
func (e *evaluation) explainValue(path []string, err cueerrors.Error, say func(string, ...any)) {
	f, args := err.Msg()
	places := e.userPlaces(err)
	if want := e.schema.wanted(err); want != "" && len(places) == 1 {
		say("%s is not %s", e.written(path), want)
		return
	}
	text := brief(fmt.Sprintf(f, args...))
	switch {
	case len(places) > 1:
		other := places[0]
		say("%s; the other one is at %s:%d:%d", text, other.Filename(), other.Line(), other.Column())
	case len(args) == 4: // with the types of both
		say("want %s, not %s", otherThan(fmt.Sprint(e.at(path).IncompleteKind()), args[2:]), e.written(path))
	case f == formatConflict:
		say("want %s, not %s", otherThan(fmt.Sprint(e.at(path)), args), e.written(path))
	default:
		say("%s", text)
	}
}

// at is the value at path as the user's files have it.
func (e *evaluation) at(path []string) cue.Value {
	return e.user.LookupPath(cue.MakePath(e.selectors(path)...))
}

// otherThan is that of two args of a conflict that does not read as mine.
func otherThan(mine string, args []any) string {
	if fmt.Sprint(args[0]) == mine {
		return brief(fmt.Sprint(args[1]))
	}
	return brief(fmt.Sprint(args[0]))
}

// written is the value at path as the user's files have it, in brief.
func (e *evaluation) written(path []string) string {
	v := e.at(path)
	if s, err := v.String(); err == nil {
		return brief(strconv.Quote(s))
	}
	switch v.IncompleteKind() {
	case cue.StructKind:
		return "a struct"
	case cue.ListKind:
		return "a list"
	case cue.BottomKind:
		return "the value"
	}
	return brief(fmt.Sprint(v))
}

// unknownField explains a field that a closed struct does not have.
func (e *evaluation) unknownField(path []string) string {
	if len(path) == 0 {
		return "unknown field"
	}
	parent, name := path[:len(path)-1], unquote(path[len(path)-1])
	if len(parent) > 0 && parent[len(parent)-1] == "files" && badPath(name) != "" {
		return badPath(name)
	}
	known := e.fieldsOf(parent)
	if slices.Contains(known, name) {
		return `not allowed: a definition of this fleet that it is part of is closed and does not have it; end that definition with "..."`
	}
	return "unknown field" + suggest(name, known)
}

// schemaAt is what the schema has at path.
func (e *evaluation) schemaAt(path []string) cue.Value {
	v := e.fleet
	for i, p := range path {
		if i > 0 && unquote(path[i-1]) == "files" {
			v = e.file
			continue
		}
		if i == 3 && isApps(path[:i]) {
			v = e.app
			continue
		}
		next := v.LookupPath(cue.MakePath(cue.Str(unquote(p)).Optional()))
		if !next.Exists() {
			next = v.LookupPath(cue.MakePath(cue.AnyString))
		}
		if !next.Exists() {
			next = v.LookupPath(cue.MakePath(cue.AnyIndex))
		}
		v = next
	}
	return v
}

// fieldsOf are the fields that the schema has at path.
func (e *evaluation) fieldsOf(path []string) []string {
	iter, err := e.schemaAt(path).Fields(cue.Optional(true))
	if err != nil {
		return nil
	}
	var names []string
	for iter.Next() {
		names = append(names, iter.Selector().Unquoted())
	}
	return names
}

// explainDisjunction explains a value that is none of several: group begins with the error that says so, and goes on
// with why it is not each of them.
func (e *evaluation) explainDisjunction(path []string, group []cueerrors.Error) {
	v := e.at(path)
	isFile := len(path) > 1 && unquote(path[len(path)-2]) == "files"
	if (isFile || isApps(path)) && v.IncompleteKind() == cue.StructKind {
		// A file or apps in full: what does not matter is that they are no plain text or list of names either.
		group = slices.DeleteFunc(slices.Clone(group[1:]), func(m cueerrors.Error) bool {
			return len(userPath(m)) == len(path) && !strings.Contains(format(m), "required")
		})
		if len(group) > 0 {
			e.explain(joined(group))
			return
		}
	}
	text := e.noneOf(path, v, group[1:])
	if isFile {
		text = "want text or {content: …}, not " + e.written(path)
	}
	if isApps(path) && v.IncompleteKind() != cue.ListKind {
		text = "want names of app images, or apps by name, not " + e.written(path)
	}
	pos := token.NoPos
	for _, m := range group {
		if p := e.userPlace(m); p.IsValid() {
			pos = p
		}
	}
	if !pos.IsValid() {
		pos = e.posOf(path...)
	}
	e.add(pos, "%s: %s", pathText(path), text)
}

// isApps says whether path is that of a role's apps.
func isApps(path []string) bool { return len(path) == 3 && path[0] == "roles" && path[2] == "apps" }

// noneOf says what is wanted in the place of v, from why it is none of several things.
func (e *evaluation) noneOf(path []string, v cue.Value, why []cueerrors.Error) string {
	var values, types []string
	for _, m := range why {
		if w := e.schema.wanted(m); w != "" {
			return e.written(path) + " is not " + w
		}
		switch f, args := m.Msg(); {
		case strings.HasPrefix(f, formatConflict) && len(args) == 4:
			types = append(types, otherThan(fmt.Sprint(v.IncompleteKind()), args[2:]))
			values = append(values, otherThan(fmt.Sprint(v), args))
		case f == formatConflict:
			values = append(values, otherThan(fmt.Sprint(v), args))
		}
	}
	slices.Sort(types)
	if types = slices.Compact(types); len(types) > 0 && !slices.Contains(types, "string") {
		values = types
	}
	if len(values) == 0 {
		return e.written(path) + " is none of what it can be"
	}
	return "want " + strings.Join(slices.Compact(values), " or ") + ", not " + e.written(path)
}

// joined makes one error of several.
func joined(list []cueerrors.Error) error {
	var out cueerrors.Error
	for _, m := range list {
		out = cueerrors.Append(out, m)
	}
	return out
}

// walk tells unknown and missing fields at and below path. CUE tells these too, but only where nothing else is wrong.
func (e *evaluation) walk(v cue.Value, path ...string) {
	want := e.schemaAt(path)
	switch v.IncompleteKind() {
	case cue.ListKind:
		iter, err := v.List()
		for i := 0; err == nil && iter.Next(); i++ {
			e.walk(iter.Value(), append(slices.Clone(path), strconv.Itoa(i))...)
		}
		return
	case cue.StructKind:
	default:
		return
	}
	if want.IncompleteKind() != cue.StructKind {
		return
	}
	e.walkMissing(v, want, path)
	iter, err := v.Fields()
	if err != nil {
		return
	}
	for iter.Next() {
		name := iter.Selector().Unquoted()
		at := append(slices.Clone(path), name)
		if !want.Allows(iter.Selector()) {
			e.add(e.userPos(iter.Value()), "%s: %s", pathText(at), e.unknownField(at))
			continue
		}
		e.walk(iter.Value(), at...)
	}
}

// walkMissing tells which fields that the schema requires v has not.
func (e *evaluation) walkMissing(v, want cue.Value, path []string) {
	iter, err := want.Fields(cue.Optional(true))
	for err == nil && iter.Next() {
		sel := iter.Selector()
		if sel.ConstraintType()&cue.RequiredConstraint == 0 || v.LookupPath(cue.MakePath(cue.Str(sel.Unquoted()))).Exists() {
			continue
		}
		e.complain(append(slices.Clone(path), sel.Unquoted()), "missing")
	}
}

// brief is a text of CUE's on one line and not too long.
func brief(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	const most = 160
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}

// suggest is the end of a sentence about an unknown name: the known one that was meant, or all if they are few.
func suggest(name string, known []string) string {
	known = slices.Sorted(slices.Values(known))
	best, least := "", (len(name)+1)/3+1
	for _, k := range known {
		if d := distance(strings.ToLower(name), strings.ToLower(k)); d < least && d < len(k) {
			best, least = k, d
		}
	}
	switch {
	case best != "":
		return fmt.Sprintf("; did you mean %q?", best)
	case len(known) > 0 && len(known) <= 12:
		return "; known: " + strings.Join(known, ", ")
	}
	return ""
}

// distance is how many letters must be added, dropped, changed or swapped with the next to make b of a (optimal string
// alignment).
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	var before, prev, cur []int
	for j := range len(b) + 1 {
		prev = append(prev, j)
	}
	for i := 1; i <= len(a); i++ {
		cur = append(make([]int, 0, len(b)+1), i)
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			d := min(prev[j]+1, cur[j-1]+1, prev[j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, before[j-2]+1)
			}
			cur = append(cur, d)
		}
		before, prev = prev, cur
	}
	return prev[len(b)]
}

// schemaDocs are the definitions of the schema that say what a single value must look like.
type schemaDocs struct{ defs []schemaDef }

type schemaDef struct {
	name        string
	first, last int    // lines
	want        string // "an IPv4 address", from the comment "#Address is an IPv4 address."
}

// readSchemaDocs reads the comments of the schema's definitions.
func readSchemaDocs(f *ast.File) *schemaDocs {
	out := &schemaDocs{}
	for _, d := range f.Decls {
		field, ok := d.(*ast.Field)
		if !ok {
			continue
		}
		if _, isStruct := field.Value.(*ast.StructLit); isStruct {
			continue
		}
		name, _, err := ast.LabelName(field.Label)
		if err != nil {
			continue
		}
		for _, c := range ast.Comments(field) {
			text := strings.Join(strings.Fields(c.Text()), " ")
			if want, ok := strings.CutPrefix(text, name+" is "); ok {
				out.defs = append(out.defs, schemaDef{name, field.Pos().Line(), field.End().Line(), strings.TrimSuffix(want, ".")})
			}
		}
	}
	return out
}

// wanted says what the schema wants where err is, or "".
func (s *schemaDocs) wanted(err cueerrors.Error) string {
	for _, pos := range append([]token.Pos{err.Position()}, err.InputPositions()...) {
		if pos.Filename() != schemaFile {
			continue
		}
		for _, d := range s.defs {
			if d.first <= pos.Line() && pos.Line() <= d.last {
				return d.want
			}
		}
	}
	return ""
}

// nameOf says what names of a part of the fleet look like.
func (s *schemaDocs) nameOf(part string) string {
	def := "#Name"
	if part == "hosts" {
		def = "#Label"
	}
	for _, d := range s.defs {
		if d.name == def {
			return d.want
		}
	}
	return "another one"
}
