package source

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
	"github.com/go-git/go-git/v5/plumbing/object"
)

// Bounds of a fleet's tree: a commit is hostile input, and a few kilobytes of trees that name one another can stand for
// more files than anybody can read.
const (
	MaxFiles    = 200_000
	MaxDepth    = 64
	MaxFileSize = 17 << 20 // bytes; a bigger file is listed, but may not be in the mirror, and opening it is an error
	maxName     = 255      // bytes
)

// A fault is something wrong with a commit's tree itself: it stays so however often the tree is read.
type fault string

func (f fault) Error() string { return string(f) }

func faultf(format string, args ...any) error { return fault(fmt.Sprintf(format, args...)) }

var (
	errSymlink = fault("is a symbolic link, and those are not followed")
	errTooBig  = faultf("is bigger than %d bytes", MaxFileSize)
)

// A tree is a directory of a commit, as it lies in the mirror. Symbolic links are listed, can be read as links, and are
// not followed; submodules, and names that are not UTF-8 (io/fs knows no others), are left out.
type tree struct {
	objects *objects
	root    plumbing.Hash
	mod     time.Time

	mu   sync.Mutex
	dirs map[plumbing.Hash]*dir
}

// A dir is a Git tree, sorted by name as io/fs wants it: Git sorts directories as if they ended in a slash.
type dir struct{ entries []entry }

type entry struct {
	name string
	mode filemode.FileMode
	hash plumbing.Hash
}

func newTree(o *objects, c *object.Commit, dirname string) (*tree, error) {
	t := &tree{objects: o, root: c.TreeHash, mod: c.Committer.When.UTC(), dirs: map[plumbing.Hash]*dir{}}
	e, err := t.lookup(dirname)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && e.mode != filemode.Dir:
		return nil, fmt.Errorf("%w: %q", ErrNoPath, dirname)
	case err != nil:
		return nil, blame(fmt.Errorf("%q: %w", dirname, err))
	}
	t.root = e.hash
	if _, err := t.survey(t.root, 0, map[plumbing.Hash]int{}); err != nil {
		return nil, blame(err)
	}
	return t, nil
}

// blame says whose fault it is that a tree cannot be used: the commit's, which nobody can mend, or that of the mirror or
// this machine, which may be over soon.
func blame(err error) error {
	if _, ok := errors.AsType[fault](err); ok {
		return fmt.Errorf("%w: %w", ErrTree, err)
	}
	if errors.Is(err, plumbing.ErrObjectNotFound) { // a fetch brings all directories of a commit, or not the commit
		err = fmt.Errorf("%w: %w", errMirror, err)
	}
	return fmt.Errorf("reading the tree: %w", err)
}

// survey reads all directories once, and counts what they hold as often as it can be reached.
func (t *tree) survey(h plumbing.Hash, depth int, counts map[plumbing.Hash]int) (int, error) {
	if depth > MaxDepth {
		return 0, faultf("directories are nested more than %d deep", MaxDepth)
	}
	if n, ok := counts[h]; ok {
		return n, nil
	}
	d, err := t.dir(h)
	if err != nil {
		return 0, err
	}
	n := len(d.entries)
	for _, e := range d.entries {
		if e.mode != filemode.Dir {
			continue
		}
		below, err := t.survey(e.hash, depth+1, counts)
		if err != nil {
			return 0, fmt.Errorf("%q: %w", e.name, err)
		}
		if n += below; n > MaxFiles {
			return 0, faultf("there are more than %d files", MaxFiles)
		}
	}
	counts[h] = n
	return n, nil
}

// dir reads a directory, once.
func (t *tree) dir(h plumbing.Hash) (*dir, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d := t.dirs[h]; d != nil {
		return d, nil
	}
	raw, err := t.objects.tree(h)
	if err != nil {
		return nil, fmt.Errorf("reading directory %s: %w", h, err)
	}
	d := &dir{entries: make([]entry, 0, len(raw.Entries))}
	for _, e := range raw.Entries {
		if e.Mode == filemode.Submodule || !utf8.ValidString(e.Name) {
			continue
		}
		if e.Name == "" || e.Name == "." || e.Name == ".." || len(e.Name) > maxName || strings.ContainsAny(e.Name, "/\x00") {
			return nil, faultf("directory %s has an entry named %q", h, bounded(e.Name, maxName))
		}
		d.entries = append(d.entries, entry{e.Name, e.Mode, e.Hash})
	}
	slices.SortFunc(d.entries, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	for i := range d.entries[min(1, len(d.entries)):] {
		if d.entries[i].name == d.entries[i+1].name {
			return nil, faultf("directory %s has two entries named %q", h, d.entries[i].name)
		}
	}
	t.dirs[h] = d
	return d, nil
}

// lookup finds what name names; the last part may be a symbolic link.
func (t *tree) lookup(name string) (entry, error) {
	if !fs.ValidPath(name) {
		return entry{}, fs.ErrInvalid
	}
	at := entry{name: ".", mode: filemode.Dir, hash: t.root}
	if name == "." {
		return at, nil
	}
	for part := range strings.SplitSeq(name, "/") {
		if at.mode == filemode.Symlink {
			return entry{}, errSymlink
		}
		if at.mode != filemode.Dir {
			return entry{}, fs.ErrNotExist
		}
		d, err := t.dir(at.hash)
		if err != nil {
			return entry{}, err
		}
		i, ok := slices.BinarySearchFunc(d.entries, part, func(e entry, s string) int { return strings.Compare(e.name, s) })
		if !ok {
			return entry{}, fs.ErrNotExist
		}
		at = d.entries[i]
	}
	return at, nil
}

func pathError(op, name string, err error) error {
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// Open opens a file or a directory. The whole file is read at once.
func (t *tree) Open(name string) (fs.File, error) {
	e, err := t.lookup(name)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	info := fileInfo{t, e}
	if e.mode == filemode.Dir {
		list, err := t.list(e)
		if err != nil {
			return nil, pathError("open", name, err)
		}
		return &openDir{fileInfo: info, path: name, rest: list}, nil
	}
	b, err := t.read(e)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	return &openFile{fileInfo: info, path: name, Reader: bytes.NewReader(b)}, nil
}

func (t *tree) read(e entry) ([]byte, error) {
	switch e.mode {
	case filemode.Dir:
		return nil, errors.New("is a directory")
	case filemode.Symlink:
		return nil, errSymlink
	}
	return t.content(e.hash)
}

func (t *tree) content(h plumbing.Hash) ([]byte, error) { return t.objects.blob(h) }

// ReadFile is as fs.ReadFileFS has it.
func (t *tree) ReadFile(name string) ([]byte, error) {
	e, err := t.lookup(name)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	b, err := t.read(e)
	if err != nil {
		return nil, pathError("read", name, err)
	}
	return b, nil
}

// ReadDir is as fs.ReadDirFS has it.
func (t *tree) ReadDir(name string) ([]fs.DirEntry, error) {
	e, err := t.lookup(name)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	list, err := t.list(e)
	if err != nil {
		return nil, pathError("readdir", name, err)
	}
	return list, nil
}

func (t *tree) list(e entry) ([]fs.DirEntry, error) {
	if e.mode != filemode.Dir {
		return nil, errors.New("is not a directory")
	}
	d, err := t.dir(e.hash)
	if err != nil {
		return nil, err
	}
	list := make([]fs.DirEntry, len(d.entries))
	for i, e := range d.entries {
		list[i] = fileInfo{t, e}
	}
	return list, nil
}

// Stat is as fs.StatFS has it. A symbolic link cannot be followed, and is an error.
func (t *tree) Stat(name string) (fs.FileInfo, error) {
	e, err := t.lookup(name)
	if err == nil && e.mode == filemode.Symlink {
		err = errSymlink
	}
	if err != nil {
		return nil, pathError("stat", name, err)
	}
	return fileInfo{t, e}, nil
}

// Lstat is as fs.ReadLinkFS has it.
func (t *tree) Lstat(name string) (fs.FileInfo, error) {
	e, err := t.lookup(name)
	if err != nil {
		return nil, pathError("lstat", name, err)
	}
	return fileInfo{t, e}, nil
}

// ReadLink is as fs.ReadLinkFS has it.
func (t *tree) ReadLink(name string) (string, error) {
	e, err := t.lookup(name)
	if err == nil && e.mode != filemode.Symlink {
		err = fs.ErrInvalid
	}
	if err != nil {
		return "", pathError("readlink", name, err)
	}
	b, err := t.content(e.hash)
	if err != nil {
		return "", pathError("readlink", name, err)
	}
	return string(b), nil
}

// Hash is the Git object id of a file or a directory: what has the same id has the same content, in any commit.
func (t *tree) Hash(name string) (string, bool) {
	e, err := t.lookup(name)
	if err != nil {
		return "", false
	}
	return e.hash.String(), true
}

// A fileInfo is fs.FileInfo and fs.DirEntry of one entry.
type fileInfo struct {
	t *tree
	e entry
}

func (i fileInfo) Name() string               { return path.Base(i.e.name) }
func (i fileInfo) IsDir() bool                { return i.e.mode == filemode.Dir }
func (i fileInfo) Type() fs.FileMode          { return i.Mode().Type() }
func (i fileInfo) Info() (fs.FileInfo, error) { return i, nil }
func (i fileInfo) ModTime() time.Time         { return i.t.mod }
func (i fileInfo) Sys() any                   { return nil }
func (i fileInfo) String() string             { return fs.FormatFileInfo(i) }

// Size is in bytes; 0 of a directory, and of what cannot be read: opening it says why.
func (i fileInfo) Size() int64 {
	if i.IsDir() {
		return 0
	}
	n, err := i.t.objects.size(i.e.hash)
	if err != nil {
		return 0
	}
	return n
}

func (i fileInfo) Mode() fs.FileMode {
	switch i.e.mode {
	case filemode.Dir:
		return fs.ModeDir | 0o555
	case filemode.Symlink:
		return fs.ModeSymlink | 0o777
	case filemode.Executable:
		return 0o555
	}
	return 0o444
}

// An openFile can also be sought and read at.
type openFile struct {
	fileInfo
	path string
	*bytes.Reader
}

func (f *openFile) Stat() (fs.FileInfo, error) { return f.fileInfo, nil }
func (f *openFile) Close() error               { return nil }
func (f *openFile) Size() int64                { return f.fileInfo.Size() }

type openDir struct {
	fileInfo
	path string
	rest []fs.DirEntry
}

func (d *openDir) Stat() (fs.FileInfo, error) { return d.fileInfo, nil }
func (d *openDir) Close() error               { return nil }

func (d *openDir) Read([]byte) (int, error) {
	return 0, pathError("read", d.path, errors.New("is a directory"))
}

func (d *openDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if n <= 0 {
		n = len(d.rest)
	} else if len(d.rest) == 0 {
		return nil, io.EOF
	}
	n = min(n, len(d.rest))
	list := d.rest[:n:n]
	d.rest = d.rest[n:]
	return list, nil
}
