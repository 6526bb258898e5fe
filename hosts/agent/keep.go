package agent

import (
	"errors"
	"slices"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// persist mounts what a host keeps from release to release over the root, which is mounted. What is kept for the first time begins as
// what the root has there: that of the image, or of a node delta that was kept. What an order says to drop goes before, once.
func (b *boot) persist(a agentapi.Assignment) error {
	for _, path := range slices.Sorted(slices.Values(a.Persist)) {
		k, err := openKept(b.cache, a, path)
		if err != nil {
			return err
		}
		if k.Fresh {
			if err := rootfs.Copy(newRoot, path, k.Data); err != nil {
				return err
			}
		}
		if k.Fresh || k.Order != orderID(a) && a.Delta != nil {
			k.Order = orderID(a)
			if err := k.Seeded(); err != nil {
				return err
			}
		}
		if err := rootfs.Bind(newRoot, path, k.Data); err != nil {
			return err
		}
	}
	return nil
}

// unmountKept takes down what persist mounted.
func unmountKept(a agentapi.Assignment) error {
	var errs []error
	for _, path := range slices.Backward(slices.Sorted(slices.Values(a.Persist))) {
		errs = append(errs, rootfs.Unbind(newRoot, path))
	}
	return errors.Join(errs...)
}

// openKept opens what a host keeps at a path, without what an order that it did not follow yet says to drop.
func openKept(c *cache.Cache, a agentapi.Assignment, path string) (*cache.Kept, error) {
	k, err := c.Keep(a.Host, path)
	if err != nil || k.Fresh || a.Delta == nil || k.Order == a.Delta.ID {
		return k, err
	}
	fresh := len(a.Delta.Paths) == 0
	if !fresh {
		if fresh, err = k.Drop(a.Delta.Paths); err != nil {
			return nil, err
		}
	}
	if !fresh {
		return k, nil
	}
	if err := k.Unseed(); err != nil {
		return nil, err
	}
	return c.Keep(a.Host, path)
}
