package images

import (
	"encoding/binary"

	"github.com/troupe-dev/troupe/internal/digest"
)

// The canonical bytes of a value are what its id is the digest of. They are ours alone, and not those of JSON or any
// other library, so that no upgrade gives the same thing a new name.
//
//	value   = string(format) field…     every field of the type, in the order below
//	number  = 8 bytes, big-endian
//	string  = number(length in bytes) bytes
//	list    = number(count) string…     sorted and without repeats, where order has no meaning
//	files   = number(count) file…       sorted by path
//	file    = string(path) string(content) number(mode) number(uid) number(gid)
//	blob    = string(digest) number(size)
//	image   = blob number(data) string(root) blob(chunks)
//
//	base recipe:   suite mirror list(components) arch list(packages) kernel rebuild
//	delta recipe:  base files list(packages) list(enable) list(run) list(boot)
//	compilation:   source url base list(run) output number(network: 0 or 1)
//	disk recipe:   url sha256 format
//	app recipe:    tree url sha256 oci arch, and the fields of a base recipe and of a compilation
//	release:       base delta kernel modules list(kernelArgs)
//	disk release:  disk, and the fields of a release
//	app release:   disk number(count) app…, and the fields of a release
//	app     = string(name) image string(mount) list(exec) list(env) string(user) number(root) string(data) string(delta)
//
// Every part says how long it is before it comes, so two different values never have the same bytes. The number at the
// end of a format goes up when the fields change, and when package build starts to make something else of the same
// recipe: what was built before must not pass for it.
const (
	formatBase        = "troupe base recipe 4"
	formatDelta       = "troupe delta recipe 2"
	formatCompile     = "troupe compilation 1"
	formatCompiled    = "troupe compiled 1"
	formatApp         = "troupe app recipe 1"
	formatDisk        = "troupe disk recipe 1"
	formatRelease     = "troupe release 2"
	formatAppRelease  = "troupe app release 1"
	formatDiskRelease = "troupe disk release 2"
)

func (r BaseRecipe) canonical() []byte {
	return r.encode(encoder{}.str(formatBase)).b
}

func (r BaseRecipe) encode(e encoder) encoder {
	e = e.str(r.Suite).str(r.Mirror).list(sorted(r.Components))
	return e.str(r.Arch).list(sorted(r.Packages)).str(r.Kernel).str(r.Rebuild)
}

func (r DeltaRecipe) canonical() []byte {
	e := encoder{}.str(formatDelta).str(string(r.Base)).num(uint64(len(r.Files)))
	for _, path := range sortedKeys(r.Files) {
		f := r.Files[path]
		e = e.str(path).str(f.Content).num(uint64(f.Mode)).num(uint64(f.UID)).num(uint64(f.GID))
	}
	return e.list(sorted(r.Packages)).list(sorted(r.Enable)).list(r.Run).list(r.Boot).b
}

func (r CompileRecipe) canonical() []byte { return r.encode(encoder{}.str(formatCompile)).b }

func (r CompileRecipe) encode(e encoder) encoder {
	return r.steps(e.str(string(r.Source)).str(r.URL).str(string(r.Base)))
}

// steps adds what is done with the source.
func (r CompileRecipe) steps(e encoder) encoder {
	e = e.list(r.Run).str(r.Output)
	if r.Network {
		return e.num(1)
	}
	return e.num(0)
}

func (r DiskRecipe) canonical() []byte {
	return encoder{}.str(formatDisk).str(r.URL).str(r.SHA256).str(r.Format).b
}

func (r Release) canonical() []byte {
	e := encoder{}.str(formatRelease)
	switch {
	case len(r.Apps) > 0:
		e = encoder{}.str(formatAppRelease).blob(r.Disk).num(uint64(len(r.Apps)))
		for _, a := range r.Apps {
			e = a.encode(e)
		}
	case r.Disk != (Blob{}):
		e = encoder{}.str(formatDiskRelease).blob(r.Disk)
	}
	e = e.image(r.Base).image(r.Delta).blob(r.Kernel).blob(r.Modules)
	return e.list(r.KernelArgs).b
}

// ID names the release by its bytes and its kernel arguments.
func (r Release) ID() digest.Digest { return digest.Of(r.canonical()) }

// An encoder holds the canonical bytes so far.
type encoder struct{ b []byte }

func (e encoder) num(n uint64) encoder { return encoder{binary.BigEndian.AppendUint64(e.b, n)} }

func (e encoder) str(s string) encoder {
	e = e.num(uint64(len(s)))
	return encoder{append(e.b, s...)}
}

func (e encoder) blob(b Blob) encoder {
	return e.str(string(b.Digest)).num(uint64(b.Size)) //nolint:gosec // another size has other bytes either way
}

func (e encoder) image(i Image) encoder {
	e = e.blob(i.Blob).num(uint64(i.Data)) //nolint:gosec // as in blob
	return e.str(i.Root).blob(i.Chunks)
}

func (e encoder) list(l []string) encoder {
	e = e.num(uint64(len(l)))
	for _, s := range l {
		e = e.str(s)
	}
	return e
}
