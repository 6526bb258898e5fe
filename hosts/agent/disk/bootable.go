package disk

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/troupe-dev/troupe/hosts/agent/esp"
)

// Bootable is where a disk with a cache has what firmware boots.
type Bootable struct {
	Disk      string // path of the whole disk
	Block     int64  // bytes of a logical block
	ESP, BIOS Entry  // the EFI system partition, and the one for GRUB of a BIOS; their Size is 0 where the disk has none
}

// isOurFAT says whether a partition has the file system that package esp makes.
func isOurFAT(r io.ReaderAt) bool {
	b := make([]byte, len(esp.Mark))
	_, err := r.ReadAt(b, 0)
	return err == nil && string(b) == esp.Mark
}

// Bootable finds it for the device of a cache. A cache that somebody made by hand, or an older troupe, has no place for it.
func (s Scanner) Bootable(cache string) (Bootable, error) {
	s = s.withDefaults()
	disks, err := s.list()
	if err != nil {
		return Bootable{}, err
	}
	for _, d := range disks {
		holds := func(p Part) bool { return p.Path == cache || filepath.Base(p.Path) == filepath.Base(cache) }
		if !slices.ContainsFunc(s.kernelParts(d.Name), holds) {
			continue
		}
		f, err := os.Open(d.Path)
		if err != nil {
			return Bootable{}, fmt.Errorf("reading the table of disk %s: %w", d.Name, err)
		}
		defer f.Close()
		entries, err := readGPT(f, d.Size, d.Block)
		if err != nil {
			return Bootable{}, fmt.Errorf("reading the table of disk %s: %w", d.Name, err)
		}
		b := Bootable{Disk: d.Path, Block: d.Block}
		for _, e := range entries {
			switch {
			case e.Name == espLabel && e.Number == 2: // where GRUB looks for it
				b.ESP = e
			case e.Name == biosLabel:
				b.BIOS = e
			}
		}
		return b, nil
	}
	return Bootable{}, nil // the whole disk is the cache
}
