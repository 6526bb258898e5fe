package load

import (
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/troupe-dev/troupe/schema"
)

var update = flag.Bool("update", false, "write what was got into testdata/problems")

// TestProblems loads the fleet in each archive and compares all that is wrong with it with the archive's file
// "problems".
func TestProblems(t *testing.T) {
	names, err := filepath.Glob("testdata/problems/*.txtar")
	if err != nil || len(names) == 0 {
		t.Fatalf("no archives in testdata/problems (%v)", err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			t.Parallel()
			ar, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			got := problemsOf(t, ar)
			if *update {
				updateProblems(t, name, ar, got)
			}
			if d := cmp.Diff(string(archiveFile(ar, "problems")), got); d != "" {
				t.Errorf("problems differ (-want +got):\n%s", d)
			}
		})
	}
}

// problemsOf are the problems of an archive's fleet, as text.
func problemsOf(t *testing.T, ar *txtar.Archive) string {
	t.Helper()
	var l Loader
	fleet, err := l.Load(t.Context(), tree(t, ar))
	var problems schema.Problems
	switch {
	case err == nil:
		t.Logf("loaded %d hosts", len(fleet.Hosts))
		return ""
	case !errors.As(err, &problems):
		t.Fatalf("loading: %v; want schema.Problems", err)
	}
	if fleet != nil {
		t.Error("there is a fleet beside the problems")
	}
	return problems.Error() + "\n"
}

func tree(t *testing.T, ar *txtar.Archive) fs.FS {
	t.Helper()
	tree, err := txtar.FS(ar)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func archiveFile(ar *txtar.Archive, name string) []byte {
	for _, f := range ar.Files {
		if f.Name == name {
			return f.Data
		}
	}
	return nil
}

func updateProblems(t *testing.T, name string, ar *txtar.Archive, got string) {
	t.Helper()
	last := &ar.Files[len(ar.Files)-1]
	if last.Name != "problems" {
		ar.Files = append(ar.Files, txtar.File{Name: "problems"})
		last = &ar.Files[len(ar.Files)-1]
	}
	last.Data = []byte(got)
	if err := os.WriteFile(name, txtar.Format(ar), 0o644); err != nil {
		t.Fatal(err)
	}
}
