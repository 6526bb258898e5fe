package cache

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// ErrNoSpace is in the chain of the error that says that an image does not fit, even with all evicted that may be.
var ErrNoSpace = errors.New("not enough space in the cache")

// reserve is free for the node delta when a Fetch ends, in bytes.
const reserve = 64 << 20

// listingShare is the part of an image that the list of its chunks takes on the disk at most, where these are as small as they
// usually are.
const listingShare = 256

// maxDeltas is how many node deltas are kept, however much room there is: the last ones that were used.
const maxDeltas = 16

// An eviction is what may not go to make room for a fetch.
type eviction struct {
	missing []agentapi.Image // images that are being fetched
	needed  []digest.Digest  // images of what runs, of what shall run, and of what the node goes back to
	deltas  []string         // IDs of their node deltas
}

// makeRoom evicts what nobody uses until missing fits. Where there is room, it changes nothing.
func (c *Cache) makeRoom(missing []agentapi.Image, f Fetch) error {
	c.evicting.Lock()
	defer c.evicting.Unlock()
	need := int64(reserve)
	for _, b := range missing {
		need += b.Size - c.partial(b.Digest)
		if b.Chunks.Size > 0 {
			need += b.Data / listingShare
		}
	}
	e := eviction{missing: missing, needed: slices.Clone(f.Keep), deltas: slices.Clone(f.Deltas)}
	for _, r := range c.precious() {
		e.needed = append(e.needed, r.digests()...)
		e.deltas = append(e.deltas, r.NodeDelta())
	}
	for _, b := range f.all() {
		e.needed = append(e.needed, b.Digest)
	}
	for {
		free, err := c.free()
		if err != nil {
			return err
		}
		if free >= need {
			return nil
		}
		gone, err := c.evict(e)
		if err != nil {
			return err
		}
		if !gone {
			return fmt.Errorf("%w: %d MiB are needed, %d MiB are free, and nothing more can be evicted: what runs, what shall run and the last good release stay", ErrNoSpace, need>>20, free>>20)
		}
	}
}

// precious are the records of what is never evicted: of what was switched to last, unless it is bad, and of the last good
// one that is another.
func (c *Cache) precious() []Record {
	var out []Record
	last := ""
	for _, r := range c.Records() {
		if r.Used > 0 {
			last = r.Key
			if r.Bad == nil {
				out = append(out, r)
			}
			break
		}
	}
	if good := c.LastGood(last); good.Key != "" {
		out = append(out, good)
	}
	return out
}

// evict removes one transfer, image or node delta, and is false where there is none that may go. Images that can be had again go
// before what only this node has, and of that what belongs to no image here before what a change back would find:
//
//  1. transfers that broke off, of images that are not being fetched
//  2. images that nobody needs, oldest first
//  3. node deltas whose images are gone, least recently used first
//  4. any other node delta, least recently used first
func (c *Cache) evict(e eviction) (bool, error) {
	isOrphan := func(r Record) bool {
		return slices.ContainsFunc(r.Images(), func(b agentapi.Blob) bool { return !c.Has(b.Digest, -1) })
	}
	for _, step := range []func() (bool, error){
		func() (bool, error) { return c.evictTransfer(e.missing) },
		func() (bool, error) { return c.evictImage(e.needed) },
		func() (bool, error) {
			return c.evictDelta(e.deltas, func(r Record) bool { return r.Used == 0 || isOrphan(r) })
		},
		func() (bool, error) { return c.evictDelta(e.deltas, func(Record) bool { return true }) },
	} {
		if gone, err := step(); gone || err != nil {
			return gone, err
		}
	}
	return false, nil
}

// evictTransfer removes one transfer of an image outside missing. As long as there is room, what came of a release is
// worth keeping: a node that was told something else meanwhile may be told to run it again.
func (c *Cache) evictTransfer(missing []agentapi.Image) (bool, error) {
	entries, err := os.ReadDir(c.path("images/tmp"))
	if err != nil {
		return false, fmt.Errorf("listing the transfers: %w", err)
	}
	for _, e := range entries {
		if slices.ContainsFunc(missing, func(b agentapi.Image) bool { return b.Digest.Hex() == e.Name() }) {
			continue
		}
		err := os.Remove(c.path("images/tmp", e.Name()))
		if err == nil {
			return true, nil
		}
		c.log.Warn("an old transfer cannot be removed, and takes room", "error", err)
	}
	return false, nil
}

// evictImage removes the oldest image outside keep.
func (c *Cache) evictImage(keep []digest.Digest) (bool, error) {
	victim, err := c.oldest(keep)
	if err != nil || victim == "" {
		return false, err
	}
	c.log.Info("evicting an image", "digest", victim.Short())
	if err := os.Remove(c.Path(victim)); err != nil {
		return false, fmt.Errorf("evicting an image: %w", err)
	}
	if err := atomicfile.SyncDir(c.path("images/sha256")); err != nil {
		return false, fmt.Errorf("evicting an image: %w", err)
	}
	c.dropListing(victim)
	return true, nil
}

// oldest is the image outside keep that was fetched first; "" where there is none.
func (c *Cache) oldest(keep []digest.Digest) (digest.Digest, error) {
	all, err := c.newest()
	if err != nil {
		return "", err
	}
	for _, d := range slices.Backward(all) {
		if !slices.Contains(keep, d) {
			return d, nil
		}
	}
	return "", nil
}

// newest are the images that are there, those that were fetched last first.
func (c *Cache) newest() ([]digest.Digest, error) {
	all, err := c.List()
	if err != nil {
		return nil, err
	}
	at := make(map[digest.Digest]time.Time, len(all))
	for _, d := range all {
		if fi, err := os.Stat(c.Path(d)); err == nil {
			at[d] = fi.ModTime()
		}
	}
	all = slices.DeleteFunc(all, func(d digest.Digest) bool { return at[d].IsZero() })
	slices.SortStableFunc(all, func(a, b digest.Digest) int { return at[b].Compare(at[a]) })
	return all, nil
}

// evictDelta removes the least recently used node delta outside keep that may go. One that cannot be removed is passed
// over: it must not stand between this node and every other release.
func (c *Cache) evictDelta(keep []string, mayGo func(Record) bool) (bool, error) {
	all, err := c.deltas()
	if err != nil {
		return false, err
	}
	for _, r := range all {
		if slices.Contains(keep, r.Key) || !mayGo(r) {
			continue
		}
		c.log.Info("removing a node delta", "id", r.Key, "role", r.Assignment.Role, "generation", r.Assignment.Generation)
		err := c.removeDelta(r.Key)
		if err == nil {
			return true, nil
		}
		c.log.Error("a node delta cannot be removed, and takes room", "id", r.Key, "error", err)
	}
	return false, nil
}

// deltas are the records of the node deltas on the disk, least recently used first, each the newest of those that share the
// delta and under the delta's ID in place of its own key. One that has no record was used before all that have, or never.
func (c *Cache) deltas() ([]Record, error) {
	entries, err := os.ReadDir(c.path("deltas"))
	if err != nil {
		return nil, fmt.Errorf("listing the node deltas: %w", err)
	}
	newest := map[string]Record{}
	for _, r := range slices.Backward(c.Records()) {
		newest[r.NodeDelta()] = r
	}
	all := make([]Record, 0, len(entries))
	for _, e := range entries {
		r := newest[e.Name()]
		r.Key = e.Name()
		all = append(all, r)
	}
	slices.SortStableFunc(all, func(a, b Record) int { return cmp.Compare(a.Used, b.Used) })
	return all, nil
}

// removeDelta takes the mark away first: a removal that breaks off leaves nothing that looks whole.
func (c *Cache) removeDelta(id string) error {
	dir := c.path("deltas", id)
	err := removeAll(c.path("deltas", id, "seeded"))
	if err == nil {
		err = atomicfile.SyncDir(dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing node delta %s: %w", id, err)
	}
	if err := removeAll(dir); err != nil {
		return fmt.Errorf("removing node delta %s: %w", id, err)
	}
	return nil
}

// TrimDeltas removes the least recently used node deltas that are too many, but never those of keep, nor the one that
// was switched to last.
func (c *Cache) TrimDeltas(keep ...string) error {
	c.evicting.Lock()
	defer c.evicting.Unlock()
	keep = slices.Clone(keep)
	for _, r := range c.precious() {
		keep = append(keep, r.NodeDelta())
	}
	for {
		all, err := c.deltas()
		if err != nil || len(all) <= maxDeltas {
			return err
		}
		gone, err := c.evictDelta(keep, func(Record) bool { return true })
		if err != nil || !gone {
			return err
		}
	}
}

func (c *Cache) partial(d digest.Digest) int64 {
	fi, err := os.Stat(c.path("images/tmp", d.Hex()))
	if err != nil {
		return 0
	}
	return fi.Size()
}
