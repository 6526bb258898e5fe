package images

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/schema"
)

func TestAppRecipesOfSchema(t *testing.T) {
	tree := digest.Of([]byte("tree"))
	for name, c := range map[string]struct {
		from schema.From
		want AppRecipe
	}{
		"a directory": {schema.From{Dir: "apps/site", Tree: tree.String()}, AppRecipe{Tree: tree}},
		"an archive":  {schema.From{Tar: &schema.TarFile{URL: "file:///x", SHA256: "00"}}, AppRecipe{URL: "file:///x", SHA256: "00"}},
		"OCI":         {schema.From{OCI: &schema.OCI{Image: "oci:/x:1", Arch: "amd64"}}, AppRecipe{OCI: "oci:/x:1", Arch: "amd64"}},
		"packages": {
			schema.From{Debian: &schema.Debian{Suite: "bookworm", Packages: []string{"jq", "jq"}}},
			AppRecipe{Debian: BaseRecipe{Suite: "bookworm", Packages: []string{"jq"}}},
		},
		"what is compiled": {
			schema.From{Compile: &schema.Compile{
				Source: schema.CompileSource{Dir: "src", Tree: tree.String()}, In: "debian", Base: &schema.Debian{Suite: "bookworm"}, Run: []string{"make"}, Output: "/out",
			}},
			AppRecipe{Compile: CompileRecipe{Source: tree, Base: BaseRecipe{Suite: "bookworm"}.ID(), Run: []string{"make"}, Output: "/out"}},
		},
	} {
		got := AppRecipeOf(schema.Image{Kind: "app", From: c.from})
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	if got := AppRecipeOf(schema.Image{Kind: "app", From: schema.From{Dir: "elsewhere", Tree: tree.String()}}); got.ID() != (AppRecipe{Tree: tree}).ID() {
		t.Error("the same files in another directory are another recipe")
	}
}

// Releases that differ in apps alone share all that a node has to boot.
func TestOSOfARelease(t *testing.T) {
	r := release()
	bare := r
	bare.Apps = nil
	if r.OS() != bare.ID() || r.OS() == r.ID() {
		t.Errorf("the release is %s, without apps %s, its OS %s", r.ID(), bare.ID(), r.OS())
	}
	r.KernelArgs = nil
	if r.OS() == bare.OS() {
		t.Error("another argument of the kernel is the same OS")
	}
}
