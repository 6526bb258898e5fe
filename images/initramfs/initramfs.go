// Package initramfs writes what every node boots first: cpio archives in the "newc" format (the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst), compressed with zstd (RFC 8878), which the kernel needs
// CONFIG_RD_ZSTD for. There are two, and the boot loader gives the kernel both, one after the other:
//
//	Agent     /init and the devices it needs to speak; changes with troupe
//	Modules   one kernel's modules, their firmware, and the tools that make a file system; changes with the OS base
//
// Both lay out a usr-merged root: everything real lies under /usr, and /bin, /sbin, /lib and /lib64 are links into it, so
// it does not matter which archive comes first. The same input gives the same bytes: entries are sorted, times are zero,
// and everything belongs to root.
package initramfs

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// maxFile bounds one file of an archive, in bytes. The format ends at 4 GiB; a node's memory ends long before.
const maxFile = 512 << 20

// Agent writes the first archive: agent, a statically linked program, as /init; the console and the null device; and
// empty directories to mount on. keys are those whose releases the agent runs, as package signing writes them.
func Agent(w io.Writer, agent io.Reader, keys string) error {
	a, err := withInit(agent)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	a.dir("etc/troupe", 0o755)
	a.bytes("etc/troupe/release.pub", 0o644, []byte(keys))
	if _, err := a.writeTo(w); err != nil {
		return fmt.Errorf("writing the agent's initramfs: %w", err)
	}
	return nil
}

// Plain writes the same archive for another program, and does not compress it: for a machine that is on this one and
// lives shortly, to compress takes longer than to read.
func Plain(w io.Writer, program io.Reader) error {
	a, err := withInit(program)
	if err != nil {
		return fmt.Errorf("program: %w", err)
	}
	counted := &counter{w: w}
	if _, err := a.write(counted); err != nil {
		return fmt.Errorf("writing an initramfs: %w", err)
	}
	if over := counted.n % align; over != 0 {
		_, err = w.Write(make([]byte, align-over))
	}
	return err
}

// withInit is an archive with a statically linked program as /init.
func withInit(program io.Reader) (*archive, error) {
	prog, err := readAtMost(program, maxFile)
	if err != nil {
		return nil, fmt.Errorf("reading it: %w", err)
	}
	if err := checkStatic(prog); err != nil {
		return nil, err
	}
	a := newArchive()
	for _, d := range []string{"dev", "etc", "mnt", "proc", "run", "sys", "var"} {
		a.dir(d, 0o755)
	}
	a.dir("root", 0o700)
	a.dir("tmp", 0o777|sticky)
	a.device("dev/console", 0o600, 5, 1)
	a.device("dev/kmsg", 0o600, 1, 11)
	a.device("dev/null", 0o666, 1, 3)
	a.bytes("init", 0o755, prog)
	return a, nil
}

// Arch is the architecture that agent, a program, was built for, in Debian's word for it: "amd64", "arm64".
func Arch(agent io.ReaderAt) (string, error) {
	f, err := elf.NewFile(agent)
	if err != nil {
		return "", fmt.Errorf("agent: not an ELF program: %w", err)
	}
	switch f.Machine {
	case elf.EM_X86_64:
		return "amd64", nil
	case elf.EM_AARCH64:
		return "arm64", nil
	}
	return "", fmt.Errorf("agent: is for %v, and machines of that architecture are not booted", f.Machine)
}

// checkStatic refuses what the kernel could not run as /init; all that it would say of it is "no working init found".
func checkStatic(prog []byte) error {
	f, err := elf.NewFile(bytes.NewReader(prog))
	if err != nil {
		return fmt.Errorf("not an ELF program: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is dynamically linked, and an initramfs has no libraries for it: build it with CGO_ENABLED=0")
		}
	}
	return nil
}

// A Summary tells what Modules took.
type Summary struct {
	Modules  []string // their names, sorted
	Firmware []string // files below /lib/firmware, sorted
	// NoFirmware are files that a module taken may ask for and that the root file system does not have, sorted. Most
	// machines need none of them.
	NoFirmware []string
	Tools      []string // absolute paths of programs, sorted
	Unpacked   int64    // bytes of all files: what a node needs of memory while it boots
}

// Modules writes the second archive, from an OS base's root file system: those modules of the kernel kver (as in uname -r)
// with which a machine reaches its network, its disk and its root file system, all that they depend on, the firmware that
// they name, and mke2fs and e2fsck with their libraries. Modules are stored plain, however they are compressed in root,
// with a modules.dep, modules.alias, modules.softdep and modules.builtin that speak of nothing else.
//
// Links in root are followed as if root were "/" (so it should implement fs.ReadLinkFS), and never out of it. Where the
// root file system lacks what a node cannot boot without, the error names the Debian package that has it.
func Modules(w io.Writer, root fs.FS, kver string) (Summary, error) {
	r := rootFS{root}
	a := newArchive()
	mods, err := chooseModules(r, kver)
	if err != nil {
		return Summary{}, fmt.Errorf("choosing modules of kernel %q: %w", kver, err)
	}
	var sum Summary
	sum.Modules = mods.addTo(a)
	if sum.Firmware, sum.NoFirmware, err = addFirmware(a, r, mods); err != nil {
		return Summary{}, fmt.Errorf("choosing firmware: %w", err)
	}
	if sum.Tools, err = addTools(a, r); err != nil {
		return Summary{}, fmt.Errorf("choosing tools: %w", err)
	}
	if sum.Unpacked, err = a.writeTo(w); err != nil {
		return Summary{}, fmt.Errorf("writing the initramfs of kernel %q: %w", kver, err)
	}
	return sum, nil
}

// readAtMost reads r to its end, which must come within limit bytes.
func readAtMost(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("has more than %d bytes", limit)
	}
	return b, nil
}
