package source

import (
	"context"
	"crypto/sha1" // what Git names packs by
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/plumbing/object"
	"github.com/go-git/go-git/v5/plumbing/storer"
	"github.com/go-git/go-git/v5/storage/filesystem"

	"github.com/troupe-dev/troupe/internal/atomicfile"
)

// maxPacks is how many packs a mirror may have before they are made one: each fetch brings one, and each costs a look
// for every object.
const maxPacks = 50

// refs are branches, tags and our own names, each with what it points at.
type refs map[plumbing.ReferenceName]plumbing.Hash

// own begins the names in the mirror that are not the remote's.
const own = "refs/troupe/"

// followedName has the head of a branch as it last was; it outlives the branch.
func followedName(branch string) plumbing.ReferenceName {
	return plumbing.ReferenceName(own + "followed/" + branch)
}

// seenName keeps a head that a force-push left behind.
func seenName(h plumbing.Hash) plumbing.ReferenceName {
	return plumbing.ReferenceName(own + "seen/" + h.String())
}

// mirrored says whether a name of the remote is taken over. Names are hostile: one with a line break would write others.
func mirrored(n plumbing.ReferenceName) bool {
	return (n.IsBranch() || n.IsTag()) && printable(n.String()) && n.Validate() == nil
}

func (r refs) branches() []string {
	var names []string
	for n := range r {
		if n.IsBranch() {
			names = append(names, n.Short())
		}
	}
	slices.Sort(names)
	return names
}

// A mirror is a bare repository that only this package writes. Objects come as whole packs, each renamed into place
// when it is complete, and all names lie in one file (packed-refs) that is replaced at once: a process that is killed
// leaves the mirror as it was, or as it should be.
type mirror struct {
	dir     string
	log     *slog.Logger
	objects *objects
	refs    atomic.Pointer[refs] // what packed-refs says; never changed in place
}

// openMirror opens the mirror in dir, and makes it, or makes it anew.
func openMirror(dir string, log *slog.Logger) (*mirror, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("mirror %q: %w", dir, err)
	}
	m := &mirror{dir: abs, log: log, objects: &objects{dir: abs}}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, fmt.Errorf("making the mirror's directory: %w", err)
	}
	if names, err := os.ReadDir(abs); err == nil && len(names) == 0 {
		return m, m.initialize()
	}
	m.sweep()
	if err := m.load(); err != nil {
		log.Warn("making the mirror anew", "dir", abs, "why", err)
		return m, m.rebuild()
	}
	return m, nil
}

// initialize makes an empty repository.
func (m *mirror) initialize() error {
	s := openStorage(m.dir)
	if err := s.Init(); err != nil {
		return fmt.Errorf("making the mirror %q: %w", m.dir, err)
	}
	if err := os.MkdirAll(filepath.Join(m.dir, "objects", "pack"), 0o700); err != nil {
		return fmt.Errorf("making the mirror: %w", err)
	}
	// HEAD and config are for people who look into the mirror with git.
	for name, text := range map[string]string{
		"config": "[core]\n\tbare = true\n\trepositoryformatversion = 0\n",
		"HEAD":   "ref: refs/heads/" + DefaultBranch + "\n",
	} {
		if err := atomicfile.WriteFile(filepath.Join(m.dir, name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("making the mirror: %w", err)
		}
	}
	return m.setRefs(refs{})
}

// load reads the names, and checks that every pack is whole and that every head that matters can be read.
func (m *mirror) load() error {
	s := openStorage(m.dir)
	got, err := readRefs(s)
	if err != nil {
		return fmt.Errorf("reading names: %w", err)
	}
	packs, err := filepath.Glob(filepath.Join(m.dir, "objects", "pack", "pack-*.pack"))
	if err != nil {
		return err
	}
	for _, p := range packs {
		if err := checkPack(p); err != nil {
			return err
		}
	}
	for name, h := range got {
		if _, err := s.EncodedObject(plumbing.AnyObject, h); err != nil {
			return fmt.Errorf("reading %s: %w", name, err)
		}
	}
	m.refs.Store(&got)
	return nil
}

// checkPack checks the checksum that a pack ends with (gitformat-pack(5)).
func checkPack(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() < 12+sha1.Size {
		return fmt.Errorf("pack %q has %d bytes", name, fi.Size())
	}
	h := sha1.New()
	if _, err := io.CopyN(h, f, fi.Size()-sha1.Size); err != nil {
		return fmt.Errorf("pack %q: %w", name, err)
	}
	want := make([]byte, sha1.Size)
	if _, err := io.ReadFull(f, want); err != nil {
		return fmt.Errorf("pack %q: %w", name, err)
	}
	if got := h.Sum(nil); hex.EncodeToString(got) != hex.EncodeToString(want) {
		return fmt.Errorf("pack %q: checksum is %x, want %x", name, got, want)
	}
	if _, err := os.Stat(strings.TrimSuffix(name, ".pack") + ".idx"); err != nil {
		return fmt.Errorf("pack %q has no index: %w", name, err)
	}
	return nil
}

// sweep removes what a killed process left half-written.
func (m *mirror) sweep() {
	m.sweepPacks()
	if _, err := atomicfile.Sweep(m.dir); err != nil {
		m.log.Warn("removing half-written files", "err", err)
	}
}

// sweepPacks removes packs of transfers that broke off.
func (m *mirror) sweepPacks() {
	half, _ := filepath.Glob(filepath.Join(m.dir, "objects", "pack", "tmp_pack_*")) // the pattern is well formed
	for _, name := range half {
		if err := os.Remove(name); err != nil {
			m.log.Warn("removing a half-written pack", "err", err)
		}
	}
}

// rebuild makes the mirror anew and takes over what can be read of the old one: a commit that was in force may be gone
// from the remote.
func (m *mirror) rebuild() error {
	old := m.dir + ".damaged"
	if err := os.RemoveAll(old); err != nil {
		return fmt.Errorf("removing the old mirror: %w", err)
	}
	if err := os.Rename(m.dir, old); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("putting the old mirror aside: %w", err)
	}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return fmt.Errorf("making the mirror: %w", err)
	}
	if err := m.initialize(); err != nil {
		return err
	}
	m.objects.reopen()
	m.salvage(old)
	if err := os.RemoveAll(old); err != nil {
		m.log.Warn("removing the old mirror", "err", err)
	}
	return nil
}

// salvage copies each name of the mirror in dir that can be read with all that it needs. What cannot, the next fetch
// brings, or nobody has it any more.
func (m *mirror) salvage(dir string) {
	got, err := readRefs(openStorage(dir))
	if err != nil {
		return
	}
	kept := refs{}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		h := got[name]
		if err := copyObjects(context.Background(), openStorage(dir), m, []plumbing.Hash{h}, true); err != nil {
			m.log.Warn("lost from the mirror, until it is fetched again", "name", name.String(), "commit", h.String(), "err", err)
			continue
		}
		kept[name] = h
	}
	if err := m.setRefs(kept); err != nil {
		m.log.Warn("keeping names of the old mirror", "err", err)
	}
}

// openStorage opens the repository whose .git is dir. What it returns is for one goroutine, and sees no packs that come
// later: open it afresh for each piece of work.
func openStorage(dir string) *filesystem.Storage {
	return filesystem.NewStorageWithOptions(osfs.New(dir), cache.NewObjectLRU(cacheSize), filesystem.Options{
		AlternatesFS: osfs.New("/"),
	})
}

// readRefs reads the heads, the tags, and our own names.
func readRefs(s storer.ReferenceStorer) (refs, error) {
	it, err := s.IterReferences()
	if err != nil {
		return nil, err
	}
	defer it.Close()
	got := refs{}
	err = it.ForEach(func(ref *plumbing.Reference) error {
		if ref.Type() == plumbing.HashReference && (mirrored(ref.Name()) || strings.HasPrefix(ref.Name().String(), own)) {
			got[ref.Name()] = ref.Hash()
		}
		return nil
	})
	return got, err
}

// keep is what the mirror's names become: the remote's new ones whose objects are here, and our own old ones.
func (m *mirror) keep(got refs) refs {
	next := refs{}
	s := openStorage(m.dir)
	for name, h := range got {
		if s.HasEncodedObject(h) == nil {
			next[name] = h
		}
	}
	for name, h := range *m.refs.Load() {
		if strings.HasPrefix(name.String(), own) {
			next[name] = h
		}
	}
	return next
}

// head is that of a branch as it was when a fetch last found it; zero for none.
func (m *mirror) head(branch string) plumbing.Hash { return (*m.refs.Load())[followedName(branch)] }

// setRefs replaces all names.
func (m *mirror) setRefs(next refs) error {
	if old := m.refs.Load(); old != nil && maps.Equal(*old, next) {
		return nil
	}
	var b strings.Builder
	b.WriteString("# pack-refs with: sorted \n")
	for _, name := range slices.Sorted(maps.Keys(next)) {
		fmt.Fprintf(&b, "%s %s\n", next[name], name)
	}
	if err := atomicfile.WriteFile(filepath.Join(m.dir, "packed-refs"), []byte(b.String()), 0o600); err != nil {
		return fmt.Errorf("writing the mirror's names: %w", err)
	}
	m.refs.Store(&next)
	return nil
}

// descends says whether old is head or one of its ancestors. History that is not there (of a shallow repository) ends
// the search.
func (m *mirror) descends(head, old plumbing.Hash) bool {
	found := false
	walkCommits(func(h plumbing.Hash) (*object.Commit, error) { return m.objects.commit(h) }, []plumbing.Hash{head},
		func(c *object.Commit) bool {
			found = found || c.Hash == old
			return !found
		})
	return found
}

// walkCommits calls visit for each commit that can be reached from the tips and read, newer ones of a line first, until
// visit returns false.
func walkCommits(get func(plumbing.Hash) (*object.Commit, error), tips []plumbing.Hash, visit func(*object.Commit) bool) {
	seen := map[plumbing.Hash]bool{}
	queue := slices.Clone(tips)
	for len(queue) > 0 {
		h := queue[0]
		queue = queue[1:]
		if seen[h] {
			continue
		}
		seen[h] = true
		c, err := get(h)
		if err != nil {
			continue
		}
		if !visit(c) {
			return
		}
		queue = append(queue, c.ParentHashes...)
	}
}
