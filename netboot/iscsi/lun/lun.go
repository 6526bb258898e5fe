// Package lun has what logical units keep their blocks on: files that are only read ([Image]), files that are written
// ([Disk]), and copy-on-write deltas over files that are only read ([Delta]).
//
// All three map their file into memory, and hand parts of that memory out as Segments, for the kernel alone: a page that
// is there is sent to a socket without being copied into this process. Is that safe where a file is truncated under its
// mapping? Not for a process that looks at the memory itself: it is killed by SIGBUS, which Go cannot turn into an error
// of the one read. For a system call it is: writev(2) then fails with EFAULT, as does any copy from user memory that
// faults, and vmsplice(2), which takes the pages and holds them. So this package never looks at mapped memory and only
// such calls get it; after an EFAULT the transport calls Unmapped, and from then on the medium is read with pread(2), which
// tells what is wrong with the file.
//
// What is cut off within the last page that a file keeps is read as zeros through the mapping, and nobody is told: the
// kernel fills up that page.
package lun

import (
	"errors"
	"fmt"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// BlockSize is what the sizes of all media are multiples of, in bytes: a logical block.
const BlockSize = 512

// ErrInUse says that somebody else has the file open who cannot share it.
var ErrInUse = errors.New("in use by this or another process")

// errRange says that a call left [0, Size).
var errRange = errors.New("out of range")

// mediumError says that what was done to [off, off+n) of a file did not work, with scsi.ErrMedium in its chain.
func mediumError(doing, path string, off, n int64, cause error) error {
	return fmt.Errorf("%s %q at %d, %d bytes: %w: %w", doing, path, off, n, scsi.ErrMedium, cause)
}

// within fails where [off, off+n) is no part of [0, size).
func within(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%d bytes at %d of %d: %w", n, off, size, errRange)
	}
	return nil
}

// roundUp is n, made a multiple of unit.
func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
