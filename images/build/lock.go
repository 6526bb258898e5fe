package build

import (
	"slices"
	"strings"
)

// installed are the packages that a dpkg database (/var/lib/dpkg/status, deb822(5)) has as installed: "name=version", and
// "name:arch=version" where a package of that name is installed for two architectures. Sorted.
func installed(status []byte) []string {
	type pkg struct{ name, arch, version string }
	var all []pkg
	count := make(map[string]int)
	for stanza := range strings.SplitSeq(string(status), "\n\n") {
		f := fields(stanza)
		if f["Package"] == "" || !strings.HasSuffix(f["Status"], " installed") {
			continue
		}
		all = append(all, pkg{f["Package"], f["Architecture"], f["Version"]})
		count[f["Package"]]++
	}
	lock := make([]string, len(all))
	for i, p := range all {
		lock[i] = p.name + "=" + p.version
		if count[p.name] > 1 {
			lock[i] = p.name + ":" + p.arch + "=" + p.version
		}
	}
	slices.Sort(lock)
	return lock
}

// fields are the fields of one stanza, without what follows on further lines.
func fields(stanza string) map[string]string {
	f := make(map[string]string)
	for line := range strings.Lines(stanza) {
		if name, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
			f[name] = strings.TrimSpace(value)
		}
	}
	return f
}

// added is what of lock is not in base.
func added(base, lock []string) []string {
	return slices.DeleteFunc(slices.Clone(lock), func(p string) bool { return slices.Contains(base, p) })
}
