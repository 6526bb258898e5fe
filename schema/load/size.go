package load

import (
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/troupe-dev/troupe/schema"
)

// What the agent of a host is told is one record of the reconciler, at most 1 MiB of JSON. These bounds, in bytes, leave
// a fifth of it: the reasons for a generation name up to 16 files, each with a path of up to 4000 bytes, which as JSON
// may be twice that.
const (
	// maxNode bounds the node files of one host, as JSON.
	maxNode = 640 << 10
	// maxHealthy bounds the checks of one role, as JSON.
	maxHealthy = 64 << 10
	// maxKernelArgs bounds the kernel arguments of a role, with the spaces between them. A kernel takes 2047 bytes
	// (COMMAND_LINE_SIZE of x86 and arm64 is 2048, with a NUL at the end) and drops what comes after; troupe and the boot
	// loader add some 300: the server's URL, the machine's MAC, the boot's name, the kernel's digest, consoles.
	maxKernelArgs = 1536
)

// What JSON adds to the strings of a file and of a check, at most.
const (
	fileJSON  = len(`:{"content":,"mode":4095,"uid":4294967295,"gid":4294967295},`)
	checkJSON = len(`{"http":{"port":65535,"path":,"status":599},"unit":,"exec":[],"every":9223372036854775807,"timeout":9223372036854775807},`)
)

// nodeSize is how many bytes files take as JSON, or some more.
func nodeSize(files map[string]schema.File) int {
	most := 0 // were each byte escaped
	for path, f := range files {
		most += fileJSON + 6*(len(path)+len(f.Content)) + 4
	}
	if most <= maxNode {
		return most
	}
	size := 0
	for path, f := range files {
		size += fileJSON + jsonSize(path) + jsonSize(f.Content)
	}
	return size
}

func checkSize(c schema.Check) int {
	size := checkJSON + jsonSize(c.Unit)
	if c.HTTP != nil {
		size += jsonSize(c.HTTP.Path)
	}
	for _, word := range c.Exec {
		size += jsonSize(word) + len(",")
	}
	return size
}

// jsonSize is how many bytes s takes as a JSON string, in which encoding/json escapes what it has to, and not HTML.
func jsonSize(s string) int {
	size := len(`""`)
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			size += asciiJSON[c]
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		if i += n; r == '\u2028' || r == '\u2029' || r == utf8.RuneError && n == 1 {
			n = len(`\u2028`)
		}
		size += n
	}
	return size
}

// asciiJSON is how many bytes each ASCII character takes in a JSON string.
var asciiJSON = func() (n [utf8.RuneSelf]int) {
	for c := range n {
		n[c] = 1
		if c < ' ' {
			n[c] = len(`\u0000`)
		}
	}
	for _, c := range "\"\\\b\f\n\r\t" {
		n[c] = len(`\n`)
	}
	return n
}()

// roleSize complains about what of a role is too big for its hosts.
func (e *evaluation) roleSize(r schema.Role) {
	args := max(len(r.Kernel.Args)-1, 0)
	for _, a := range r.Kernel.Args {
		args += len(a)
	}
	if args > maxKernelArgs {
		e.complain([]string{"roles", r.Name, "kernel", "args"}, "%d bytes, with the spaces between them, are more than the %d that a kernel takes beside troupe's own", args, maxKernelArgs)
	}
	size := 0
	over := slices.IndexFunc(r.Healthy, func(c schema.Check) bool {
		size += checkSize(c)
		return size > maxHealthy
	})
	if over >= 0 {
		e.complain([]string{"roles", r.Name, "healthy", strconv.Itoa(over)}, "with this, the checks have %d bytes as JSON, more than the %d that a role may have; what is long belongs into a file of the role", size, maxHealthy)
	}
}
