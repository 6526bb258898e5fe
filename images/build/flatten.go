package build

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Bounds of an app's files. An archive is hostile input: a few kilobytes of it can stand for more than any disk holds.
const (
	maxAppFiles = 500_000  // files, links and directories
	maxAppBytes = 32 << 30 // of all files together, as often as each is there
	maxAppPath  = 4000     // bytes of a path
	maxAppName  = 255      // bytes of one part of it
	maxAppDepth = 256      // directories in one another
	maxAppLinks = 4095     // bytes of a link's target
	maxXattrs   = 64 << 10 // bytes of the extended attributes of one file
)

// Names of the image specification (layer.md, "Whiteouts"): a file with the prefix hides what the layers below have under the
// rest of its name, and the one named opaque all that they have in its directory.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// errHostile says that an archive has what no image may have.
var errHostile = errors.New("the archive cannot be used")

// A node is a file of a tree, with those in it where it is a directory.
type node struct {
	entry
	size  int64 // of a regular file
	layer int   // that it came with
	kids  map[string]*node
}

// A flattener makes one tree of archives that lie over one another. The content of files goes to a spool, a file of its own,
// so that only their names are in memory.
type flattener struct {
	root  *node
	spool *os.File
	used  int64 // bytes of spool
	room  room
	layer int
	count int   // entries of all layers
	bytes int64 // of all files that were taken, also of such as a layer above hides
	noDev bool  // what is in /dev is left out
	drop  func(name string, dir bool) bool
}

// newFlattener keeps what it reads in a file of dir, which belongs to nobody else.
func newFlattener(dir string) (*flattener, error) {
	spool, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, fmt.Errorf("making a spool: %w", err)
	}
	return &flattener{root: directory(0), spool: spool, room: room{dir: dir}}, nil
}

func (f *flattener) close() error { return errors.Join(f.spool.Close(), os.Remove(f.spool.Name())) }

// directory is one that no archive has an entry for.
func directory(layer int) *node {
	return &node{entry: entry{mode: unix.S_IFDIR | 0o755, mtime: epoch}, layer: layer, kids: map[string]*node{}}
}

// add lays the tar archive r over what is there.
func (f *flattener) add(ctx context.Context, r io.Reader) error {
	f.layer++
	tr := tar.NewReader(&limited{r: r, left: maxAppBytes + maxAppFiles*1024})
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the archive: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := f.take(h, tr); err != nil {
			return fmt.Errorf("taking %q: %w", cutName(h.Name), err)
		}
	}
}

// cutName bounds a name for an error.
func cutName(s string) string { return s[:min(len(s), 200)] }

// A limited is an error where an archive is longer than it may be.
type limited struct {
	r    io.Reader
	left int64
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, fmt.Errorf("%w: it has more than %d bytes", errHostile, int64(maxAppBytes))
	}
	return n, err
}

// take lays one file of an archive over what is there.
func (f *flattener) take(h *tar.Header, r io.Reader) error {
	if f.count++; f.count > maxAppFiles {
		return fmt.Errorf("%w: it has more than %d files", errHostile, maxAppFiles)
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	if f.noDev && strings.HasPrefix(name, "dev/") || f.drop != nil && f.drop(name, h.Typeflag == tar.TypeDir) {
		return nil
	}
	dir, base := path.Split(name)
	if base == whiteoutOpaque {
		return f.clear(dir)
	}
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		return f.hide(dir, hidden)
	}
	n, err := f.nodeOf(h, r)
	if err != nil {
		return err
	}
	return f.put(name, n)
}

// cleanName is the path of a file as io/fs has it. Archives begin it with "/" or "./"; one with ".." would lead out.
func cleanName(name string) (string, error) {
	switch {
	case len(name) > maxAppPath || strings.Count(name, "/") > maxAppDepth:
		return "", fmt.Errorf("%w: the path is too long", errHostile)
	case strings.ContainsRune(name, 0) || !utf8.ValidString(name):
		return "", fmt.Errorf("%w: the path is not text", errHostile)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fmt.Errorf("%w: the path has \"..\"", errHostile)
		}
		if len(part) > maxAppName {
			return "", fmt.Errorf("%w: a part of the path has more than %d bytes", errHostile, maxAppName)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// nodeOf makes a node of a header and of the content that follows it.
func (f *flattener) nodeOf(h *tar.Header, r io.Reader) (*node, error) {
	n := &node{layer: f.layer, entry: entry{mode: uint32(h.Mode) & 0o7777, mtime: h.ModTime}} //nolint:gosec // the other bits are of no use
	var err error
	if n.uid, err = id(h.Uid); err != nil {
		return nil, err
	}
	if n.gid, err = id(h.Gid); err != nil {
		return nil, err
	}
	if n.xattrs, err = xattrsOf(h); err != nil {
		return nil, err
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		n.mode |= unix.S_IFREG
		return n, f.keep(n, r, h.Size)
	case tar.TypeDir:
		n.mode |= unix.S_IFDIR
		n.kids = map[string]*node{}
	case tar.TypeSymlink:
		n.mode |= unix.S_IFLNK
		if n.target = h.Linkname; n.target == "" || len(n.target) > maxAppLinks || strings.ContainsRune(n.target, 0) {
			return nil, fmt.Errorf("%w: the target of the link has %d bytes; want 1 to %d, none of them zero", errHostile, len(n.target), maxAppLinks)
		}
	case tar.TypeLink:
		return f.linked(h.Linkname)
	default:
		return nil, fmt.Errorf("%w: it is neither a file nor a directory nor a link (type %q)", errHostile, h.Typeflag)
	}
	return n, nil
}

func id(n int) (uint32, error) {
	if n < 0 || int64(n) > 1<<32-2 {
		return 0, fmt.Errorf("%w: %d is no number of a user or group", errHostile, n)
	}
	return uint32(n), nil
}

// xattrsOf are the extended attributes that an app can mean: its own, and capabilities. Those of overlayfs, of which an
// archive could make a hole, and those of a security module of another machine are left out.
func xattrsOf(h *tar.Header) (map[string]string, error) {
	var out map[string]string
	size := 0
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, "SCHILY.xattr.")
		if !ok || name != "security.capability" && !strings.HasPrefix(name, "user.") {
			continue
		}
		if size += len(name) + len(v); size > maxXattrs || len(name) > maxAppName {
			return nil, fmt.Errorf("%w: its extended attributes have more than %d bytes", errHostile, maxXattrs)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = v
	}
	return out, nil
}

// keep puts the content of a file into the spool.
func (f *flattener) keep(n *node, r io.Reader, size int64) error {
	if err := f.count64(size); err != nil {
		return err
	}
	n.size = size
	if size == 0 {
		return nil
	}
	start := f.used
	buf := make([]byte, min(size, 1<<20))
	for left := size; left > 0; {
		p := buf[:min(left, int64(len(buf)))]
		if _, err := io.ReadFull(r, p); err != nil {
			return fmt.Errorf("reading the archive: %w", err)
		}
		if err := f.room.take(int64(len(p))); err != nil {
			return err
		}
		if _, err := f.spool.WriteAt(p, f.used); err != nil {
			return err
		}
		f.used += int64(len(p))
		left -= int64(len(p))
	}
	n.open = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(f.spool, start, size)), nil }
	return nil
}

// count64 counts the bytes of a file.
func (f *flattener) count64(size int64) error {
	if size < 0 || size > maxAppBytes-f.bytes {
		return fmt.Errorf("%w: its files have more than %d bytes", errHostile, int64(maxAppBytes))
	}
	f.bytes += size
	return nil
}

// linked is a file that is another one, too. An image that go-erofs writes has no hard links: the content comes a second time.
func (f *flattener) linked(to string) (*node, error) {
	name, err := cleanName(to)
	if err != nil {
		return nil, err
	}
	old := f.find(name)
	if old == nil || old.kind() != unix.S_IFREG && old.kind() != unix.S_IFLNK {
		return nil, fmt.Errorf("%w: it is a link to %q, which is no file", errHostile, cutName(to))
	}
	if err := f.count64(old.size); err != nil {
		return nil, err
	}
	n := *old
	n.layer = f.layer
	return &n, nil
}

// find is the node at name; nil where there is none. Links on the way are followed, the last part is not.
func (f *flattener) find(name string) *node {
	dir, base := path.Split(name)
	d, err := f.dir(dir, false)
	if err != nil || d == nil {
		return nil
	}
	if base == "" {
		return d
	}
	return d.kids[base]
}

// dir is the directory at name. Links are followed as a process with that root would follow them, so that nothing leads out of
// the tree. Where there is no directory it is nil or, with mk, made.
func (f *flattener) dir(name string, mk bool) (*node, error) {
	todo := strings.Split(name, "/")
	way := []*node{f.root}
	for links := 0; len(todo) > 0; {
		part, at := todo[0], way[len(way)-1]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			way = way[:max(len(way)-1, 1)]
			continue
		}
		next := at.kids[part]
		switch {
		case next != nil && next.isLink():
			if links++; links > maxLinks {
				return nil, fmt.Errorf("%w: the path leads over more than %d symbolic links", errHostile, maxLinks)
			}
			if path.IsAbs(next.target) {
				way = way[:1]
			}
			todo = append(strings.Split(next.target, "/"), todo...)
			continue
		case next == nil && !mk:
			return nil, nil
		case next == nil || !next.isDir() && mk:
			next = directory(f.layer)
			at.kids[part] = next
			if f.count++; f.count > maxAppFiles {
				return nil, fmt.Errorf("%w: it has more than %d files", errHostile, maxAppFiles)
			}
		case !next.isDir():
			return nil, nil
		}
		if way = append(way, next); len(way) > maxAppDepth {
			return nil, fmt.Errorf("%w: directories are nested more than %d deep", errHostile, maxAppDepth)
		}
	}
	return way[len(way)-1], nil
}

// put lays n over what is at name. A directory over a directory keeps what is in it.
func (f *flattener) put(name string, n *node) error {
	if name == "" {
		if n.isDir() {
			f.root.entry, f.root.layer = n.entry, n.layer
			return nil
		}
		return fmt.Errorf("%w: its root is no directory", errHostile)
	}
	dir, base := path.Split(name)
	d, err := f.dir(dir, true)
	if err != nil {
		return err
	}
	if old := d.kids[base]; old != nil && old.isDir() && n.isDir() {
		n.kids = old.kids
	}
	d.kids[base] = n
	return nil
}

// hide takes away what the layers below have under a name.
func (f *flattener) hide(dir, base string) error {
	if base == "" || base == "." || base == ".." || strings.HasPrefix(base, whiteoutPrefix) {
		return fmt.Errorf("%w: it hides nothing that can be", errHostile)
	}
	d, err := f.dir(dir, false)
	if err != nil || d == nil {
		return err
	}
	if n := d.kids[base]; n != nil && !f.prune(n) {
		delete(d.kids, base)
	}
	return nil
}

// clear takes away all that the layers below have in a directory.
func (f *flattener) clear(dir string) error {
	d, err := f.dir(dir, true)
	if err != nil {
		return err
	}
	for name, n := range d.kids {
		if !f.prune(n) {
			delete(d.kids, name)
		}
	}
	return nil
}

// prune takes out of n what is not of this layer, and says whether something is left: in an archive a whiteout may also come
// behind what it does not hide.
func (f *flattener) prune(n *node) bool {
	for name, kid := range n.kids {
		if !f.prune(kid) {
			delete(n.kids, name)
		}
	}
	return n.layer == f.layer || len(n.kids) > 0
}

// write writes the tree into an image, by path.
func (f *flattener) write(ctx context.Context, w *imageWriter) error {
	if err := w.setAttributes(".", f.root.entry); err != nil {
		return err
	}
	left := int64(maxAppBytes) // a directory that is reached once is written once: the bytes of the files counted on the way in
	return f.root.write(ctx, w, "", &left)
}

func (n *node) write(ctx context.Context, w *imageWriter, at string, left *int64) error {
	for _, name := range slices.Sorted(maps.Keys(n.kids)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		kid := n.kids[name]
		full := path.Join(at, name)
		if err := w.add(full, kid.entry); err != nil {
			return err
		}
		if *left -= kid.size; *left < 0 {
			return fmt.Errorf("%w: its files have more than %d bytes", errHostile, int64(maxAppBytes))
		}
		if err := kid.write(ctx, w, full, left); err != nil {
			return err
		}
	}
	return nil
}
