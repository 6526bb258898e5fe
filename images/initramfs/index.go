package initramfs

import (
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
)

// addTo adds the chosen modules and the files by which a loader finds them, and gives their names.
func (s *moduleSet) addTo(a *archive) []string {
	dir := "usr/lib/modules/" + s.kver
	names := slices.Sorted(maps.Keys(s.chosen))
	for _, n := range names {
		m := s.chosen[n]
		a.file(dir+"/"+m.rel, 0o644, func() ([]byte, error) { return s.root.readPlain(m.file) })
	}
	a.bytes(dir+"/modules.dep", 0o644, []byte(s.depFile(names)))
	a.bytes(dir+"/modules.alias", 0o644, []byte(s.aliasFile(names)))
	a.bytes(dir+"/modules.softdep", 0o644, []byte(s.softdepFile(names)))
	a.bytes(dir+"/modules.builtin", 0o644, []byte(s.builtinFile()))
	return names
}

// depFile is modules.dep(5): a module, and all that must be loaded before it, the last of the line first. What a module
// wants through "softdep pre:" stands here too, so that a loader which knows nothing of soft dependencies does right.
func (s *moduleSet) depFile(names []string) string {
	var b strings.Builder
	for _, n := range names {
		order := s.chosen[n].loadOrder(nil, make(map[*module]bool))
		b.WriteString(s.chosen[n].rel + ":")
		for _, d := range slices.Backward(order[:len(order)-1]) {
			b.WriteString(" " + d.rel)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// loadOrder appends what m depends on, in the order in which it can be loaded, then m.
func (m *module) loadOrder(order []*module, seen map[*module]bool) []*module {
	if seen[m] {
		return order
	}
	seen[m] = true
	for _, d := range m.deps {
		order = d.loadOrder(order, seen)
	}
	return append(order, m)
}

func (s *moduleSet) aliasFile(names []string) string {
	var b strings.Builder
	for _, n := range names {
		for _, a := range s.chosen[n].info.aliases {
			fmt.Fprintf(&b, "alias %s %s\n", a, n)
		}
	}
	return b.String()
}

func (s *moduleSet) softdepFile(names []string) string {
	var b strings.Builder
	for _, n := range names {
		for _, soft := range s.chosen[n].info.soft {
			fmt.Fprintf(&b, "softdep %s %s\n", n, soft)
		}
	}
	return b.String()
}

func (s *moduleSet) builtinFile() string {
	paths := slices.Sorted(maps.Values(s.builtin))
	if len(paths) == 0 {
		return ""
	}
	return strings.Join(paths, "\n") + "\n"
}

// addFirmware adds the firmware that the chosen modules name, as far as root has it. It is stored plain, under the name
// that the kernel asks for.
func addFirmware(a *archive, root rootFS, s *moduleSet) (added, missing []string, err error) {
	names := make(map[string]bool)
	for _, m := range s.chosen {
		for _, f := range m.info.firmware {
			names[f] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !fs.ValidPath(name) || name == "." {
			continue // a pattern or nonsense: not a file that the kernel would ask for
		}
		file, err := findFirmware(root, s.kver, name)
		if err != nil {
			return nil, nil, fmt.Errorf("firmware %q: %w", name, err)
		}
		if file == "" {
			missing = append(missing, name)
			continue
		}
		a.file("usr/lib/firmware/"+name, 0o644, func() ([]byte, error) { return root.readPlain(file) })
		added = append(added, name)
	}
	return added, missing, nil
}

// findFirmware looks where the kernel looks, in its order (Documentation/driver-api/firmware/fw_search_path.rst).
func findFirmware(root rootFS, kver, name string) (string, error) {
	for _, dir := range []string{"updates/" + kver, "updates", kver, ""} {
		for _, suffix := range suffixes {
			file, err := root.first(path.Join("lib/firmware", dir, name) + suffix)
			if file != "" || err != nil {
				return file, err
			}
		}
	}
	return "", nil
}
