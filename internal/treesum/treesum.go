// Package treesum names a directory by what it holds: the files below it, with their paths, their content and whether they may
// be executed, and the symbolic links. A directory of a Git commit and one that was checked out from it have one name, since
// nothing counts that Git does not keep: no times, owners, other permissions or empty directories.
package treesum

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"github.com/troupe-dev/troupe/internal/digest"
)

// Bounds of a directory.
const (
	MaxFiles = 100_000 // files and links, and directories above them
	MaxBytes = 1 << 30 // of all files together
	maxLink  = 4095    // bytes of a link's target (PATH_MAX without the NUL)
	maxDepth = 64      // directories in one another
)

// ErrContent is in the chain of an error that lies in the directory itself, and stays until somebody changes it.
var ErrContent = errors.New("the directory cannot be used")

// An Entry is a regular file or a symbolic link.
type Entry struct {
	Name       string // slash-separated, from the directory
	Executable bool
	IsLink     bool
	Target     string // of a link
}

// Walk calls f for each file and link below dir, in the order of their paths, element by element. A link is not
// followed. Anything else than files, links and directories is an error; what is called .git is left out.
func Walk(ctx context.Context, fsys fs.FS, dir string, f func(Entry) error) error {
	w := walker{ctx: ctx, fsys: fsys, f: f}
	fi, err := fs.Lstat(fsys, dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: there is no directory %q", ErrContent, dir)
	case err != nil:
		return fmt.Errorf("reading %q: %w", dir, err)
	case !fi.IsDir():
		return fmt.Errorf("%w: %q is not a directory", ErrContent, dir)
	}
	return w.dir(dir, "", 0)
}

type walker struct {
	ctx   context.Context //nolint:containedctx // it lives for one call of Walk
	fsys  fs.FS
	f     func(Entry) error
	count int
}

func (w *walker) dir(at, name string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%w: %q: directories are nested more than %d deep", ErrContent, name, maxDepth)
	}
	list, err := fs.ReadDir(w.fsys, at)
	if err != nil {
		return fmt.Errorf("reading the directory %q: %w", at, err)
	}
	for _, d := range list {
		if d.Name() == ".git" {
			continue
		}
		if w.count++; w.count > MaxFiles {
			return fmt.Errorf("%w: it has more than %d files and directories", ErrContent, MaxFiles)
		}
		if err := w.ctx.Err(); err != nil {
			return err
		}
		if err := w.one(path.Join(at, d.Name()), path.Join(name, d.Name()), d, depth); err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) one(at, name string, d fs.DirEntry, depth int) error {
	switch {
	case d.IsDir():
		return w.dir(at, name, depth+1)
	case d.Type() == fs.ModeSymlink:
		target, err := fs.ReadLink(w.fsys, at)
		if err != nil {
			return fmt.Errorf("reading the link %q: %w", at, err)
		}
		if target == "" || len(target) > maxLink {
			return fmt.Errorf("%w: the target of link %q has %d bytes; want 1 to %d", ErrContent, name, len(target), maxLink)
		}
		return w.f(Entry{Name: name, IsLink: true, Target: target})
	case d.Type().IsRegular():
		fi, err := d.Info()
		if err != nil {
			return fmt.Errorf("reading %q: %w", at, err)
		}
		return w.f(Entry{Name: name, Executable: fi.Mode()&0o111 != 0})
	}
	return fmt.Errorf("%w: %q is neither a file nor a directory nor a link", ErrContent, name)
}

// Sum is the name of the directory dir: the SHA-256 of
//
//	"troupe tree 1\n" entry…     in the order of Walk
//	entry = kind number(length) name number(length) content
//	kind  = "f" a file, "x" one that may be executed, "l" a link, whose content is its target
//
// where numbers have 8 bytes, big-endian. A directory that is too large is an error with ErrContent.
func Sum(ctx context.Context, fsys fs.FS, dir string) (digest.Digest, error) {
	h := digest.NewHash()
	_, _ = io.WriteString(h, "troupe tree 1\n") // a hash takes all
	str := func(s string) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		_, _ = h.Write(n[:])
		_, _ = io.WriteString(h, s)
	}
	left := int64(MaxBytes)
	err := Walk(ctx, fsys, dir, func(e Entry) error {
		switch {
		case e.IsLink:
			_, _ = h.Write([]byte("l"))
			str(e.Name)
			str(e.Target)
			return nil
		case e.Executable:
			_, _ = h.Write([]byte("x"))
		default:
			_, _ = h.Write([]byte("f"))
		}
		str(e.Name)
		n, err := content(h, fsys, path.Join(dir, e.Name), left)
		if err != nil {
			return fmt.Errorf("reading %q: %w", path.Join(dir, e.Name), err)
		}
		left -= n
		return nil
	})
	if err != nil {
		return "", err
	}
	return h.Digest(), nil
}

// content adds a file and its length to a sum, where it has no more than left bytes.
func content(to io.Writer, fsys fs.FS, name string, left int64) (int64, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	size := fi.Size()
	if size > left {
		return 0, fmt.Errorf("%w: its files have more than %d bytes together", ErrContent, int64(MaxBytes))
	}
	if err := binary.Write(to, binary.BigEndian, size); err != nil {
		return 0, err
	}
	n, err := io.Copy(to, io.LimitReader(f, size+1))
	if err == nil && n != size {
		err = fmt.Errorf("it changed while it was read: %d bytes, and before %d", n, size)
	}
	return n, err
}
