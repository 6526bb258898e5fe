package api

import (
	"encoding"
	"encoding/json"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

var update = flag.Bool("update", false, "write the schemas in openapi.json anew, from the types")

func readOpenAPI(t *testing.T) map[string]any {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal(openapi, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

// TestOpenAPIRoutes wants each route in the document, and each operation of the document served.
func TestOpenAPIRoutes(t *testing.T) {
	var described []string
	for path, ops := range readOpenAPI(t)["paths"].(map[string]any) {
		for method := range ops.(map[string]any) {
			described = append(described, strings.ToUpper(method)+" "+path)
		}
	}
	var served []string
	for _, r := range new(Server).routes() {
		if !strings.Contains(r.pattern, " /node/") { // package agentapi documents those
			served = append(served, r.pattern)
		}
	}
	slices.Sort(described)
	slices.Sort(served)
	if d := cmp.Diff(served, described); d != "" {
		t.Errorf("openapi.json does not describe the routes that the server has (-served +described):\n%s", d)
	}
}

// TestOpenAPISchemas wants the document's schemas to be those of the types that are sent.
func TestOpenAPISchemas(t *testing.T) {
	doc := readOpenAPI(t)
	s := schemas{docs: readComments(t), out: map[string]any{}}
	for _, v := range []any{
		Status{},
		Host{},
		HostDetail{},
		LUN{},
		ResetRequest{},
		DropRequest{},
		agentapi.DeltaDiff{},
		Role{},
		Image{},
		ImageDetail{},
		Release{},
		Contents{},
		Diff{},
		Artifact{},
		Collected{},
		artifact.Verification{},
		Noted{},
		Change{},
		PlanRequest{},
		Error{},
		state.Event{},
		plan.Plan{},
	} {
		s.of(reflect.TypeOf(v))
	}
	b, err := json.Marshal(s.out)
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]any // through JSON, so that both sides have the same types
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	components := doc["components"].(map[string]any)
	if *update {
		components["schemas"] = want
		b, err := json.MarshalIndent(doc, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile("openapi.json", append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if d := cmp.Diff(want, components["schemas"]); d != "" {
		t.Errorf("openapi.json is behind the types: run go test -run OpenAPISchemas -update (-types +document):\n%s", d)
	}
	checkRefs(t, doc, components)
}

// checkRefs wants every reference in the document to lead somewhere.
func checkRefs(t *testing.T, v any, components map[string]any) {
	t.Helper()
	switch v := v.(type) {
	case map[string]any:
		if ref, ok := v["$ref"].(string); ok {
			parts := strings.Split(strings.TrimPrefix(ref, "#/components/"), "/")
			kind, _ := components[parts[0]].(map[string]any)
			if len(parts) != 2 || kind[parts[1]] == nil {
				t.Errorf("openapi.json refers to %s, which is not there", ref)
			}
		}
		for _, e := range v {
			checkRefs(t, e, components)
		}
	case []any:
		for _, e := range v {
			checkRefs(t, e, components)
		}
	}
}

// schemas makes JSON schemas of Go types as encoding/json writes them.
type schemas struct {
	docs map[string]string // by "package.Type.Field"
	out  map[string]any
}

var (
	typeTime     = reflect.TypeFor[time.Time]()
	typeDuration = reflect.TypeFor[time.Duration]()
	typeText     = reflect.TypeFor[encoding.TextMarshaler]()
)

func (s schemas) of(t reflect.Type) map[string]any {
	switch {
	case t.Kind() == reflect.Pointer:
		return s.of(t.Elem())
	case t == typeTime:
		return map[string]any{"type": "string", "format": "date-time"}
	case t == typeDuration:
		return map[string]any{"type": "integer", "description": "nanoseconds"}
	case t.Implements(typeText):
		return map[string]any{"type": "string"}
	}
	switch t.Kind() {
	case reflect.Struct:
		name := typeName(t)
		if s.out[name] == nil {
			s.out[name] = true // a type that has itself in it ends here
			s.out[name] = s.object(t)
		}
		return map[string]any{"$ref": "#/components/schemas/" + name}
	case reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.Slice:
		return map[string]any{"type": "array", "items": s.of(t.Elem())}
	case reflect.String:
		return map[string]any{"type": "string"}
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	}
	return map[string]any{"type": "integer"}
}

// typeName is the type's own where it is one of this package, else with its package's in front.
func typeName(t reflect.Type) string {
	return strings.TrimPrefix(t.String(), "api.")
}

func (s schemas) object(t reflect.Type) map[string]any {
	properties, required := map[string]any{}, []string{}
	for _, f := range reflect.VisibleFields(t) {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && name == "" || name == "-" || !f.IsExported() || hidden(t, f, name) {
			continue
		}
		p := s.of(f.Type)
		owner := t
		for _, i := range f.Index[:len(f.Index)-1] {
			owner = owner.Field(i).Type
		}
		if doc := s.docs[owner.String()+"."+f.Name]; doc != "" {
			p["description"] = doc
		}
		properties[name] = p
		if options == "" {
			required = append(required, name)
		}
	}
	slices.Sort(required)
	out := map[string]any{"type": "object", "properties": properties, "required": required}
	if doc := s.docs[t.String()]; doc != "" {
		out["description"] = doc
	}
	return out
}

// hidden says whether another field of t with the same JSON name, less deep, takes the place of f.
func hidden(t reflect.Type, f reflect.StructField, name string) bool {
	return slices.ContainsFunc(reflect.VisibleFields(t), func(o reflect.StructField) bool {
		other, _, _ := strings.Cut(o.Tag.Get("json"), ",")
		return other == name && len(o.Index) < len(f.Index)
	})
}

// readComments are the comments on the types of this package and their fields.
func readComments(t *testing.T) map[string]string {
	t.Helper()
	docs := map[string]string{}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(name, "_test.go") {
			readFileComments(f, docs)
		}
	}
	return docs
}

func readFileComments(f *ast.File, docs map[string]string) {
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok {
			continue
		}
		for _, spec := range g.Specs {
			ts, ok := spec.(*ast.TypeSpec)
			if !ok {
				continue
			}
			name := f.Name.Name + "." + ts.Name.Name
			docs[name] = oneLine(g.Doc.Text())
			st, ok := ts.Type.(*ast.StructType)
			if !ok {
				continue
			}
			for _, field := range st.Fields.List {
				for _, id := range field.Names {
					docs[name+"."+id.Name] = oneLine(field.Doc.Text() + " " + field.Comment.Text())
				}
			}
		}
	}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
