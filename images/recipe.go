package images

import (
	"maps"
	"slices"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/schema"
)

// BaseRecipeOf is the recipe of an OS image. Of an image that is not made of Debian packages it is the zero recipe;
// schema/load lets no such image through.
func BaseRecipeOf(img schema.Image) BaseRecipe {
	d := img.From.Debian
	if d == nil {
		return BaseRecipe{}
	}
	return BaseRecipe{
		Suite:      d.Suite,
		Mirror:     d.Mirror,
		Components: sorted(d.Components),
		Arch:       d.Arch,
		Packages:   sorted(d.Packages),
		Kernel:     d.Kernel,
		Rebuild:    img.Rebuild,
	}
}

// DeltaRecipeOf is the recipe of what role r adds to the OS base that the recipe named base makes.
func DeltaRecipeOf(base RecipeID, r schema.Role) DeltaRecipe {
	var files map[string]File
	if len(r.Files) > 0 {
		files = make(map[string]File, len(r.Files))
	}
	for path, f := range r.Files {
		files[path] = File(f)
	}
	return DeltaRecipe{
		Base:     base,
		Files:    files,
		Packages: sorted(r.Packages),
		Enable:   sorted(r.Services.Enable),
		Run:      slices.Clone(r.Run),
		Boot:     slices.Clone(r.Build.Boot),
	}
}

// DiskRecipeOf is the recipe of an image of kind "disk"; the zero recipe of another one.
func DiskRecipeOf(img schema.Image) DiskRecipe {
	if img.From.Disk == nil {
		return DiskRecipe{}
	}
	return DiskRecipe(*img.From.Disk)
}

// CompileRecipeOf is the recipe of what an image gets of a source that is compiled on the OS base named base; the zero recipe where nothing is
// compiled for it.
func CompileRecipeOf(base RecipeID, c *schema.Compile) CompileRecipe {
	if c == nil {
		return CompileRecipe{}
	}
	source := digest.Digest(c.Source.Tree)
	if c.Source.URL != "" {
		source = digest.Digest(digest.Prefix + c.Source.SHA256)
	}
	return CompileRecipe{
		Source: source, URL: c.Source.URL, Base: base, Run: slices.Clone(c.Run), Output: c.Output, Network: c.Network,
	}
}

// ID names the recipe: the digest of its canonical bytes. It is the same for the same source from another place only where that is in no URL.
func (r CompileRecipe) ID() RecipeID { return digest.Of(r.canonical()) }

// Result names what comes out of the recipe on the base with that image, wherever the source came from.
func (r CompileRecipe) Result(base digest.Digest) digest.Digest {
	return digest.Of(r.steps(encoder{}.str(formatCompiled).str(string(r.Source)).str(string(base))).b)
}

// ID names the recipe: the digest of its canonical bytes. Two files with the same content have two recipes where they are
// fetched from two places: whoever mends a URL has it tried at once. What comes out is the same blob.
func (r DiskRecipe) ID() RecipeID { return digest.Of(r.canonical()) }

// ID names the recipe: the digest of its canonical bytes. Order and repeats in its sorted lists change nothing.
func (r BaseRecipe) ID() RecipeID { return digest.Of(r.canonical()) }

// ID names the recipe: the digest of its canonical bytes. Order and repeats in Packages and Enable change nothing,
// the order of Run does.
func (r DeltaRecipe) ID() RecipeID { return digest.Of(r.canonical()) }

// sorted is a sorted copy of list without repeats; nil if there is nothing in it.
func sorted(list []string) []string {
	if len(list) == 0 {
		return nil
	}
	return slices.Compact(slices.Sorted(slices.Values(list)))
}

// sortedKeys are the keys of m in order.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
