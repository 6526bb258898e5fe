package rootfs_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
)

// TestCopyAndBind copies a directory of a root, with all that its files have, and mounts the copy in its place.
func TestCopyAndBind(t *testing.T) {
	root, to, outside := t.TempDir(), t.TempDir(), t.TempDir()
	from := filepath.Join(root, "real/app")
	for _, step := range []error{
		os.MkdirAll(filepath.Join(from, "sub"), 0o750),
		os.WriteFile(filepath.Join(from, "sub/file"), []byte("content"), 0o640),
		os.Chown(filepath.Join(from, "sub/file"), 7, 8),
		unix.Lsetxattr(filepath.Join(from, "sub/file"), "trusted.mine", []byte("x"), 0),
		unix.Lsetxattr(filepath.Join(from, "sub"), "trusted.overlay.origin", []byte("x"), 0),
		os.Symlink("sub/file", filepath.Join(from, "link")),
		unix.Mkfifo(filepath.Join(from, "fifo"), 0o600),
		os.Symlink("/real", filepath.Join(root, "way")), // of that root, not of ours
		os.Symlink(outside, filepath.Join(root, "out")),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	if err := rootfs.Copy(root, "/way/app", to); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	file := filepath.Join(to, "sub/file")
	if b, err := os.ReadFile(file); err != nil || string(b) != "content" {
		t.Errorf("file: %q, %v", b, err)
	}
	if err := unix.Stat(file, &st); err != nil || st.Mode&0o7777 != 0o640 || st.Uid != 7 || st.Gid != 8 {
		t.Errorf("file: mode %o, owner %d:%d, %v", st.Mode, st.Uid, st.Gid, err)
	}
	if n, err := unix.Lgetxattr(file, "trusted.mine", make([]byte, 8)); n != 1 || err != nil {
		t.Errorf("its attribute: %d bytes, %v", n, err)
	}
	if _, err := unix.Lgetxattr(filepath.Join(to, "sub"), "trusted.overlay.origin", make([]byte, 8)); err == nil {
		t.Error("an attribute of overlayfs was copied")
	}
	if target, err := os.Readlink(filepath.Join(to, "link")); target != "sub/file" {
		t.Errorf("link: %q, %v", target, err)
	}
	if fi, err := os.Lstat(filepath.Join(to, "fifo")); err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		t.Errorf("fifo: %v", err)
	}
	if err := rootfs.Copy(root, "/not/there", t.TempDir()); err != nil {
		t.Errorf("what is not there: %v", err)
	}

	if err := os.WriteFile(filepath.Join(to, "kept"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/way/app", "/new/place"} {
		if err := rootfs.Bind(root, path, to); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"real/app/kept", "new/place/kept"} {
		if _, err := os.Stat(filepath.Join(root, name)); err != nil {
			t.Error(err)
		}
	}
	for _, path := range []string{"/way/app", "/new/place", "/not/there", "/real"} {
		if err := rootfs.Unbind(root, path); err != nil {
			t.Errorf("unmounting %s: %v", path, err)
		}
	}
	if _, err := os.Stat(filepath.Join(from, "kept")); err == nil {
		t.Error("the copy is still mounted")
	}
	if rootfs.Bind(root, "/out", to) == nil {
		t.Error("a directory was mounted over a link that leads out of the root")
	}
}
