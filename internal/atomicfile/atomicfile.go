// Package atomicfile replaces files whole: after a crash at any point a name holds either its old bytes or all of its new
// ones, never some of each (POSIX rename(2), with the fsync(2) of the file before it and of its directory after it).
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// tempPrefix begins the name of every file that is being written. Sweep knows them by it.
const tempPrefix = ".troupe-tmp-"

// WriteFile makes data the content of the file called name, with exactly the permission bits of perm (the umask does not
// count). It returns once the file and its name are on stable storage. After an error name is as it was, except that
// where only the last fsync, of the directory, went wrong, name already has the new content.
func WriteFile(name string, data []byte, perm fs.FileMode) error {
	f, err := Create(name, perm)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return errors.Join(err, f.Abort())
	}
	return f.Commit()
}

// A File is being written under a temporary name. It must be ended by Commit, CommitTo or Abort; what a killed process
// did not end, Sweep removes. It is not for use by several goroutines at once.
type File struct {
	f    *os.File // nil once ended
	name string   // that Commit gives it
	perm fs.FileMode
	size int64 // end of the last byte written: what must be there on Commit
}

// Create starts a File that Commit will call name. The temporary file lies in the same directory, which must exist.
func Create(name string, perm fs.FileMode) (*File, error) {
	f, err := os.CreateTemp(filepath.Dir(name), tempPrefix+"*")
	if err != nil {
		return nil, fmt.Errorf("creating a temporary file for %q: %w", name, err)
	}
	return &File{f: f, name: name, perm: perm.Perm()}, nil
}

// Write appends at the current offset, as io.Writer has it.
func (f *File) Write(p []byte) (int, error) {
	file, err := f.open()
	if err != nil {
		return 0, err
	}
	n, err := file.Write(p)
	if err != nil {
		return n, fmt.Errorf("writing %q: %w", f.name, err)
	}
	// An offset that cannot be asked for belongs to something that is no regular file; CreateTemp makes none.
	off, err := file.Seek(0, 1)
	if err != nil {
		return n, fmt.Errorf("writing %q: %w", f.name, err)
	}
	f.size = max(f.size, off)
	return n, nil
}

// WriteAt writes at off, as io.WriterAt has it. A gap before off reads as zeros.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	file, err := f.open()
	if err != nil {
		return 0, err
	}
	n, err := file.WriteAt(p, off)
	if err != nil {
		return n, fmt.Errorf("writing %q: %w", f.name, err)
	}
	f.size = max(f.size, off+int64(n))
	return n, nil
}

// ReadAt reads back what was written, as io.ReaderAt has it.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	file, err := f.open()
	if err != nil {
		return 0, err
	}
	return file.ReadAt(p, off)
}

// Seek sets the offset of the next Write, as io.Seeker has it.
func (f *File) Seek(offset int64, whence int) (int64, error) {
	file, err := f.open()
	if err != nil {
		return 0, err
	}
	return file.Seek(offset, whence)
}

// Truncate sets the size in bytes; where it grows the file, the new part reads as zeros.
func (f *File) Truncate(size int64) error {
	file, err := f.open()
	if err != nil {
		return err
	}
	if err := file.Truncate(size); err != nil {
		return fmt.Errorf("setting the size of %q to %d: %w", f.name, size, err)
	}
	f.size = size
	return nil
}

// Commit makes what was written the content of the file that Create named, and ends f. See WriteFile for what an error
// leaves.
func (f *File) Commit() error { return f.CommitTo(f.name) }

// CommitTo is Commit under another name of the same file system, for a name that is known only after the writing.
func (f *File) CommitTo(name string) error {
	file, err := f.open()
	if err != nil {
		return err
	}
	if err := f.settle(file); err != nil {
		return errors.Join(fmt.Errorf("writing %q: %w", name, err), f.Abort())
	}
	// From here on the descriptor is closed: Abort could only remove, and that is done by hand.
	f.f = nil
	if err := file.Close(); err != nil {
		return errors.Join(fmt.Errorf("writing %q: %w", name, err), remove(file.Name()))
	}
	if err := os.Rename(file.Name(), name); err != nil {
		return errors.Join(fmt.Errorf("writing %q: %w", name, err), remove(file.Name()))
	}
	return SyncDir(filepath.Dir(name))
}

// settle checks that file holds what was written and brings that to stable storage.
func (f *File) settle(file *os.File) error {
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != f.size {
		return fmt.Errorf("the file has %d bytes, %d were written", fi.Size(), f.size)
	}
	if err := file.Chmod(f.perm); err != nil {
		return err
	}
	// A failed fsync is final: the kernel may have dropped the pages, and a second one would report success.
	return file.Sync()
}

// Abort ends f and leaves nothing of it. After Commit, or a second time, it does nothing, so it can be deferred.
func (f *File) Abort() error {
	if f.f == nil {
		return nil
	}
	file := f.f
	f.f = nil
	return errors.Join(file.Close(), remove(file.Name()))
}

func (f *File) open() (*os.File, error) {
	if f.f == nil {
		return nil, fmt.Errorf("writing %q: %w", f.name, fs.ErrClosed)
	}
	return f.f, nil
}

// Sweep removes what processes that were killed left behind in dir, and says how many files that were. It cannot tell a
// file that is still being written: call it before the first Create, where no other process writes to dir. A directory
// that does not exist has nothing to sweep.
func Sweep(dir string) (int, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("sweeping %q: %w", dir, err)
	}
	n := 0
	var errs []error
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) || !e.Type().IsRegular() {
			continue
		}
		if err := remove(filepath.Join(dir, e.Name())); err != nil {
			errs = append(errs, err)
			continue
		}
		n++
	}
	return n, errors.Join(errs...)
}

// SyncDir brings the names in dir to stable storage: what was created in, renamed into or removed from it.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing directory %q: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("syncing directory %q: %w", dir, err)
	}
	return nil
}

// remove removes a file; one that is gone already is as good.
func remove(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a temporary file: %w", err)
	}
	return nil
}
