package disk

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
)

// A Maker finds the cache of a machine, or makes it. It is killed at any point without harm: what it left is found
// again and finished.
//
//	on the disk                     next
//	blank                           claim it, write the table
//	claimed                         the same
//	table, partition empty          mke2fs
//	table, mke2fs broken off        mke2fs
//	table, superblock gone,         use it as below: Mount repairs it
//	  record of an owner
//	table, ext4 with our label      use it; where another machine made it, only if the disk may be taken
//
// A cache that is whole is used at once. Before anything is written, the disks must have been the same for Settle, and
// every one that may hold the cache must have been read: the disk with the cache may only be late, or fail for a moment,
// and what is taken in its place is lost.
type Maker struct {
	Scanner Scanner
	Machine Machine
	Mke2fs  string        // "" means /sbin/mke2fs
	E2fsck  string        // "" means /sbin/e2fsck
	MinSize int64         // bytes; 0 means the constant MinSize
	Settle  time.Duration // how long the disks must have been the same before one is written to; 0 does not wait
	Rescan  func()        // looks for devices that showed late; called several times a second while waiting; may be nil
	Log     *slog.Logger
}

// rescanEvery is how often late disks are looked for.
const rescanEvery = 300 * time.Millisecond

// Found is the file system of a cache.
type Found struct {
	Path string // its device, "/dev/vda1"
	Made bool   // it was made now, and is empty
	// Repaired says that e2fsck changed it: what is in its files may be something else than before.
	Repaired bool
	Note     string // what people should know of it; "" for nothing
}

// Ensure returns the cache, found or made. An error that wraps ErrNoDisk says which disks were looked at and what they
// hold; nothing was written to any of them then. The end of ctx ends the waiting, but nothing that is being written.
func (m Maker) Ensure(ctx context.Context, spec agentapi.Disks) (Found, error) {
	disks, err := m.settled(ctx, spec)
	if err != nil {
		return Found{}, err
	}
	ctx = context.WithoutCancel(ctx)
	if p, ok := findCache(disks, spec); ok {
		return m.use(p, disks, spec)
	}
	if p, ok := findDamaged(disks, spec); ok {
		m.Log.Error("the superblock of the cache is gone; it is to be repaired", "disk", p.disk.Name)
		return m.use(p, disks, spec)
	}
	if p, ok := findUnfinished(disks, spec); ok {
		if why := doubts(disks, spec); len(why) > 0 {
			return Found{}, doubtful(p.disk, why)
		}
		return m.finish(ctx, p)
	}
	minSize := m.MinSize
	if minSize == 0 {
		minSize = MinSize
	}
	d, err := choose(disks, spec, minSize)
	if err != nil {
		return Found{}, err
	}
	if p, ok := foreignCache(d); ok {
		m.Log.Warn("taking over the cache of another machine", "disk", d.Name, "owner", ownerText(p.part.Owner))
		found, err := m.use(p, disks, spec)
		found.Note = "which was another machine's: " + ownerText(p.part.Owner)
		return found, err
	}
	m.Log.Warn("making the cache", "disk", d.Name, "size_mib", d.Size>>20, "holds", d.describe())
	p, err := m.partition(d)
	if err != nil {
		return Found{}, fmt.Errorf("making the cache on %s: %w", d.Name, err)
	}
	return Found{Path: p.Path, Made: true}, m.fill(ctx, p.Path)
}

// Find returns the cache of this machine where there is one, and makes none. An error that wraps ErrNoDisk says that there
// is none.
func (m Maker) Find() (Found, error) {
	disks, err := m.scan()
	if err != nil {
		return Found{}, err
	}
	p, ok := findCache(disks, agentapi.Disks{})
	if !ok {
		p, ok = findDamaged(disks, agentapi.Disks{})
	}
	if !ok {
		return Found{}, fmt.Errorf("%w: none of this machine's is on any disk", ErrNoDisk)
	}
	return m.use(p, disks, agentapi.Disks{})
}

// settled returns the disks: at once where it is clear which one is to be used, and else when they have been the same
// for Settle. While it waits it only looks for other devices; it reads the disks again where they are others, where one
// could not be read, and in the end.
func (m Maker) settled(ctx context.Context, spec agentapi.Disks) ([]Disk, error) {
	disks, err := m.scan()
	since := time.Now()
	if err != nil || m.Settle == 0 || isClear(disks, spec) {
		return disks, err
	}
	m.Log.Info("no cache is there; late disks are waited for before one is written to", "for", m.Settle)
	for {
		if err := backoff.Sleep(ctx, rescanEvery); err != nil {
			return nil, fmt.Errorf("waiting for late disks: %w", err)
		}
		if m.Rescan != nil {
			m.Rescan()
		}
		there, err := m.Scanner.list()
		if err != nil {
			return nil, err
		}
		isOver := time.Since(since) >= m.Settle
		if !isOver && slices.EqualFunc(there, disks, isSameDevice) && !slices.ContainsFunc(disks, unread) {
			continue
		}
		now, err := m.scan()
		if err != nil || isClear(now, spec) {
			return now, err
		}
		isSame := slices.EqualFunc(now, disks, func(a, b Disk) bool { return isSameDevice(a, b) && a.looks() == b.looks() })
		if isSame && isOver {
			return now, nil
		}
		if !isSame {
			since = time.Now()
		}
		disks = now
	}
}

// isClear says whether no disk that shows later can matter: a cache is there, or the very disk that the fleet names.
func isClear(disks []Disk, spec agentapi.Disks) bool {
	if _, ok := findCache(disks, spec); ok {
		return true
	}
	return isIdentity(spec.Device) && slices.ContainsFunc(disks, func(d Disk) bool { return !unread(d) && d.matches(spec.Device) })
}

func unread(d Disk) bool { return d.Err != nil }

func isSameDevice(a, b Disk) bool {
	return a.Name == b.Name && a.Size == b.Size && a.Serial == b.Serial && a.WWN == b.WWN
}

// looks is what a disk holds, to be compared.
func (d Disk) looks() string { return fmt.Sprint(d.Holds, unread(d), d.Owner, d.Parts) }

// scan looks at the disks, and says of each cache whether it is this machine's.
func (m Maker) scan() ([]Disk, error) {
	disks, err := m.Scanner.Scan()
	for i, d := range disks {
		disks[i].Foreign = !m.Machine.owns(d.Owner)
		for j, p := range d.Parts {
			d.Parts[j].Foreign = !m.Machine.owns(p.Owner)
		}
	}
	return disks, err
}

// fill makes the file system of a cache, and marks it as this machine's. Until then it is nobody's, and so everybody's: a
// mark from before would say of an mke2fs that was killed that there is a cache to repair.
func (m Maker) fill(ctx context.Context, path string) error {
	if err := unmark(path); err != nil {
		return err
	}
	if err := m.format(ctx, path, 0); err != nil {
		return err
	}
	return m.mark(path)
}

// use takes a cache that is whole.
func (m Maker) use(p place, disks []Disk, spec agentapi.Disks) (Found, error) {
	found := Found{Path: p.part.Path}
	if found.Path == "" {
		var err error
		if found.Path, err = m.show(p.disk, p.part.Entry); err != nil {
			return Found{}, err
		}
	}
	if !m.Machine.has(p.part.Owner.MAC) {
		if err := m.mark(found.Path); err != nil {
			return Found{}, err
		}
	}
	if spec.Device != "" && !p.disk.matches(spec.Device) {
		found.Note = fmt.Sprintf("not on %s: names like that change from boot to boot, those in /dev/disk/by-id do not", spec.Device)
	}
	if others := otherCaches(p, disks, spec); len(others) > 0 {
		m.Log.Warn("the machine has several caches, and uses one", "uses", found.Path, "others", others)
	}
	return found, nil
}

// finish makes the rest of a cache that was not made to the end.
func (m Maker) finish(ctx context.Context, p place) (Found, error) {
	m.Log.Warn("finishing a cache that was not made to the end", "disk", p.disk.Name)
	var err error
	switch {
	case p.part.Holds == Claimed:
		p.part, err = m.partition(p.disk)
	case p.part.Path == "":
		p.part.Path, err = m.show(p.disk, p.part.Entry)
	}
	if err != nil {
		return Found{}, fmt.Errorf("finishing the cache on %s: %w", p.disk.Name, err)
	}
	return Found{Path: p.part.Path, Made: true}, m.fill(ctx, p.part.Path)
}
