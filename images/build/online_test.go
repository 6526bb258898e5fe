package build

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/build/vm"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/treesum"
)

// machineBuilder is a Builder with the Debian base in its store that can run machines.
func machineBuilder(t *testing.T) (*Builder, images.Base) {
	t.Helper()
	shared, base := debianBase(t)
	b := newBuilderOn(t, shared)
	b.Compiled = t.TempDir()
	program := filepath.Join(t.TempDir(), "troupe")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../../cmd/troupe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the machine's init: %v\n%s", err, out)
	}
	b.VMs = vm.NewHost(program, 1)
	return b, base
}

// TestBootSteps boots a base and a role twice. All that the system of the base leaves behind by itself must stay out.
func TestBootSteps(t *testing.T) {
	b, base := machineBuilder(t)
	r := images.DeltaRecipe{
		Base: base.Recipe,
		Files: map[string]images.File{
			"/etc/systemd/system/once.service": {Mode: 0o644, Content: "[Service]\nType=oneshot\nRemainAfterExit=yes\n" +
				"ExecStart=/bin/sh -c 'mkdir /var/lib/once; touch /var/lib/once/started'\nExecStop=/bin/sh -c 'echo ended >/var/lib/once/ended'\n" +
				"[Install]\nWantedBy=multi-user.target\n"},
			"/var/log/kept": {Content: "the role's own\n", Mode: 0o600, UID: 7},
			"/etc/motd":     {Content: "hi\n", Mode: 0o644},
		},
		Enable: []string{"once.service"},
		Boot: []string{
			"test -e /var/lib/once/started; systemctl is-system-running; ls /sys/class/net; hostname; cat /etc/motd",
			`rm /etc/issue.net; rm -r /etc/apt; mkdir /etc/apt; touch /etc/apt/mine; echo log >/var/log/x
			echo made >/etc/made; chown 7:8 /etc/made; chmod 4711 /etc/made
			perl -e '@a = ("/etc/made", "user.a", "b"); syscall(188, @a, 1, 0) == 0 or die $!'
			date +%s%N >/run/x; date +%s%N >/tmp/x; cp /etc/issue /etc/i; mv /etc/i /etc/issue`,
		},
	}
	var rec recorder
	d, err := b.Delta(t.Context(), r, base, &rec)
	if err != nil {
		t.Fatalf("%v\n%s", err, rec.output.String())
	}
	steps := []string{"files", "services", "boot", "boot 1/2: " + r.Boot[0][:59] + "…", "boot 2/2: " + r.Boot[1][:59] + "…", "image"}
	if diff := cmp.Diff(steps, rec.steps); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
	if out := rec.output.String(); !strings.Contains(out, "running\nlo\nlocalhost\nhi\n") {
		t.Errorf("output of the steps: %q", out)
	}
	const want = `drwxr-xr-x 0:0 etc
drwxr-xr-x 0:0 etc/apt trusted.overlay.opaque="y"
-rw-r--r-- 0:0 etc/apt/mine ""
Dc--------- 0:0 etc/issue.net
urwx--x--x 7:8 etc/made user.a="b" "made\n"
-rw-r--r-- 0:0 etc/motd "hi\n"
drwxr-xr-x 0:0 etc/systemd
drwxr-xr-x 0:0 etc/systemd/system
drwxr-xr-x 0:0 etc/systemd/system/multi-user.target.wants
Lrwxrwxrwx 0:0 etc/systemd/system/multi-user.target.wants/once.service -> /etc/systemd/system/once.service
-rw-r--r-- 0:0 etc/systemd/system/once.service UNIT
drwxr-xr-x 0:0 var
drwxr-xr-x 0:0 var/lib
drwxr-xr-x 0:0 var/lib/once
-rw-r--r-- 0:0 var/lib/once/ended "ended\n"
-rw-r--r-- 0:0 var/lib/once/started ""
drwxr-xr-x 0:0 var/log
-rw------- 7:0 var/log/kept "the role's own\n"
`
	list := listing(t, b, d.Image)
	unit := fmt.Sprintf("%q", r.Files["/etc/systemd/system/once.service"].Content)
	if diff := cmp.Diff(want, strings.Replace(list, unit, "UNIT", 1)); diff != "" {
		t.Errorf("the layer (-want +got):\n%s", diff)
	}
	again, err := b.Delta(t.Context(), r, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	if again.Image != d.Image {
		t.Errorf("another boot makes another image (-first +second):\n%s", cmp.Diff(list, listing(t, b, again.Image)))
	}
	nothingLeft(t, b)
}

// TestCompile compiles a program and has what came of it kept.
func TestCompile(t *testing.T) {
	b, base := machineBuilder(t)
	source := fstest.MapFS{
		"make.sh":     {Data: []byte("mkdir -p /out/bin; cat text >/out/bin/prog; chmod 755 /out/bin/prog; ln -s prog /out/bin/alias\n"), Mode: 0o755},
		"text":        {Data: []byte("#!/bin/sh\necho compiled\n"), Mode: 0o644},
		"a/b/c":       {Data: []byte("deep\n"), Mode: 0o644},
		"a/link":      {Data: []byte("b/c"), Mode: os.ModeSymlink | 0o777},
		"a/b/another": {Data: nil, Mode: 0o644},
	}
	sum, err := treesum.Sum(t.Context(), source, ".")
	if err != nil {
		t.Fatal(err)
	}
	r := images.CompileRecipe{
		Source: sum, Base: base.Recipe, Output: "/out",
		Run: []string{"pwd; ls /sys/class/net; cat a/link; ./make.sh; sleep 1000 & date +%N >/elsewhere", "sh /out/bin/prog; ! pidof sleep"},
	}
	var rec recorder
	blob, err := b.Compile(t.Context(), r, base, source, &rec)
	if err != nil {
		t.Fatalf("%v\n%s", err, rec.output.String())
	}
	if out := rec.output.String(); !strings.Contains(out, "/src\nlo\ndeep\ncompiled\n") {
		t.Errorf("output of the steps: %q", out)
	}
	want := "5 755 ./ \"\"\n5 755 bin/ \"\"\n2 777 bin/alias prog \"\"\n0 755 bin/prog \"#!/bin/sh\\necho compiled\\n\"\n"
	if diff := cmp.Diff(want, tarListing(t, b, blob)); diff != "" {
		t.Errorf("what was compiled (-want +got):\n%s", diff)
	}

	// Another Builder, as after a restart of the server, cannot compile, and need not.
	other := &Builder{Store: b.Store, Dir: b.Dir, Compiled: b.Compiled}
	again, err := other.Compile(t.Context(), r, base, source, nil)
	if err != nil || again != blob {
		t.Errorf("compiled before: %v, %v; want %v", again, err, blob)
	}
	moved := r
	moved.Source, moved.URL = digest.Of([]byte("another")), "file:///nowhere"
	if _, err := other.Compile(t.Context(), moved, base, nil, nil); err == nil || !strings.Contains(err.Error(), "runs no machines") {
		t.Errorf("another source without machines: %v", err)
	}
	// What the store lost is compiled again, to the same bytes.
	if err := b.Store.Delete(t.Context(), blob.Digest); err != nil {
		t.Fatal(err)
	}
	if again, err = b.Compile(t.Context(), r, base, source, nil); err != nil || again != blob {
		t.Errorf("compiled again: %v, %v; want %v", again, err, blob)
	}
	nothingLeft(t, b)
}

func TestFailedCompileNamesItsStep(t *testing.T) {
	b, base := machineBuilder(t)
	before := blobs(t, b)
	var archive bytes.Buffer
	z := gzip.NewWriter(&archive)
	w := tar.NewWriter(z)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeReg, Name: "x-1.0/file", Mode: 0o644, Size: 3},
		{Typeflag: tar.TypeLink, Name: "x-1.0/hard", Linkname: "x-1.0/file"},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			_, _ = io.WriteString(w, "hi\n")
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "x.tar.gz")
	if err := os.WriteFile(file, archive.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	r := images.CompileRecipe{
		Source: digest.Of(archive.Bytes()), URL: "file://" + file, Base: base.Recipe, Output: "/out",
		Run: []string{"cat x-1.0/hard", "for i in $(seq 30); do echo line $i; done; echo bad >&2; exit 3", "true"},
	}
	_, err := b.Compile(t.Context(), r, base, nil, nil)
	var se *StepError
	if !errors.As(err, &se) {
		t.Fatalf("got error %v", err)
	}
	if want := "compile 2/3: for i in $(seq 30)"; !strings.HasPrefix(se.Step, want) {
		t.Errorf("got step %q, want %q", se.Step, want)
	}
	if len(se.Tail) != tailLines || !slices.Contains(se.Tail, "bad") || !slices.Contains(se.Tail, "line 30") {
		t.Errorf("got tail %q", se.Tail)
	}
	var exit *vm.ExitError
	if !errors.As(err, &exit) || *exit != (vm.ExitError{Step: 1, Status: 3}) {
		t.Errorf("got error %v, want exit status 3 of the second step", err)
	}
	if diff := cmp.Diff(before, blobs(t, b)); diff != "" {
		t.Errorf("left in the store:\n%s", diff)
	}
	nothingLeft(t, b)
}

// tarListing is a blob of the store that is a tar stream, as text.
func tarListing(t *testing.T, b *Builder, blob images.Blob) string {
	t.Helper()
	f, err := b.Store.Open(t.Context(), blob.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out strings.Builder
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		name := h.Name
		if h.Linkname != "" {
			name += " " + h.Linkname
		}
		if h.ModTime.After(epoch) {
			name += " later than epoch"
		}
		fmt.Fprintf(&out, "%c %o %s %q\n", h.Typeflag, h.Mode, name, content)
	}
}

// A machine runs what a fleet says; what it hands out is not believed.
func TestMachinesAreNotBelieved(t *testing.T) {
	b := newBuilder(t)
	base := fakeBase(t, b)
	root, closeRoot, err := b.openImage(t.Context(), base.Image.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer closeRoot()
	for _, c := range []struct {
		want string
		tar  []tar.Header
	}{
		{"is not the name of a file", []tar.Header{{Typeflag: tar.TypeReg, Name: "../x"}}},
		{"is not the name of a file", []tar.Header{{Typeflag: tar.TypeReg, Name: "/x"}}},
		{"comes twice", []tar.Header{{Typeflag: tar.TypeReg, Name: "x"}, {Typeflag: tar.TypeReg, Name: "x"}}},
		{"lies in no directory", []tar.Header{{Typeflag: tar.TypeReg, Name: "a/x"}}},
		{"lies in no directory", []tar.Header{{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "/"}, {Typeflag: tar.TypeReg, Name: "a/x"}}},
		{"of a kind that is not known", []tar.Header{{Typeflag: tar.TypeLink, Name: "x", Linkname: "y"}}},
	} {
		v, err := newView(root)
		if err != nil {
			t.Fatal(err)
		}
		err = v.takeLayer(t.Context(), resultOf(t, c.tar), nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: got error %v, want one with %q", c.tar, err, c.want)
		}
	}
}

// resultOf is what a machine would hand out that wrote these headers.
func resultOf(t *testing.T, headers []tar.Header) *vm.Result {
	t.Helper()
	var stream bytes.Buffer
	w := tar.NewWriter(&stream)
	for _, h := range headers {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &vm.Result{SectionReader: io.NewSectionReader(bytes.NewReader(stream.Bytes()), 0, int64(stream.Len()))}
}

func TestBadArchivesAreNotUnpacked(t *testing.T) {
	for _, c := range []struct {
		want string
		tar  []tar.Header
	}{
		{"leads out of it", []tar.Header{{Typeflag: tar.TypeReg, Name: "../x"}}},
		{"lies in what is no directory", []tar.Header{{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "/etc"}, {Typeflag: tar.TypeReg, Name: "a/x"}}},
		{"a link to what is not there", []tar.Header{{Typeflag: tar.TypeLink, Name: "a", Linkname: "../../etc/passwd"}}},
		{"no file, directory or link", []tar.Header{{Typeflag: tar.TypeBlock, Name: "a"}}},
	} {
		err := writeArchive(t.Context(), tar.NewWriter(io.Discard), resultOf(t, c.tar))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: got error %v, want one with %q", c.tar, err, c.want)
		}
	}
	if err := writeArchive(t.Context(), tar.NewWriter(io.Discard), strings.NewReader(strings.Repeat("no archive", 100))); err == nil {
		t.Error("what is no archive was taken for one")
	}
}

// What goes into a machine and comes out again unchanged is the same layer.
func TestLayerThroughTar(t *testing.T) {
	b := newBuilder(t)
	base := fakeBase(t, b)
	root, closeRoot, err := b.openImage(t.Context(), base.Image.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer closeRoot()
	v, err := newView(root)
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range map[string]entry{
		"etc/a":     regular("content\n", 0o4755),
		"etc/motd":  {mode: unix.S_IFCHR, mtime: epoch},
		"opt/deep":  {mode: unix.S_IFDIR | 0o1777, mtime: epoch, xattrs: map[string]string{opaqueXattr: "y"}},
		"opt/link":  {mode: unix.S_IFLNK | 0o777, target: "deep", mtime: epoch},
		"opt/block": {mode: unix.S_IFBLK | 0o600, rdev: uint32(unix.Mkdev(259, 300)), mtime: epoch},
		"opt/caps":  {mode: unix.S_IFREG | 0o755, uid: 1000, gid: 70000, mtime: epoch, xattrs: map[string]string{"security.capability": "\x01\x00=\n"}},
	} {
		if _, _, err := v.put(name, e); err != nil {
			t.Fatal(err)
		}
	}
	var stream bytes.Buffer
	w := tar.NewWriter(&stream)
	for _, name := range sortedKeys(v.top) {
		if err := writeTarEntry(w, name, v.top[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := newView(root)
	if err != nil {
		t.Fatal(err)
	}
	r := &vm.Result{SectionReader: io.NewSectionReader(bytes.NewReader(stream.Bytes()), 0, int64(stream.Len()))}
	if err := got.takeLayer(t.Context(), r, nil); err != nil {
		t.Fatal(err)
	}
	var lists [2]string
	for i, top := range []layer{v.top, got.top} {
		w, err := b.newImage(t.Context(), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if err := addAll(top, w); err != nil {
			t.Fatal(err)
		}
		blob, err := w.commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		lists[i] = listing(t, b, blob)
	}
	if diff := cmp.Diff(lists[0], lists[1]); diff != "" {
		t.Errorf("the layer came back (-in +out):\n%s", diff)
	}
}
