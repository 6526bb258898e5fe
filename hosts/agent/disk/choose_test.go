package disk

import (
	"errors"
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

func TestChoose(t *testing.T) {
	const big = 10 << 30
	blank := Disk{Name: "sdb", Size: big, Holds: Blank}
	foreign := with(cacheOn("sda", "aaa", Troupe), func(d *Disk) {
		d.Parts[0].Owner, d.Parts[0].Foreign = agentapi.Identity{MAC: "52:54:00:00:00:02"}, true
	})
	for _, tt := range []struct {
		name  string
		disks []Disk
		spec  agentapi.Disks
		want  string // a name, or part of the error
	}{
		{"first blank", []Disk{{Name: "sda", Size: big, Holds: "ext4"}, blank, {Name: "sdc", Size: big, Holds: Blank}}, agentapi.Disks{}, "sdb"},
		{"blank before taken", []Disk{{Name: "sda", Size: big, Holds: "ext4"}, blank}, agentapi.Disks{Take: true}, "sdb"},
		{"taken", []Disk{{Name: "sda", Size: big, Holds: "ext4"}}, agentapi.Disks{Take: true}, "sda"},
		{"not blank", []Disk{{Name: "sda", Size: big, Holds: "gpt", Parts: []Part{{Entry: Entry{Number: 1, Name: "root"}}}}}, agentapi.Disks{}, `sda holds gpt with partitions "root" and is left alone`},
		{"named", []Disk{{Name: "sda", Size: big, Holds: Blank}, blank}, agentapi.Disks{Device: "/dev/sdb"}, "sdb"},
		{"named but full", []Disk{{Name: "sda", Size: big, Holds: "xfs"}, blank}, agentapi.Disks{Device: "/dev/sda"}, "sda holds xfs"},
		{"named by id", []Disk{{Name: "sda", Size: big, Holds: Blank}, {Name: "sdb", Size: big, Holds: Blank, Serial: "S1 2"}}, agentapi.Disks{Device: "/dev/disk/by-id/ata-Maker_Disk_S1_2"}, "sdb"},
		{"named by wwn", []Disk{{Name: "sda", Size: big, Holds: Blank}, {Name: "sdb", Size: big, Holds: Blank, WWN: "0x5000c5"}}, agentapi.Disks{Device: "/dev/disk/by-id/wwn-0x5000c5"}, "sdb"},
		{"named by virtio serial", []Disk{{Name: "vda", Size: big, Holds: Blank, Serial: "cache0"}}, agentapi.Disks{Device: "/dev/disk/by-id/virtio-cache0"}, "vda"},
		{"removable", []Disk{{Name: "sda", Size: big, Holds: Blank, Removable: true}}, agentapi.Disks{}, "sda is removable"},
		{"another machine's cache", []Disk{foreign}, agentapi.Disks{}, `sda holds the cache of another machine (MAC "52:54:00:00:00:02"`},
		{"blank before another machine's cache", []Disk{foreign, blank}, agentapi.Disks{Take: true}, "sdb"},
		{"another machine's cache before other data", []Disk{{Name: "sd", Size: big, Holds: "xfs"}, foreign, {Name: "sdx", Size: big, Holds: "xfs"}}, agentapi.Disks{Take: true}, "sda"},
		{"removable, not blank, named as another may be", []Disk{{Name: "sda", Size: big, Holds: "vfat", Removable: true}}, agentapi.Disks{Device: "/dev/sda", Take: true}, "sda is removable and holds vfat"},
		{"removable, not blank, named", []Disk{{Name: "sda", Size: big, Holds: "vfat", Removable: true, Serial: "S1"}}, agentapi.Disks{Device: "/dev/disk/by-id/usb-X_S1", Take: true}, "sda"},
		{"one name, two disks", []Disk{{Name: "sda", Size: big, Holds: "xfs", Serial: "S1"}, {Name: "sdb", Size: big, Holds: Blank, Serial: "X_S1"}}, agentapi.Disks{Device: "/dev/disk/by-id/ata-Y_X_S1", Take: true}, "is the name of several: sda, sdb"},
		{"one disk, two ways", []Disk{{Name: "sda", Size: big, Holds: Blank, WWN: "0x5a"}, {Name: "sdb", Size: big, Holds: Blank, WWN: "0x5a"}}, agentapi.Disks{Device: "/dev/disk/by-id/wwn-0x5a"}, "sda"},
		{"removable but named", []Disk{{Name: "sda", Size: big, Holds: Blank, Removable: true}}, agentapi.Disks{Device: "/dev/sda"}, "sda"},
		{"read-only, with take", []Disk{{Name: "sda", Size: big, Holds: "ext4", ReadOnly: true}}, agentapi.Disks{Take: true}, "sda is read-only"},
		{"in use, with take", []Disk{{Name: "sda", Size: big, Holds: "ext4", InUse: true}}, agentapi.Disks{Take: true}, "sda is part of another device"},
		{"small", []Disk{{Name: "sda", Size: 100 << 20, Holds: Blank}}, agentapi.Disks{Take: true}, "sda has 100 MiB, 1024 are needed"},
		{"none", nil, agentapi.Disks{}, "the machine has no disk"},
		{"not there", []Disk{blank}, agentapi.Disks{Device: "/dev/nvme0n1"}, "the machine has no /dev/nvme0n1, it has sdb"},
	} {
		d, err := choose(tt.disks, tt.spec, MinSize)
		got := d.Name
		if err != nil {
			got = err.Error()
			if !errors.Is(err, ErrNoDisk) {
				t.Errorf("%s: error %v", tt.name, err)
			}
		}
		if got != tt.want && (err == nil || !strings.Contains(got, tt.want)) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// cacheOn is a disk with a cache, or with what is left of making one.
func cacheOn(name, uuid, holds string) Disk {
	d := Disk{Name: name, Size: 10 << 30, Holds: "gpt", Parts: []Part{{Entry: Entry{Number: 1, Name: Label}, Path: "/dev/" + name + "1", Holds: holds, UUID: uuid}}}
	if holds == Troupe {
		d.Holds = Troupe
	}
	return d
}

func with(d Disk, changes ...func(*Disk)) Disk {
	for _, change := range changes {
		change(&d)
	}
	return d
}

func removable(d *Disk) { d.Removable = true }

// own marks the cache of a disk as this machine's.
func own(d *Disk) { d.Parts[0].Owner = agentapi.Identity{MAC: "52:54:00:00:00:01"} }

func TestFindCache(t *testing.T) {
	serial := func(s string) func(*Disk) { return func(d *Disk) { d.Serial = s } }
	for _, tt := range []struct {
		name  string
		disks []Disk
		spec  agentapi.Disks
		want  string
	}{
		{"the lowest UUID", []Disk{cacheOn("sda", "bbb", Troupe), cacheOn("sdb", "aaa", Troupe), cacheOn("sdc", "", Blank)}, agentapi.Disks{}, "sdb"},
		{"the same under other names", []Disk{cacheOn("sda", "", Blank), cacheOn("sdb", "aaa", Troupe), cacheOn("sdc", "bbb", Troupe)}, agentapi.Disks{}, "sdb"},
		{"the named one", []Disk{cacheOn("sdb", "aaa", Troupe), cacheOn("sdc", "bbb", Troupe)}, agentapi.Disks{Device: "/dev/sdc"}, "sdc"},
		{"where the name is another disk's now", []Disk{{Name: "sda", Holds: "xfs"}, cacheOn("sdb", "aaa", Troupe)}, agentapi.Disks{Device: "/dev/sda", Take: true}, "sdb"},
		{"where the name is a blank disk's now", []Disk{{Name: "sda", Holds: Blank}, cacheOn("sdb", "aaa", Troupe)}, agentapi.Disks{Device: "/dev/sda"}, "sdb"},
		{"whole, before one that is not, on the named disk", []Disk{cacheOn("sda", "", Unknown), cacheOn("sdb", "aaa", Troupe)}, agentapi.Disks{Device: "/dev/sda"}, "sdb"},
		{"only on the disk of that id", []Disk{with(cacheOn("sda", "aaa", Troupe), serial("S1")), {Name: "sdb", Serial: "S2", Holds: Blank}}, agentapi.Disks{Device: "/dev/disk/by-id/ata-X_S2"}, ""},
		{"not on a stick", []Disk{with(cacheOn("sda", "aaa", Troupe), removable), cacheOn("sdb", "bbb", Troupe)}, agentapi.Disks{}, "sdb"},
		{"on a stick that is named", []Disk{with(cacheOn("sda", "bbb", Troupe), removable), cacheOn("sdb", "aaa", Troupe)}, agentapi.Disks{Device: "/dev/sda"}, "sda"},
		{"not on a stick, if another is named", []Disk{with(cacheOn("sda", "aaa", Troupe), removable), {Name: "sdb", Holds: Blank}}, agentapi.Disks{Device: "/dev/sdb"}, ""},
		{"its own, on a stick that had the name", []Disk{{Name: "sda", Holds: "xfs"}, with(cacheOn("sdb", "aaa", Troupe), removable, own)}, agentapi.Disks{Device: "/dev/sda", Take: true}, "sdb"},
		{"its own, on a stick after one that stays", []Disk{{Name: "sda", Holds: "xfs"}, with(cacheOn("sdb", "aaa", Troupe), removable, own), cacheOn("sdc", "bbb", Troupe)}, agentapi.Disks{Device: "/dev/sda"}, "sdc"},
		{"its own, on a stick that another id is not", []Disk{with(cacheOn("sda", "aaa", Troupe), removable, own), {Name: "sdb", Serial: "S2", Holds: Blank}}, agentapi.Disks{Device: "/dev/disk/by-id/ata-X_S2"}, ""},
		{"its own, on a stick of which the fleet says nothing", []Disk{with(cacheOn("sda", "aaa", Troupe), removable, own)}, agentapi.Disks{}, ""},
		{"another machine's, on a stick", []Disk{{Name: "sda", Holds: "xfs"}, with(cacheOn("sdb", "aaa", Troupe), removable, own, func(d *Disk) { d.Parts[0].Foreign = true })}, agentapi.Disks{Device: "/dev/sda"}, ""},
		{"not on a disk that cannot be read", []Disk{with(cacheOn("sda", "aaa", Troupe), func(d *Disk) { d.Err = errCut })}, agentapi.Disks{}, ""},
		{"not on a read-only disk", []Disk{with(cacheOn("sda", "aaa", Troupe), func(d *Disk) { d.ReadOnly = true })}, agentapi.Disks{}, ""},
		{"not one of another machine", []Disk{with(cacheOn("sda", "aaa", Troupe), func(d *Disk) { d.Parts[0].Foreign = true }), cacheOn("sdb", "bbb", Troupe)}, agentapi.Disks{}, "sdb"},
		{"not in a partition with another use", []Disk{cacheOn("sda", "", "xfs")}, agentapi.Disks{}, ""},
	} {
		p, ok := findCache(tt.disks, tt.spec)
		if p.disk.Name != tt.want || ok != (tt.want != "") {
			t.Errorf("%s: found %v, %q, want %q", tt.name, ok, p.disk.Name, tt.want)
		}
	}
	damaged := []Disk{cacheOn("sda", "", Unknown), cacheOn("sdb", "", Damaged), with(cacheOn("sdc", "", Damaged), func(d *Disk) { d.Parts[0].Foreign = true })}
	if p, ok := findDamaged(damaged[1:], agentapi.Disks{Device: "/dev/sdc"}); !ok || p.disk.Name != "sdb" {
		t.Errorf("damaged: found %v, %q", ok, p.disk.Name)
	}
	if p, ok := findUnfinished(damaged, agentapi.Disks{Device: "/dev/sdb"}); !ok || p.disk.Name != "sda" {
		t.Errorf("unfinished: found %v, %q", ok, p.disk.Name)
	}
	for _, holds := range []string{"xfs", Troupe, Damaged} {
		if p, ok := findUnfinished([]Disk{cacheOn("sda", "", holds)}, agentapi.Disks{}); ok {
			t.Errorf("a partition that holds %s is to be finished: %+v", holds, p)
		}
	}
}

// TestNoCacheIsMadeWhileThereMayBeOne has a disk that cannot say what it holds.
func TestNoCacheIsMadeWhileThereMayBeOne(t *testing.T) {
	const big = 10 << 30
	bad := Disk{Name: "sdb", Size: big, WWN: "0x5b", Err: errCut}
	for _, tt := range []struct {
		name  string
		disks []Disk
		spec  agentapi.Disks
		want  string // a name, or part of the error
	}{
		{"blank", []Disk{{Name: "sda", Size: big, Holds: Blank}, bad}, agentapi.Disks{}, "so sda is left alone"},
		{"taken", []Disk{{Name: "sda", Size: big, Holds: "xfs"}, bad}, agentapi.Disks{Take: true}, "sdb cannot be read: power cut"},
		{"named, taken", []Disk{{Name: "sda", Size: big, Holds: "xfs"}, bad}, agentapi.Disks{Take: true, Device: "/dev/sda"}, "so sda is left alone"},
		{"named, blank", []Disk{{Name: "sda", Size: big, Holds: Blank}, bad}, agentapi.Disks{Device: "/dev/sda"}, "sda"},
		{"identified, taken", []Disk{{Name: "sda", Size: big, Holds: "xfs", WWN: "0x5a"}, bad}, agentapi.Disks{Take: true, Device: "/dev/disk/by-id/wwn-0x5a"}, "sda"},
		{"a stick", []Disk{{Name: "sda", Size: big, Holds: Blank}, with(bad, removable)}, agentapi.Disks{}, "sda"},
		{"a stick, where a stick may have had the name", []Disk{{Name: "sda", Size: big, Holds: "xfs"}, with(bad, removable)}, agentapi.Disks{Take: true, Device: "/dev/sda"}, "sdb cannot be read: power cut"},
		{"a stick with nobody's cache", []Disk{{Name: "sda", Size: big, Holds: "xfs"}, with(cacheOn("sdb", "a", Troupe), removable)}, agentapi.Disks{Take: true, Device: "/dev/sda"}, "sdb is removable and has a cache"},
		{"a stick with the beginning of a cache", []Disk{{Name: "sda", Size: big, Holds: "xfs"}, {Name: "sdb", Size: big, Holds: Claimed, Removable: true}}, agentapi.Disks{Take: true, Device: "/dev/sda"}, "so sda is left alone"},
		{"a stick with its own cache, read-only", []Disk{{Name: "sda", Size: big, Holds: "xfs"}, with(cacheOn("sdb", "a", Troupe), removable, own, func(d *Disk) { d.ReadOnly = true })}, agentapi.Disks{Take: true, Device: "/dev/sda"}, "sdb has a cache and is read-only"},
		{"a damaged cache, read-only", []Disk{{Name: "sda", Size: big, Holds: Blank}, with(cacheOn("sdb", "", Damaged), func(d *Disk) { d.ReadOnly = true })}, agentapi.Disks{}, "sdb has a cache and is read-only"},
		{"a stick with another machine's cache", []Disk{{Name: "sda", Size: big, Holds: "xfs"}, with(cacheOn("sdb", "a", Troupe), removable, func(d *Disk) { d.Parts[0].Foreign = true })}, agentapi.Disks{Take: true, Device: "/dev/sda"}, "sda"},
		{"a stick with nobody's cache, another disk identified", []Disk{{Name: "sda", Size: big, Holds: "xfs", WWN: "0x5a"}, with(cacheOn("sdb", "a", Troupe), removable)}, agentapi.Disks{Take: true, Device: "/dev/disk/by-id/wwn-0x5a"}, "sda"},
		{"a stick with nobody's cache, a blank disk named", []Disk{{Name: "sda", Size: big, Holds: Blank}, with(cacheOn("sdb", "a", Troupe), removable)}, agentapi.Disks{Device: "/dev/sda"}, "sda"},
		{"a second way to the same disk", []Disk{{Name: "sda", Size: big, Holds: Blank, WWN: "0x5b"}, bad}, agentapi.Disks{}, "sda"},
		{"a read-only cache", []Disk{{Name: "sda", Size: big, Holds: Blank}, with(cacheOn("sdb", "a", Troupe), func(d *Disk) { d.ReadOnly = true })}, agentapi.Disks{}, "sdb has a cache and is read-only"},
		{"another machine's, read-only", []Disk{{Name: "sda", Size: big, Holds: Blank}, with(cacheOn("sdb", "a", Troupe), func(d *Disk) { d.ReadOnly, d.Parts[0].Foreign = true, true })}, agentapi.Disks{}, "sda"},
		{"a read-only disk", []Disk{{Name: "sda", Size: big, Holds: Blank}, {Name: "sdb", ReadOnly: true, Holds: "iso9660"}}, agentapi.Disks{}, "sda"},
	} {
		d, err := choose(tt.disks, tt.spec, MinSize)
		got := d.Name
		if err != nil {
			got = err.Error()
		}
		if got != tt.want && (err == nil || !errors.Is(err, ErrNoDisk) || !strings.Contains(got, tt.want)) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
