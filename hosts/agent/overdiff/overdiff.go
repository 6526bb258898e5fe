// Package overdiff lists what the upper layer of an overlayfs changes over the layers below (Linux,
// Documentation/filesystems/overlayfs.rst): a path of the upper layer that is in a layer below is changed, another one is added, and
// a whiteout, a character device 0/0, is what was removed.
package overdiff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// A Stack is the layers of an overlay, mounted or not.
type Stack struct {
	Upper string
	Lower []string // the uppermost first
	// Seeds are files that the upper layer began with, by absolute path. One that is still the same is no change.
	Seeds map[string]string
}

// Diff lists the changes by path. It reads files whose size and attributes are those of the layer below, and none else. A path that
// goes while it is looked at is left out.
func (s Stack) Diff(ctx context.Context) (agentapi.DeltaDiff, error) {
	d := agentapi.DeltaDiff{List: []agentapi.DeltaChange{}}
	room := agentapi.MaxDeltaPaths
	add := func(c agentapi.DeltaChange) {
		d.Changes++
		d.Bytes += c.Size
		if room -= len(c.Path); room < 0 || len(d.List) >= agentapi.MaxDeltaChanges {
			room = 0
			d.More++
			return
		}
		d.List = append(d.List, c)
	}
	err := filepath.WalkDir(s.Upper, func(name string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		rel, err := filepath.Rel(s.Upper, name)
		if err != nil || rel == "." {
			return err
		}
		c, ok, err := s.change(rel, e)
		if err == nil && ok {
			add(c)
		}
		return err
	})
	if err != nil {
		return d, fmt.Errorf("comparing a node delta with its release: %w", err)
	}
	for _, c := range s.goneSeeds() {
		add(c)
	}
	slices.SortFunc(d.List, func(a, b agentapi.DeltaChange) int { return strings.Compare(a.Path, b.Path) })
	return d, nil
}

// change says what the upper layer's entry at rel is, if it is a change.
func (s Stack) change(rel string, e fs.DirEntry) (c agentapi.DeltaChange, ok bool, err error) {
	info, err := e.Info()
	if errors.Is(err, fs.ErrNotExist) {
		return c, false, nil
	}
	if err != nil {
		return c, false, err
	}
	c.Path = "/" + rel
	below := s.below(rel)
	if isWhiteout(info) {
		c.Kind = agentapi.DeltaRemoved
		return c, below.info != nil, nil
	}
	c.Type = typeOf(info.Mode())
	if info.Mode().IsRegular() {
		c.Size = info.Size()
	}
	switch {
	case s.isSeed(rel, info):
		return c, false, nil
	case below.info == nil && s.hasSeed(rel):
		c.Kind = agentapi.DeltaChanged
		return c, true, nil
	case below.info == nil:
		c.Kind = agentapi.DeltaAdded
		return c, !info.IsDir() || !s.leadsToSeed(rel), nil
	}
	c.Kind = agentapi.DeltaChanged
	same, err := isSame(filepath.Join(s.Upper, rel), info, below)
	return c, !same, err
}

func (s Stack) hasSeed(rel string) bool {
	_, ok := s.Seeds["/"+rel]
	return ok
}

// goneSeeds are those that were removed, and left no whiteout since no layer below has them.
func (s Stack) goneSeeds() []agentapi.DeltaChange {
	var gone []agentapi.DeltaChange
	for path := range s.Seeds {
		_, err := os.Lstat(filepath.Join(s.Upper, path))
		if errors.Is(err, fs.ErrNotExist) && s.below(path[1:]).info == nil {
			gone = append(gone, agentapi.DeltaChange{Path: path, Kind: agentapi.DeltaRemoved})
		}
	}
	return gone
}

// isSeed says whether a file is as the layer began with it.
func (s Stack) isSeed(rel string, info fs.FileInfo) bool {
	want, ok := s.Seeds["/"+rel]
	if !ok || !info.Mode().IsRegular() || info.Size() != int64(len(want)) {
		return false
	}
	got, err := os.ReadFile(filepath.Join(s.Upper, rel))
	return err == nil && string(got) == want
}

// leadsToSeed says whether a directory was made for a seed.
func (s Stack) leadsToSeed(rel string) bool {
	for path := range s.Seeds {
		if strings.HasPrefix(path, "/"+rel+"/") {
			return true
		}
	}
	return false
}

// A found is what the layers below show at a path.
type found struct {
	path string
	info fs.FileInfo // nil: nothing
}

// below finds what the layers below show.
func (s Stack) below(rel string) found {
	for _, layer := range s.Lower {
		f, ends := look(layer, rel)
		if f.info != nil || ends {
			return f
		}
	}
	return found{}
}

// look finds a path in one layer. ends says that this layer hides what those below it have.
func look(layer, rel string) (f found, ends bool) {
	path := layer
	for name := range strings.SplitSeq(rel, "/") {
		path = filepath.Join(path, name)
		info, err := os.Lstat(path)
		switch {
		case err != nil:
			return found{}, ends
		case isWhiteout(info):
			return found{}, true
		case !info.IsDir():
			return found{path: path, info: info}, true // that something is below a file is not possible
		}
		f = found{path: path, info: info}
		ends = ends || isOpaque(path)
	}
	return f, ends
}

func isWhiteout(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0
}

func isOpaque(dir string) bool {
	b := make([]byte, 1)
	n, err := unix.Lgetxattr(dir, "trusted.overlay.opaque", b)
	return err == nil && n == 1 && b[0] == 'y'
}

func typeOf(m fs.FileMode) string {
	switch {
	case m.IsRegular():
		return "file"
	case m.IsDir():
		return "dir"
	case m&fs.ModeSymlink != 0:
		return "link"
	}
	return "other"
}

// isSame says whether a path of the upper layer has all that the one below has: overlayfs copies up what is only opened for writing.
func isSame(path string, info fs.FileInfo, below found) (bool, error) {
	a, okA := info.Sys().(*syscall.Stat_t)
	b, okB := below.info.Sys().(*syscall.Stat_t)
	if !okA || !okB || info.Mode() != below.info.Mode() || a.Uid != b.Uid || a.Gid != b.Gid {
		return false, nil
	}
	switch {
	case info.IsDir():
		return !isOpaque(path), nil
	case info.Mode()&fs.ModeSymlink != 0:
		x, errX := os.Readlink(path)
		y, errY := os.Readlink(below.path)
		return errX == nil && errY == nil && x == y, nil
	case !info.Mode().IsRegular():
		return a.Rdev == b.Rdev, nil
	case info.Size() != below.info.Size():
		return false, nil
	}
	same, err := sameContent(path, below.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return same, err
}

func sameContent(one, other string) (bool, error) {
	f, err := os.Open(one)
	if err != nil {
		return false, err
	}
	defer f.Close()
	g, err := os.Open(other)
	if err != nil {
		return false, err
	}
	defer g.Close()
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errX := io.ReadFull(f, x)
		m, errY := io.ReadFull(g, y)
		if string(x[:n]) != string(y[:m]) {
			return false, nil
		}
		switch {
		case isEnd(errX) && isEnd(errY):
			return true, nil
		case errX != nil || errY != nil:
			return false, errors.Join(errX, errY)
		}
	}
}

func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }
