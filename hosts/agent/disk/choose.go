package disk

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// ErrNoDisk is in the chain of the error that says that no disk may hold the cache; its text says why, disk by disk.
var ErrNoDisk = errors.New("no disk for the cache")

// MinSize is the smallest disk that a cache is made on, in bytes: a base, its successor and a node delta must fit.
const MinSize = 1 << 30

// findCache returns the partition that is, or was being made, our cache. Where there are several, one that is whole
// comes first, then the one whose file system has the lowest UUID: names of disks change from boot to boot, that does
// not.
func findCache(disks []Disk, spec agentapi.Disks) (Disk, Part, bool) {
	type place struct {
		d Disk
		p Part
	}
	var found []place
	for _, d := range disks {
		if d.Err != nil || d.ReadOnly || spec.Device != "" && !d.matches(spec.Device) {
			continue
		}
		if d.Holds == Claimed {
			found = append(found, place{d, Part{Holds: Claimed}})
		}
		if d.Holds == Troupe && len(d.Parts) == 0 { // ext4 with our label on the whole disk: somebody made it by hand
			found = append(found, place{d, Part{Path: d.Path, Holds: Troupe}})
		}
		for _, p := range d.Parts {
			if p.Name == Label && (p.Holds == Troupe || unfinished(p.Holds)) {
				found = append(found, place{d, p})
			}
		}
	}
	if len(found) == 0 {
		return Disk{}, Part{}, false
	}
	slices.SortStableFunc(found, func(a, b place) int {
		if x, y := a.p.Holds == Troupe, b.p.Holds == Troupe; x != y {
			if x {
				return -1
			}
			return 1
		}
		return strings.Compare(a.p.UUID, b.p.UUID)
	})
	return found[0].d, found[0].p, true
}

// unfinished says whether a partition with our name holds what an mke2fs leaves that was killed: it writes the
// superblock last. A partition with our name that holds another format was put to another use.
func unfinished(holds string) bool { return holds == Blank || holds == Unknown }

// choose picks the disk to make a cache on: the one that the fleet names, or else the first blank one, or else, where
// the fleet lets troupe take it, the first of any content.
func choose(disks []Disk, spec agentapi.Disks, minSize int64) (Disk, error) {
	var why []string
	var taken *Disk
	named := 0
	for _, d := range disks {
		if spec.Device != "" && !d.matches(spec.Device) {
			continue
		}
		named++
		reason := unfit(d, spec, minSize)
		if reason == "" {
			return d, nil
		}
		if d.Holds != Blank && spec.Take && taken == nil && unusable(d, spec, minSize) == "" {
			taken = &d
		}
		why = append(why, reason)
	}
	switch {
	case taken != nil:
		return *taken, nil
	case spec.Device != "" && named == 0:
		return Disk{}, fmt.Errorf("%w: the machine has no %s, it has %s", ErrNoDisk, spec.Device, names(disks))
	case len(why) == 0:
		return Disk{}, fmt.Errorf("%w: the machine has no disk", ErrNoDisk)
	}
	return Disk{}, fmt.Errorf("%w: %s", ErrNoDisk, strings.Join(why, "; "))
}

// unfit says why a disk is not taken as it is; "" for a blank disk that may be used.
func unfit(d Disk, spec agentapi.Disks, minSize int64) string {
	if r := unusable(d, spec, minSize); r != "" {
		return r
	}
	if d.Holds != Blank {
		return fmt.Sprintf("%s holds %s and is left alone (disk: take: true would give it away)", d.Name, d.describe())
	}
	return ""
}

// unusable says why a disk cannot be used, whatever it holds; "" where it can.
func unusable(d Disk, spec agentapi.Disks, minSize int64) string {
	switch {
	case d.Err != nil:
		return fmt.Sprintf("%s cannot be read: %v", d.Name, d.Err)
	case d.ReadOnly:
		return d.Name + " is read-only"
	case d.InUse:
		return d.Name + " is part of another device"
	case d.Removable && spec.Device == "":
		return d.Name + " is removable (disk: device would name it)"
	case d.Size < minSize:
		return fmt.Sprintf("%s has %d MiB, %d are needed", d.Name, d.Size>>20, minSize>>20)
	}
	return ""
}

// describe says what is on the disk, for people.
func (d Disk) describe() string {
	if len(d.Parts) == 0 {
		return d.Holds
	}
	var parts []string
	for _, p := range d.Parts {
		name := p.Name
		if name == "" {
			name = fmt.Sprint(p.Number)
		}
		parts = append(parts, fmt.Sprintf("%q", name))
	}
	return fmt.Sprintf("%s with partitions %s", d.Holds, strings.Join(parts, ", "))
}

func names(disks []Disk) string {
	var out []string
	for _, d := range disks {
		out = append(out, d.Name)
	}
	if len(out) == 0 {
		return "no disk"
	}
	return strings.Join(out, ", ")
}
