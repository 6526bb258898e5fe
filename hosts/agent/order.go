package agent

import (
	"path/filepath"
	"strings"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// orderID names the order to drop something that an assignment has; "" for none.
func orderID(a agentapi.Assignment) string {
	if a.Delta == nil {
		return ""
	}
	return a.Delta.ID
}

// openDelta opens the node delta of an assignment, without what an order that it was not brought up to says to drop. That is so on the
// disk only when the mark of the delta is written anew, by seed: a boot that does not come as far does it once more. dropped tells
// people what was.
func openDelta(c *cache.Cache, a agentapi.Assignment) (d *cache.Delta, dropped string, err error) {
	if a.Fresh {
		if err := c.Unseed(cache.NodeDeltaOf(a)); err != nil {
			return nil, "", err
		}
	}
	if d, err = c.Delta(cache.NodeDeltaOf(a)); err != nil || d.Fresh || !isBehind(a, d) {
		return d, "", err
	}
	if len(a.Delta.Paths) > 0 {
		return d, ", dropped: " + strings.Join(a.Delta.Paths, " "), d.Drop(a.Delta.Paths)
	}
	if err := c.Unseed(d.ID); err != nil {
		return nil, "", err
	}
	d, err = c.Delta(d.ID)
	return d, ", the one before was dropped", err
}

// isBehind says whether a node delta was not brought up to the order that there is.
func isBehind(a agentapi.Assignment, d *cache.Delta) bool {
	return a.Delta != nil && a.Delta.ID != d.Order
}

// obey ends what openDelta began with a node delta that is kept: what it started with is there again where it was dropped.
func (b *boot) obey(a agentapi.Assignment, d *cache.Delta) error {
	if !isBehind(a, d) {
		return nil
	}
	var again []rootfs.File
	for _, f := range seedFiles(a, b.id, b.lease.Load()) {
		if isBelow(f.Path, a.Delta.Paths) {
			again = append(again, f)
		}
	}
	if err := rootfs.Seed(newRoot, again); err != nil {
		return err
	}
	kept := *d
	kept.Order = a.Delta.ID
	return kept.Seeded()
}

// isBelow says whether a path is one of those, or below one.
func isBelow(path string, those []string) bool {
	for _, t := range those {
		if path == t || strings.HasPrefix(path, filepath.Clean(t)+"/") {
			return true
		}
	}
	return false
}

// isOrdered says whether somebody asks a node that runs to reboot, and so to drop something.
func isOrdered(now, a agentapi.Assignment) bool {
	return a.Delta != nil && a.Delta.Reboot && a.Delta.ID != orderID(now)
}
