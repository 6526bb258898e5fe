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
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
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
func (o *objects) blob(h plumbing.Hash) ([]byte, error) { return o.read(plumbing.BlobObject, h) }

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
// there too. With shallow, history may end in commits that are not there (gitprotocol-pack(5), "shallow").
func reachable(ctx context.Context, s storer.EncodedObjectStorer, tips []plumbing.Hash, have func(plumbing.Hash) bool, shallow bool) ([]plumbing.Hash, error) {
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
		obj, err := s.EncodedObject(plumbing.AnyObject, next.hash)
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

// copyObjects brings what the tips need from src into the mirror, as one pack.
func copyObjects(ctx context.Context, src *filesystem.Storage, m *mirror, tips []plumbing.Hash) error {
	dst := openStorage(m.dir)
	have := func(h plumbing.Hash) bool { return dst.HasEncodedObject(h) == nil }
	ends, err := src.Shallow()
	if err != nil {
		return fmt.Errorf("reading the list of shallow commits: %w", err)
	}
	all, err := reachable(ctx, src, tips, have, len(ends) > 0)
	if err != nil || len(all) == 0 {
		return err
	}
	if _, err := writePack(dst, src, all); err != nil {
		m.sweepPacks()
		return err
	}
	return nil
}

// plain hides everything of a storage but whole objects: go-git reads stored deltas from several goroutines without a
// lock, and does not find those of alternates.
type plain struct{ storer.EncodedObjectStorer }

// compact makes one pack of many, with all that any name reaches. Readers that had an old one open find the new one.
func (m *mirror) compact() error {
	old, err := filepath.Glob(filepath.Join(m.dir, "objects", "pack", "pack-*.pack"))
	if err != nil || len(old) <= maxPacks {
		return err
	}
	s := openStorage(m.dir)
	tips := slices.Collect(maps.Values(*m.refs.Load()))
	all, err := reachable(context.Background(), s, tips, func(plumbing.Hash) bool { return false }, true)
	if err != nil {
		return err
	}
	name, err := writePack(s, s, all)
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

// writePack writes the objects all of src as one pack of dst, complete or not at all, and returns its checksum.
func writePack(dst storer.PackfileWriter, src storer.EncodedObjectStorer, all []plumbing.Hash) (plumbing.Hash, error) {
	w, err := dst.PackfileWriter()
	if err != nil {
		return plumbing.ZeroHash, fmt.Errorf("%w: %w", errMirror, err)
	}
	sum, err := packfile.NewEncoder(w, plain{src}, false).Encode(all, deltaWindow)
	return sum, errors.Join(err, w.Close())
}
