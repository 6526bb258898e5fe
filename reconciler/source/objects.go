package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/plumbing/filemode"
	"github.com/go-git/go-git/v5/plumbing/object"
	"github.com/go-git/go-git/v5/plumbing/storer"
	"github.com/go-git/go-git/v5/storage/filesystem"
)

const (
	cacheSize   = 32 * cache.MiByte // of unpacked objects, for each open storage
	deltaWindow = 10                // as git's pack.window
)

// objects reads the mirror for all revisions. A storage of go-git is for one goroutine, and knows only the packs that it
// found when it looked; so there is a lock, and what is not found is looked for once more.
type objects struct {
	dir string

	mu sync.Mutex
	s  *filesystem.Storage // nil until used
}

func (o *objects) reopen() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.s = nil
}

// with calls f with a storage, and again with a fresh one if f fails.
func (o *objects) with(f func(*filesystem.Storage) error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.s != nil {
		if f(o.s) == nil {
			return nil
		}
	}
	o.s = openStorage(o.dir)
	return f(o.s)
}

func (o *objects) commit(h plumbing.Hash) (*object.Commit, error) {
	var c *object.Commit
	err := o.with(func(s *filesystem.Storage) error {
		obj, err := s.EncodedObject(plumbing.CommitObject, h)
		if err != nil {
			return err
		}
		if obj.Size() > MaxFileSize {
			return hugeError(h, obj.Size())
		}
		c, err = object.DecodeCommit(nil, obj)
		return err
	})
	return c, err
}

// tree reads a directory. What is no directory although it has the right hash is the commit's fault.
func (o *objects) tree(h plumbing.Hash) (*object.Tree, error) {
	b, err := o.read(plumbing.TreeObject, h)
	if err != nil {
		return nil, err
	}
	if got := plumbing.ComputeHash(plumbing.TreeObject, b); got != h {
		return nil, fmt.Errorf("what the mirror has as directory %s is %s", h, got)
	}
	obj := &plumbing.MemoryObject{}
	obj.SetType(plumbing.TreeObject)
	if _, err := obj.Write(b); err != nil {
		return nil, err
	}
	t, err := object.DecodeTree(nil, obj)
	if err != nil {
		return nil, faultf("directory %s: %v", h, err)
	}
	return t, nil
}

func (o *objects) size(h plumbing.Hash) (int64, error) {
	var n int64
	err := o.with(func(s *filesystem.Storage) (err error) {
		n, err = s.EncodedObjectSize(h)
		return err
	})
	return n, err
}

// blob reads a file.
func (o *objects) blob(h plumbing.Hash) ([]byte, error) {
	b, err := o.read(plumbing.BlobObject, h)
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		err = fmt.Errorf("%w, or lost: the mirror does not have it", errTooBig)
	}
	return b, err
}

// read reads an object that is not bigger than MaxFileSize.
func (o *objects) read(typ plumbing.ObjectType, h plumbing.Hash) ([]byte, error) {
	var b []byte
	err := o.with(func(s *filesystem.Storage) error {
		obj, err := s.EncodedObject(typ, h) // of a pack, which all are in: what is big is not read before its Reader is
		if err != nil {
			return err
		}
		if obj.Size() > MaxFileSize {
			return errTooBig
		}
		r, err := obj.Reader()
		if err != nil {
			return err
		}
		b, err = io.ReadAll(r)
		return errors.Join(err, r.Close())
	})
	return b, err
}

// reachable lists all objects that the tips need and for which have is false; have(x) must mean that all that x needs is
// there too. With shallow, history may end in commits that are not there (gitprotocol-pack(5), "shallow"). A commit, a
// directory or a tag that is bigger than MaxFileSize is an error; files are not looked at.
func reachable(ctx context.Context, s storer.EncodedObjectStorer, sz sizes, tips []plumbing.Hash, have func(plumbing.Hash) bool, shallow bool) ([]plumbing.Hash, error) {
	w := walker{seen: map[plumbing.Hash]bool{}, have: have}
	for _, h := range tips {
		w.push(h, false)
	}
	for len(w.todo) > 0 {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		next := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		size, err := sz.of(next.hash)
		if err == nil && size > MaxFileSize {
			return nil, hugeError(next.hash, size)
		}
		var obj plumbing.EncodedObject
		if err == nil {
			obj, err = s.EncodedObject(plumbing.AnyObject, next.hash)
		}
		if err != nil && next.parent && shallow && errors.Is(err, plumbing.ErrObjectNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading object %s: %w", next.hash, err)
		}
		w.all = append(w.all, next.hash)
		if err := w.expand(obj); err != nil {
			return nil, fmt.Errorf("reading object %s: %w", next.hash, err)
		}
	}
	return w.all, nil
}

type walker struct {
	seen map[plumbing.Hash]bool
	have func(plumbing.Hash) bool
	todo []step
	all  []plumbing.Hash
}

type step struct {
	hash   plumbing.Hash
	parent bool // of a commit
}

// fresh says whether h is wanted and was not met before.
func (w *walker) fresh(h plumbing.Hash) bool {
	if w.seen[h] {
		return false
	}
	w.seen[h] = true
	return !w.have(h)
}

func (w *walker) push(h plumbing.Hash, parent bool) {
	if w.fresh(h) {
		w.todo = append(w.todo, step{h, parent})
	}
}

// expand pushes what obj needs.
func (w *walker) expand(obj plumbing.EncodedObject) error {
	switch obj.Type() {
	case plumbing.CommitObject:
		c, err := object.DecodeCommit(nil, obj)
		if err != nil {
			return err
		}
		for _, p := range c.ParentHashes {
			w.push(p, true)
		}
		w.push(c.TreeHash, false)
	case plumbing.TreeObject:
		t, err := object.DecodeTree(nil, obj)
		if err != nil {
			return err
		}
		for _, e := range t.Entries {
			switch {
			case e.Mode == filemode.Submodule: // a commit of another repository
			case e.Mode == filemode.Dir:
				w.push(e.Hash, false)
			case w.fresh(e.Hash):
				w.all = append(w.all, e.Hash)
			}
		}
	case plumbing.TagObject:
		t, err := object.DecodeTag(nil, obj)
		if err != nil {
			return err
		}
		w.push(t.Target, false)
	}
	return nil
}

// copyObjects brings what the tips need from src into the mirror, as one pack. With partial, src is a mirror, too.
func copyObjects(ctx context.Context, src *filesystem.Storage, m *mirror, tips []plumbing.Hash, partial bool) error {
	dst := openStorage(m.dir)
	have := func(h plumbing.Hash) bool { return dst.HasEncodedObject(h) == nil }
	ends, err := src.Shallow()
	if err != nil {
		return fmt.Errorf("reading the list of shallow commits: %w", err)
	}
	sz := newSizes(src)
	all, err := reachable(ctx, src, sz, tips, have, len(ends) > 0)
	if err != nil {
		return err
	}
	parts, err := batches(sz, all, partial)
	if err != nil || len(parts) == 0 {
		return err
	}
	if _, err := writePack(dst, src, parts); err != nil {
		m.sweepPacks()
		return err
	}
	return nil
}

// compact makes one pack of many, with all that any name reaches. Readers that had an old one open find the new one.
func (m *mirror) compact() error {
	old, err := filepath.Glob(filepath.Join(m.dir, "objects", "pack", "pack-*.pack"))
	if err != nil || len(old) <= maxPacks {
		return err
	}
	s := openStorage(m.dir)
	tips := slices.Collect(maps.Values(*m.refs.Load()))
	sz := newSizes(s)
	all, err := reachable(context.Background(), s, sz, tips, func(plumbing.Hash) bool { return false }, true)
	if err != nil {
		return err
	}
	parts, err := batches(sz, all, true)
	if err != nil {
		return err
	}
	name, err := writePack(s, s, parts)
	if err != nil {
		return err
	}
	for _, p := range old {
		if strings.Contains(p, name.String()) {
			continue
		}
		// The pack first: a pack without an index is an error to a reader, an index without a pack is nothing.
		if err := errors.Join(os.Remove(p), os.Remove(strings.TrimSuffix(p, ".pack")+".idx")); err != nil {
			return err
		}
	}
	m.objects.reopen()
	return nil
}
