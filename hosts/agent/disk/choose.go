package disk

import (
	"cmp"
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

// A place is where a cache is, or was being made.
type place struct {
	disk Disk
	part Part
}

// findCache returns our cache, whole. Where there are several, one on the disk that the fleet names comes first, then those
// on disks that stay in the machine, then the one whose file system has the lowest UUID: names of disks change from boot to
// boot, that does not.
func findCache(disks []Disk, spec agentapi.Disks) (place, bool) {
	return first(disks, spec, func(p Part) bool { return p.Holds == Troupe })
}

// findDamaged returns our cache where its superblock is gone.
func findDamaged(disks []Disk, spec agentapi.Disks) (place, bool) {
	return first(disks, spec, func(p Part) bool { return p.Holds == Damaged })
}

// findUnfinished returns a place where a cache was being made.
func findUnfinished(disks []Disk, spec agentapi.Disks) (place, bool) {
	return first(disks, spec, func(p Part) bool { return !isCache(p.Holds) })
}

func first(disks []Disk, spec agentapi.Disks, which func(Part) bool) (place, bool) {
	for _, p := range places(disks, spec) {
		if which(p.part) {
			return p, true
		}
	}
	return place{}, false
}

// places are all caches of this machine on disks that may be used, whole, damaged and unfinished, the best first.
func places(disks []Disk, spec agentapi.Disks) []place {
	var out []place
	for _, d := range disks {
		if !unread(d) && !d.ReadOnly && mayHold(d, spec) {
			out = append(out, placesOn(d)...)
		}
	}
	out = slices.DeleteFunc(out, func(p place) bool { return p.part.Foreign || !p.isUsable(spec) })
	slices.SortStableFunc(out, func(a, b place) int {
		return cmp.Or(rank(a.disk, spec)-rank(b.disk, spec), strings.Compare(a.part.UUID, b.part.UUID))
	})
	return out
}

// rank says how near a disk is to the one that the fleet means: the lower, the nearer.
func rank(d Disk, spec agentapi.Disks) int {
	switch {
	case d.matches(spec.Device):
		return 0
	case !d.Removable:
		return 1
	}
	return 2
}

func placesOn(d Disk) []place {
	var out []place
	if d.Holds == Claimed {
		out = append(out, place{d, Part{Holds: Claimed}})
	}
	if isCache(d.Holds) && len(d.Parts) == 0 { // ext4 with our label on the whole disk: somebody made it by hand
		out = append(out, place{d, Part{Path: d.Path, Holds: d.Holds, Owner: d.Owner, Foreign: d.Foreign}})
	}
	for _, p := range d.Parts {
		if p.Name == Label && (isCache(p.Holds) || unfinished(p.Holds)) {
			out = append(out, place{d, p})
		}
	}
	return out
}

// mayHold says whether the cache may be on a disk, as far as the fleet says. A disk that the fleet names by what it is,
// is the only one. A name of the kernel's order says only where a cache shall be made: the one that was made there is on
// the disk that had the name then, which may be any in this boot, a removable one too.
func mayHold(d Disk, spec agentapi.Disks) bool {
	switch {
	case d.matches(spec.Device):
		return true
	case isIdentity(spec.Device):
		return false
	}
	return !d.Removable || spec.Device != ""
}

// isUsable says whether a place on a disk that may hold the cache is used. A removable disk that does not have the name
// in the fleet came from anywhere: what is there is used only where the cache says that it is this machine's.
func (p place) isUsable(spec agentapi.Disks) bool {
	return !p.disk.Removable || p.disk.matches(spec.Device) || isCache(p.part.Holds) && p.part.Owner.MAC != ""
}

// otherCaches are the devices of the whole caches beside p. One disk may show twice, by two ways to it.
func otherCaches(p place, disks []Disk, spec agentapi.Disks) []string {
	var out []string
	for _, o := range places(disks, spec) {
		if o.part.Holds == Troupe && o.part.UUID != p.part.UUID {
			out = append(out, o.disk.Name)
		}
	}
	return out
}

// foreignCache is the cache of another machine on a disk.
func foreignCache(d Disk) (place, bool) {
	all := placesOn(d)
	i := slices.IndexFunc(all, func(p place) bool { return p.part.Foreign })
	if i < 0 {
		return place{}, false
	}
	return all[i], true
}

// doubts says which disks may hold the cache and cannot tell, or cannot be used although they do.
func doubts(disks []Disk, spec agentapi.Disks) []string {
	var why []string
	for _, d := range disks {
		if !mayHold(d, spec) {
			continue
		}
		if unread(d) {
			if !slices.ContainsFunc(disks, d.isOtherWayTo) {
				why = append(why, fmt.Sprintf("%s cannot be read: %v", d.Name, d.Err))
			}
			continue
		}
		for _, p := range placesOn(d) {
			if reason := p.doubt(spec); reason != "" {
				why = append(why, reason)
			}
		}
	}
	return why
}

// doubt says why a place may be that of the cache, and is not used; "" where it is used, or is no cache of this machine.
func (p place) doubt(spec agentapi.Disks) string {
	switch {
	case p.part.Foreign:
		return ""
	case p.disk.ReadOnly && isCache(p.part.Holds):
		return p.disk.Name + " has a cache and is read-only"
	case !p.isUsable(spec):
		return p.disk.Name + " is removable and has a cache, or the beginning of one, that does not say whose it is"
	}
	return ""
}

// isOtherWayTo says whether o is the same disk, and can be read: of two ways to a disk on a storage network one often
// answers every read with an error.
func (d Disk) isOtherWayTo(o Disk) bool {
	return d.WWN != "" && d.WWN == o.WWN && d.Size == o.Size && !unread(o)
}

// doubtful says why the cache is not made on d.
func doubtful(d Disk, why []string) error {
	return fmt.Errorf("%w: one that the machine has already may be on another disk, so %s is left alone (disk: device with a name of %s would settle it): %s",
		ErrNoDisk, d.Name, byID, strings.Join(why, "; "))
}

// isCache says whether a device holds a cache, whole or damaged.
func isCache(holds string) bool { return holds == Troupe || holds == Damaged }

// unfinished says whether a partition with our name holds what an mke2fs leaves that was killed: it writes the
// superblock last. A partition with our name that holds another format was put to another use.
func unfinished(holds string) bool { return holds == Blank || holds == Unknown }

// choose picks the disk to make a cache on: the one that the fleet names, or else the first blank one, or else, where
// the fleet lets troupe take it, the first with a cache of another machine, or else of any content. It picks none while it is in doubt whether there is a cache,
// but for a blank disk that the fleet names.
func choose(disks []Disk, spec agentapi.Disks, minSize int64) (Disk, error) {
	d, err := pick(disks, spec, minSize)
	if err != nil {
		return Disk{}, err
	}
	if why := doubts(disks, spec); len(why) > 0 && (d.Holds != Blank || !d.matches(spec.Device)) {
		return Disk{}, doubtful(d, why)
	}
	return d, nil
}

func pick(disks []Disk, spec agentapi.Disks, minSize int64) (Disk, error) {
	candidates, err := meant(disks, spec)
	if err != nil {
		return Disk{}, err
	}
	var why []string
	var taken *Disk
	for _, d := range candidates {
		reason := unfit(d, spec, minSize)
		if reason == "" {
			return d, nil
		}
		_, isCache := foreignCache(d)
		if d.Holds != Blank && spec.Take && (taken == nil || isCache && taken.Holds != Troupe) && unusable(d, spec, minSize) == "" {
			taken = &d
		}
		why = append(why, reason)
	}
	if taken != nil {
		return *taken, nil
	}
	return Disk{}, fmt.Errorf("%w: %s", ErrNoDisk, strings.Join(why, "; "))
}

// meant are the disks that the fleet names: all where it names none. A name that may mean two disks means none of them.
func meant(disks []Disk, spec agentapi.Disks) ([]Disk, error) {
	out := slices.Clone(disks)
	if spec.Device != "" {
		out = slices.DeleteFunc(out, func(d Disk) bool { return !d.matches(spec.Device) })
	}
	switch {
	case len(out) == 0 && spec.Device != "":
		return nil, fmt.Errorf("%w: the machine has no %s, it has %s", ErrNoDisk, spec.Device, names(disks))
	case len(out) == 0:
		return nil, fmt.Errorf("%w: the machine has no disk", ErrNoDisk)
	case spec.Device != "" && slices.ContainsFunc(out, func(d Disk) bool { return d.Name != out[0].Name && (d.WWN == "" || d.WWN != out[0].WWN) }):
		return nil, fmt.Errorf("%w: %s is the name of several: %s", ErrNoDisk, spec.Device, names(out))
	}
	return out, nil
}

// unfit says why a disk is not taken as it is; "" for a blank disk that may be used.
func unfit(d Disk, spec agentapi.Disks, minSize int64) string {
	if r := unusable(d, spec, minSize); r != "" {
		return r
	}
	if p, ok := foreignCache(d); ok {
		return fmt.Sprintf("%s holds the cache of another machine (%s) and is left alone (disk: take: true would make it this machine's)", d.Name, ownerText(p.part.Owner))
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
	case d.Removable && d.Holds != Blank && !isIdentity(spec.Device): // a stick that was left in the machine has such a name, too
		return fmt.Sprintf("%s is removable and holds %s (disk: device with a name of %s would give it away)", d.Name, d.describe(), byID)
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
