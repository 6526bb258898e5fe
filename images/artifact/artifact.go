// Package artifact says what troupe builds as OCI artifacts (OCI image specification 1.1, manifest.md, "Guidelines for
// artifact usage"), so that registries and other programs can keep, copy and name it.
//
//	base, delta, disk, app   a manifest; artifactType application/vnd.troupe.KIND.v1
//	  config                 the value of package images as JSON: with it comes the lock of its packages
//	  layers                 images as zstd (RFC 8878), in frames of some MiB; kernel and modules as they are
//	release                  an index with the same artifactType; it names
//	  its own manifest       config: the release as JSON; layer: its SBOM
//	  its parts              the manifests of base and delta, or of the disk, and of its apps
//
// A release is an index because a manifest can name no other manifest but its subject, and that points the wrong way: who
// copies a release gets all of its parts, and each part is kept once, however many releases have it.
//
// The image that a machine is given, uncompressed, is a working copy of its layer: it is made again of it, and must then
// have the digest that the config says. The same value and the same bytes make the same manifest.
package artifact

import (
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
)

// The kinds of an artifact.
const (
	KindBase    = "base"
	KindDelta   = "delta"
	KindDisk    = "disk"
	KindApp     = "app"
	KindRelease = "release"
)

// TypeOf is the artifactType of a kind.
func TypeOf(kind string) string { return "application/vnd.troupe." + kind + ".v1" }

// configType is the media type of the config of a kind.
func configType(kind string) string { return "application/vnd.troupe." + kind + ".config.v1+json" }

// Media types of layers.
const (
	typeImage   = "application/vnd.troupe.image.v1+zstd" // an EROFS image, or the bytes of a disk
	typeKernel  = "application/vnd.troupe.kernel.v1"
	typeModules = "application/vnd.troupe.modules.v1+cpio" // compressed as the kernel unpacks it
	typeSBOM    = "application/spdx+json"
)

// Annotations of layers. Those of a packed one say what it unpacks to.
const (
	annotationDigest = "dev.troupe.image.digest"
	annotationSize   = "dev.troupe.image.size" // bytes
)

// An Artifact is something built, as it becomes a manifest.
type Artifact struct {
	Kind   string
	Config any // of package images; becomes JSON
	Layers []Layer
}

// A Layer is one file of an artifact. The store has it as it is.
type Layer struct {
	Name string // for people: "image", "kernel"
	Type string // its media type in the manifest
	Blob images.Blob
	Pack bool // the layer is the zstd of it
}

// Image is the layer of an image that is packed.
func Image(d digest.Digest, size int64) Layer {
	return Layer{Name: "image", Type: typeImage, Blob: images.Blob{Digest: d, Size: size}, Pack: true}
}

// OfBase is a base as an artifact.
func OfBase(b images.Base) Artifact {
	return Artifact{Kind: KindBase, Config: b, Layers: []Layer{
		Image(b.Image.Digest, b.Image.Size),
		{Name: "kernel", Type: typeKernel, Blob: b.Kernel},
		{Name: "modules", Type: typeModules, Blob: b.Modules},
	}}
}

// OfDelta is a role delta as an artifact.
func OfDelta(d images.Delta) Artifact {
	return Artifact{Kind: KindDelta, Config: d, Layers: []Layer{Image(d.Image.Digest, d.Image.Size)}}
}

// OfDisk is a disk image as an artifact.
func OfDisk(d images.Disk) Artifact {
	return Artifact{Kind: KindDisk, Config: d, Layers: []Layer{Image(d.Image.Digest, d.Image.Size)}}
}

// OfApp is an app image as an artifact.
func OfApp(a images.App) Artifact {
	return Artifact{Kind: KindApp, Config: a, Layers: []Layer{Image(a.Image.Digest, a.Image.Size)}}
}

// A Release is the config of a release.
type Release struct {
	ID          digest.Digest   `json:"id"`
	BaseRecipe  images.RecipeID `json:"baseRecipe"` // or that of its disk
	DeltaRecipe images.RecipeID `json:"deltaRecipe,omitempty"`
	Content     images.Release  `json:"content"`
}

// TagOf is the tag of what has that id: a recipe, or a release.
func TagOf(id digest.Digest) string { return id.Hex() }

// NamesOf are the tags by which people know something: NAME.KIND, which moves to what is newest, and NAME.KIND.VERSION. The
// version is the start of a digest.
func NamesOf(name, kind string, version digest.Digest) []string {
	return []string{name + "." + kind, name + "." + kind + "." + version.Short()}
}
