package esp

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// A BIOS reads the first sector of a disk, and starts it. GRUB's (boot.img, grub-core/boot/i386/pc/boot.S in 2.06) reads one
// more, and that one (diskboot.img, the first sector of core.img) reads the rest:
//
//	first sector   0x003-0x05a  parameters of the BIOS: left as they are
//	               0x05c        sector of the disk where core.img begins, 8 bytes
//	               0x064        drive to read from; 0xff: the one that the BIOS names
//	               0x066        two bytes that become 0x90 0x90 for a hard disk: do not believe a BIOS that names a floppy
//	               0x1b8-0x1fe  signature of the disk and table of partitions: left as they are
//	core.img       0x1f4        sector of the disk where its second sector lies, 8 bytes
//	               0x1fc        how many sectors there are from that one on, 2 bytes
//
// Two copies of core.img have room in its partition. The one that is not started is written, and then the first sector,
// which a disk writes whole or not at all.
const (
	bootBytes    = 512 // a BIOS reads so many, also of a disk with larger sectors
	kernelSector = 0x5c
	driveCheck   = 0x66
	tableAt      = 0x1b8
	tableEnd     = 0x1fe
	blockStart   = 0x1f4
	blockLen     = 0x1fc
)

// A BIOS is what a machine without UEFI starts: the first sector of a disk, and the partition that GRUB's core.img lies in.
type BIOS struct {
	Disk        string // path
	First, Size int64  // of the partition, in bytes
	Sector      int64  // bytes; other ones than 512 no BIOS boots
}

// Ensure makes the disk start core by boot, and says whether it wrote anything.
func (b BIOS) Ensure(boot, core []byte) (written bool, err error) {
	if b.Sector != bootBytes {
		return false, nil
	}
	if err := b.check(boot, core); err != nil {
		return false, err
	}
	now := make([]byte, bootBytes)
	if err := b.on(func(d device) error { _, err := d.ReadAt(now, 0); return err }); err != nil {
		return false, fmt.Errorf("reading the first sector: %w", err)
	}
	for copyOf := range 2 {
		has, err := b.has(copyOf, core)
		if err != nil {
			return false, err
		}
		if has && bytes.Equal(now, b.firstSector(now, boot, copyOf)) {
			return false, nil
		}
	}
	next := 0
	if binary.LittleEndian.Uint64(now[kernelSector:]) == uint64(b.at(0)/bootBytes) { //nolint:gosec // no place is negative
		next = 1
	}
	return true, b.put(next, now, boot, core)
}

// at is where a copy of core.img begins, in bytes.
func (b BIOS) at(copyOf int) int64 { return b.First + int64(copyOf)*(b.Size/2/bootBytes*bootBytes) }

func (b BIOS) check(boot, core []byte) error {
	sectors := (len(core) + bootBytes - 1) / bootBytes
	switch {
	case len(boot) != bootBytes || boot[510] != 0x55 || boot[511] != 0xaa:
		return fmt.Errorf("the boot loader for a BIOS has a first sector of %d bytes that is none", len(boot))
	case len(core) <= bootBytes || int(binary.LittleEndian.Uint16(core[blockLen:])) != sectors-1:
		return fmt.Errorf("the boot loader for a BIOS has %d bytes, and not as many sectors as it says", len(core))
	case int64(sectors)*bootBytes > b.Size/2:
		return fmt.Errorf("the boot loader for a BIOS has %d bytes, and %d have room", len(core), b.Size/2)
	}
	return nil
}

func (b BIOS) firstSector(now, boot []byte, copyOf int) []byte {
	s := bytes.Clone(boot)
	copy(s[3:0x5a], now[3:0x5a])
	copy(s[tableAt:tableEnd], now[tableAt:tableEnd])
	binary.LittleEndian.PutUint64(s[kernelSector:], uint64(b.at(copyOf)/bootBytes)) //nolint:gosec // no place is negative
	s[driveCheck], s[driveCheck+1] = 0x90, 0x90
	return s
}

func (b BIOS) patched(copyOf int, core []byte) []byte {
	s := bytes.Clone(core)
	binary.LittleEndian.PutUint64(s[blockStart:], uint64(b.at(copyOf)/bootBytes+1)) //nolint:gosec // no place is negative
	return s
}

func (b BIOS) has(copyOf int, core []byte) (bool, error) {
	got := make([]byte, len(core))
	err := b.on(func(d device) error {
		_, err := d.ReadAt(got, b.at(copyOf))
		return err
	})
	if err != nil {
		return false, fmt.Errorf("reading the boot loader for a BIOS: %w", err)
	}
	return bytes.Equal(got, b.patched(copyOf, core)), nil
}

func (b BIOS) put(copyOf int, now, boot, core []byte) error {
	padded := append(b.patched(copyOf, core), make([]byte, -len(core)&(bootBytes-1))...)
	err := b.on(func(d device) error {
		if _, err := d.WriteAt(padded, b.at(copyOf)); err != nil {
			return err
		}
		return d.Sync()
	})
	if err == nil {
		var ok bool
		if ok, err = b.has(copyOf, core); err == nil && !ok {
			err = errNotWhole
		}
	}
	if err == nil {
		err = b.on(func(d device) error {
			if _, err := d.WriteAt(b.firstSector(now, boot, copyOf), 0); err != nil {
				return err
			}
			return d.Sync()
		})
	}
	if err != nil {
		return fmt.Errorf("writing the boot loader for a BIOS: %w", err)
	}
	return nil
}

// on opens the disk. Its other partitions may be mounted: the kernel allows writes beside them.
func (b BIOS) on(f func(device) error) error {
	d, err := openDevice(b.Disk)
	if err != nil {
		return err
	}
	defer d.Close()
	return f(d)
}
