package load

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/ast"
	"cuelang.org/go/cue/build"
	"cuelang.org/go/cue/cuecontext"
	"cuelang.org/go/cue/parser"
	"cuelang.org/go/cue/token"

	"github.com/troupe-dev/troupe/schema"
)

// schemaFile is the name of the schema in positions: one that no file of a fleet can have.
const schemaFile = "\x00"

// contextShards is how many shards share one CUE context. A context only grows, and to make one costs as much as to
// evaluate a small shard.
const contextShards = 32

// A worker evaluates shards, one after the other.
type worker struct {
	ctx    *cue.Context
	fleet  cue.Value // #Fleet
	file   cue.Value // #FileSpec
	app    cue.Value // #App
	schema *schemaDocs
	shards int
}

// evaluate evaluates one shard. What goes wrong is in its result.
func (w *worker) evaluate(req *request, sr shardRequest) (out *shard) {
	out = &shard{Dir: sr.Dir}
	defer func() {
		if r := recover(); r != nil { // a fault of CUE's evaluator that hostile input can trigger
			out = &shard{Dir: sr.Dir, Broken: true, Problems: schema.Problems{{
				Message: fmt.Sprintf("evaluating %s crashed CUE's evaluator: %v", sr.Dir, r),
			}}}
			w.ctx = nil
		}
	}()
	if err := w.prepare(); err != nil {
		out.Broken = true
		out.Problems = schema.Problems{{Message: "troupe's own schema: " + err.Error()}}
		return out
	}
	e := &evaluation{worker: w, out: out, index: map[string]int{}, tops: map[string]token.Pos{}}
	for _, i := range sr.Files {
		e.index[req.Files[i].Name] = len(out.Files)
		out.Files = append(out.Files, req.Files[i].Name)
	}
	inst := e.instance(req, sr)
	if len(out.Problems) > 0 {
		out.Broken = true
		return out
	}
	e.run(inst)
	if out.Problems = arrange(out.Problems); out.Broken && len(out.Problems) == 0 {
		out.Problems = schema.Problems{{Message: "CUE could not evaluate " + sr.Dir + ", and does not say why"}}
	}
	return out
}

// prepare gives the worker a context with the schema.
func (w *worker) prepare() error {
	if w.shards++; w.ctx != nil && w.shards%contextShards != 0 {
		return nil
	}
	f, err := parser.ParseFile(schemaFile, schema.CUE, parser.ParseComments)
	if err != nil {
		return err
	}
	w.ctx = cuecontext.New()
	v := w.ctx.BuildFile(f)
	w.fleet = v.LookupPath(cue.ParsePath("#Fleet"))
	w.file = v.LookupPath(cue.ParsePath("#FileSpec"))
	w.app = v.LookupPath(cue.ParsePath("#App"))
	w.schema = readSchemaDocs(f)
	return v.Err()
}

// An evaluation is the work on one shard.
type evaluation struct {
	*worker
	out   *shard
	index map[string]int // out.Files

	user    cue.Value // as the files have it: its positions are all in them
	unified cue.Value // with the schema, which brings defaults and errors

	faults  int                   // found so far, also those beyond the number that is told
	tops    map[string]token.Pos  // fields at the top of files, also hidden ones
	perHost map[string]*hostNodes // by role
}

// instance parses the files and makes one CUE instance of them.
func (e *evaluation) instance(req *request, sr shardRequest) *build.Instance {
	inst := build.NewContext().NewInstance("", nil)
	for _, i := range sr.Files {
		f, err := parser.ParseFile(req.Files[i].Name, req.Files[i].Text, parser.AllErrors)
		if err != nil {
			e.explain(err)
			continue
		}
		if !e.admit(f) {
			continue
		}
		if err := inst.AddSyntax(f); err != nil {
			e.explain(err)
		}
	}
	if len(e.out.Problems) > 0 {
		return inst
	}
	if err := inst.Complete(); err != nil {
		e.explain(err)
	}
	return inst
}

// admit says whether a file uses only what a fleet may use.
func (e *evaluation) admit(f *ast.File) bool {
	ok := true
	refuse := func(pos token.Pos, format string, args ...any) {
		e.add(pos, format, args...)
		ok = false
	}
	for _, d := range f.Decls {
		e.remember(d)
		if p, isPackage := d.(*ast.Package); isPackage && p.Name.Name != packageName {
			refuse(p.Name.Pos(), "%s", notOfFleet(p.Name.Name))
		}
		if a, isAttr := d.(*ast.Attribute); isAttr {
			if key, _ := a.Split(); key == "extern" || key == "if" {
				refuse(a.Pos(), "attribute @%s: a fleet is the same everywhere: it embeds no files and has no build tags", key)
			}
		}
	}
	for spec := range f.ImportSpecs() {
		name, err := strconv.Unquote(spec.Path.Value)
		first, _, _ := strings.Cut(name, "/")
		if err == nil && strings.Contains(first, ".") {
			refuse(spec.Pos(), "import %s: only packages of CUE's own library can be imported; what directories share goes into a parent directory", brief(strconv.Quote(name)))
		}
	}
	return ok
}

// remember keeps where a field at the top of a file stands.
func (e *evaluation) remember(d ast.Decl) {
	if field, ok := d.(*ast.Field); ok {
		if name, _, err := ast.LabelName(field.Label); err == nil {
			e.tops[name] = field.Pos()
		}
	}
}

// topLevel are the fields of a fleet.
var topLevel = []string{"network", "images", "roles", "hosts", "discovery", "allowEmpty"}

// run evaluates the instance, part by part, so that a fault in one hides no fault in another.
func (e *evaluation) run(inst *build.Instance) {
	e.user = e.ctx.BuildInstance(inst)
	fields, err := e.user.Fields()
	if err != nil {
		e.out.Broken = true
		e.explain(err)
		return
	}
	for fields.Next() {
		if name := fields.Selector().Unquoted(); !slices.Contains(topLevel, name) {
			e.add(e.userPos(fields.Value()), "%s: unknown field%s", pathText([]string{name}), suggest(name, topLevel))
		}
	}
	e.unified = e.fleet.Unify(e.user)
	e.network()
	e.discovery()
	e.allowEmpty()
	e.out.Images = items(e, "images", imageFields, e.image)
	e.out.Roles = items(e, "roles", roleFields, e.role)
	e.out.Hosts = items(e, "hosts", hostFields, e.host)
	e.roleProblems()
	for _, f := range inst.Files {
		e.modes(f)
	}
	if len(e.out.Problems) == 0 && len(e.out.RoleProblems) == 0 {
		if err := e.unified.Validate(); err != nil { // for what the parts do not cover
			e.explainSome(err, notInNode)
		}
	}
}

// Fields whose places checks across hosts want to name.
var (
	imageFields   = []string{}
	roleFields    = append([]string{"os", "boot", "iscsi", "node"}, notOnDisk...)
	hostFields    = []string{"mac", "uuid", "serial", "address", "role", "node"}
	networkFields = []string{"subnet", "router", "dynamic"}
)

// items evaluates every field of a part of the fleet. one fills in a value and says what is wrong with it.
func items[T any](e *evaluation, part string, fields []string, one func(name string, v cue.Value, it *item[T])) map[string]item[T] {
	whole := e.unified.LookupPath(cue.MakePath(cue.Str(part)))
	iter, err := whole.Fields()
	if err != nil {
		e.explain(err)
		e.out.Broken = true
		return nil
	}
	named := e.fleet.LookupPath(cue.MakePath(cue.Str(part)))
	out := map[string]item[T]{}
	for iter.Next() {
		name := iter.Selector().Unquoted()
		it := item[T]{At: e.places(iter.Value(), fields, part, name)}
		before := e.faults
		if !named.Allows(iter.Selector()) {
			e.addAt(it.At[""], "%s: this is not %s", pathText([]string{part, name}), e.schema.nameOf(part))
		} else {
			one(name, iter.Value(), &it)
		}
		if it.Bad = e.faults > before; it.Bad {
			var none T
			it.Value = none
			e.walk(e.at([]string{part, name}), part, name)
		}
		out[name] = it
	}
	return out
}

// check explains all that is wrong with v, and says whether nothing was.
func (e *evaluation) check(v cue.Value) bool {
	err := v.Validate(cue.Concrete(true), cue.All())
	if err != nil {
		e.explain(err)
	}
	return err == nil
}

// places are the places of an item and of some of its fields.
func (e *evaluation) places(v cue.Value, fields []string, path ...string) map[string]place {
	out := map[string]place{"": e.place(e.posOf(path...))}
	for _, f := range fields {
		fv := v.LookupPath(cue.MakePath(cue.Str(f)))
		if !fv.Exists() {
			continue
		}
		pos := e.userPos(fv)
		if !pos.IsValid() {
			pos = e.posOf(append(slices.Clone(path), f)...)
		}
		if at := e.place(pos); at != (place{}) {
			out[f] = at
		}
	}
	return out
}

// posOf is where the user's files have the field at path, or else what encloses it.
func (e *evaluation) posOf(path ...string) token.Pos {
	sels := e.selectors(path)
	for n := len(sels); n > 0; n-- {
		if pos := e.userPos(e.user.LookupPath(cue.MakePath(sels[:n]...))); pos.IsValid() {
			return pos
		}
	}
	if len(path) > 0 {
		return e.tops[path[0]]
	}
	return token.NoPos
}

// userPos is v's position, if that is in the user's files.
func (e *evaluation) userPos(v cue.Value) token.Pos {
	if pos := v.Pos(); e.place(pos) != (place{}) {
		return pos
	}
	return token.NoPos
}

func (e *evaluation) place(pos token.Pos) place {
	i, ok := e.index[pos.Filename()]
	if !ok || !pos.IsValid() {
		return place{}
	}
	return place{i, pos.Line(), pos.Column()}
}

func (e *evaluation) add(pos token.Pos, format string, args ...any) {
	e.addAt(e.place(pos), format, args...)
}

func (e *evaluation) addAt(at place, format string, args ...any) {
	e.faults++
	if len(e.out.Problems) <= maxProblems {
		e.out.Problems = append(e.out.Problems, e.out.problem(at, format, args...))
	}
}

// complain adds a problem with the field at path.
func (e *evaluation) complain(path []string, format string, args ...any) {
	e.add(e.posOf(path...), "%s: %s", pathText(path), fmt.Sprintf(format, args...))
}

// selectors makes a CUE path of labels as errors have them, with or without quotes.
func (e *evaluation) selectors(path []string) []cue.Selector {
	sels := make([]cue.Selector, 0, len(path))
	v := e.user
	for _, p := range path {
		sel := cue.Str(unquote(p))
		if n, err := strconv.Atoi(p); err == nil && n >= 0 && v.IncompleteKind() == cue.ListKind {
			sel = cue.Index(n)
		} else if strings.HasPrefix(p, "#") {
			sel = cue.Def(p)
		}
		sels = append(sels, sel)
		v = v.LookupPath(cue.MakePath(sel))
	}
	return sels
}

// maxLabel is how many bytes of a name are told. A valid name of anything but a file is shorter.
const maxLabel = 256

// pathText writes a path as CUE does, its names cut.
func pathText(path []string) string {
	out := make([]string, len(path))
	for i, p := range path {
		out[i] = cut(label(unquote(p)), maxLabel)
	}
	return cut(strings.Join(out, "."), 4*maxLabel)
}

// label quotes a name where CUE needs that.
func label(name string) string {
	if ast.IsValidIdent(name) {
		return name
	}
	if _, err := strconv.Atoi(name); err == nil {
		return name
	}
	return strconv.Quote(name)
}

func unquote(s string) string {
	if u, err := strconv.Unquote(s); err == nil {
		return u
	}
	return s
}
