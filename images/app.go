package images

import (
	"slices"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/schema"
)

// An AppRecipe is what an app image is made of: one of a directory, an archive, an OCI image, Debian packages and what is compiled for it.
type AppRecipe struct {
	Tree   digest.Digest `json:"tree,omitempty"`   // what a directory of the repo holds (internal/treesum)
	URL    string        `json:"url,omitempty"`    // of a tar archive
	SHA256 string        `json:"sha256,omitempty"` // of the file there, 64 lower-case hex digits
	OCI    string        `json:"oci,omitempty"`    // "docker://HOST/NAME…" or "oci:/DIR…", each with ":TAG" or "@sha256:…"
	Arch   string        `json:"arch,omitempty"`   // that is taken of an OCI image for several
	Debian BaseRecipe    `json:"debian,omitzero"`  // packages that are only unpacked; without a kernel

	Compile CompileRecipe `json:"compile,omitzero"`
}

// An App is what came out of an AppRecipe.
type App struct {
	Recipe RecipeID `json:"recipe"`
	Image  Image    `json:"image"` // EROFS: the application's files
	// Source is the manifest of the OCI image that it was made of, which a tag stood for then; "" for another one.
	Source digest.Digest `json:"source,omitempty"`
	// Packages is the lock, as in Base; none where it was not made of packages.
	Packages []string `json:"packages,omitempty"`
}

// A ReleaseApp is an app of a release: its image, and what is done with it.
type ReleaseApp struct {
	Name  string   `json:"name"`
	Image Image    `json:"image"`
	Mount string   `json:"mount"`           // where it is mounted
	Exec  []string `json:"exec,omitempty"`  // of its service; none: it is only mounted
	Env   []string `json:"env,omitempty"`   // of its service, "NAME=value", sorted
	User  string   `json:"user,omitempty"`  // of its service; "" is root
	Root  bool     `json:"root,omitempty"`  // its service sees the image as its root file system
	Data  string   `json:"data"`            // "keep" or "fresh": what becomes of its data directory
	Delta string   `json:"delta,omitempty"` // "keep", "fresh", or "": nothing can be written where it is mounted
}

// AppRecipeOf is the recipe of an image of kind "app"; the zero recipe of another one.
func AppRecipeOf(img schema.Image) AppRecipe {
	from := img.From
	switch {
	case from.Dir != "":
		return AppRecipe{Tree: digest.Digest(from.Tree)}
	case from.Tar != nil:
		return AppRecipe{URL: from.Tar.URL, SHA256: from.Tar.SHA256}
	case from.OCI != nil:
		return AppRecipe{OCI: from.OCI.Image, Arch: from.OCI.Arch}
	case img.Kind == "app" && from.Debian != nil:
		return AppRecipe{Debian: BaseRecipeOf(img)}
	case from.Compile != nil:
		return AppRecipe{Compile: CompileRecipeOf(MachineRecipeOf(from.Compile).ID(), from.Compile)}
	}
	return AppRecipe{}
}

// MachineRecipeOf is the recipe of the OS base of the machine that compiles.
func MachineRecipeOf(c *schema.Compile) BaseRecipe {
	return BaseRecipeOf(schema.Image{Kind: "os", From: schema.From{Debian: c.Base}})
}

// ReleaseAppOf is app of a role, whose image is there.
func ReleaseAppOf(app schema.App, image Image) ReleaseApp {
	out := ReleaseApp{
		Name: app.Name, Image: image, Mount: app.Mount, Exec: slices.Clone(app.Exec), User: app.User, Root: app.Root,
		Data: app.Data, Delta: app.Delta,
	}
	for _, name := range sortedKeys(app.Env) {
		out.Env = append(out.Env, name+"="+app.Env[name])
	}
	return out
}

// ID names the recipe: the digest of its canonical bytes.
func (r AppRecipe) ID() RecipeID { return digest.Of(r.canonical()) }

// OS names the release without its apps: two that have the same OS differ in apps alone, and share their node delta.
func (r Release) OS() digest.Digest {
	r.Apps = nil
	return r.ID()
}

func (r AppRecipe) canonical() []byte {
	e := encoder{}.str(formatApp).str(string(r.Tree)).str(r.URL).str(r.SHA256).str(r.OCI).str(r.Arch)
	return r.Compile.encode(r.Debian.encode(e)).b
}

func (a ReleaseApp) encode(e encoder) encoder {
	e = e.str(a.Name).image(a.Image).str(a.Mount).list(a.Exec).list(a.Env).str(a.User)
	root := uint64(0)
	if a.Root {
		root = 1
	}
	return e.num(root).str(a.Data).str(a.Delta)
}
