package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/verity"
)

// newBuilder is a Builder with a store and a scratch directory of its own.
func newBuilder(t testing.TB) *Builder {
	t.Helper()
	s, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &Builder{Store: s, Dir: t.TempDir()}
}

// fakeTree is a base as small as can be with what matters to deltas: merged /usr, units, links, owners and modes.
func fakeTree() map[string]entry {
	dir := func(mode, uid uint32) entry { return entry{mode: unix.S_IFDIR | mode, uid: uid, mtime: epoch} }
	link := func(to string) entry { return entry{mode: unix.S_IFLNK | 0o777, target: to, mtime: epoch} }
	tree := map[string]entry{
		".":                   dir(0o755, 0),
		"lib":                 link("usr/lib"),
		"etc":                 dir(0o755, 0),
		"etc/motd":            regular("base\n", 0o644),
		"etc/localtime":       link("/usr/share/zoneinfo/UTC"),
		"loop":                link("/loop"),
		"srv":                 dir(0o2770, 33),
		"usr":                 dir(0o755, 0),
		"usr/lib":             dir(0o755, 0),
		"usr/lib/systemd":     dir(0o755, 0),
		"var":                 dir(0o755, 0),
		"var/lib":             dir(0o755, 0),
		"var/lib/dpkg":        dir(0o755, 0),
		"var/lib/dpkg/status": regular("Package: a\nStatus: install ok installed\nVersion: 1\n", 0o644),
	}
	units := "usr/lib/systemd/system"
	tree[units] = dir(0o755, 0)
	for name, text := range map[string]string{
		"plain.service":   "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n",
		"static.service":  "[Service]\nExecStart=/bin/true\nWantedBy=not-install.target\n",
		"getty@.service":  "[Install]\nWantedBy=getty.target\nDefaultInstance=tty1\n",
		"worker@.service": "[Install]\nWantedBy=workers@%i.target \\\n  multi-user.target\n",
		"many.socket": "# [Install] of a comment\n[Install]\nWantedBy=gone.target\nWantedBy=\nWantedBy=sockets.target\n" +
			"RequiredBy=a.service b.service\nAlias=other.socket\nAlso=many.service static.service\n",
		"many.service": "[Install]\nAlias=other.service\n",
		"bad.service":  "[Install]\nWantedBy=%H.target\n",
		"path.service": "[Install]\nWantedBy=../../x\n",
	} {
		tree[units+"/"+name] = regular(text, 0o644)
	}
	tree[units+"/called.service"] = link("plain.service")
	tree["etc/systemd"] = dir(0o755, 0)
	tree["etc/systemd/system"] = dir(0o755, 0)
	tree["etc/systemd/system/masked.service"] = link("/dev/null")
	return tree
}

// fakeBase puts fakeTree into the store as a base.
func fakeBase(t *testing.T, b *Builder) images.Base {
	t.Helper()
	w, err := b.newImage(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer w.abort()
	if err := addAll(fakeTree(), w); err != nil {
		t.Fatal(err)
	}
	blob, err := w.commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return images.Base{Recipe: digest.Of([]byte("a recipe")), Arch: "amd64", Image: blob, Packages: []string{"a=1"}}
}

// listing is an image of the store as text, one line for each file but the root directory; after fsck.erofs found
// nothing wrong with it, nor veritysetup with its tree.
func listing(t *testing.T, b *Builder, image images.Image) string {
	t.Helper()
	if out, err := exec.Command("fsck.erofs", b.Store.Path(image.Digest)).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
	file := b.Store.Path(image.Digest)
	out, err := exec.Command("veritysetup", "verify", file, file, image.Root, fmt.Sprintf("--hash-offset=%d", image.Data)).CombinedOutput()
	if err != nil {
		t.Errorf("veritysetup: %v\n%s", err, out)
	}
	if want := image.Data + verity.Size(image.Data); image.Size != want {
		t.Errorf("the image has %d bytes, with %d of data want %d", image.Size, image.Data, want)
	}
	root, closeRoot, err := b.openImage(t.Context(), image.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer closeRoot()
	var list strings.Builder
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		line, err := listEntry(root, name, d)
		list.WriteString(line + "\n")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list.String()
}

func listEntry(root fs.FS, name string, d fs.DirEntry) (string, error) {
	fi, err := d.Info()
	if err != nil {
		return "", err
	}
	st := fi.Sys().(*erofs.Stat)
	line := fmt.Sprintf("%v %d:%d %s", st.Mode, st.UID, st.GID, name)
	for _, k := range sortedKeys(st.Xattrs) {
		line += fmt.Sprintf(" %s=%q", k, st.Xattrs[k])
	}
	if fi.ModTime().After(epoch) {
		line += " later than epoch"
	}
	switch fi.Mode().Type() {
	case fs.ModeSymlink:
		to, err := fs.ReadLink(root, name)
		return line + " -> " + to, err
	case 0:
		b, err := fs.ReadFile(root, name)
		if len(b) > 8192 {
			return fmt.Sprintf("%s %q and more: %s", line, b[:100], digest.Of(b)), err
		}
		return fmt.Sprintf("%s %q", line, b), err
	}
	return line, nil
}

// nothingLeft fails the test if a build left scratch or mounts behind.
func nothingLeft(t *testing.T, b *Builder) {
	t.Helper()
	left, err := os.ReadDir(b.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range left {
		t.Errorf("left in the scratch directory: %s", e.Name())
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(mounts) {
		if bytes.Contains(line, []byte(b.Dir+"/")) {
			t.Errorf("left mounted: %s", line)
		}
	}
	if p := processesOf(b.Dir); len(p) > 0 {
		t.Errorf("left running: %q", p)
	}
}

// blobs are the digests of all that is in the store.
func blobs(t *testing.T, b *Builder) []digest.Digest {
	t.Helper()
	list, err := b.Store.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var all []digest.Digest
	for _, blob := range list {
		all = append(all, blob.Digest)
	}
	slices.Sort(all)
	return all
}

// processesOf are the command lines of the processes, other than this one, that name dir.
func processesOf(dir string) []string {
	lines, _ := fs.Glob(os.DirFS("/proc"), "[0-9]*/cmdline") // the pattern is good
	var found []string
	for _, name := range lines {
		b, err := os.ReadFile("/proc/" + name)
		if err != nil || strings.HasPrefix(name, fmt.Sprint(os.Getpid(), "/")) {
			continue // gone meanwhile, or this one
		}
		if line := string(bytes.ReplaceAll(b, []byte{0}, []byte(" "))); strings.Contains(line, dir) {
			found = append(found, line)
		}
	}
	return found
}

// A recorder keeps a build's progress, and calls hooks as it comes.
type recorder struct {
	steps  []string
	output strings.Builder
	onStep func(name string)
	onLine func(line string)
}

func (r *recorder) Step(name string) {
	r.steps = append(r.steps, name)
	if r.onStep != nil {
		r.onStep(name)
	}
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.onLine != nil {
		r.onLine(string(p))
	}
	return r.output.Write(p)
}

// cancelAt is a context that ends when the recorder's build writes a line with text in it.
func cancelAt(t *testing.T, text string) (context.Context, *recorder) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return ctx, &recorder{onLine: func(line string) {
		if strings.Contains(line, text) {
			cancel()
		}
	}}
}
