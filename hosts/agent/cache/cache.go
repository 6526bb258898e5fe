// Package cache keeps whole images on a node's disk, named by their digest, and the node deltas that lie over them.
//
//	images/sha256/HEX      a whole image. It got this name by rename(2) after its bytes were hashed and fsynced, so a
//	                       file with such a name is whole and was right: a warm boot does not hash it again
//	images/tmp/HEX         a transfer that is not finished; what is there is hashed again before it goes on
//	chunks/HEX             the index of an image's chunks (package internal/chunk) and its pages, of one that is there or on its way
//	deltas/ID/upper, work  a node delta: the two directories of overlayfs
//	deltas/ID/seeded       the delta has what it shall start with; without this file it is made anew. It says which order to
//	                       drop something was followed last. The 16 deltas
//	                       that were used last are kept, and fewer where an image needs the room
//	releases/KEY.json      what this node knows of one release on one host: see Record. KEY is the ID of its node delta
//	kept/ID/data, seeded   a directory of one host that outlives its releases: see Kept
//	state.json             what it remembers beside that: see State
//	verify                 the file system was repaired, and what that left was not looked through yet: see Recover
//	spare                  room for these two on a disk that is full
//
// The records and the state have a checksum in them. One that is broken counts as one that was never made.
//
// Every step is on the disk before the next begins, so that a power cut leaves the old state or the new one.
package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// A Cache is a directory on a disk of the node. It is safe for concurrent use, by one process.
type Cache struct {
	// InMemory says that no boot finds the cache again. It is set by who opened it, before anything else.
	InMemory bool

	dir string
	log *slog.Logger

	mu       sync.Mutex
	state    State
	records  map[string]Record // by key
	warnings []string          // not changed after Open

	evicting sync.Mutex // held while room is made

	free  func() (int64, error) // bytes; replaced in tests
	stall time.Duration         // how long a transfer may stand still
}

// State is what a node remembers from boot to boot beside its records.
type State struct {
	// KernelTries counts the reboots in a row that were to get the kernel Kernel; a server that keeps sending
	// another one must not make a machine boot for ever.
	Kernel      digest.Digest `json:"kernel,omitempty"`
	KernelTries int           `json:"kernelTries,omitempty"`
	// GoalTries counts the reboots in a row that were to lead to Goal, a record's key or another name: a server that
	// tells a boot something else than the system that it boots must not make a machine boot for ever, either.
	Goal      string `json:"goal,omitempty"`
	GoalTries int    `json:"goalTries,omitempty"`
	// Damage is what the scrubs found.
	Damage Damage `json:"damage,omitzero"`
	// Scrubs are when the images were read through last.
	Scrubs map[digest.Digest]time.Time `json:"scrubs,omitempty"`
	// Lease is the last address that the node was given, in the form of package netup: what a boot takes that hears of no
	// DHCP server.
	Lease json.RawMessage `json:"lease,omitempty"`
}

// stallAfter is how long a transfer may bring no byte before it is broken off and tried again.
const stallAfter = 30 * time.Second

// Open uses dir, a directory on the mounted file system of the cache.
func Open(dir string, log *slog.Logger) (*Cache, error) {
	c := &Cache{dir: dir, log: log, stall: stallAfter}
	c.free = c.statfs
	for _, d := range []string{"images/sha256", "images/tmp", "chunks", "deltas", "releases"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("opening the cache: %w", err)
		}
	}
	for _, d := range []string{dir, filepath.Join(dir, "images")} {
		if err := atomicfile.SyncDir(d); err != nil {
			return nil, fmt.Errorf("opening the cache: %w", err)
		}
	}
	for _, d := range []string{dir, c.path("chunks")} {
		if _, err := atomicfile.Sweep(d); err != nil {
			return nil, fmt.Errorf("opening the cache: %w", err)
		}
	}
	if err := c.sweepListings(); err != nil {
		log.Warn("the cache keeps indexes of images that are gone", "error", err)
	}
	if err := c.keepSpare(); err != nil {
		log.Warn("the cache is full", "error", err)
	}
	if err := unseal(c.path("state.json"), &c.state); err != nil && !errors.Is(err, fs.ErrNotExist) {
		// It is only memory: a node without it boots as one that never did.
		c.warn("the state is begun anew: %w", err)
		c.state = State{}
	}
	return c, c.loadRecords()
}

// Dir is the directory that the cache was opened with.
func (c *Cache) Dir() string { return c.dir }

func (c *Cache) path(elem ...string) string {
	return filepath.Join(append([]string{c.dir}, elem...)...)
}

// Path is the file of an image, whether it is there or not.
func (c *Cache) Path(d digest.Digest) string { return c.path("images/sha256", d.Hex()) }

// Has says whether an image of that size is there, whole. A file of another size is none: the file system lost it.
func (c *Cache) Has(d digest.Digest, size int64) bool {
	fi, err := os.Stat(c.Path(d))
	return err == nil && fi.Mode().IsRegular() && (size < 0 || fi.Size() == size)
}

// List returns the images that are there, sorted.
func (c *Cache) List() ([]digest.Digest, error) {
	entries, err := os.ReadDir(c.path("images/sha256"))
	if err != nil {
		return nil, fmt.Errorf("listing the cache: %w", err)
	}
	var out []digest.Digest
	for _, e := range entries {
		if d, err := digest.FromHex(e.Name()); err == nil {
			out = append(out, d)
		}
	}
	slices.Sort(out)
	return out, nil
}

// State is what the node remembers.
func (c *Cache) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// SetState changes what the node remembers; it is on the disk when this returns.
func (c *Cache) SetState(change func(*State)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state
	change(&s)
	if reflect.DeepEqual(s, c.state) {
		return nil
	}
	b, err := seal(s)
	if err == nil {
		err = c.write(c.path("state.json"), b)
	}
	if err != nil {
		return fmt.Errorf("writing the cache's state: %w", err)
	}
	c.state = s
	return nil
}

// statfs is how many bytes can still be written.
func (c *Cache) statfs() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(c.dir, &st); err != nil {
		return 0, fmt.Errorf("asking for the free space of the cache: %w", err)
	}
	return int64(st.Bavail) * st.Bsize, nil //nolint:gosec // a disk has less than 2^63 bytes
}
