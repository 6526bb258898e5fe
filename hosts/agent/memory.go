package agent

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

const (
	// memoryShare is how much of the memory images and node delta may have, in quarters. The rest is the system's.
	memoryShare = 3
	// deltaRoom is what must be left of that for the node delta, in bytes: what the cache keeps free beside images.
	deltaRoom = 64 << 20
)

// keepsNothing says whether the next boot of an assignment finds no image in a cache of this machine.
func keepsNothing(a agentapi.Assignment) bool { return a.ISCSI != nil || a.RAM }

// memoryFor is how many bytes of a machine's memory its images and its node delta may have.
func memoryFor(total int64, a agentapi.Assignment) (int64, error) {
	most := total / 4 * memoryShare
	need := a.Release.Base.Size + a.Release.Delta.Size + deltaRoom
	if need > most {
		return 0, fmt.Errorf("role %s runs from memory, and does not fit: its images and what the host writes need %d MiB at least, and of the %d MiB of this machine %d may be taken for that",
			a.Role, need>>20, total>>20, most>>20)
	}
	return most, nil
}

// openMemory makes a cache in memory, once. No disk is looked at.
func (b *boot) openMemory(ctx context.Context, a agentapi.Assignment) error {
	select {
	case <-b.fsReady:
	case <-ctx.Done():
		return ctx.Err()
	}
	size, err := memoryFor(memoryOf(), a)
	if err != nil || b.cache != nil {
		return err
	}
	if err := os.MkdirAll(cacheDir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("troupe", cacheDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=700,size=%d", size)); err != nil {
		return fmt.Errorf("making a cache in memory: %w", err)
	}
	c, err := cache.Open(cacheDir, b.log)
	if err != nil {
		return errors.Join(err, b.unmount(cacheDir, 0))
	}
	c.InMemory = true
	b.cache = c
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageCache, Detail: fmt.Sprintf("in memory, up to %d MiB", size>>20)})
	return nil
}

// memoryOf is how much memory this machine has, in bytes.
func memoryOf() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0 // it has no way to fail but a bad address
	}
	return int64(info.Totalram) * int64(info.Unit) //nolint:gosec // a machine has less than 2^63 bytes
}
