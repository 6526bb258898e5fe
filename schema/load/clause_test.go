package load

import (
	"errors"
	"strings"
	"testing"
	"testing/fstest"

	"cuelang.org/go/cue/ast"
	"cuelang.org/go/cue/parser"

	"github.com/troupe-dev/troupe/schema"
)

// TestDeepBrackets loads files whose brackets CUE's scanner or parser follows one function call each. It is the child
// that may die of them.
func TestDeepBrackets(t *testing.T) {
	deep := strings.Repeat("(", 15<<20)
	for name, tc := range map[string]struct{ text, want string }{
		"in an attribute after the clause":  {"package fleet\n@a(" + deep, "went too deep"},
		"in an attribute before the clause": {"@a(" + deep + "\npackage fleet\n", "went too deep"},
		"in a value":                        {"package fleet\nhosts: " + deep, "bad.cue:2:"},
		"of another package":                {"package other\n@a(" + deep, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var l Loader
			_, err := l.Load(t.Context(), fstest.MapFS{"root.cue": {Data: []byte(goodRoot)}, "bad.cue": {Data: []byte(tc.text)}})
			if tc.want == "" {
				if err != nil {
					t.Errorf("error %v of a file that is not of the fleet", err)
				}
				return
			}
			var ps schema.Problems
			if !errors.As(err, &ps) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %.300v; want a problem that says %q", err, tc.want)
			}
			noChildren(t)
		})
	}
}

// TestPackageClause holds what the parent does not dare to say, and positions.
func TestPackageClause(t *testing.T) {
	for text, want := range map[string]struct {
		c  clause
		ok bool
	}{
		"":                                {clause{}, true},
		"package fleet":                   {clause{"fleet", 1, 9}, true},
		"\ufeffpackage fleet\n":           {clause{"fleet", 1, 12}, true},
		"// of package x\n\n\tpackage\ta": {clause{"a", 3, 10}, true},
		"package\nfleet":                  {clause{}, false},
		"package // x\nfleet":             {clause{}, false},
		"package: 5":                      {clause{}, false},
		"packages: 5":                     {clause{}, true},
		"hosts: {}\npackage fleet":        {clause{}, true},
		"@a()\npackage fleet":             {clause{"fleet", 2, 9}, true},
		"@a({[\")]\\\"\", ')']} // )\n)\n@b()\npackage x": {clause{"x", 4, 9}, true},
		"@a(),\npackage x":                 {clause{}, false},
		"@a({)}\npackage fleet":            {clause{}, false},
		"@a(\npackage fleet":               {clause{}, false},
		"@a(#\")\"#)\npackage x":           {clause{}, false},
		"@a(\"\"\"\n)\n\"\"\")\npackage x": {clause{}, false},
		"@a(\"\\(x)\")\npackage x":         {clause{}, false},
		"@a(@b())\npackage x":              {clause{}, false},
	} {
		if c, ok := packageClause([]byte(text)); c != want.c || ok != want.ok {
			t.Errorf("%q: got %+v, %v; want %+v, %v", text, c, ok, want.c, want.ok)
		}
	}
}

// FuzzPackageClause holds packageClause against CUE's own parser, which is right, but no match for long files.
func FuzzPackageClause(f *testing.F) {
	for _, text := range []string{
		goodRoot, "", "package fleet", "\ufeff// x\npackage fleet", "@if(a)\n\n@x(\"(\", [1, {}]) // y\npackage fleet", "@a(//)\n)\npackage fleet",
		"package _x#y", "package #x", "package fleet2\nimport \"strings\"", "@a\n(),package x", "'a\npackage fleet", "@a('\\')package x') // y\n,package fleet",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 10_000 {
			return
		}
		got, ok := packageClause(text)
		file, err := parser.ParseFile("a.cue", text, parser.PackageClauseOnly)
		if err != nil || !ok {
			return // whatever it is, it is not left out in silence although it is of the fleet
		}
		var want clause
		for _, d := range file.Decls {
			if p, ok := d.(*ast.Package); ok {
				want = clause{p.Name.Name, p.Name.Pos().Line(), p.Name.Pos().Column()}
			}
		}
		if got != want {
			t.Errorf("%q: got %+v, want %+v", text, got, want)
		}
	})
}
