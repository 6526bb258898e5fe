package lun

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/atomicfile"
)

// A file is what a medium that is written asks of the file that it lies on.
type file interface {
	io.ReaderAt
	io.WriterAt
	// Sync brings the bytes of the file, and what is needed to find them, to stable storage: fdatasync(2).
	Sync() error
	// Punch makes [off, off+n) a hole, which reads as zeros and takes no space.
	Punch(off, n int64) error
	// Forget has what is read next come from stable storage, but for what was written since the last Sync. It must not be
	// mapped by anybody.
	Forget() error
	// Length is how many bytes the file has now.
	Length() (int64, error)
	Close() error
}

// An osFile is a file of the operating system.
type osFile struct{ *os.File }

func (f osFile) fd() int { return int(f.Fd()) }

// Sync implements file.
func (f osFile) Sync() error {
	return again(func() error { return unix.Fdatasync(f.fd()) })
}

// Punch implements file. On a file system without holes it writes zeros, as far as the file is long.
func (f osFile) Punch(off, n int64) error {
	err := again(func() error {
		return unix.Fallocate(f.fd(), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	size, err := plainSize(f)
	if err != nil {
		return err
	}
	return writeZeros(f, off, min(n, size-off))
}

// Forget implements file. After fdatasync(2) no page is dirty, and posix_fadvise(2) drops all that are not.
func (f osFile) Forget() error {
	if err := unix.Fadvise(f.fd(), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("dropping it from the page cache: %w", err)
	}
	return nil
}

// Length implements file. It asks for nothing but the size: Linux (6.13 and later) gives a file whose times were asked for a
// new time, which is journalled, with the next write, and that makes a write and its fdatasync(2) half as slow again.
func (f osFile) Length() (int64, error) {
	var st unix.Statx_t
	if err := unix.Statx(f.fd(), "", unix.AT_EMPTY_PATH, unix.STATX_SIZE, &st); err != nil {
		return 0, os.NewSyscallError("statx", err)
	}
	return int64(st.Size), nil //nolint:gosec // no file is longer than an int64 says
}

// allocated is how many bytes the file takes of its file system.
func (f osFile) allocated() (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd(), &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil // st_blocks counts 512 bytes whatever a block is otherwise (stat(2))
}

// onTmpfs says that the file lies in memory. There the first look at a hole through a mapping takes a page for good
// (shmem_fault), which pread(2) does not.
func (f osFile) onTmpfs() bool {
	var st unix.Statfs_t
	return unix.Fstatfs(f.fd(), &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// lock takes the file for this process: alone, or with others that only read it. It fails with ErrInUse. The lock ends
// with the file, or with the process.
func (f osFile) lock(alone bool) error {
	how := unix.LOCK_SH
	if alone {
		how = unix.LOCK_EX
	}
	err := again(func() error { return unix.Flock(f.fd(), how|unix.LOCK_NB) })
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return ErrInUse
	case err != nil && !alone && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOLCK)):
		return nil // a file system without locks; those who only read do each other no harm
	case err != nil:
		return fmt.Errorf("locking it: %w", err)
	}
	return nil
}

// openLocked opens path to read and write it, and makes it if need be and create says so, until it has the lock of the file
// that is there under that name.
func openLocked(path string, create bool) (f osFile, created bool, err error) {
	flags := os.O_RDWR | unix.O_NONBLOCK // a pipe would be waited for
	if create {
		flags |= os.O_CREATE
	}
	for {
		_, err := os.Stat(path)
		created := errors.Is(err, fs.ErrNotExist)
		file, err := os.OpenFile(path, flags, 0o600)
		if err != nil {
			return osFile{}, false, err
		}
		f := osFile{file}
		if err := f.lock(true); err != nil {
			return osFile{}, false, errors.Join(err, file.Close())
		}
		mine, err := file.Stat()
		if err != nil {
			return osFile{}, false, errors.Join(err, file.Close())
		}
		if there, err := os.Stat(path); err == nil && os.SameFile(mine, there) {
			return f, created, nil
		}
		if err := file.Close(); err != nil { // replaced or removed in between
			return osFile{}, false, err
		}
	}
}

// unmake leaves of a file, which is locked and of which nothing could be made, what was there before: nothing where it was
// created, and else an empty file.
func unmake(f osFile, path string, created bool) error {
	if !created {
		return f.Truncate(0)
	}
	path, err := filepath.EvalSymlinks(path) // a link is somebody else's
	if err != nil {
		return err
	}
	return os.Remove(path)
}

// syncName has the name of a file that was made outlive a loss of power.
func syncName(path string) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(path))
}

// plainSize is the length of a plain file, in bytes, as it is.
func plainSize(f fs.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !fi.Mode().IsRegular() {
		return 0, fmt.Errorf("it is %s: want a plain file", kind(fi.Mode()))
	}
	return fi.Size(), nil
}

func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a directory"
	case m&fs.ModeDevice != 0:
		return "a device"
	default:
		return "no plain file"
	}
}

// again calls f until no signal interrupts it.
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// zeros are what holes are sent from. Nobody writes to them: as long as that is so, all of them are one page of memory.
var zeros [1 << 20]byte

// writeZeros writes n zeros at off.
func writeZeros(w io.WriterAt, off, n int64) error {
	for n > 0 {
		part := min(n, int64(len(zeros)))
		if _, err := w.WriteAt(zeros[:part], off); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}
