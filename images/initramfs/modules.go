package initramfs

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
)

// A module is a file of /lib/modules/KVER.
type module struct {
	name string // as the kernel spells it
	rel  string // its path below /lib/modules/KVER, without a compression's suffix
	file string // its path in the root file system
	info modinfo
	deps []*module // direct, by name
}

// modinfo is what a module says of itself in its ELF section .modinfo (the kernel's include/linux/module.h).
type modinfo struct {
	depends  []string // names of modules whose symbols it uses
	pre      []string // softdep: to be loaded before it; names of modules or aliases
	soft     []string // softdep lines as they stand
	aliases  []string
	firmware []string // paths below /lib/firmware
}

// A moduleSet is the modules that were chosen from one kernel's.
type moduleSet struct {
	root    rootFS
	kver    string
	index   map[string]*module // all the kernel's, by name
	builtin map[string]string  // built into the kernel: name -> path as in modules.builtin
	chosen  map[string]*module
}

// chooseModules takes what choose.go says from the modules of kver, and all that these depend on.
func chooseModules(root rootFS, kver string) (*moduleSet, error) {
	s := &moduleSet{root: root, kver: kver, chosen: make(map[string]*module)}
	if kver == "" || strings.Contains(kver, "/") || strings.HasPrefix(kver, ".") {
		return nil, errors.New("not the release of a kernel, as uname -r has it")
	}
	dir, err := root.resolve("lib/modules/" + kver)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the root file system has no /lib/modules/%s: add the kernel's package, e.g. linux-image-cloud-amd64", kver)
	}
	if err != nil {
		return nil, err
	}
	if err := s.findAll(dir); err != nil {
		return nil, err
	}
	if err := s.readBuiltin(dir); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(s.index)) {
		m := s.index[name]
		if rel, ok := strings.CutPrefix(m.rel, "kernel/"); ok && wanted(strings.TrimSuffix(rel, ".ko")) {
			if err := s.choose(m); err != nil {
				return nil, err
			}
		}
	}
	return s, s.checkNeeded()
}

// findAll fills the index. A module of updates/ or extra/ is preferred to the kernel's own of that name, as depmod does.
func (s *moduleSet) findAll(dir string) error {
	s.index = make(map[string]*module)
	return fs.WalkDir(s.root.fsys, dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, ok := strings.CutPrefix(plain(p), dir+"/")
		if !ok || !d.Type().IsRegular() || path.Ext(rel) != ".ko" {
			return nil
		}
		m := &module{name: moduleName(strings.TrimSuffix(path.Base(rel), ".ko")), rel: rel, file: p}
		if old := s.index[m.name]; old == nil || strings.HasPrefix(old.rel, "kernel/") {
			s.index[m.name] = m
		}
		return nil
	})
}

// readBuiltin reads the kernel package's list of what is no module.
func (s *moduleSet) readBuiltin(dir string) error {
	s.builtin = make(map[string]string)
	b, err := s.root.read(dir + "/modules.builtin")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if line != "" {
			s.builtin[moduleName(strings.TrimSuffix(path.Base(line), ".ko"))] = line
		}
	}
	return nil
}

func (s *moduleSet) checkNeeded() error {
	for _, n := range needed {
		if s.chosen[n] == nil && s.builtin[n] == "" {
			return fmt.Errorf("the kernel has no %s, neither as a module nor built in: no node could reach its root", n)
		}
	}
	return nil
}

// choose takes m and, first, everything that it depends on.
func (s *moduleSet) choose(m *module) error {
	if s.chosen[m.name] != nil {
		return nil
	}
	b, err := s.root.readPlain(m.file)
	if err != nil {
		return err
	}
	if m.info, err = readModinfo(b); err != nil {
		return fmt.Errorf("reading module %q: %w", m.file, err)
	}
	s.chosen[m.name] = m
	for _, name := range m.info.depends {
		dep := s.index[moduleName(name)]
		if dep == nil && s.builtin[moduleName(name)] == "" {
			return fmt.Errorf("module %q depends on %q, which is neither a module nor built in", m.file, name)
		}
		if err := s.depend(m, dep); err != nil {
			return err
		}
	}
	for _, name := range m.info.pre {
		if err := s.depend(m, s.provider(name)); err != nil {
			return err
		}
	}
	return nil
}

// depend takes dep, unless it is nil, and notes that m comes after it.
func (s *moduleSet) depend(m, dep *module) error {
	if dep == nil {
		return nil
	}
	if err := s.choose(dep); err != nil {
		return err
	}
	// A soft dependency may point back. A loader that walks modules.dep must not find a ring.
	if !dep.needs(m, make(map[*module]bool)) && !slices.Contains(m.deps, dep) {
		m.deps = append(m.deps, dep)
	}
	return nil
}

// needs says whether other is m or one of those that m depends on.
func (m *module) needs(other *module, seen map[*module]bool) bool {
	if m == other {
		return true
	}
	seen[m] = true
	return slices.ContainsFunc(m.deps, func(d *module) bool { return !seen[d] && d.needs(other, seen) })
}

// provider is the module behind a name in a softdep: that module, or the generic implementation of an algorithm, as in
// "pre: crc32c", without which libcrc32c does not load. An accelerated one would fail on the wrong CPU, and what needs it
// with it. It is nil where there is none, or it is built in.
func (s *moduleSet) provider(name string) *module {
	name = moduleName(strings.TrimPrefix(name, "crypto-"))
	for _, n := range []string{name, name + "_generic"} {
		if m := s.index[n]; m != nil {
			return m
		}
	}
	return nil
}

// readModinfo reads the .modinfo of a module.
func readModinfo(ko []byte) (modinfo, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return modinfo{}, err
	}
	sec := f.Section(".modinfo")
	if sec == nil {
		return modinfo{}, errors.New("has no section .modinfo: not a kernel module")
	}
	b, err := sec.Data()
	if err != nil {
		return modinfo{}, fmt.Errorf("section .modinfo: %w", err)
	}
	return parseModinfo(b), nil
}

// parseModinfo takes "key=value" strings that each end in NUL; what it does not know, it leaves alone.
func parseModinfo(b []byte) modinfo {
	var mi modinfo
	for kv := range strings.SplitSeq(string(b), "\x00") {
		key, value, _ := strings.Cut(kv, "=")
		// The values become lines of modules.dep and its like.
		if value == "" || strings.ContainsAny(value, "\r\n") {
			continue
		}
		switch key {
		case "depends":
			mi.depends = slices.DeleteFunc(strings.Split(value, ","), func(s string) bool { return s == "" })
		case "alias":
			mi.aliases = append(mi.aliases, value)
		case "firmware":
			mi.firmware = append(mi.firmware, value)
		case "softdep":
			mi.soft = append(mi.soft, value)
			mi.pre = append(mi.pre, softPre(value)...)
		}
	}
	return mi
}

// softPre is A and B of "pre: A B post: C D".
func softPre(line string) []string {
	var names []string
	pre := false
	for w := range strings.FieldsSeq(line) {
		if strings.HasSuffix(w, ":") {
			pre = w == "pre:"
		} else if pre {
			names = append(names, w)
		}
	}
	return names
}
