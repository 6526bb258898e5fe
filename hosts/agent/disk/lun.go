package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrHolds says that a LUN holds what nobody told a Maker to overwrite.
var ErrHolds = errors.New("it holds something else than a node disk")

// The file system leaves the last lunTail bytes of a LUN free. While it is being made, their last lunBlock bytes begin with
// claimText: what is found then has no name yet, and nothing that anybody wrote is in it.
const (
	lunTail  = 1 << 20
	lunBlock = 4096
)

// EnsureLUN returns the file system on a LUN that the server has for this machine alone: no other machine's disk can be
// taken for it, so nothing is searched, and no late disk is waited for. The file system lies on the whole of it, without
// a table. It is made where the LUN is blank, and where making it was broken off. One that lost its first superblock is
// repaired from another. Anything else is not written to: the error wraps ErrHolds. Machine is to be nobody: whose the
// disk is, is the server's to say.
func (m Maker) EnsureLUN(ctx context.Context, path string, size int64) (Found, error) {
	ctx = context.WithoutCancel(ctx) // what is broken off leaves more to do
	is, err := lookAtLUN(path, size)
	if err != nil {
		return Found{}, fmt.Errorf("looking at the node disk %s: %w", path, err)
	}
	switch {
	case is.holds == Troupe || is.holds == Damaged:
		return Found{Path: path}, nil
	case is.holds == Blank || is.isClaimed && is.backup == nil:
		m.Log.Warn("making the node disk", "disk", path, "size_mib", size>>20, "holds", is.holds)
		found := Found{Path: path, Made: true}
		if is.holds != Blank {
			found.Note = "which was not made to the end"
		}
		return found, m.makeLUN(ctx, path, size)
	case is.backup != nil:
		return m.restoreLUN(ctx, path, *is.backup)
	}
	return Found{}, fmt.Errorf("node disk %s: %w: %s", path, ErrHolds, is.holds)
}

// lunLook is what a LUN holds.
type lunLook struct {
	holds     string      // as Identify has it
	isClaimed bool        // looked at only where that is Unknown, as is backup
	backup    *superblock // nil: there is none
}

func lookAtLUN(path string, size int64) (is lunLook, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return is, err
	}
	defer f.Close()
	if is.holds, err = Identify(f, size); err != nil || is.holds != Unknown {
		return is, err
	}
	p := probe{r: f, size: size}
	is.isClaimed = bytes.HasPrefix(p.read(size-lunBlock, lunBlock), []byte(claimText))
	is.backup = p.backup()
	return is, p.err
}

// A superblock is a copy of the one that a file system begins with.
type superblock struct {
	number int64 // of its block
	block  int64 // bytes of a block
}

// backup finds a copy of the superblock of a file system of ours; nil: there is none. They lie at the beginning of the
// block groups 1 and those that are powers of 3, 5 and 7 (ext4's sparse_super); a group has 8 blocks for each byte of a
// block. In blocks of 1 KiB the first one belongs to no group.
func (p *probe) backup() *superblock {
	for _, block := range []int64{4096, 1024, 2048} {
		for _, group := range []int64{1, 3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343} {
			number := group * 8 * block
			if block == 1024 {
				number++
			}
			if (number+1)*block > p.size {
				break
			}
			sb := p.read(number*block, 1024)
			if p.err != nil {
				return nil
			}
			isExt := sb[0x38] == 0x53 && sb[0x39] == 0xef
			if isExt && extLabel(sb) == Label && int64(binary.LittleEndian.Uint16(sb[0x5a:])) == group {
				return &superblock{number: number, block: block}
			}
		}
	}
	return nil
}

// makeLUN makes the file system of a node disk.
func (m Maker) makeLUN(ctx context.Context, path string, size int64) error {
	if err := writeTail(path, size, claimText); err != nil {
		return fmt.Errorf("claiming the node disk: %w", err)
	}
	if err := m.format(ctx, path, size-lunTail); err != nil {
		return err
	}
	if err := writeTail(path, size, ""); err != nil {
		return fmt.Errorf("finishing the node disk: %w", err)
	}
	return nil
}

// writeTail writes the last block of a LUN.
func writeTail(path string, size int64, text string) error {
	f, err := claim(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, lunBlock)
	copy(b, text)
	if _, err := f.WriteAt(b, size-lunBlock); err != nil {
		return err
	}
	return f.Sync()
}

// restoreLUN repairs a file system without its first superblock.
func (m Maker) restoreLUN(ctx context.Context, path string, from superblock) (Found, error) {
	m.Log.Error("the superblock of the node disk is gone; it is repaired from another", "disk", path, "block", from.number)
	found := Found{Path: path}
	result, err := m.repairLUN(ctx, &found, "-b", strconv.FormatInt(from.number, 10), "-B", strconv.FormatInt(from.block, 10))
	if err != nil {
		return Found{}, err
	}
	if is, err := m.look(path); err != nil || !is.hasMagic {
		return Found{}, errors.Join(err, fmt.Errorf("node disk %s: %w that can be used: it has lost its superblock, and e2fsck ended with status %d: %s",
			path, ErrHolds, result.status, result.said))
	}
	return found, nil
}

// repairLUN checks a node disk, and mends what can be mended. Before that it looks whether all can be read, and changes
// nothing where it cannot: e2fsck would put zeros in the place of what it does not get, and throw away what hangs on it,
// be it that the server could give it a minute later.
func (m Maker) repairLUN(ctx context.Context, found *Found, mode ...string) (checked, error) {
	seen, err := m.fsck(ctx, &Found{Path: found.Path}, append([]string{"-f", "-n"}, mode...)...)
	if err != nil {
		return seen, err
	}
	if seen.unread != "" {
		return seen, fmt.Errorf("node disk %s: some of it cannot be read, and so it is not repaired: %s", found.Path, seen.unread)
	}
	return m.fsck(ctx, found, append([]string{"-f", "-y"}, mode...)...)
}

// MountLUN mounts a node disk of size bytes that EnsureLUN returned on dir, as Mount does a cache. But nothing that is on
// it can be fetched again, and people can have the server make a blank one. So it is made anew only where all of it was
// read, it has its superblock, and e2fsck says that errors are left; else an error that wraps ErrHolds says how it is.
func (m Maker) MountLUN(ctx context.Context, found Found, size int64, dir string) (Found, error) {
	ctx = context.WithoutCancel(ctx) // a repair that is broken off leaves more to repair
	was, err := m.look(found.Path)
	if err != nil {
		return found, err
	}
	if was.hasErrors {
		m.Log.Warn("the node disk has errors, checking it", "disk", found.Path)
		if _, err := m.repairLUN(ctx, &found); err != nil {
			return found, err
		}
	}
	if err = Mount(found.Path, dir); !isDamage(err) {
		return found, err
	}
	m.Log.Error("the node disk does not mount, repairing it", "disk", found.Path, "error", err)
	result, repairErr := m.repairLUN(ctx, &found)
	if repairErr != nil {
		return found, errors.Join(err, repairErr)
	}
	if err = Mount(found.Path, dir); !m.isBeyondRepair(found.Path, err) {
		return found, err
	}
	is, lookErr := m.look(found.Path)
	if lookErr != nil || !is.hasMagic || result.status&fsckUncorrected == 0 || result.unread != "" {
		return found, errors.Join(lookErr, fmt.Errorf("node disk %s: %w that mounts, and e2fsck ended with status %d: %s: %w",
			found.Path, ErrHolds, result.status, result.said, err))
	}
	return m.anew(found, dir, err, func() error { return m.makeLUN(ctx, found.Path, size) })
}

// Trim gives back the space of what was deleted in the file system at dir (ioctl FITRIM of linux/fs.h). A disk that takes
// nothing back is no error.
func Trim(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fitrim(f); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOTTY) {
		return fmt.Errorf("giving back the free space of %s: %w", dir, err)
	}
	return nil
}
