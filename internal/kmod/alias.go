package kmod

import "strings"

// Aliases is the table of modules.alias: which patterns of device names belong to which modules. The zero value is empty.
type Aliases struct {
	// byBus has the patterns by their part before the first colon ("pci", "virtio"), which nearly all have and which
	// never has wildcards then: a device is held against its own bus only.
	byBus map[string][]alias
	other []alias
}

type alias struct{ pattern, module string }

// addLine takes "alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci".
func (t *Aliases) addLine(line string) {
	f := strings.Fields(line)
	if len(f) == 3 && f[0] == "alias" {
		t.Add(f[1], f[2])
	}
}

// Add says that devices whose alias matches pattern want module.
func (t *Aliases) Add(pattern, module string) {
	a := alias{pattern, moduleName(module)}
	bus, _, ok := strings.Cut(pattern, ":")
	if !ok || strings.ContainsAny(bus, "*?[\\") {
		t.other = append(t.other, a)
		return
	}
	if t.byBus == nil {
		t.byBus = map[string][]alias{}
	}
	t.byBus[bus] = append(t.byBus[bus], a)
}

// Match returns the modules that want the device with this alias.
func (t *Aliases) Match(name string) []string {
	var out []string
	bus, _, _ := strings.Cut(name, ":")
	for _, list := range [][]alias{t.byBus[bus], t.other} {
		for _, a := range list {
			if Glob(a.pattern, name) {
				out = append(out, a.module)
			}
		}
	}
	return out
}

// Glob says whether name matches pattern, as fnmatch(3) with no flags has it: * is any run of characters, ? any one,
// [a-c] and [!a-c] one of a set, and a backslash takes the next character as it is. A set that is not closed is no
// set. It takes time in the product of both lengths at most.
func Glob(pattern, name string) bool {
	p, n := 0, 0
	star, mark := -1, 0 // the last *, and how far it has eaten
	for n < len(name) {
		if p < len(pattern) && pattern[p] == '*' {
			star, mark = p, n
			p++
			continue
		}
		if size, ok := matchOne(pattern[p:], name[n]); ok {
			p += size
			n++
			continue
		}
		if star < 0 {
			return false
		}
		mark++
		p, n = star+1, mark
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// matchOne holds the first element of pattern (not a *) against c, and says how long that element is.
func matchOne(pattern string, c byte) (int, bool) {
	if pattern == "" {
		return 0, false
	}
	switch pattern[0] {
	case '?':
		return 1, true
	case '[':
		if size, ok := matchSet(pattern, c); size > 0 {
			return size, ok
		}
	case '\\':
		if len(pattern) > 1 {
			return 2, pattern[1] == c
		}
	}
	return 1, pattern[0] == c
}

// matchSet holds c against the set at the start of pattern. A size of 0 says that there is no whole set.
func matchSet(pattern string, c byte) (size int, ok bool) {
	i, not := 1, false
	if i < len(pattern) && (pattern[i] == '!' || pattern[i] == '^') {
		not = true
		i++
	}
	for first := true; i < len(pattern); first = false {
		if pattern[i] == ']' && !first {
			return i + 1, ok != not
		}
		lo, hi := pattern[i], pattern[i]
		if i+2 < len(pattern) && pattern[i+1] == '-' && pattern[i+2] != ']' {
			hi = pattern[i+2]
			i += 2
		}
		ok = ok || lo <= c && c <= hi
		i++
	}
	return 0, false
}
