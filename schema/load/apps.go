package load

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/troupe-dev/troupe/internal/treesum"
	"github.com/troupe-dev/troupe/schema"
)

// appKind is the kind of an image that is an application.
const appKind = "app"

// roleApps checks the apps of a role, each by itself and against one another, and notes where they stand.
func (e *evaluation) roleApps(role string, it *item[schema.Role]) {
	at := appPaths(e, role, it.Value.Apps)
	mounts := map[string]string{}
	for i, app := range it.Value.Apps {
		p := at[i]
		it.At["apps."+app.Name] = e.place(e.posOf(p...))
		if i > 0 && it.Value.Apps[i-1].Name == app.Name {
			e.complain(p, "app %q stands there twice", app.Name)
			continue
		}
		if why := badMount(app.Mount); why != "" {
			e.complain(append(slices.Clone(p), "mount"), "%s", why)
		}
		for other, name := range mounts {
			if below(strings.Split(app.Mount, "/"), strings.Split(other, "/")) || below(strings.Split(other, "/"), strings.Split(app.Mount, "/")) {
				e.complain(append(slices.Clone(p), "mount"), "%s and %s, where app %q is mounted, lie in one another", app.Mount, other, name)
			}
		}
		mounts[app.Mount] = app.Name
		e.appExec(p, app)
	}
}

// appPaths are where each app stands in the user's files: apps by name, or the elements of a list, which were sorted.
func appPaths(e *evaluation, role string, apps schema.Apps) [][]string {
	at := []string{"roles", role, "apps"}
	out := make([][]string, len(apps))
	iter, err := e.at(at).List()
	if err != nil {
		for i, app := range apps {
			out[i] = append(slices.Clone(at), app.Name)
		}
		return out
	}
	taken := map[int]bool{}
	for n := 0; iter.Next(); n++ {
		name, _ := iter.Value().String() // not one that does not stand for an app
		for i, app := range apps {
			if app.Name == name && !taken[i] {
				out[i], taken[i] = append(slices.Clone(at), strconv.Itoa(n)), true
				break
			}
		}
	}
	return out
}

// maxEnv is how many bytes the value of a variable may have.
const maxEnv = 4000

// appExec checks what an app runs.
func (e *evaluation) appExec(at []string, app schema.App) {
	for i, word := range app.Exec {
		if strings.ContainsFunc(word, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			e.complain(append(slices.Clone(at), "exec", strconv.Itoa(i)), "a word of a command has no control characters")
		}
	}
	for name, value := range app.Env {
		if strings.HasPrefix(name, "TROUPE_") {
			e.complain(append(slices.Clone(at), "env", name), "names that begin with TROUPE_ are troupe's own")
		}
		if len(value) > maxEnv {
			e.complain(append(slices.Clone(at), "env", name), "the value has %d bytes, more than %d", len(value), maxEnv)
		}
	}
	if len(app.Exec) > 0 {
		return
	}
	for field, has := range map[string]bool{"env": len(app.Env) > 0, "user": app.User != "", "root": app.Root} {
		if has {
			e.complain(append(slices.Clone(at), field), "says something only of an app with exec")
		}
	}
}

// reserved are where no image can be mounted, nor above or below it: what the system mounts itself, and where the agent is.
var reserved = []string{"/dev", "/proc", "/run", "/sys", "/tmp", "/var/lib/troupe", "/var/tmp"}

// systemDirs are directories that a system cannot do without: an image may be mounted below them, and not in their place.
var systemDirs = []string{
	"/bin", "/boot", "/etc", "/home", "/lib", "/lib32", "/lib64", "/libx32", "/media", "/mnt", "/opt", "/root", "/sbin", "/srv", "/usr",
	"/usr/bin", "/usr/lib", "/usr/libexec", "/usr/local", "/usr/sbin", "/usr/share", "/var", "/var/cache", "/var/lib", "/var/log",
}

// badMount says why no image can be mounted there, or "".
func badMount(dir string) string {
	if badPath(dir) != "" {
		return "this is not the absolute, clean path of a directory that an image can be mounted on"
	}
	for _, r := range reserved {
		if dir == r || strings.HasPrefix(dir, r+"/") {
			return fmt.Sprintf("nothing can be mounted in %s: it belongs to the system or to troupe", r)
		}
	}
	if slices.Contains(systemDirs, dir) {
		return fmt.Sprintf("%s is a directory of the system: mount the image below it, as on %s", dir, path.Join(dir, "app"))
	}
	return ""
}

// checkApps complains about apps whose images are not there, or none.
func (m *merged) checkApps(name string, r found[schema.Role]) {
	var known []string
	for n, img := range m.images {
		if img.Bad || img.Value.Kind == appKind {
			known = append(known, n)
		}
	}
	if len(r.Value.Apps) > 0 && r.Value.Boot == bootISCSI {
		m.add(r.problem("apps", "roles.%s.apps: app images are kept in a cache on a disk of the host: want boot: \"disk\", not %q", label(name), bootISCSI))
	}
	for _, app := range r.Value.Apps {
		at := "apps." + app.Name
		img, ok := m.images[app.Image]
		switch {
		case !ok:
			m.add(r.problem(at, "roles.%s.apps.%s: unknown app image %q%s", label(name), label(app.Name), app.Image, suggest(app.Image, known)))
		case !img.Bad && img.Value.Kind != appKind:
			m.add(r.problem(at, "roles.%s.apps.%s: image %q is of kind %q (%s), and an app is of kind %q",
				label(name), label(app.Name), app.Image, img.Value.Kind, img.where(""), appKind))
		}
	}
}

// resolveMachines says of each image for which something is compiled what the machine is made of.
func (m *merged) resolveMachines() {
	for _, name := range sorted(m.images) {
		img := m.images[name]
		if img.Bad || img.Value.From.Compile == nil {
			continue
		}
		c := *img.Value.From.Compile // what was evaluated may be kept for the next commit
		os, ok := m.images[c.In]
		switch {
		case !ok && !m.broken:
			m.add(img.problem(atIn, "images.%s.%s: unknown OS image %q%s", label(name), atIn, c.In, suggest(c.In, keys(m.images))))
		case ok && !os.Bad && os.Value.Kind != osKind:
			m.add(img.problem(atIn, "images.%s.%s: image %q is of kind %q (%s), and what compiles is of kind %q",
				label(name), atIn, c.In, os.Value.Kind, os.where(""), osKind))
		}
		c.Base = os.Value.From.Debian
		v := m.fleet.Images[name]
		v.From.Compile = &c
		m.fleet.Images[name] = v
	}
}

// readDirs names what the directories hold that images are made of.
func (l *Loader) readDirs(ctx context.Context, m *merged, fsys fs.FS) error {
	for _, name := range sorted(m.images) {
		img := m.images[name]
		dir, at := img.Value.From.Dir, atDir
		if c := img.Value.From.Compile; c != nil {
			dir, at = c.Source.Dir, atSource
		}
		if img.Bad || dir == "" {
			continue
		}
		sum, err := l.trees.sum(ctx, fsys, dir)
		if errors.Is(err, treesum.ErrContent) {
			m.add(img.problem(at, "images.%s.%s: %v", label(name), at, err))
			continue
		}
		if err != nil {
			return fmt.Errorf("reading the directory of image %q: %w", name, err)
		}
		v := m.fleet.Images[name]
		if v.From.Compile != nil {
			v.From.Compile.Source.Tree = sum // of a copy, see resolveMachines
		} else {
			v.From.Tree = sum
		}
		m.fleet.Images[name] = v
	}
	return nil
}
