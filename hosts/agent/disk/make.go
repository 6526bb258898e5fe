package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// show makes the kernel see a partition that it did not find itself.
func (m Maker) show(d Disk, e Entry) (string, error) {
	f, err := os.OpenFile(d.Path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("opening the disk %s: %w", d.Name, err)
	}
	defer f.Close()
	return m.appear(f, d, e)
}

// partition writes the table and returns the cache's partition. What else was on the disk is wiped before, as far as it
// would be seen again. First of all the kernel forgets the partitions that it knows: one of them may have our number and
// start where ours does, and is of another size. The kernel refuses that while one is open, and nothing was written then.
func (m Maker) partition(d Disk) (Part, error) {
	f, err := claim(d.Path)
	if err != nil {
		return Part{}, err
	}
	defer f.Close()
	if err := m.forget(f, d.Name, func(Part) bool { return true }); err != nil {
		return Part{}, err
	}
	if d.Holds != Blank {
		if err := wipe(f, d.Size, d.Block); err != nil {
			return Part{}, err
		}
	}
	if err := writeGPT(f, d.Size, d.Block, Label); err != nil {
		return Part{}, err
	}
	entries, err := readGPT(f, d.Size, d.Block)
	i := slices.IndexFunc(entries, func(e Entry) bool { return e.Name == Label })
	if err != nil || i < 0 {
		return Part{}, fmt.Errorf("reading the partition table back: %d partitions and none of them the cache's, %w", len(entries), err)
	}
	path, err := m.appear(f, d, entries[i])
	return Part{Entry: entries[i], Path: path}, err
}

// wipe zeroes the parts of a disk that Identify reads whole, and as much of the partition to be: no format finds
// itself there afterwards. Block 0 is not zeroed but claimed, first of all: a disk that was given away stays ours.
func wipe(f *os.File, size, block int64) error {
	if _, err := f.WriteAt(claimBlock(block), 0); err != nil {
		return fmt.Errorf("claiming the disk: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("claiming the disk: %w", err)
	}
	zeros := make([]byte, 1<<20)
	ranges := [][2]int64{{size - tailSize - 2*gptAlign, size}, {block, headSize + gptAlign}}
	for _, p := range layout(size, block, Label) {
		ranges = append(ranges, [2]int64{p.first, p.first + headSize})
	}
	for _, r := range ranges {
		for off := max(block, r[0]); off < min(r[1], size); off += int64(len(zeros)) {
			n := min(int64(len(zeros)), size-off)
			if _, err := f.WriteAt(zeros[:n], off); err != nil {
				return fmt.Errorf("wiping %d bytes at %d: %w", n, off, err)
			}
		}
	}
	return f.Sync()
}

// appear makes the kernel see a partition, and returns its device. A kernel that reads the table itself is asked to;
// one that does not (it was built without GPT) is told, and forgets before what it has in the place of it.
func (m Maker) appear(f *os.File, d Disk, e Entry) (string, error) {
	s := m.Scanner.withDefaults()
	if path := s.partPath(d.Name, e); path != "" {
		return path, nil
	}
	err := unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0)
	if path := s.partPath(d.Name, e); path != "" {
		return path, nil
	}
	err = errors.Join(err, m.forget(f, d.Name, func(p Part) bool { return p.Number == e.Number || p.overlaps(e) }))
	if addErr := blkpg(f, unix.BLKPG_ADD_PARTITION, e); addErr != nil {
		return "", fmt.Errorf("making the kernel see partition %d of %s: %w", e.Number, d.Name, errors.Join(err, addErr))
	}
	path := s.partPath(d.Name, e)
	if path == "" {
		return "", fmt.Errorf("partition %d of %s does not appear in %s", e.Number, d.Name, filepath.Join(s.Sys, "block", d.Name))
	}
	return path, nil
}

// forget makes the kernel forget partitions of a disk; what is in them stays where it is.
func (m Maker) forget(f *os.File, disk string, which func(Part) bool) error {
	var errs []error
	for _, p := range m.Scanner.withDefaults().kernelParts(disk) {
		if which(p) {
			errs = append(errs, blkpg(f, unix.BLKPG_DEL_PARTITION, p.Entry))
		}
	}
	return errors.Join(errs...)
}

// blkpg tells the kernel of a partition (ioctl BLKPG of linux/blkpg.h).
func blkpg(f *os.File, op int32, e Entry) error {
	p := unix.BlkpgPartition{Start: e.First, Length: e.Size, Pno: int32(e.Number)} //nolint:gosec // at most 1024
	arg := unix.BlkpgIoctlArg{Op: op, Datalen: int32(unsafe.Sizeof(p)), Data: (*byte)(unsafe.Pointer(&p))}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg)))
	switch {
	case errno == 0:
		return nil
	case op == unix.BLKPG_DEL_PARTITION:
		return fmt.Errorf("making the kernel forget partition %d of %s: %w", e.Number, f.Name(), errno)
	}
	return fmt.Errorf("adding partition %d of %s by hand: %w", e.Number, f.Name(), errno)
}

// fitrim is ioctl FITRIM of all that there is.
func fitrim(f *os.File) error {
	const fitrimCall = 0xc0185879
	r := struct{ start, length, least uint64 }{length: 1<<64 - 1}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fitrimCall, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}

// format makes ext4 with our label. mke2fs clears the place of the superblock first and writes the superblock last,
// after a flush of all the rest: where it is found, the file system is whole. Size is in bytes; 0 means all of the device.
func (m Maker) format(ctx context.Context, path string, size int64) error {
	tool := m.Mke2fs
	if tool == "" {
		tool = "/sbin/mke2fs"
	}
	// No space is kept back for root, which is who uses it; what a new file system need not write now is written later.
	args := []string{"-q", "-F", "-t", "ext4", "-L", Label, "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", path}
	if size > 0 {
		args = append(args, fmt.Sprintf("%dk", size>>10))
	}
	cmd := exec.CommandContext(ctx, tool, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("making a file system on %s: %s: %w", path, lastLine(out.String()), err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("making a file system on %s: %w", path, err)
	}
	return errors.Join(f.Sync(), f.Close())
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
