package build

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed chroot.sh
var chrootScript string

// A chroot is a base and a layer over it on disk, in which programs can run:
//
//	dir/lower   the base: its image, mounted where dir/root is, or a copy where this machine's kernel lacks EROFS or loop devices
//	dir/upper   the layer, as overlayfs keeps it
//	dir/work    overlayfs' own
//	dir/root    where both are mounted, in the mount namespace of the program that runs, and for nobody else
type chroot struct {
	dir   string
	base  fs.FS
	image string // file with the base
	s     *steps
	ready bool
	copy  bool // the base was copied
}

func (c *chroot) upper() string { return filepath.Join(c.dir, "upper") }

// prepare makes the directories and, where the base's image cannot be mounted, unpacks it: that takes seconds, and a
// mount none. A second time it does nothing.
func (c *chroot) prepare(ctx context.Context) error {
	if c.ready {
		return nil
	}
	for _, d := range []string{"lower", "upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(c.dir, d), 0o755); err != nil {
			return fmt.Errorf("making the chroot: %w", err)
		}
	}
	var err error
	if c.image, err = filepath.Abs(c.image); err != nil { // programs run in other directories
		return fmt.Errorf("making the chroot: %w", err)
	}
	if c.copy = !c.canMount(ctx); c.copy {
		if err := c.unpack(ctx, filepath.Join(c.dir, "lower")); err != nil {
			return fmt.Errorf("unpacking the base: %w", err)
		}
	}
	if err := c.matchRoot(); err != nil {
		return fmt.Errorf("making the chroot: %w", err)
	}
	c.ready = true
	return nil
}

// canMount tries whether the base's image can be mounted here. The mount is in a namespace that ends with the trial.
func (c *chroot) canMount(ctx context.Context) bool {
	cmd := exec.CommandContext(ctx, "mount", "-t", "erofs", "-o", "ro,loop", c.image, filepath.Join(c.dir, "lower"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	return cmd.Run() == nil
}

func (c *chroot) unpack(ctx context.Context, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }() // it is only a place
	v := &view{base: c.base}
	var dirs []string
	err = fs.WalkDir(c.base, ".", func(name string, _ fs.DirEntry, err error) error {
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		e, ok, err := v.lower(name)
		if err != nil || !ok {
			return errors.Join(err, checkThere(ok, name))
		}
		if e.isDir() {
			dirs = append(dirs, name)
		}
		return writeEntry(root, name, e)
	})
	if err != nil {
		return err
	}
	for _, name := range dirs { // their times changed as they were filled
		e, _, err := v.lower(name)
		if err != nil {
			return err
		}
		if err := root.Chtimes(name, e.mtime, e.mtime); err != nil {
			return err
		}
	}
	return nil
}

func checkThere(ok bool, name string) error {
	if !ok {
		return fmt.Errorf("%q went away", name)
	}
	return nil
}

// matchRoot gives the layer's root directory the attributes of the base's, which it would hide otherwise.
func (c *chroot) matchRoot() error {
	e, _, err := (&view{base: c.base}).lower(".")
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(c.upper())
	if err != nil {
		return err
	}
	return errors.Join(writeEntry(root, ".", e), root.Close())
}

// writeEntry makes e on disk, in place of what is not a directory there.
func writeEntry(root *os.Root, name string, e entry) error {
	if err := makeEntry(root, name, e); err != nil {
		return err
	}
	if err := root.Lchown(name, int(e.uid), int(e.gid)); err != nil {
		return err
	}
	full := filepath.Join(root.Name(), name)
	for k, v := range e.xattrs {
		if err := unix.Lsetxattr(full, k, []byte(v), 0); err != nil {
			return fmt.Errorf("setting %s of %q: %w", k, name, err)
		}
	}
	if e.isLink() {
		return nil
	}
	if err := root.Chmod(name, goMode(e.mode)); err != nil { // after the owner, which takes setuid away
		return err
	}
	return root.Chtimes(name, e.mtime, e.mtime)
}

func makeEntry(root *os.Root, name string, e entry) error {
	if e.isDir() {
		err := root.Mkdir(name, 0o700)
		if fi, serr := root.Lstat(name); serr == nil && fi.IsDir() {
			return nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch e.kind() {
	case unix.S_IFDIR:
		return root.Mkdir(name, 0o700)
	case unix.S_IFLNK:
		return root.Symlink(e.target, name)
	case unix.S_IFREG:
		return makeFile(root, name, e)
	}
	full := filepath.Join(root.Name(), name)
	if err := unix.Mknod(full, e.mode, int(e.rdev)); err != nil {
		return fmt.Errorf("making the node %q: %w", name, err)
	}
	return nil
}

func makeFile(root *os.Root, name string, e entry) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if e.open != nil {
		r, oerr := e.open()
		if oerr != nil {
			return errors.Join(oerr, f.Close())
		}
		_, err = io.Copy(f, r)
		err = errors.Join(err, r.Close())
	}
	return errors.Join(err, f.Close())
}

// write puts some of a layer's entries into the chroot. Every directory above one must be there or come before it.
func (c *chroot) write(l layer, names []string) error {
	root, err := os.OpenRoot(c.upper())
	if err != nil {
		return fmt.Errorf("writing files into the chroot: %w", err)
	}
	for _, name := range names {
		if err := writeEntry(root, name, l[name]); err != nil {
			return errors.Join(fmt.Errorf("writing files into the chroot: %w", err), root.Close())
		}
	}
	return root.Close()
}

// online gives the chroot what it needs to reach the archive, and keeps packages from starting their services. What done
// finds unchanged of that it takes away again.
func (c *chroot) online() (done func() error, err error) {
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading this machine's name servers: %w", err)
	}
	v, err := newView(c.base)
	if err != nil {
		return nil, err
	}
	contents := map[string]string{
		"etc/resolv.conf":      string(resolv),
		"usr/sbin/policy-rc.d": "#!/bin/sh\nexit 101\n", // "action not allowed", says invoke-rc.d's interface
	}
	for _, name := range sortedKeys(contents) {
		if _, ok, err := v.lstat(name); err != nil || ok {
			delete(contents, name) // the base has its own
			if err != nil {
				return nil, err
			}
			continue
		}
		_, put, err := v.put(name, regular(contents[name], 0o755))
		if err != nil {
			return nil, err
		}
		if err := c.write(v.top, put); err != nil {
			return nil, err
		}
	}
	return func() error { return c.offline(contents) }, nil
}

func (c *chroot) offline(contents map[string]string) error {
	for name, content := range contents {
		full := filepath.Join(c.upper(), name)
		fi, err := os.Lstat(full)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
			continue // a package has its own by now
		}
		b, err := os.ReadFile(full)
		if err == nil && string(b) == content {
			err = os.Remove(full)
		}
		if err != nil {
			return fmt.Errorf("taking %q out of the chroot: %w", name, err)
		}
	}
	return nil
}

// sh runs a shell command in the chroot, with the network or without one.
func (c *chroot) sh(ctx context.Context, command string, online bool) error {
	network, flags := "online", uintptr(syscall.CLONE_NEWUTS)
	if !online {
		network, flags = "none", flags|syscall.CLONE_NEWNET
	}
	image := c.image
	if c.copy {
		image = ""
	}
	cmd := exec.Command("/bin/sh", "-c", chrootScript, "chroot", c.dir, network, command, image) //nolint:noctx // steps.run ends it
	cmd.Env, cmd.Dir = environ(""), "/"
	return c.s.run(ctx, cmd, flags)
}

// scan takes what is in the layer on disk into v, and says whether it left out host keys. It leaves out what is transient,
// unless it is in keep.
func (c *chroot) scan(v *view, keep []string) (hadKeys bool, err error) {
	err = filepath.WalkDir(c.upper(), func(full string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(c.upper(), full)
		if err != nil || name == "." {
			return err
		}
		if d.Type() == fs.ModeSocket {
			return nil
		}
		if leftOut(name, d.IsDir(), keep) {
			hadKeys = hadKeys || isHostKey(name) && d.Type().IsRegular()
			return nil
		}
		e, err := diskEntry(full)
		if err != nil {
			return err
		}
		if same, err := v.unchanged(name, e); err != nil || same {
			return err
		}
		v.top[name] = e
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("reading the layer: %w", err)
	}
	return hadKeys, nil
}

// leftOut says whether what is in a layer at name belongs into no image, unless it is in keep.
func leftOut(name string, dir bool, keep []string) bool {
	return !slices.Contains(keep, name) && (isTransient(name, dir) || name == "etc/machine-id")
}

// unchanged says whether e is a regular file that the base has just so, but for its time: programs write anew what has
// not changed.
func (v *view) unchanged(name string, e entry) (bool, error) {
	if e.kind() != unix.S_IFREG || v.hidden(name) {
		return false, nil
	}
	old, ok, err := v.lower(name)
	if err != nil || !ok || !sameAttributes(old, e) {
		return false, err
	}
	return sameContent(old, e)
}

// sameContent says whether two regular files have the same bytes.
func sameContent(a, b entry) (bool, error) {
	ra, err := a.open()
	if err != nil {
		return false, err
	}
	defer func() { _ = ra.Close() }() // it is only read
	rb, err := b.open()
	if err != nil {
		return false, err
	}
	defer func() { _ = rb.Close() }() // it is only read
	bufA, bufB := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		na, errA := io.ReadFull(ra, bufA)
		nb, errB := io.ReadFull(rb, bufB)
		if string(bufA[:na]) != string(bufB[:nb]) {
			return false, nil
		}
		endA, endB := isEnd(errA), isEnd(errB)
		if endA && endB {
			return true, nil
		}
		if err := errors.Join(errA, errB); err != nil {
			return false, err
		}
	}
}

func isEnd(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// diskEntry is the entry of a file on disk.
func diskEntry(full string) (entry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return entry{}, fmt.Errorf("reading %q: %w", full, err)
	}
	e := entry{
		mode: st.Mode, uid: st.Uid, gid: st.Gid, rdev: uint32(st.Rdev), mtime: time.Unix(st.Mtim.Unix()), //nolint:gosec // the kernel has 32 bits for a device
	}
	var err error
	switch e.kind() {
	case unix.S_IFREG:
		e.open = func() (io.ReadCloser, error) { return os.Open(full) }
	case unix.S_IFLNK:
		if e.target, err = os.Readlink(full); err != nil {
			return entry{}, err
		}
	}
	e.xattrs, err = xattrs(full)
	return e, err
}

// xattrs are the extended attributes that belong into an image: of overlayfs' own only that of an opaque directory, and
// nothing that this machine's security module gave every file.
func xattrs(full string) (map[string]string, error) {
	list, err := readXattr(func(b []byte) (int, error) { return unix.Llistxattr(full, b) })
	if err != nil {
		return nil, fmt.Errorf("listing the extended attributes of %q: %w", full, err)
	}
	var all map[string]string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if !keepsXattr(name) {
			continue
		}
		value, err := readXattr(func(b []byte) (int, error) { return unix.Lgetxattr(full, name, b) })
		if err != nil {
			return nil, fmt.Errorf("reading %s of %q: %w", name, full, err)
		}
		if all == nil {
			all = make(map[string]string)
		}
		all[name] = string(value)
	}
	return all, nil
}

func keepsXattr(name string) bool {
	return name == opaqueXattr || name == "security.capability" ||
		strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "system.posix_acl_")
}

// readXattr calls get with a buffer that is large enough.
func readXattr(get func([]byte) (int, error)) ([]byte, error) {
	n, err := get(nil)
	if err != nil || n == 0 {
		if errors.Is(err, unix.ENOTSUP) {
			err = nil
		}
		return nil, err
	}
	b := make([]byte, n)
	n, err = get(b)
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}
