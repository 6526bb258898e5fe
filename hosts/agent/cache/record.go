package cache

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// maxRecords is how many records are kept: those of the node deltas that are kept, and as many of what is bad.
const maxRecords = 2 * maxDeltas

// A Record is what a node knows of one release on one host, with its files: all that it needs to boot it with no server,
// and how its boots ended. Its key is the ID of its node delta.
type Record struct {
	Key        string              `json:"key"`
	Delta      string              `json:"delta,omitempty"` // the ID of its node delta, where that is another than Key
	Assignment agentapi.Assignment `json:"assignment"`      // the newest one; without the secrets of a target
	// Used is the number of the switch to it, of all switches of this node: the higher, the later. 0: there was none.
	Used uint64 `json:"used,omitempty"`
	// Healthy is the Used of the last boot in which it became healthy; 0: it never did.
	Healthy uint64 `json:"healthy,omitempty"`
	// Good is since when it is known to become healthy, by the node's own clock.
	Good time.Time `json:"good,omitzero"`
	// Attempts are the switches to it since it was last healthy that did not end with a shutdown.
	Attempts int `json:"attempts,omitempty"`
	// Ended are the switches since then that did: Attempts leaves out the first few of them.
	Ended int `json:"ended,omitempty"`
	// Left says that it was good, and was left after too many attempts in a row.
	Left *Left `json:"left,omitempty"`
	// Again says that it was left before, and is tried once more.
	Again bool `json:"again,omitempty"`
	// Bad says that it is not tried again.
	Bad *Bad `json:"bad,omitempty"`
}

// Bad is why a release is not tried again.
type Bad struct {
	Why  string    `json:"why"`
	When time.Time `json:"when"` // by the node's own clock
	// Checks names the checks and the deadline that did not pass; "" where it did not come as far as checks.
	Checks string `json:"checks,omitempty"`
}

// Left is why a good release is not run for a while.
type Left struct {
	Why  string    `json:"why"`
	When time.Time `json:"when"` // by the node's own clock
}

// IsGood says whether the node may go back to it.
func (r Record) IsGood() bool { return r.Healthy > 0 && r.Bad == nil }

// Images are what it is mounted from, its apps' with it.
func (r Record) Images() []agentapi.Blob {
	if r.Assignment.Release == nil {
		return nil
	}
	return r.Assignment.Release.Blobs()
}

// digests are all that the release is booted from: its images, and what starts its kernel where no server does.
func (r Record) digests() []digest.Digest {
	var out []digest.Digest
	for _, b := range r.Images() {
		out = append(out, b.Digest)
	}
	a := r.Assignment
	if a.Release != nil && a.Release.KernelBlob.Digest != "" {
		out = append(out, a.Release.KernelBlob.Digest, a.Release.Modules.Digest, a.Agent.Digest)
	}
	if l := a.Loaders; l != nil {
		out = append(out, l.EFI.Digest, l.MBR.Digest, l.Core.Digest)
	}
	return out
}

// NodeDelta is the ID of its node delta.
func (r Record) NodeDelta() string { return cmp.Or(r.Delta, r.Key) }

// NodeDeltaOf is the ID of an assignment's node delta: releases that differ in apps alone share it.
func NodeDeltaOf(a agentapi.Assignment) string {
	return DeltaID(a.Host, a.Release.System(), a.Node.Digest)
}

// KeyOf is the key of an assignment's record.
func KeyOf(a agentapi.Assignment) string { return DeltaID(a.Host, a.Release.ID, a.Node.Digest) }

// Records are all records, the last one used first.
func (c *Cache) Records() []Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sorted()
}

// sorted is called with mu held.
func (c *Cache) sorted() []Record {
	return slices.SortedFunc(maps.Values(c.records), func(a, b Record) int {
		return cmp.Or(cmp.Compare(b.Used, a.Used), strings.Compare(a.Key, b.Key))
	})
}

// Record is the record with that key, and whether there is one.
func (c *Cache) Record(key string) (Record, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.records[key]
	return r, ok
}

// Remember makes a the assignment of its record, which is made where there is none; it is on the disk when this returns.
func (c *Cache) Remember(a agentapi.Assignment) error { return c.remember(KeyOf(a), a) }

func (c *Cache) remember(key string, a agentapi.Assignment) error {
	a.ISCSI = withoutSecrets(a.ISCSI)
	return c.change(key, func(r *Record) {
		r.Assignment = a
		if a.Release != nil && len(a.Release.Apps) > 0 {
			r.Delta = NodeDeltaOf(a)
		}
	})
}

// withoutSecrets leaves of a target what says that there is one: its secrets come with each boot, from the server.
func withoutSecrets(t *agentapi.ISCSI) *agentapi.ISCSI {
	if t == nil {
		return nil
	}
	return &agentapi.ISCSI{Disk: t.Disk}
}

// Begin counts a switch to the release with that key, which is on the disk when this returns.
func (c *Cache) Begin(key string) error {
	var last uint64
	for _, r := range c.Records() {
		last = max(last, r.Used)
	}
	return c.Change(key, func(r *Record) {
		r.Used = last + 1
		r.Attempts++
	})
}

// Change changes the record with that key; it is on the disk when this returns.
func (c *Cache) Change(key string, change func(*Record)) error {
	if _, ok := c.Record(key); !ok {
		return fmt.Errorf("changing the record of %s: there is none", key)
	}
	return c.change(key, change)
}

func (c *Cache) change(key string, change func(*Record)) error {
	if _, err := hex.DecodeString(key); err != nil || key == "" {
		return fmt.Errorf("record %q: not a name for one", key)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old, had := c.records[key]
	r := old
	r.Key = key
	change(&r)
	if had && reflect.DeepEqual(r, old) {
		return nil
	}
	b, err := seal(r)
	if err == nil {
		err = c.write(c.recordPath(key), b)
	}
	if err != nil {
		return fmt.Errorf("writing the record of release %s: %w", key, err)
	}
	c.records[key] = r
	if !had {
		c.trimRecords(key)
	}
	return nil
}

// trimRecords removes the records that are too many, those that were used longest ago first, but never that of keep nor
// one that the node may go back to at once. It is called with mu held.
func (c *Cache) trimRecords(keep string) {
	all := c.sorted()
	for _, r := range slices.Backward(all) {
		if len(c.records) <= maxRecords {
			return
		}
		if r.Key == keep || r.Key == all[0].Key || r.Key == lastGood(all, "").Key || r.Key == lastGood(all, all[0].Key).Key {
			continue
		}
		if err := c.dropRecord(r.Key); err != nil {
			c.log.Warn("an old record cannot be removed", "error", err)
			return
		}
		delete(c.records, r.Key)
	}
}

func (c *Cache) dropRecord(key string) error {
	if err := os.Remove(c.recordPath(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the record of release %s: %w", key, err)
	}
	return atomicfile.SyncDir(c.path("releases"))
}

// LastGood is the record of the release that became healthy last, but for the one with the key other; its key is "" where
// there is none.
func (c *Cache) LastGood(other string) Record { return lastGood(c.Records(), other) }

func lastGood(all []Record, other string) Record {
	var best Record
	for _, r := range all {
		if r.IsGood() && r.Key != other && r.Healthy > best.Healthy {
			best = r
		}
	}
	return best
}

func (c *Cache) recordPath(key string) string { return c.path("releases", key+".json") }

// loadRecords reads all records. What is broken is removed, and warned of: it counts as a record that was never made.
func (c *Cache) loadRecords() error {
	c.records = map[string]Record{}
	dir := c.path("releases")
	if _, err := atomicfile.Sweep(dir); err != nil {
		return fmt.Errorf("opening the cache: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("opening the cache: %w", err)
	}
	for _, e := range entries {
		key, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		path := filepath.Join(dir, e.Name())
		var r Record
		err := unseal(path, &r)
		if err == nil && r.Key != key {
			err = fmt.Errorf("reading %q: %w: it is the record of %s", path, errBroken, r.Key)
		}
		if err != nil {
			c.warn("the record of release %s counts as none: %w", key, err)
			if err := removeAll(path); err != nil {
				c.log.Warn("a broken record stays", "error", err)
			}
			continue
		}
		c.records[key] = r
	}
	return nil
}

// maxWarnings bounds what Warnings says.
const maxWarnings = 20

// warn notes what the node got past, for its report.
func (c *Cache) warn(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	c.log.Warn("something of the cache is lost", "error", err)
	if len(c.warnings) < maxWarnings {
		c.warnings = append(c.warnings, "cache: "+err.Error())
	}
}

// Warnings are what was found broken as the cache was opened, and got past, and what scrubs found, for people.
func (c *Cache) Warnings() []string {
	all := slices.Clone(c.warnings)
	if d := c.State().Damage; d.Blocks > 0 {
		all = append(all, fmt.Sprintf("cache: its disk had %d damaged blocks of images, %d were mended; the last at %s, in image %s",
			d.Blocks, d.Mended, d.When.UTC().Format(time.RFC3339), d.Image.Short()))
	}
	return all
}
