package vm

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// collectLayer hands out the upper layer after the system has ended: systemd has killed all processes, taken its mounts
// away as far as it could, and given this program the machine (systemd-shutdown(8)).
func collectLayer() error {
	const dir = "/layer"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// The root file system still holds it. It can only be mounted again as it is, which systemd may have made read-only.
	err := unix.Mount(layerDisk, dir, "ext4", unix.MS_RDONLY, "")
	if errors.Is(err, unix.EBUSY) {
		err = unix.Mount(layerDisk, dir, "ext4", 0, "")
	}
	if err != nil {
		return fmt.Errorf("mounting the layer again: %w", err)
	}
	return handOut(filepath.Join(dir, "upper"))
}

// handOutput hands out one file or directory of the root file system, as the steps see it.
func handOutput(output string) error {
	root, err := os.OpenRoot(rootDir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }() // it is only a place
	name := strings.TrimPrefix(filepath.Clean(output), "/")
	fi, err := root.Lstat(name) // follows links on the way, and none out of the root
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("the steps made no %s", output)
	case err != nil:
		return err
	case !fi.IsDir() && !fi.Mode().IsRegular():
		return fmt.Errorf("%s is neither a directory nor a regular file", output)
	}
	return handOut(filepath.Join(rootDir, name))
}

// handOut writes a tar stream of the file, or of what is in the directory, to the disk for results, and tells of it.
func handOut(top string) error {
	disk, err := os.OpenFile(resultDisk, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	out := &countingWriter{w: bufio.NewWriterSize(disk, 1<<20)}
	w := tar.NewWriter(out)
	if err := addTree(w, top); err != nil {
		return fmt.Errorf("handing out what the steps made: %w", err)
	}
	if err := errors.Join(w.Close(), out.w.Flush(), disk.Sync(), disk.Close()); err != nil {
		return fmt.Errorf("handing out what the steps made: %w", err)
	}
	tell(event{Done: &out.n})
	return nil
}

type countingWriter struct {
	w *bufio.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// addTree adds all below top by its path from there, and top itself as "." or, where it is a file, by its own name.
func addTree(w *tar.Writer, top string) error {
	return filepath.WalkDir(top, func(full string, d fs.DirEntry, err error) error {
		if err != nil || d.Type() == fs.ModeSocket {
			return err
		}
		name, err := filepath.Rel(top, full)
		if err != nil {
			return err
		}
		if name == "." && !d.IsDir() {
			name = filepath.Base(top)
		}
		return addFile(w, full, name)
	})
}

func addFile(w *tar.Writer, full, name string) error {
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return fmt.Errorf("reading %q: %w", name, err)
	}
	h := &tar.Header{
		Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()), Format: tar.FormatPAX,
		Devmajor: int64(unix.Major(st.Rdev)), Devminor: int64(unix.Minor(st.Rdev)),
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		h.Linkname, err = os.Readlink(full)
	case unix.S_IFCHR:
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	default:
		h.Typeflag = tar.TypeFifo
	}
	if err == nil {
		h.PAXRecords, err = xattrRecords(full)
	}
	if err != nil {
		return fmt.Errorf("reading %q: %w", name, err)
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	f, err := os.Open(full)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return errors.Join(err, f.Close())
}

// xattrRecords are the extended attributes of a file as PAX records.
func xattrRecords(full string) (map[string]string, error) {
	list := make([]byte, 64<<10) // XATTR_LIST_MAX, and XATTR_SIZE_MAX below: xattr(7)
	n, err := unix.Llistxattr(full, list)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	records := make(map[string]string)
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(full, name, value)
		if err != nil {
			return nil, fmt.Errorf("its %s: %w", name, err)
		}
		records[xattrRecord+name] = string(value[:n])
	}
	return records, nil
}
