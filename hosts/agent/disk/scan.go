// Package disk looks at a machine's disks, says what they hold, and makes troupe's cache on one: a GPT (UEFI
// specification 2.10, section 5.3) with a partition named "troupe-cache", on it ext4 with the same label, and partitions that
// firmware boots. It
// reads without writing; only Maker writes, and only to a disk that is blank or that its owner gave away.
package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// Label is the name of the cache's partition and of its file system.
const Label = "troupe-cache"

// A Disk is a whole block device.
type Disk struct {
	Name      string // "vda"
	Path      string // "/dev/vda"
	Size      int64  // bytes
	Block     int64  // bytes of a logical block
	Model     string
	Serial    string
	WWN       string // as in "0x5000c500…", "eui.…"
	Rotary    bool
	Removable bool // or on USB: nothing to keep a machine's root on
	ReadOnly  bool
	InUse     bool              // something of the running system holds it
	Holds     string            // as Identify has it; "" where it could not be read: see Err
	Owner     agentapi.Identity // of a cache that is the whole disk
	Foreign   bool              // that cache is another machine's; only a Maker knows
	Err       error
	Parts     []Part
	Boots     bool // it has an EFI system partition that troupe made
}

// A Part is a partition of a GPT.
type Part struct {
	Entry
	Path    string            // "/dev/vda1"; "" where the kernel does not have it
	Holds   string            // looked at only where the name is Label
	UUID    string            // of its file system, where that is ours
	Owner   agentapi.Identity // of the cache
	Foreign bool              // the cache is another machine's; only a Maker knows
}

// A Scanner finds disks. The zero value looks at the machine that it runs on.
type Scanner struct {
	Sys  string                 // "" means /sys
	Dev  string                 // "" means /dev
	Keep func(name string) bool // which devices of /sys/block are disks; nil for all but loops, RAM disks and the like
}

// Scan returns the disks by name. It only reads, from /sys and from the disks.
func (s Scanner) Scan() ([]Disk, error) {
	disks, err := s.list()
	for i := range disks {
		disks[i].Err = s.withDefaults().look(&disks[i])
	}
	return disks, err
}

// list returns the disks by name, without a look at what they hold.
func (s Scanner) list() ([]Disk, error) {
	s = s.withDefaults()
	entries, err := os.ReadDir(filepath.Join(s.Sys, "block"))
	if err != nil {
		return nil, fmt.Errorf("listing disks: %w", err)
	}
	var out []Disk
	for _, e := range entries {
		if !s.Keep(e.Name()) {
			continue
		}
		if d := s.disk(e.Name()); d.Size != 0 { // else a slot without a medium
			out = append(out, d)
		}
	}
	slices.SortFunc(out, func(a, b Disk) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func (s Scanner) withDefaults() Scanner {
	if s.Sys == "" {
		s.Sys = "/sys"
	}
	if s.Dev == "" {
		s.Dev = "/dev"
	}
	if s.Keep == nil {
		s.Keep = isDisk
	}
	return s
}

// isDisk leaves out what is made of other devices, or of nothing.
func isDisk(name string) bool {
	for _, p := range []string{"loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd", "mtdblock", "drbd", "rbd", "zd"} {
		if rest, ok := strings.CutPrefix(name, p); ok && (rest == "" || rest[0] >= '0' && rest[0] <= '9') {
			return false
		}
	}
	// The boot areas of an eMMC are no place for data.
	return !strings.Contains(name, "boot") && !strings.Contains(name, "rpmb")
}

// disk reads what /sys knows.
func (s Scanner) disk(name string) Disk {
	dir := filepath.Join(s.Sys, "block", name)
	d := Disk{
		Name: name, Path: filepath.Join(s.Dev, name), Size: number(dir, "size") * 512, Block: max(512, number(dir, "queue/logical_block_size")),
		Model: text(dir, "device/model"), Rotary: number(dir, "queue/rotational") == 1,
		Removable: number(dir, "removable") == 1, ReadOnly: number(dir, "ro") == 1,
	}
	for _, f := range []string{"serial", "device/serial"} {
		if d.Serial == "" {
			d.Serial = text(dir, f)
		}
	}
	if pg80 := text(dir, "device/vpd_pg80"); d.Serial == "" && len(pg80) > 4 {
		d.Serial = strings.TrimSpace(pg80[4:]) // SCSI's unit serial number page: a header of 4 bytes, then text
	}
	for _, f := range []string{"wwid", "device/wwid"} {
		if w := text(dir, f); d.WWN == "" {
			d.WWN = strings.Replace(w, "naa.", "0x", 1)
		}
	}
	if target, err := os.Readlink(dir); err == nil && strings.Contains(target, "/usb") {
		d.Removable = true
	}
	d.InUse = s.held(dir)
	return d
}

// held says whether a device mapper, a RAID or the like sits on the disk or on a partition of it.
func (s Scanner) held(dir string) bool {
	for _, pattern := range []string{"holders/*", "*/holders/*"} {
		if m, err := filepath.Glob(filepath.Join(dir, pattern)); err == nil && len(m) > 0 {
			return true
		}
	}
	return false
}

// look reads what is on the disk.
func (s Scanner) look(d *Disk) error {
	f, err := os.Open(d.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	if d.Holds, d.Owner, err = examine(f, d.Size); err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	if d.Holds != "gpt" {
		return nil
	}
	entries, err := readGPT(f, d.Size, d.Block)
	if err != nil && !errors.Is(err, errNoGPT) {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	for _, e := range entries {
		p := Part{Entry: e, Path: s.partPath(d.Name, e)}
		if e.Name == Label {
			part := io.NewSectionReader(f, e.First, e.Size)
			if p.Holds, p.Owner, err = examine(part, e.Size); err != nil {
				return fmt.Errorf("partition %d of disk %s: %w", e.Number, d.Name, err)
			}
			p.UUID = extUUID(part)
			if p.Holds == Troupe {
				d.Holds = Troupe
			}
		}
		if e.Name == espLabel {
			d.Boots = isOurFAT(io.NewSectionReader(f, e.First, e.Size))
		}
		d.Parts = append(d.Parts, p)
	}
	return nil
}

// examine says what a device holds, and whose it is where that is a cache. A cache is marked when it is whole: where
// nothing but the mark shows, it was damaged since. An mke2fs that was killed leaves no mark (see Maker.fill).
func examine(r io.ReaderAt, size int64) (holds string, owner agentapi.Identity, err error) {
	holds, err = Identify(r, size)
	if err != nil || holds != Troupe && holds != Unknown {
		return holds, owner, err
	}
	if owner, err = ownerAt(r); err == nil && holds == Unknown && owner.MAC != "" {
		holds = Damaged
	}
	return holds, owner, err
}

// partPath is the device of a partition: the one with that number, start and size.
func (s Scanner) partPath(disk string, e Entry) string {
	for _, p := range s.kernelParts(disk) {
		if p.Number == e.Number && p.First == e.First && p.Size == e.Size {
			return p.Path
		}
	}
	return ""
}

// kernelParts are the partitions that the kernel knows of a disk. They are not those on the disk, where its table was
// changed since the kernel read it.
func (s Scanner) kernelParts(disk string) []Part {
	m, err := filepath.Glob(filepath.Join(s.Sys, "block", disk, disk+"*", "partition"))
	if err != nil {
		return nil
	}
	var out []Part
	for _, file := range m {
		dir := filepath.Dir(file)
		out = append(out, Part{
			Entry: Entry{Number: int(number(dir, "partition")), First: number(dir, "start") * 512, Size: number(dir, "size") * 512},
			Path:  filepath.Join(s.Dev, filepath.Base(dir)),
		})
	}
	return out
}

// overlaps says whether two partitions have a byte in common.
func (e Entry) overlaps(o Entry) bool { return e.First < o.First+o.Size && o.First < e.First+e.Size }

// extUUID is the UUID of an ext file system, in hex; "" for another.
func extUUID(r io.ReaderAt) string {
	sb := make([]byte, 1024)
	if _, err := r.ReadAt(sb, 1024); err != nil || sb[56] != 0x53 || sb[57] != 0xef {
		return ""
	}
	return fmt.Sprintf("%x", sb[0x68:0x78])
}

// Inventory is the disks in the words of an agent's hello.
func Inventory(disks []Disk) []agentapi.Disk {
	out := make([]agentapi.Disk, 0, len(disks))
	for _, d := range disks {
		a := agentapi.Disk{Name: d.Name, Size: d.Size, Model: d.Model, Serial: d.Serial, WWN: d.WWN, Rotary: d.Rotary, Holds: d.Holds, Boots: d.Boots}
		if d.Err != nil {
			a.Holds = "unreadable"
		}
		out = append(out, a)
	}
	return out
}

// byID is the directory of udev's links that say which disk one is, whatever name it has in this boot.
const byID = "/dev/disk/by-id/"

// isIdentity says whether a fleet names a disk by what it is. The kernel gives out names like "/dev/sda" in the order in
// which disks show, which may be another with each boot.
func isIdentity(device string) bool { return strings.HasPrefix(device, byID) }

// matches says whether the disk is the one that a fleet names: "/dev/sda", "sda", or a link of udev's in
// /dev/disk/by-id, which nobody makes in an initramfs: it is taken apart here.
func (d Disk) matches(device string) bool {
	id, ok := strings.CutPrefix(device, byID)
	if !ok {
		return strings.TrimPrefix(device, "/dev/") == d.Name
	}
	bus, rest, _ := strings.Cut(id, "-")
	serial := strings.ReplaceAll(d.Serial, " ", "_")
	switch bus {
	case "wwn":
		return d.WWN != "" && rest == d.WWN
	case "virtio":
		return serial != "" && rest == serial
	case "nvme", "ata", "scsi", "usb":
		return serial != "" && strings.HasSuffix(rest, "_"+serial) || bus == "nvme" && d.WWN != "" && rest == d.WWN
	}
	return false
}

func text(path ...string) string {
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func number(path ...string) int64 {
	n, err := strconv.ParseInt(text(path...), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// claim opens a device for writing, alone: the kernel refuses that while it is mounted or part of something.
func claim(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%s is in use: %w", path, err)
	}
	return f, err
}
