package initramfs

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// tools are the programs that the agent runs before there is a root file system, with the Debian packages that have them.
var tools = []struct{ path, pkg string }{
	{"/sbin/e2fsck", "e2fsprogs"},
	{"/sbin/mke2fs", "e2fsprogs"},
}

// configs are files that tools read, where they are there.
var configs = []string{"/etc/mke2fs.conf"}

// addTools adds the tools with their loader and libraries, each under the path by which it is asked for, and gives the
// tools' paths.
func addTools(a *archive, root rootFS) ([]string, error) {
	var added []string
	for _, t := range tools {
		err := addProgram(a, root, t.path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("the root file system lacks a part of %s: add the package %s to the image (%w)", t.path, t.pkg, err)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", t.path, err)
		}
		added = append(added, t.path)
	}
	for _, name := range configs {
		b, err := root.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		a.bytes(merged(name), 0o644, b)
	}
	return added, nil
}

// addProgram adds an ELF program, its interpreter, and the libraries that it needs.
func addProgram(a *archive, root rootFS, name string) error {
	p, err := addELF(a, root, name)
	if err != nil {
		return err
	}
	if p.interp == "" {
		return nil
	}
	if _, err := addELF(a, root, p.interp); err != nil {
		return fmt.Errorf("its loader: %w", err)
	}
	return addLibraries(a, root, p, path.Base(p.interp))
}

// addLibraries adds what p needs, and what that needs. The loader is mapped already when it reads its own name.
func addLibraries(a *archive, root rootFS, p program, loader string) error {
	for _, so := range p.needed {
		if so == loader {
			continue
		}
		file, err := findLibrary(root, p, so)
		if err != nil {
			return err
		}
		if a.has(merged(file)) {
			continue
		}
		lib, err := addELF(a, root, file)
		if err != nil {
			return err
		}
		if err := addLibraries(a, root, lib, loader); err != nil {
			return err
		}
	}
	return nil
}

// A program is what the loader reads of an ELF file, be it a program or a library.
type program struct {
	name    string
	machine elf.Machine
	class   elf.Class
	interp  string   // absolute; "" for libraries and for static programs
	needed  []string // DT_NEEDED
	runpath []string // DT_RUNPATH, else DT_RPATH, with $ORIGIN put in
}

func addELF(a *archive, root rootFS, name string) (program, error) {
	b, err := root.read(name)
	if err != nil {
		return program{}, err
	}
	p, err := parseELF(name, b)
	if err != nil {
		return program{}, fmt.Errorf("%s: %w", name, err)
	}
	a.bytes(merged(name), 0o755, b)
	return p, nil
}

func parseELF(name string, b []byte) (program, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return program{}, err
	}
	p := program{name: name, machine: f.Machine, class: f.Class}
	for _, seg := range f.Progs {
		if seg.Type != elf.PT_INTERP {
			continue
		}
		s, err := readAtMost(seg.Open(), maxName)
		if err != nil {
			return program{}, fmt.Errorf("its loader's name: %w", err)
		}
		p.interp = strings.TrimRight(string(s), "\x00")
	}
	if f.SectionByType(elf.SHT_DYNAMIC) == nil {
		return p, nil
	}
	if p.needed, err = f.DynString(elf.DT_NEEDED); err != nil {
		return program{}, fmt.Errorf("its libraries: %w", err)
	}
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		paths, err := f.DynString(tag)
		if err != nil {
			return program{}, fmt.Errorf("its library path: %w", err)
		}
		if len(paths) > 0 {
			r := strings.NewReplacer("$ORIGIN", path.Dir(name), "${ORIGIN}", path.Dir(name))
			p.runpath = strings.Split(r.Replace(strings.Join(paths, ":")), ":")
			break
		}
	}
	return p, nil
}

// multiarch is Debian's directory for libraries of a machine.
func multiarch(m elf.Machine) string {
	switch m {
	case elf.EM_X86_64:
		return "x86_64-linux-gnu"
	case elf.EM_AARCH64:
		return "aarch64-linux-gnu"
	}
	return "."
}

// findLibrary looks where ld.so(8) of Debian looks without its cache, which the initramfs does not have.
func findLibrary(root rootFS, p program, so string) (string, error) {
	if strings.Contains(so, "/") {
		return so, nil
	}
	ma := multiarch(p.machine)
	dirs := slices.Concat(p.runpath, []string{"/lib/" + ma, "/usr/lib/" + ma, "/lib64", "/usr/lib64", "/lib", "/usr/lib"})
	for _, d := range dirs {
		name, err := root.first(path.Join(d, so))
		if err != nil {
			return "", err
		}
		if name == "" {
			continue
		}
		b, err := root.read(name)
		if err != nil {
			return "", err
		}
		// One of another machine or word size is passed over, as the loader does.
		if lib, err := parseELF(name, b); err == nil && lib.machine == p.machine && lib.class == p.class {
			return name, nil
		}
	}
	return "", fmt.Errorf("library %q of %s: %w", so, p.name, fs.ErrNotExist)
}
