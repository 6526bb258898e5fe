// Package images has the nouns of what troupe builds: recipes, artifacts and releases, as values without I/O. Each is
// named by a digest of its own canonical bytes, so that what is the same has the same name.
package images

import "github.com/troupe-dev/troupe/internal/digest"

// A Blob is an immutable file of the store.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"` // bytes
}

// An Image is a file system with its dm-verity tree behind it, in one file, which its Blob names (package
// internal/verity draws it).
type Image struct {
	Blob
	Data int64  `json:"data"` // bytes of the file system, a whole number of blocks
	Root string `json:"root"` // root hash of the tree: 64 lower-case hex digits
	// Chunks is the index of the image's content-defined chunks; the zero Blob where there is none.
	Chunks Blob `json:"chunks,omitzero"`
}

// A RecipeID names a recipe: what an image is made of and how, not what came out.
type RecipeID = digest.Digest

// A BaseRecipe is an OS base made of Debian packages.
type BaseRecipe struct {
	Suite      string   `json:"suite"`
	Mirror     string   `json:"mirror"`
	Components []string `json:"components"` // order matters to nobody: sorted, without repeats
	Arch       string   `json:"arch"`       // Debian's word for it: "amd64", "arm64"
	Packages   []string `json:"packages"`   // sorted, without repeats
	Kernel     string   `json:"kernel"`
	Rebuild    string   `json:"rebuild,omitempty"` // another word has the same packages be fetched anew
}

// A Base is what came out of a BaseRecipe.
type Base struct {
	Recipe  RecipeID `json:"recipe"`
	Arch    string   `json:"arch"`
	Image   Image    `json:"image"`   // EROFS: the whole root file system, its kernel's modules with it
	Kernel  Blob     `json:"kernel"`  // a bootable kernel image
	Modules Blob     `json:"modules"` // a cpio archive (zstd): the modules and tools that the agent needs to reach its root
	Version string   `json:"version"` // of the kernel, as uname -r has it
	// Packages is the lock: every package with its version, "name=version", sorted.
	Packages []string `json:"packages,omitempty"`
}

// A DeltaRecipe is what a role adds to an OS base.
type DeltaRecipe struct {
	Base     RecipeID        `json:"base"`
	Files    map[string]File `json:"files,omitempty"`
	Packages []string        `json:"packages,omitempty"` // sorted, without repeats
	Enable   []string        `json:"enable,omitempty"`   // systemd units, sorted, without repeats
	Run      []string        `json:"run,omitempty"`      // in this order
	Boot     []string        `json:"boot,omitempty"`     // in this order, in a machine that booted base and delta
}

// A File is a regular file of a DeltaRecipe.
type File struct {
	Content string `json:"content"`
	Mode    uint32 `json:"mode"`
	UID     uint32 `json:"uid"`
	GID     uint32 `json:"gid"`
}

// A Delta is what came out of a DeltaRecipe on one Base.
type Delta struct {
	Recipe RecipeID `json:"recipe"`
	Base   Blob     `json:"base"`  // the image that it lies over
	Image  Image    `json:"image"` // EROFS: an overlayfs layer
	// Packages is the lock of what the delta adds or changes, as in Base.
	Packages []string `json:"packages,omitempty"`
}

// A CompileRecipe is how a machine, made of an OS base for that purpose, makes files of a source. The zero value is none.
type CompileRecipe struct {
	Source  digest.Digest `json:"source"`        // of the file at URL or, without one, of a directory: internal/treesum
	URL     string        `json:"url,omitempty"` // of an archive
	Base    RecipeID      `json:"base"`          // of the machine
	Run     []string      `json:"run"`           // in this order
	Output  string        `json:"output"`        // absolute path of a file or directory
	Network bool          `json:"network,omitempty"`
}

// A DiskRecipe is a whole disk that somebody else made.
type DiskRecipe struct {
	URL    string `json:"url"`
	SHA256 string `json:"sha256"` // of the file there, 64 lower-case hex digits
	Format string `json:"format"` // "raw", "qcow2", or "": as the file begins
}

// A Disk is what came out of a DiskRecipe.
type Disk struct {
	Recipe RecipeID `json:"recipe"`
	Image  Blob     `json:"image"`  // the bytes of the disk, sparse
	Format string   `json:"format"` // that the file had: "raw" or "qcow2"
	File   int64    `json:"file"`   // bytes of it
}

// A Release is a role's bytes: what a node keeps, mounts and runs. Two releases with the same bytes are the same
// release, whatever their roles are called. One of a role whose image is a whole disk has a Disk and nothing else.
type Release struct {
	Base    Image `json:"base"`
	Delta   Image `json:"delta"`
	Kernel  Blob  `json:"kernel"`
	Modules Blob  `json:"modules"`
	// KernelArgs are the role's own, after troupe's.
	KernelArgs []string `json:"kernelArgs,omitempty"`
	Disk       Blob     `json:"disk,omitzero"`
	// Apps are sorted by name.
	Apps []ReleaseApp `json:"apps,omitempty"`
}
