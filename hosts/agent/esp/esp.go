// Package esp keeps what a machine boots from its own disk, when no server is there: an EFI system partition with GRUB, and
// two slots, each with a kernel, its initramfs archives and the command line. GRUB hashes the files of a slot before it
// starts them, and takes the other slot where they are not what they were:
//
//	/EFI/TROUPE/GRUBX64.EFI   GRUB for UEFI, which the firmware's entry "troupe" names
//	/EFI/BOOT/BOOTX64.EFI     the same, for a firmware that lost its entries
//	/TROUPE/CURRENT           GRUB's environment block: which slot is tried first
//	/TROUPE/A, /TROUPE/B      KERNEL, AGENT, MODULES, BOOT.CFG, and SUMS with the SHA-256 of these
//
// For a BIOS, GRUB's boot.img is in the first sector of the disk, and its core.img in a partition of its own: see BIOS.
package esp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/digest"
)

var slotNames = [2]string{"a", "b"}

// Names of the files of a slot, in the order in which they lie there.
var slotFiles = []string{"KERNEL", "AGENT", "MODULES", "BOOT.CFG", "SUMS"}

// A File is one whose bytes are known by digest.
type File struct {
	Path   string
	Digest digest.Digest
	Size   int64 // bytes
}

// A Boot is what a machine starts from its disk.
type Boot struct {
	Kernel, Agent, Modules File
	Args                   []string // of the kernel, as it shall see them, without quotes
}

// An ESP is an EFI system partition that is open.
type ESP struct {
	path  string
	first int64 // where it begins, in bytes
	g     geometry
	open  func(path string) (opened, error) // replaced in tests
}

// opened is a device that must be closed.
type opened interface {
	device
	io.Closer
}

// openDevice has the kernel forget what it has of a device (BLKFLSBUF); a file of a test has no such thing.
func openDevice(path string) (opened, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil && !errors.Is(err, unix.ENOTTY) {
		f.Close()
		return nil, fmt.Errorf("reading a device anew: %w", err)
	}
	return f, nil
}

// Open takes the partition of a disk that begins at first and has size bytes, with sectors of so many bytes. Nothing is read
// or written yet.
func Open(path string, first, size, sector int64) (*ESP, error) {
	g, err := newGeometry(size, sector)
	if err != nil {
		return nil, err
	}
	return &ESP{path: path, first: first, g: g, open: openDevice}, nil
}

// A Report says what Ensure did.
type Report struct {
	Written []string // what was not as it should be, and is now; none where nothing was written
}

// Ensure makes the partition boot b by loader, a program for UEFI. It reads all of it, and writes only what is not as it should
// be, so that at each moment one slot and one copy of the loader are whole. Each write is read back from the disk before
// anything relies on it.
func (e *ESP) Ensure(loader []byte, b Boot) (Report, error) {
	var rep Report
	err := e.on(func(d device) error { return e.ensureFormat(d, &rep) })
	for i, dir := range []int64{bootDir, vendorDir} {
		if err == nil {
			err = e.ensureLoader(i, dir, loader, &rep)
		}
	}
	if err == nil {
		err = e.ensureSlots(b, &rep)
	}
	return rep, err
}

// on opens the disk. What is read then comes from the disk, and not from what the kernel still has of it.
func (e *ESP) on(f func(device) error) error {
	dev, err := e.open(e.path)
	if err != nil {
		return fmt.Errorf("opening the EFI system partition: %w", err)
	}
	defer dev.Close()
	return f(shifted{dev, e.first})
}

// A shifted device begins later on another one.
type shifted struct {
	device
	by int64
}

func (s shifted) ReadAt(b []byte, at int64) (int, error)  { return s.device.ReadAt(b, s.by+at) }
func (s shifted) WriteAt(b []byte, at int64) (int, error) { return s.device.WriteAt(b, s.by+at) }

func (e *ESP) ensureFormat(d device, rep *Report) error {
	ok, err := e.g.hasFormat(d)
	if err != nil || ok {
		return err
	}
	rep.Written = append(rep.Written, "file system")
	return e.g.format(d)
}

// Names of the loader's two files, by their directories.
var loaderNames = [2]string{"BOOTX64.EFI", "GRUBX64.EFI"}

// ensureLoader makes one of the loader's files.
func (e *ESP) ensureLoader(file int, dir int64, content []byte, rep *Report) error {
	want := bytesOf(content)
	for version := range 2 {
		found, err := e.has(dir, efiDir, e.g.loader(file, version), loaderNames[file:file+1], []part{want})
		if err != nil || found {
			return err
		}
	}
	version := 0
	err := e.on(func(d device) error { // that area is written which the directory does not name
		sector := make([]byte, e.g.sector)
		_, err := d.ReadAt(sector, e.g.at(dir))
		if first := firstOf(sector[2*entrySize:]); first == e.g.loader(file, 0).first {
			version = 1
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("reading a directory of the EFI system partition: %w", err)
	}
	rep.Written = append(rep.Written, loaderNames[file])
	if err := e.put(dir, efiDir, e.g.loader(file, version), loaderNames[file:file+1], []part{want}); err != nil {
		return err
	}
	before := e.g.loader(file, 1-version)
	return e.on(func(d device) error { return e.g.writeChains(d, before, e.g.chains(before, nil)) })
}

// ensureSlots makes the slot that is tried first boot b. The other one keeps what it has, if that is whole: the boot before,
// most often. Where it is not, it gets b, too.
func (e *ESP) ensureSlots(b Boot, rep *Report) error {
	current, err := e.current()
	if err != nil {
		return err
	}
	for _, slot := range []int{current, 1 - current} {
		has, err := e.slotHas(slot, b)
		if err != nil {
			return err
		}
		if has {
			if err := e.setCurrent(slot, rep); err != nil {
				return err
			}
			return e.ensureOther(1-slot, b, rep)
		}
	}
	slot := 1 - current
	if err := e.putSlot(slot, b, rep); err != nil {
		return err
	}
	if err := e.setCurrent(slot, rep); err != nil {
		return err
	}
	return e.ensureOther(current, b, rep)
}

func (e *ESP) ensureOther(slot int, b Boot, rep *Report) error {
	whole, err := e.isWhole(slot)
	if err != nil || whole {
		return err
	}
	return e.putSlot(slot, b, rep)
}

func slotDir(slot int) int64 { return int64(slotADir + slot) }

func (e *ESP) putSlot(slot int, b Boot, rep *Report) error {
	parts, err := slotParts(slot, b)
	if err != nil {
		return err
	}
	rep.Written = append(rep.Written, "slot "+slotNames[slot])
	return e.put(slotDir(slot), troupeDir, e.g.slot(slot), slotFiles, parts)
}

func (e *ESP) slotHas(slot int, b Boot) (bool, error) {
	parts, err := slotParts(slot, b)
	if err != nil {
		return false, err
	}
	return e.has(slotDir(slot), troupeDir, e.g.slot(slot), slotFiles, parts)
}

// current is the slot that is tried first. GRUB takes the first one where nothing is named.
func (e *ESP) current() (int, error) {
	slot := 0
	err := e.on(func(d device) error {
		b := make([]byte, envSize)
		if _, err := d.ReadAt(b, e.g.at(currentFile)); err != nil {
			return fmt.Errorf("reading which slot is booted: %w", err)
		}
		if bytes.Equal(b, envBlock(1)) {
			slot = 1
		}
		return nil
	})
	return slot, err
}

// setCurrent writes it where it is another one, or where it cannot be read.
func (e *ESP) setCurrent(slot int, rep *Report) error {
	return e.on(func(d device) error {
		b := make([]byte, envSize)
		if _, err := d.ReadAt(b, e.g.at(currentFile)); err != nil {
			return fmt.Errorf("reading which slot is booted: %w", err)
		}
		if bytes.Equal(b, envBlock(slot)) {
			return nil
		}
		rep.Written = append(rep.Written, "choice of the slot")
		if _, err := d.WriteAt(envBlock(slot), e.g.at(currentFile)); err != nil {
			return fmt.Errorf("choosing the slot: %w", err)
		}
		return d.Sync()
	})
}

// slotParts are the files of a slot that boots b.
func slotParts(slot int, b Boot) ([]part, error) {
	cfg, err := bootCfg(slotNames[slot], b.Args)
	if err != nil {
		return nil, err
	}
	parts := []part{fileOf(b.Kernel), fileOf(b.Agent), fileOf(b.Modules), bytesOf(cfg)}
	var sums strings.Builder
	for i, p := range parts {
		fmt.Fprintf(&sums, "%s  %s\n", p.digest.Hex(), strings.ToLower(slotFiles[i]))
	}
	return append(parts, bytesOf([]byte(sums.String()))), nil
}

// bootCfg are GRUB's commands that start a slot. GRUB takes what stands between single quotes as it is, puts double quotes
// round an argument with a space in it, and a backslash before quotes and backslashes (2.06, lib/cmdline.c), which no
// kernel takes away again: what has one of these cannot be passed on.
func bootCfg(slot string, args []string) ([]byte, error) {
	var b strings.Builder
	b.WriteString("linux $esp/troupe/" + slot + "/kernel")
	for _, a := range args {
		if strings.ContainsAny(a, "'\"\\\n\x00") || a == "" {
			return nil, fmt.Errorf("kernel argument %q: the boot loader on the disk cannot pass it on", a)
		}
		b.WriteString(" '" + a + "'")
	}
	b.WriteString("\ninitrd $esp/troupe/" + slot + "/agent $esp/troupe/" + slot + "/modules\nboot\n")
	return []byte(b.String()), nil
}

// isWhole says whether a slot has files, and each is what the slot's own sums say of it.
func (e *ESP) isWhole(slot int) (bool, error) {
	whole := false
	err := e.on(func(d device) error {
		runs, err := e.runs(d, slotDir(slot), len(slotFiles))
		if err != nil || runs == nil {
			return err
		}
		a := e.g.slot(slot)
		sizes := make([]int64, len(runs))
		for i, r := range runs {
			sizes[i] = r.size
		}
		placed, err := e.g.place(a, sizes)
		if err != nil {
			return nil //nolint:nilerr // a directory with such sizes is not ours
		}
		if ok, err := e.describes(d, slotDir(slot), troupeDir, a, slotFiles, placed); err != nil || !ok {
			return err
		}
		var sums strings.Builder
		for i, r := range placed[:len(placed)-1] {
			got, _, err := digest.FromReader(io.NewSectionReader(d, e.g.at(r.first), r.size))
			if err != nil {
				return fmt.Errorf("reading slot %s: %w", slotNames[slot], err)
			}
			fmt.Fprintf(&sums, "%s  %s\n", got.Hex(), strings.ToLower(slotFiles[i]))
		}
		last := placed[len(placed)-1]
		if last.size != int64(sums.Len()) {
			return nil
		}
		is := make([]byte, last.size)
		if _, err := d.ReadAt(is, e.g.at(last.first)); err != nil {
			return fmt.Errorf("reading slot %s: %w", slotNames[slot], err)
		}
		whole = string(is) == sums.String()
		return nil
	})
	return whole, err
}

// runs are the files that a directory names; nil where it does not have so many.
func (e *ESP) runs(d device, dir int64, n int) ([]run, error) {
	sector := make([]byte, e.g.sector)
	if _, err := d.ReadAt(sector, e.g.at(dir)); err != nil {
		return nil, fmt.Errorf("reading a directory of the EFI system partition: %w", err)
	}
	out := make([]run, n)
	for i := range out {
		b := sector[(2+i)*entrySize:][:entrySize]
		if b[0] == 0 {
			return nil, nil
		}
		out[i] = run{firstOf(b), sizeOf(b)}
	}
	return out, nil
}
