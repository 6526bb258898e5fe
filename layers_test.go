// Package troupe_test holds the laws of the house: which package may know which. They are a test because a law that
// people must remember is soon forgotten.
package troupe_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/troupe-dev/troupe"

// A pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath   string
	Doc          string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

// all are the packages that p imports, and those that its tests do: a test that needs a house above or beside its own
// binds the two together as the package would. There is no exception; what needs several houses is tested from the
// first one that may know them all, or from testbed/e2e.
func (p pkg) all() []string { return slices.Concat(p.Imports, p.TestImports, p.XTestImports) }

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-json", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages: the laws would hold of nothing", len(all))
	}
	return all
}

// A tree is one of the house's folders; layer says who may know it.
type tree struct {
	name  string
	layer int
}

// trees, most special first: the first whose name starts a package's path is the package's own.
var trees = []tree{
	{"schema/load", 2},
	{"schema", 1},
	{"netboot", 2},
	{"images", 2},
	{"hosts", 2},
	{"reconciler", 3},
	{"internal", 0},
	{"testbed", 4},
	{"cmd", 5}, // on top of all: `troupe lab` is the testbed's command line
}

// treeOf finds the tree of an import path; ok is false for packages that are not ours.
func treeOf(importPath string) (tree, bool) {
	rel, ours := strings.CutPrefix(importPath, module+"/")
	if !ours {
		return tree{}, false
	}
	for _, tr := range trees {
		if rel == tr.name || strings.HasPrefix(rel, tr.name+"/") {
			return tr, true
		}
	}
	return tree{name: rel, layer: -1}, true
}

func TestImportsPointDown(t *testing.T) {
	for _, p := range packages(t) {
		from, ok := treeOf(p.ImportPath)
		if !ok || p.ImportPath == module {
			continue
		}
		if from.layer < 0 {
			t.Errorf("%s lies in no tree of the house: add the package where its words belong, or move the wall (and this table) on purpose", p.ImportPath)
			continue
		}
		for _, imp := range p.all() {
			to, ours := treeOf(imp)
			if !ours || to.name == from.name {
				continue
			}
			if to.layer >= from.layer {
				t.Errorf("%s (layer %d), or a test of it, imports %s (layer %d): imports point down, so that each part can be read, tested and replaced without those above or beside it", p.ImportPath, from.layer, imp, to.layer)
			}
		}
	}
}

func TestNetbootHasWordsOfItsOwn(t *testing.T) {
	for _, p := range packages(t) {
		if tr, _ := treeOf(p.ImportPath); tr.name != "netboot" {
			continue
		}
		for _, imp := range p.all() {
			if to, ours := treeOf(imp); ours && to.name != "netboot" && to.name != "internal" {
				t.Errorf("%s imports %s: netboot asks a Director and Blobs, which the reconciler implements; it knows no fleet", p.ImportPath, imp)
			}
		}
	}
}

func TestSchemaIsStandardLibraryOnly(t *testing.T) {
	for _, p := range packages(t) {
		if p.ImportPath != module+"/schema" {
			continue
		}
		for _, imp := range p.Imports {
			if first, _, _ := strings.Cut(imp, "/"); strings.Contains(first, ".") {
				t.Errorf("schema imports %s: whoever speaks the words of a fleet should not have to link an evaluator", imp)
			}
		}
	}
}

// heavy must not be linked into the agent, which travels to every node in every boot.
var heavy = []string{
	"cuelang.org/go", "github.com/go-git", "go.etcd.io", "google.golang.org/grpc", "github.com/spf13/cobra",
	"github.com/prometheus", module + "/reconciler", module + "/images", module + "/schema", module + "/netboot",
}

func TestAgentIsLean(t *testing.T) {
	all := packages(t)
	at := slices.IndexFunc(all, func(p pkg) bool { return p.ImportPath == module+"/cmd/troupe-agent" })
	if at < 0 {
		t.Fatal("there is no cmd/troupe-agent: this law holds of nothing")
	}
	for _, dep := range all[at].Deps {
		for _, h := range heavy {
			if dep == h || strings.HasPrefix(dep, h+"/") {
				t.Errorf("troupe-agent links %s: it is sent to every node in every boot, and holds nothing that only the server needs", dep)
			}
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	for _, p := range packages(t) {
		if p.ImportPath != module && p.Doc == "" {
			t.Errorf("%s has no package comment: open it with one true sentence in the trade's own words", p.ImportPath)
		}
	}
}
