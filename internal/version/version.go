// Package version tells which build of troupe this is.
package version

import "runtime/debug"

// stamped is set by the linker (-X): the builder knows the tag, the build information only the commit.
var stamped string

// String is the version of the running program: what the builder stamped, or the commit that it was built from, or
// "devel".
func String() string {
	if stamped != "" {
		return stamped
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	commit, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && len(s.Value) >= 12:
			commit = s.Value[:12]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+changes"
		}
	}
	if commit == "" {
		return "devel"
	}
	return "devel-" + commit + dirty
}
