package build

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"cuelabs.dev/go/oci/ociregistry/ocimem"
	"cuelabs.dev/go/oci/ociregistry/ociserver"
	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	godigest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/ulikunitz/xz"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/treesum"
)

// appBuilder is a Builder with a store of its own.
func appBuilder(t *testing.T) *Builder {
	t.Helper()
	s, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return &Builder{Store: s, Dir: t.TempDir()}
}

// filesOf are the files of an app image, each as "kind mode uid:gid content", by path.
func filesOf(t *testing.T, b *Builder, app images.App) map[string]string {
	t.Helper()
	root, closeRoot, err := b.openImage(t.Context(), app.Image.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer closeRoot()
	out := map[string]string{}
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := fs.Lstat(root, name)
		if err != nil {
			return err
		}
		st := fi.Sys().(*erofs.Stat) //nolint:forcetypeassert // of an EROFS image
		if fi.ModTime().After(epoch) {
			return fmt.Errorf("%q is of %v", name, fi.ModTime())
		}
		text := ""
		switch {
		case d.Type().IsRegular():
			content, err := fs.ReadFile(root, name)
			if err != nil {
				return err
			}
			text = " " + string(content)
		case d.Type() == fs.ModeSymlink:
			target, err := fs.ReadLink(root, name)
			if err != nil {
				return err
			}
			text = " -> " + target
		}
		out[name] = fmt.Sprintf("%v %d:%d%s", st.Mode, st.UID, st.GID, text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func makeApp(t *testing.T, b *Builder, r images.AppRecipe, src AppSource) images.App {
	t.Helper()
	app, err := b.App(t.Context(), r, src, nil)
	if err != nil {
		t.Fatal(err)
	}
	if app.Recipe != r.ID() || app.Image.Data == 0 || app.Image.Root == "" {
		t.Errorf("got %+v", app)
	}
	return app
}

func wantFiles(t *testing.T, got, want map[string]string) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

func TestAppOfADirectory(t *testing.T) {
	b := appBuilder(t)
	tree := fstest.MapFS{
		"index.html": {Data: []byte("hello\n"), Mode: 0o600, ModTime: time.Now()},
		"bin/serve":  {Data: []byte("#!/bin/sh\n"), Mode: 0o700},
		"bin/latest": {Data: []byte("serve"), Mode: fs.ModeSymlink | 0o777},
	}
	sum, err := treesum.Sum(t.Context(), tree, ".")
	if err != nil {
		t.Fatal(err)
	}
	r := images.AppRecipe{Tree: sum}
	first := makeApp(t, b, r, AppSource{Tree: tree})
	wantFiles(t, filesOf(t, b, first), map[string]string{
		".": "drwxr-xr-x 0:0", "bin": "drwxr-xr-x 0:0", "bin/latest": "Lrwxrwxrwx 0:0 -> serve", "bin/serve": "-rwxr-xr-x 0:0 #!/bin/sh\n",
		"index.html": "-rw-r--r-- 0:0 hello\n",
	})
	if again := makeApp(t, appBuilder(t), r, AppSource{Tree: tree}); again.Image != first.Image {
		t.Errorf("the same directory gave %s and %s", first.Image.Digest, again.Image.Digest)
	}
	tree["index.html"].Data = []byte("other\n")
	if _, err := b.App(t.Context(), r, AppSource{Tree: tree}, nil); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("another directory than the recipe's: %v", err)
	}
	if left, err := os.ReadDir(b.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A member is one file of a tar archive.
type member struct {
	tar.Header
	content string
}

func file(name, content string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content)), ModTime: time.Now()}, content}
}

func dir(name string) member {
	return member{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}}
}

func link(name, target string, kind byte) member {
	return member{Header: tar.Header{Name: name, Linkname: target, Typeflag: kind, Mode: 0o777}}
}

func archive(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		if err := w.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// squeezers compress, by name.
var squeezers = map[string]func(io.Writer) (io.WriteCloser, error){
	"plain": func(w io.Writer) (io.WriteCloser, error) { return nopCloser{w}, nil },
	"gzip":  func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil },
	"zstd":  func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) },
	"xz":    func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) },
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func squeezed(t testing.TB, how string, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := squeezers[how](&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tarRecipe is of an archive that lies on the server.
func tarRecipe(t *testing.T, content []byte) images.AppRecipe {
	t.Helper()
	name := filepath.Join(t.TempDir(), "app.tar")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return images.AppRecipe{URL: "file://" + name, SHA256: fmt.Sprintf("%x", sha256.Sum256(content))}
}

func TestAppOfAnArchive(t *testing.T) {
	suid := file("./bin/su", "s")
	suid.Mode, suid.Uid, suid.Gid = 0o4755, 5, 6
	capable := file("cap", "c")
	capable.PAXRecords = map[string]string{"SCHILY.xattr.user.x": "1", "SCHILY.xattr.trusted.overlay.opaque": "y"}
	content := archive(t,
		dir("./"), dir("./bin/"), suid, link("bin/hard", "./bin/su", tar.TypeLink), link("to-bin", "bin", tar.TypeSymlink),
		file("to-bin/over-link", "o"), file("/absolute/x", "x"), link("out", "../../etc", tar.TypeSymlink), file("out/shadow", "in here"), capable,
	)
	want := map[string]string{
		".": "drwxr-xr-x 0:0", "bin": "drwxr-xr-x 0:0", "bin/su": "urwxr-xr-x 5:6 s", "bin/hard": "urwxr-xr-x 5:6 s", "to-bin": "Lrwxrwxrwx 0:0 -> bin",
		"bin/over-link": "-rw-r--r-- 0:0 o", "absolute": "drwxr-xr-x 0:0", "absolute/x": "-rw-r--r-- 0:0 x",
		"out": "Lrwxrwxrwx 0:0 -> ../../etc", "etc": "drwxr-xr-x 0:0", "etc/shadow": "-rw-r--r-- 0:0 in here", "cap": "-rw-r--r-- 0:0 c",
	}
	var first images.Image
	for how := range squeezers {
		b := appBuilder(t)
		app := makeApp(t, b, tarRecipe(t, squeezed(t, how, content)), AppSource{})
		wantFiles(t, filesOf(t, b, app), want)
		if first.Digest == "" {
			first = app.Image
		}
		if app.Image != first {
			t.Errorf("%s gave another image", how)
		}
	}
	r := tarRecipe(t, content)
	r.SHA256 = strings.Repeat("0", 64)
	if _, err := appBuilder(t).App(t.Context(), r, AppSource{}, nil); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("another archive than the recipe's: %v", err)
	}
}

func TestHostileArchives(t *testing.T) {
	device := member{Header: tar.Header{Name: "sda", Typeflag: tar.TypeBlock, Devmajor: 8}}
	fifo := member{Header: tar.Header{Name: "p", Typeflag: tar.TypeFifo}}
	loop := []member{link("a", "b", tar.TypeSymlink), link("b", "a", tar.TypeSymlink), file("a/x", "")}
	deep := file(strings.Repeat("d/", maxAppDepth+1)+"x", "")
	for name, members := range map[string][]member{
		"out of it":          {file("../x", "")},
		"out in the middle":  {file("a/../../x", "")},
		"a device":           {device},
		"a pipe":             {fifo},
		"a link to nothing":  {link("x", "nothing", tar.TypeLink)},
		"a link out of it":   {link("x", "../../etc/passwd", tar.TypeLink)},
		"a link to a dir":    {dir("d"), link("x", "d", tar.TypeLink)},
		"a loop":             loop,
		"too deep":           {deep},
		"a long name":        {file(strings.Repeat("n", maxAppName+1), "")},
		"no text":            {file("a\xffb", "")},
		"the root as a file": {file(".", "x")},
		"hides nothing":      {file("a/.wh.", "")},
		"hides what is out":  {file("a/.wh...", "")},
		"a negative owner":   {{Header: tar.Header{Name: "x", Typeflag: tar.TypeReg, Uid: -1, Format: tar.FormatGNU}}},
	} {
		_, err := appBuilder(t).App(t.Context(), tarRecipe(t, archive(t, members...)), AppSource{}, nil)
		if !errors.Is(err, errHostile) {
			t.Errorf("%s: %v", name, err)
		}
	}
	whole := archive(t, file("x", strings.Repeat("x", 4096)))
	for n := range []int{1, 600, 2000} {
		if _, err := appBuilder(t).App(t.Context(), tarRecipe(t, whole[:[]int{1, 600, 2000}[n]]), AppSource{}, nil); err == nil {
			t.Errorf("an archive that ends early, %d, was taken", n)
		}
	}
}

// A file that says that it has more bytes than an app may have is refused before anything is read of it.
func TestAppsAreBounded(t *testing.T) {
	f, err := newFlattener(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.close() }()
	f.bytes = maxAppBytes - 1
	if err := f.add(t.Context(), bytes.NewReader(archive(t, file("x", "two")))); !errors.Is(err, errHostile) {
		t.Errorf("too many bytes: %v", err)
	}
	f.bytes, f.count = 0, maxAppFiles
	if err := f.add(t.Context(), bytes.NewReader(archive(t, file("x", "")))); !errors.Is(err, errHostile) {
		t.Errorf("too many files: %v", err)
	}
	f.bytes, f.count = maxAppBytes-2, 0
	if err := f.add(t.Context(), bytes.NewReader(archive(t, file("x", "x"), link("y", "x", tar.TypeLink), link("z", "x", tar.TypeLink)))); !errors.Is(err, errHostile) {
		t.Errorf("too many bytes by links: %v", err)
	}
}

// layers are those of an image that has all that hides.
func layers(t testing.TB) [][]byte {
	return [][]byte{
		archive(t, dir("etc"), file("etc/a", "a"), file("etc/b", "b"), dir("opt"), file("opt/old", "old"), file("opt/sub/x", "x"), dir("gone"),
			file("gone/x", "x"), file("keep/x", "x"), link("lib", "usr/lib", tar.TypeSymlink), file("usr/lib/one", "1"), file("dev/null", ""),
			member{Header: tar.Header{Name: "dev/tty", Typeflag: tar.TypeChar, Devmajor: 5}}),
		// What hides stands before and behind what its own layer has: it is of the layers below alone.
		archive(t, file("etc/.wh.a", ""), file("opt/new", "new"), file("opt/.wh..wh..opq", ""), file(".wh.gone", ""), file("lib/two", "2"), file("keep/y", "y")),
		archive(t, file("etc/a", "a again"), file("etc/.wh.nothing", ""), file("opt/.wh.new", ""), file("opt/new", "newer"), file("keep", "a file now")),
	}
}

var flattened = map[string]string{
	".": "drwxr-xr-x 0:0", "etc": "drwxr-xr-x 0:0", "etc/a": "-rw-r--r-- 0:0 a again", "etc/b": "-rw-r--r-- 0:0 b", "opt": "drwxr-xr-x 0:0",
	"opt/new": "-rw-r--r-- 0:0 newer", "lib": "Lrwxrwxrwx 0:0 -> usr/lib", "usr": "drwxr-xr-x 0:0", "usr/lib": "drwxr-xr-x 0:0",
	"usr/lib/one": "-rw-r--r-- 0:0 1", "usr/lib/two": "-rw-r--r-- 0:0 2", "keep": "-rw-r--r-- 0:0 a file now",
}

// push puts an image of these layers, for amd64 and in an index, under the tag 1, and gives the digest of its manifest.
func push(t *testing.T, to oras.Target, layers [][]byte) digest.Digest {
	t.Helper()
	blob := func(kind string, b []byte) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: kind, Digest: godigest.FromBytes(b), Size: int64(len(b))}
		if err := to.Push(t.Context(), desc, bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	jsonOf := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	platform := ocispec.Platform{OS: "linux", Architecture: "amd64"}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	m.Config = blob(ocispec.MediaTypeImageConfig, jsonOf(ocispec.Image{Platform: platform}))
	for i, l := range layers {
		how := []string{"gzip", "plain", "zstd"}[i%3]
		m.Layers = append(m.Layers, blob(ocispec.MediaTypeImageLayer, squeezed(t, how, l)))
	}
	desc := blob(ocispec.MediaTypeImageManifest, jsonOf(m))
	desc.Platform = &platform
	other := desc
	other.Platform = &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	other.Digest = godigest.FromString("is not there")
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{other, desc}}
	b := jsonOf(index)
	idx := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: godigest.FromBytes(b), Size: int64(len(b))}
	if err := to.Push(t.Context(), idx, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	if err := to.Tag(t.Context(), idx, "1"); err != nil {
		t.Fatal(err)
	}
	return digest.Digest(desc.Digest.String())
}

func TestAppOfALayout(t *testing.T) {
	at := t.TempDir()
	layout, err := oci.New(at)
	if err != nil {
		t.Fatal(err)
	}
	// The store that is tested wants all that an index names, and reads none of it.
	manifest := push(t, lenient{layout}, layers(t))
	b := appBuilder(t)
	r := images.AppRecipe{OCI: "oci:" + at + ":1", Arch: "amd64"}
	app := makeApp(t, b, r, AppSource{})
	if app.Source != manifest {
		t.Errorf("made of %s, want %s", app.Source, manifest)
	}
	wantFiles(t, filesOf(t, b, app), flattened)
	byDigest := makeApp(t, b, images.AppRecipe{OCI: "oci:" + at + "@" + manifest.String(), Arch: "amd64"}, AppSource{})
	if byDigest.Image != app.Image || byDigest.Source != manifest {
		t.Errorf("by digest it is another image: %+v", byDigest)
	}
	if _, err := b.App(t.Context(), images.AppRecipe{OCI: r.OCI, Arch: "riscv64"}, AppSource{}, nil); err == nil || !strings.Contains(err.Error(), "riscv64") {
		t.Errorf("a processor that it is not for: %v", err)
	}
	spoil(t, at)
	if _, err := b.App(t.Context(), r, AppSource{}, nil); err == nil {
		t.Error("a layer with other bytes was taken")
	}
}

// lenient is a layout in which an index may name what is not there, as those do that hold one platform of several.
type lenient struct{ *oci.Store }

func (l lenient) Push(ctx context.Context, desc ocispec.Descriptor, r io.Reader) error {
	err := l.Store.Push(ctx, desc, r)
	if desc.MediaType == ocispec.MediaTypeImageIndex && err != nil && strings.Contains(err.Error(), "not found") {
		return nil
	}
	return err
}

// spoil flips a byte of each blob that is no manifest.
func spoil(t *testing.T, layout string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(layout, "blobs/sha256/*"))
	if err != nil || len(names) == 0 {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.HasPrefix(b, []byte("{")) {
			continue
		}
		b[len(b)-1] ^= 1
		if err := os.Chmod(name, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAppOfARegistry(t *testing.T) {
	mem := ocimem.NewWithConfig(&ocimem.Config{LaxChildReferences: true})
	srv := httptest.NewServer(ociserver.New(mem, nil))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	repo, err := remote.NewRepository(host + "/apps/site")
	if err != nil {
		t.Fatal(err)
	}
	repo.PlainHTTP = true
	manifest := push(t, repo, layers(t))
	b := appBuilder(t)
	for _, ref := range []string{":1", "@" + manifest.String()} {
		app := makeApp(t, b, images.AppRecipe{OCI: "docker://" + host + "/apps/site" + ref, Arch: "amd64"}, AppSource{})
		if app.Source != manifest {
			t.Errorf("%s: made of %s, want %s", ref, app.Source, manifest)
		}
		wantFiles(t, filesOf(t, b, app), flattened)
	}
	if _, err := b.App(t.Context(), images.AppRecipe{OCI: "docker://" + host + "/apps/site:2", Arch: "amd64"}, AppSource{}, nil); err == nil {
		t.Error("a tag that is not there")
	}
}

// FuzzFlatten lays two archives over one another: whatever they hold, what is left can be written as an image or is refused.
func FuzzFlatten(f *testing.F) {
	for _, l := range layers(f) {
		f.Add(l, layers(f)[1])
	}
	f.Add(archive(f, link("a", "..", tar.TypeSymlink), file("a/x", "x")), archive(f, file("a/.wh.x", "")))
	f.Add([]byte{}, []byte("x"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, below, above []byte) {
		fl, err := newFlattener(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = fl.close() }()
		for _, l := range [][]byte{below, above} {
			if err := fl.add(t.Context(), bytes.NewReader(l)); err != nil {
				return
			}
		}
		out := &seekBuffer{}
		w := &imageWriter{fs: erofs.Create(out, erofs.WithTempDir(dir)), seen: map[string]bool{}}
		err = fl.write(t.Context(), w)
		if err == nil {
			err = w.fs.Close()
		}
		if err != nil {
			t.Fatalf("what was taken cannot be written: %v", err)
		}
		root, err := erofs.Open(bytes.NewReader(out.b))
		if err != nil {
			t.Fatal(err)
		}
		err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
			if err == nil && strings.HasPrefix(d.Name(), whiteoutPrefix) {
				err = fmt.Errorf("%q is in the image", name)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

// A seekBuffer is a file in memory.
type seekBuffer struct {
	b   []byte
	pos int64
}

func (s *seekBuffer) Write(p []byte) (int, error) {
	if need := s.pos + int64(len(p)); need > int64(len(s.b)) {
		s.b = append(s.b, make([]byte, need-int64(len(s.b)))...)
	}
	n := copy(s.b[s.pos:], p)
	s.pos += int64(n)
	return n, nil
}

func (s *seekBuffer) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += s.pos
	case io.SeekEnd:
		off += int64(len(s.b))
	}
	s.pos = off
	return off, nil
}
