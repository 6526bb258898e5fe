// Package filediff says in which files two root file systems differ: each of EROFS images that lie over one another as overlayfs
// has them (kernel documentation, filesystems/overlayfs.rst, "Upper and Lower", "whiteouts and opaque directories").
package filediff

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/erofs/go-erofs"
)

// What became of a file.
const (
	Added   = "added"
	Removed = "removed"
	Changed = "changed"
)

// A Change is one file in which two roots differ.
type Change struct {
	Path   string `json:"path"`   // absolute
	Change string `json:"change"` // "added", "removed" or "changed"
	Before *Attr  `json:"before,omitempty"`
	After  *Attr  `json:"after,omitempty"`
}

// Attr is what is compared of a file beside its content. Times are not: those of an image say nothing.
type Attr struct {
	Mode   string `json:"mode"` // as ls has it: "-rwxr-xr-x"
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Size   int64  `json:"size,omitempty"`   // bytes, of a regular file
	Target string `json:"target,omitempty"` // of a symbolic link
	Device uint32 `json:"device,omitempty"` // of a device, as the kernel's new_encode_dev
}

// maxFiles bounds the files of one root: an image with more is none of ours.
const maxFiles = 5_000_000

// A root is the files of one side, by path as of fs.FS.
type root map[string]file

type file struct {
	in   fs.FS
	attr Attr
	mode fs.FileMode
}

// Diff lists the files in which two roots differ, by path. The layers of each come from the lowest to the uppermost; where a
// file lies in the same fs.FS on both sides it is not read.
func Diff(ctx context.Context, before, after []fs.FS) ([]Change, error) {
	a, err := read(ctx, before)
	if err != nil {
		return nil, err
	}
	b, err := read(ctx, after)
	if err != nil {
		return nil, err
	}
	var changes []Change
	for name, old := range a {
		if _, stays := b[name]; !stays {
			changes = append(changes, Change{Path: "/" + name, Change: Removed, Before: &old.attr})
		}
	}
	for name, now := range b {
		old, was := a[name]
		if !was {
			changes = append(changes, Change{Path: "/" + name, Change: Added, After: &now.attr})
			continue
		}
		same, err := same(ctx, name, old, now)
		if err != nil {
			return nil, err
		}
		if !same {
			changes = append(changes, Change{Path: "/" + name, Change: Changed, Before: &old.attr, After: &now.attr})
		}
	}
	slices.SortFunc(changes, func(x, y Change) int { return strings.Compare(x.Path, y.Path) })
	return changes, nil
}

// read merges layers as overlayfs does.
func read(ctx context.Context, layers []fs.FS) (root, error) {
	all := root{}
	for i, layer := range layers {
		err := fs.WalkDir(layer, ".", func(name string, d fs.DirEntry, err error) error {
			if err = errors.Join(err, ctx.Err()); err != nil {
				return err
			}
			if len(all) > maxFiles {
				return fmt.Errorf("it has more than %d files", maxFiles)
			}
			return all.lay(layer, name, d, i > 0)
		})
		if err != nil {
			return nil, fmt.Errorf("reading the files of an image: %w", err)
		}
	}
	delete(all, ".")
	return all, nil
}

// opaque hides what the layers below have in a directory.
const opaque = "trusted.overlay.opaque"

// lay puts one file over what is there.
func (r root) lay(in fs.FS, name string, d fs.DirEntry, over bool) error {
	fi, err := d.Info()
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*erofs.Stat)
	if !ok {
		return errors.New("it is no EROFS image")
	}
	white := st.Mode&fs.ModeCharDevice != 0 && st.Rdev == 0
	old, had := r[name]
	if over && had && old.mode.IsDir() && (white || !st.Mode.IsDir() || st.Xattrs[opaque] == "y") {
		maps.DeleteFunc(r, func(p string, _ file) bool { return strings.HasPrefix(p, name+"/") })
	}
	if over && white {
		delete(r, name)
		return nil
	}
	f := file{in: in, mode: st.Mode, attr: Attr{Mode: st.Mode.String(), UID: st.UID, GID: st.GID, Device: st.Rdev}}
	switch {
	case st.Mode.IsRegular():
		f.attr.Size = fi.Size()
	case st.Mode.Type() == fs.ModeSymlink:
		if f.attr.Target, err = fs.ReadLink(in, name); err != nil {
			return err
		}
	}
	r[path.Clean(name)] = f
	return nil
}

func same(ctx context.Context, name string, a, b file) (bool, error) {
	if a.attr != b.attr || a.in == b.in || !a.mode.IsRegular() || a.attr.Size == 0 {
		return a.attr == b.attr, ctx.Err()
	}
	same, err := sameContent(ctx, name, a.in, b.in)
	if err != nil {
		return false, fmt.Errorf("comparing %q: %w", "/"+name, err)
	}
	return same, nil
}

func sameContent(ctx context.Context, name string, a, b fs.FS) (same bool, err error) {
	x, err := a.Open(name)
	if err != nil {
		return false, err
	}
	defer x.Close()
	y, err := b.Open(name)
	if err != nil {
		return false, err
	}
	defer y.Close()
	bx, by := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errX := io.ReadFull(x, bx)
		m, errY := io.ReadFull(y, by)
		if !bytes.Equal(bx[:n], by[:m]) {
			return false, nil
		}
		endX, endY := isEnd(errX), isEnd(errY)
		switch {
		case endX && endY:
			return true, nil
		case errX != nil && !endX || errY != nil && !endY || ctx.Err() != nil:
			return false, errors.Join(errX, errY, ctx.Err())
		}
	}
}

func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }
