package build

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// maxLinks bounds the symbolic links on the way to one file, as Linux does.
const maxLinks = 40

// A layer is an overlayfs layer: entries by their path as of package fs, with every directory above each of them.
// An entry for "." is the root directory's own.
type layer map[string]entry

// A view is a base with a layer over it, as overlayfs shows them.
type view struct {
	base fs.FS
	top  layer
}

// newView is a base with an empty layer over it.
func newView(base fs.FS) (*view, error) {
	v := &view{base: base, top: make(layer)}
	root, ok, err := v.lower(".")
	if err != nil || !ok {
		return nil, fmt.Errorf("reading the root directory of the base: %w", err)
	}
	v.top["."] = root // attributes of a merged directory are those of the uppermost layer that has it
	return v, nil
}

// lstat is the entry at name, whose directory must be resolved; false where there is none.
func (v *view) lstat(name string) (entry, bool, error) {
	if e, ok := v.top[name]; ok {
		return e, !e.isWhite(), nil
	}
	if v.hidden(name) {
		return entry{}, false, nil
	}
	return v.lower(name)
}

// hidden says whether the layer keeps what the base has at name from being seen.
func (v *view) hidden(name string) bool {
	for dir := name; dir != "."; {
		dir = path.Dir(dir)
		if e, ok := v.top[dir]; ok && (!e.isDir() || e.isOpaque()) {
			return true
		}
	}
	return false
}

// lower is the base's own entry at name.
func (v *view) lower(name string) (entry, bool, error) {
	fi, err := fs.Lstat(v.base, name)
	// Where a directory is expected and the base has something else, there is nothing either.
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, erofs.ErrNotDirectory) {
		return entry{}, false, nil
	}
	if err != nil {
		return entry{}, false, fmt.Errorf("reading %q in the base: %w", name, err)
	}
	st, ok := fi.Sys().(*erofs.Stat)
	if !ok {
		return entry{}, false, fmt.Errorf("reading %q in the base: it is no EROFS image", name)
	}
	e := entry{ // fi.Mode() lacks setuid, setgid and sticky (go-erofs 0.3.1), st.Mode has them
		mode: unixMode(st.Mode), mtime: fi.ModTime(),
		uid: st.UID, gid: st.GID, rdev: st.Rdev, xattrs: maps.Clone(st.Xattrs),
	}
	switch e.kind() {
	case unix.S_IFREG:
		e.open = func() (io.ReadCloser, error) { return v.base.Open(name) }
	case unix.S_IFLNK:
		if e.target, err = fs.ReadLink(v.base, name); err != nil {
			return entry{}, false, fmt.Errorf("reading the link %q in the base: %w", name, err)
		}
	}
	return e, true, nil
}

// resolve follows the symbolic links in all of name but its last element, and in that too if last is set. It never leaves
// the root. What does not exist has no links.
func (v *view) resolve(name string, last bool) (string, error) {
	todo := strings.Split(strings.Trim(name, "/"), "/")
	at := "."
	for links := 0; len(todo) > 0; {
		elem := todo[0]
		todo = todo[1:]
		next := path.Join(at, elem)
		switch elem {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		e, ok, err := v.lstat(next)
		if err != nil {
			return "", err
		}
		if ok && e.isLink() && (len(todo) > 0 || last) {
			if links++; links > maxLinks {
				return "", fmt.Errorf("%q leads over more than %d symbolic links", name, maxLinks)
			}
			if path.IsAbs(e.target) {
				at = "."
			}
			todo = slices.Concat(strings.Split(e.target, "/"), todo)
			continue
		}
		if ok && !e.isDir() && len(todo) > 0 {
			return "", fmt.Errorf("%q is not a directory", "/"+next)
		}
		at = next
	}
	return at, nil
}

// put lays e over whatever is at name, and makes the directories above it that are not there. It gives the name without
// links on the way to it, and the names of all that it put into the layer.
func (v *view) put(name string, e entry) (resolved string, put []string, err error) {
	if resolved, err = v.resolve(name, false); err != nil {
		return "", nil, err
	}
	old, ok, err := v.lstat(resolved)
	if err != nil {
		return "", nil, err
	}
	if ok && old.isDir() {
		return "", nil, fmt.Errorf("%q is a directory", "/"+resolved)
	}
	if put, err = v.mkdirs(path.Dir(resolved)); err != nil {
		return "", nil, err
	}
	v.top[resolved] = e
	return resolved, append(put, resolved), nil
}

// mkdirs brings dir and all above it into the layer, like the base's where it has them, and gives those it brought in.
func (v *view) mkdirs(dir string) ([]string, error) {
	if e, ok := v.top[dir]; ok && !e.isWhite() {
		return nil, nil
	}
	put, err := v.mkdirs(path.Dir(dir))
	if err != nil {
		return nil, err
	}
	e, ok, err := v.lstat(dir)
	if err != nil {
		return nil, err
	}
	if !ok {
		e = entry{mode: unix.S_IFDIR | 0o755, mtime: epoch}
		if _, whited := v.top[dir]; whited {
			e.xattrs = map[string]string{opaqueXattr: "y"} // what was deleted must not come back
		}
	}
	v.top[dir] = e
	return append(put, dir), nil
}

// readFile reads the regular file at name, over links; fs.ErrNotExist where there is none.
func (v *view) readFile(name string) ([]byte, error) {
	resolved, err := v.resolve(name, true)
	if err != nil {
		return nil, err
	}
	e, ok, err := v.lstat(resolved)
	if err != nil {
		return nil, err
	}
	if !ok || e.kind() != unix.S_IFREG {
		return nil, fmt.Errorf("reading %q: %w", "/"+resolved, fs.ErrNotExist)
	}
	return readEntry(e)
}

// readEntry reads a regular file, up to 64 MiB of it.
func readEntry(e entry) ([]byte, error) {
	if e.open == nil {
		return nil, nil
	}
	r, err := e.open()
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, maxMeta+1))
	if err == nil && len(b) > maxMeta {
		err = fmt.Errorf("it has more than %d bytes", maxMeta)
	}
	return b, errors.Join(err, r.Close())
}

// readDir are the names in the directory name, sorted; none where there is no directory.
func (v *view) readDir(name string) ([]string, error) {
	dir, err := v.resolve(name, true)
	if err != nil {
		return nil, err
	}
	names := make(map[string]bool)
	if e, ok, err := v.lower(dir); err != nil {
		return nil, err
	} else if ok && e.isDir() && !v.hidden(path.Join(dir, "any")) {
		list, err := fs.ReadDir(v.base, dir)
		if err != nil {
			return nil, fmt.Errorf("reading the directory %q in the base: %w", dir, err)
		}
		for _, d := range list {
			names[d.Name()] = true
		}
	}
	for p, e := range v.top {
		if p != "." && path.Dir(p) == dir {
			names[path.Base(p)] = !e.isWhite()
		}
	}
	maps.DeleteFunc(names, func(_ string, there bool) bool { return !there })
	return sortedKeys(names), nil
}

// prune takes out of the layer the directories that add nothing to the base: an emptied cache's, most of all.
func (v *view) prune() error {
	used := make(map[string]bool)
	for _, name := range slices.Backward(sortedKeys(v.top)) {
		e := v.top[name]
		if name != "." && e.isDir() && !used[name] && !e.isOpaque() && !v.hidden(name) {
			base, ok, err := v.lower(name)
			if err != nil {
				return err
			}
			if ok && sameAttributes(base, e) {
				delete(v.top, name)
				continue
			}
		}
		used[path.Dir(name)] = true
	}
	return nil
}

// sameAttributes says whether two entries have the same kind, permissions, owner and extended attributes.
func sameAttributes(a, b entry) bool {
	return a.mode == b.mode && a.uid == b.uid && a.gid == b.gid && maps.Equal(a.xattrs, b.xattrs)
}
