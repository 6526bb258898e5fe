package initramfs

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

const kver = "6.1.0-test"

// fakeRoot is a usr-merged root file system with the least that Modules takes.
func fakeRoot() fstest.MapFS {
	root := fstest.MapFS{
		"usr/lib/x86_64-linux-gnu/libc.so.6":             file(fakeProgram(elf.EM_X86_64, "", "", "ld-linux-x86-64.so.2")),
		"usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2":  file(fakeProgram(elf.EM_X86_64, "", "")),
		"usr/lib64/ld-linux-x86-64.so.2":                 link("/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"),
		"usr/sbin/mke2fs":                                file(fakeProgram(elf.EM_X86_64, "/lib64/ld-linux-x86-64.so.2", "", "libc.so.6")),
		"usr/sbin/e2fsck":                                file(fakeProgram(elf.EM_X86_64, "/lib64/ld-linux-x86-64.so.2", "", "libc.so.6")),
		"etc/mke2fs.conf":                                file([]byte("[defaults]\n")),
		"usr/lib/modules/" + kver + "/build":             link("/usr/src/linux-headers"),
		"usr/lib/modules/" + kver + "/modules.builtin":   file([]byte("kernel/fs/ext4/ext4.ko\nkernel/crypto/sha256_generic.ko\n")),
		"usr/lib/modules/" + kver + "/kernel/README.txt": file([]byte("not a module")),
	}
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		root[d] = link("usr/" + d)
	}
	addModules(root, map[string][]byte{
		"fs/erofs/erofs.ko":               fakeModule("depends=libcrc32c", "alias=fs-erofs"),
		"fs/overlayfs/overlay.ko":         fakeModule("depends="),
		"drivers/md/dm-verity.ko":         fakeModule("depends="),
		"drivers/block/loop.ko":           fakeModule("alias=block-major-7-*", "alias=devname:loop-control"),
		"drivers/net/net-failover.ko":     fakeModule("depends=failover"),
		"drivers/net/virtio_net.ko":       fakeModule("depends=net_failover,sha256_generic", "alias=virtio:d00000001v*"),
		"drivers/net/wireless/iwlwifi.ko": fakeModule("depends="),
		"net/core/failover.ko":            fakeModule("depends="),
		"lib/libcrc32c.ko":                fakeModule("softdep=pre: crc32c post: crc32c_intel"),
		"crypto/crc32c_generic.ko":        fakeModule("alias=crc32c"),
		"sound/core/snd.ko":               fakeModule("depends="),
		"drivers/net/ethernet/rtl/r8169.ko": fakeModule("firmware=rtl_nic/a.fw", "firmware=rtl_nic/b.fw", "firmware=rtl_nic/none.fw",
			"firmware=../escape.fw"),
	})
	return root
}

func file(b []byte) *fstest.MapFile { return &fstest.MapFile{Data: b, Mode: 0o755} }
func link(target string) *fstest.MapFile {
	return &fstest.MapFile{Data: []byte(target), Mode: fs.ModeSymlink | 0o777}
}

func addModules(root fstest.MapFS, mods map[string][]byte) {
	for rel, b := range mods {
		root["usr/lib/modules/"+kver+"/kernel/"+rel] = file(b)
	}
}

func build(t *testing.T, root fs.FS) (map[string]File, Summary) {
	t.Helper()
	var b bytes.Buffer
	sum, err := Modules(&b, root, kver)
	if err != nil {
		t.Fatal(err)
	}
	return listed(t, b.Bytes()), sum
}

func listed(t *testing.T, img []byte) map[string]File {
	t.Helper()
	files, err := List(bytes.NewReader(img))
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]File)
	for _, f := range files {
		m[f.Name] = f
	}
	if len(m) != len(files) {
		t.Error("a name is twice in the archive")
	}
	return m
}

func TestModules(t *testing.T) {
	root := fakeRoot()
	root["usr/lib/firmware/rtl_nic/a.fw"] = link("real.fw")
	root["usr/lib/firmware/rtl_nic/real.fw"] = file([]byte("firmware a"))
	root["usr/lib/firmware/updates/rtl_nic/b.fw.xz"] = file(xzOf(t, []byte("firmware b, newer")))
	root["usr/lib/firmware/rtl_nic/b.fw"] = file([]byte("firmware b"))
	files, sum := build(t, root)

	want := Summary{
		Modules:    []string{"crc32c_generic", "dm_verity", "erofs", "failover", "libcrc32c", "loop", "net_failover", "overlay", "r8169", "virtio_net"},
		Firmware:   []string{"rtl_nic/a.fw", "rtl_nic/b.fw"},
		NoFirmware: []string{"rtl_nic/none.fw"},
		Tools:      []string{"/sbin/e2fsck", "/sbin/mke2fs"},
		Unpacked:   sum.Unpacked,
	}
	if d := cmp.Diff(want, sum); d != "" {
		t.Errorf("summary (-want +got):\n%s", d)
	}
	texts := map[string]string{
		"modules.dep": `kernel/crypto/crc32c_generic.ko:
kernel/drivers/md/dm-verity.ko:
kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko kernel/crypto/crc32c_generic.ko
kernel/net/core/failover.ko:
kernel/lib/libcrc32c.ko: kernel/crypto/crc32c_generic.ko
kernel/drivers/block/loop.ko:
kernel/drivers/net/net-failover.ko: kernel/net/core/failover.ko
kernel/fs/overlayfs/overlay.ko:
kernel/drivers/net/ethernet/rtl/r8169.ko:
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net-failover.ko kernel/net/core/failover.ko
`,
		"modules.alias": `alias crc32c crc32c_generic
alias fs-erofs erofs
alias block-major-7-* loop
alias devname:loop-control loop
alias virtio:d00000001v* virtio_net
`,
		"modules.softdep": "softdep libcrc32c pre: crc32c post: crc32c_intel\n",
		"modules.builtin": "kernel/crypto/sha256_generic.ko\nkernel/fs/ext4/ext4.ko\n",
	}
	for name, text := range texts {
		if d := cmp.Diff(text, string(files["usr/lib/modules/"+kver+"/"+name].Data)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	for name, content := range map[string]string{
		"usr/lib/firmware/rtl_nic/a.fw": "firmware a",
		"usr/lib/firmware/rtl_nic/b.fw": "firmware b, newer",
		"etc/mke2fs.conf":               "[defaults]\n",
		"sbin":                          "usr/sbin",
	} {
		if got := string(files[name].Data); got != content {
			t.Errorf("%s has %q, want %q", name, got, content)
		}
	}
	for _, name := range []string{"usr/sbin/mke2fs", "usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu/libc.so.6"} {
		if files[name].Mode != 0o755 {
			t.Errorf("%s has mode %v, want a program", name, files[name].Mode)
		}
	}
}

// A directory must come before what is in it, and nothing may tell where or when the archive was made.
func TestArchivesAreOrderedAndReproducible(t *testing.T) {
	var first, second bytes.Buffer
	for _, w := range []io.Writer{&first, &second} {
		if _, err := Modules(w, fakeRoot(), kver); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("the same root gave different bytes")
	}
	z, err := zstd.NewReader(&first)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	// Read by the other implementation, which knows the fields that File leaves out.
	recs, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(plain)))
	if err != nil {
		t.Fatal(err)
	}
	dirs := map[string]bool{".": true}
	for _, r := range recs {
		if !dirs[filepath.Dir(r.Name)] {
			t.Errorf("%s comes before its directory", r.Name)
		}
		if r.Mode&cpio.S_IFMT == cpio.S_IFDIR {
			dirs[r.Name] = true
		}
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 || r.Major != 0 || r.Minor != 0 {
			t.Errorf("%s tells of the machine it was made on: %+v", r.Name, r.Info)
		}
	}
}

// However a distribution compresses its modules, a node gets them plain, with their plain names in modules.dep.
func TestCompressedModules(t *testing.T) {
	root := fakeRoot()
	dir := "usr/lib/modules/" + kver + "/kernel/drivers/net/"
	for suffix, squeeze := range map[string]func(testing.TB, []byte) []byte{".xz": xzOf, ".zst": zstdOf, ".gz": gzipOf} {
		name := "card" + suffix[1:]
		root[dir+name+".ko"+suffix] = file(squeeze(t, fakeModule("depends=failover", "name="+name)))
	}
	files, _ := build(t, root)
	for _, name := range []string{"cardxz", "cardzst", "cardgz"} {
		if got := files[dir+name+".ko"].Data; !bytes.Equal(got, fakeModule("depends=failover", "name="+name)) {
			t.Errorf("%s is not the plain module: %d bytes", name, len(got))
		}
	}
	dep := string(files["usr/lib/modules/"+kver+"/modules.dep"].Data)
	if !strings.Contains(dep, "\nkernel/drivers/net/cardxz.ko: kernel/net/core/failover.ko\n") {
		t.Errorf("modules.dep:\n%s", dep)
	}
}

// As for depmod, a module of updates/ stands before the kernel's own of the same name.
func TestUpdatesWin(t *testing.T) {
	root := fakeRoot()
	root["usr/lib/modules/"+kver+"/updates/dkms/failover.ko"] = file(fakeModule("version=2"))
	files, _ := build(t, root)
	dep := string(files["usr/lib/modules/"+kver+"/modules.dep"].Data)
	if !strings.Contains(dep, "kernel/drivers/net/net-failover.ko: updates/dkms/failover.ko\n") {
		t.Errorf("modules.dep:\n%s", dep)
	}
}

// Soft dependencies may go in a circle; what a loader walks must not.
func TestSoftDependencyCircle(t *testing.T) {
	root := fakeRoot()
	addModules(root, map[string][]byte{
		"drivers/net/a.ko": fakeModule("softdep=pre: b"),
		"drivers/net/b.ko": fakeModule("depends=a"),
	})
	files, _ := build(t, root)
	dep := string(files["usr/lib/modules/"+kver+"/modules.dep"].Data)
	a, b := strings.Contains(dep, "/a.ko: kernel/drivers/net/b.ko"), strings.Contains(dep, "/b.ko: kernel/drivers/net/a.ko")
	if a == b || !b {
		t.Errorf("want b after a, for its symbols, and no way back; modules.dep:\n%s", dep)
	}
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	lib := "usr/lib/modules/" + kver + "/"
	for name, tc := range map[string]struct {
		change func(fstest.MapFS)
		want   string
	}{
		"kernel":     {func(r fstest.MapFS) { deleteBelow(r, lib) }, "add the kernel's package, e.g. linux-image-cloud-amd64"},
		"erofs":      {func(r fstest.MapFS) { delete(r, lib+"kernel/fs/erofs/erofs.ko") }, "the kernel has no erofs"},
		"ext4":       {func(r fstest.MapFS) { delete(r, lib+"modules.builtin") }, `"sha256_generic", which is neither a module nor built in`},
		"dependency": {func(r fstest.MapFS) { delete(r, lib+"kernel/net/core/failover.ko") }, `depends on "failover", which is neither`},
		"no module":  {func(r fstest.MapFS) { r[lib+"kernel/fs/erofs/erofs.ko"] = file([]byte("torn")) }, `reading module "` + lib + `kernel/fs/erofs/erofs.ko"`},
		"torn xz":    {func(r fstest.MapFS) { r[lib+"kernel/drivers/net/x.ko.xz"] = file([]byte("\xfd7zXZ")) }, "decompressing"},
		"mke2fs":     {func(r fstest.MapFS) { delete(r, "usr/sbin/mke2fs") }, "add the package e2fsprogs to the image"},
		"loader":     {func(r fstest.MapFS) { delete(r, "usr/lib64/ld-linux-x86-64.so.2") }, "its loader: "},
		"library":    {func(r fstest.MapFS) { delete(r, "usr/lib/x86_64-linux-gnu/libc.so.6") }, `library "libc.so.6" of /sbin/e2fsck`},
		"links":      {func(r fstest.MapFS) { r["usr/sbin/mke2fs"] = link("/sbin/mke2fs") }, "goes through more than 40 links"},
		"directory":  {func(r fstest.MapFS) { r["usr/sbin/mke2fs"] = &fstest.MapFile{Mode: fs.ModeDir} }, "not a file"},
	} {
		t.Run(name, func(t *testing.T) {
			root := fakeRoot()
			tc.change(root)
			_, err := Modules(io.Discard, root, kver)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
	for _, bad := range []string{"", ".", "..", "a/b", "../../etc"} {
		if _, err := Modules(io.Discard, fakeRoot(), bad); err == nil {
			t.Errorf("kernel %q was taken", bad)
		}
	}
}

func deleteBelow(root fstest.MapFS, dir string) {
	for _, name := range slices.Collect(maps.Keys(root)) {
		if strings.HasPrefix(name, dir) {
			delete(root, name)
		}
	}
}

// A root file system is another machine's: its links must not lead to this one's files.
func TestLinksStayInTheRoot(t *testing.T) {
	outside := t.TempDir()
	root := filepath.Join(outside, "a", "root")
	if err := os.CopyFS(root, fstest.MapFS{"etc/ok": file([]byte("inside"))}); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("outside"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"abs": secret, "up": "../../secret", "far": "../../../../../../../../../.." + secret, "dir": outside, "ok": "/../../etc/ok",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	r := rootFS{os.DirFS(root)}
	for _, name := range []string{"abs", "up", "far", "dir/secret", "../../secret"} {
		if b, err := r.read(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("reading %q: %q, %v; want that it does not exist", name, b, err)
		}
	}
	if b, err := r.read("/ok"); string(b) != "inside" || err != nil {
		t.Errorf("reading a link to a file inside: %q, %v", b, err)
	}
}

// Libraries are looked for as ld.so does, and each is stored where it will be looked for.
func TestLibraries(t *testing.T) {
	const amd, arm = elf.EM_X86_64, elf.EM_AARCH64
	root := rootFS{fstest.MapFS{
		"opt/bin/prog":                     file(fakeProgram(amd, "/lib64/ld.so", "$ORIGIN/../lib:/none", "liba.so", "libb.so", "ld.so")),
		"opt/lib/liba.so":                  file(fakeProgram(amd, "", "", "libb.so")),
		"lib64/ld.so":                      file(fakeProgram(amd, "", "")),
		"lib/x86_64-linux-gnu/libb.so":     file(fakeProgram(arm, "", "")), // of another machine
		"usr/lib/libb.so":                  file(fakeProgram(amd, "", "", "liba.so", "/usr/lib/libc.so")),
		"usr/lib/libc.so":                  link("libc.so.6"),
		"usr/lib/libc.so.6":                file(fakeProgram(amd, "", "")),
		"usr/lib/x86_64-linux-gnu/liba.so": file(fakeProgram(amd, "", "", "libb.so")),
	}}
	a := newArchive()
	if err := addProgram(a, root, "/opt/bin/prog"); err != nil {
		t.Fatal(err)
	}
	var got []string
	for name, e := range a.entries {
		if e.load != nil {
			got = append(got, name)
		}
	}
	slices.Sort(got)
	// liba.so is there twice: prog finds its own, libb.so has no RUNPATH and finds the system's.
	want := []string{"opt/bin/prog", "opt/lib/liba.so", "usr/lib/libb.so", "usr/lib/libc.so", "usr/lib/x86_64-linux-gnu/liba.so", "usr/lib64/ld.so"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

func TestAgent(t *testing.T) {
	prog := fakeELF(elf.EM_X86_64, "")
	var b bytes.Buffer
	if err := Agent(&b, bytes.NewReader(prog), "a key\n"); err != nil {
		t.Fatal(err)
	}
	files, err := List(&b)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		switch f.Mode.Type() {
		case fs.ModeSymlink:
			got = append(got, fmt.Sprintf("%v %s -> %s", f.Mode, f.Name, f.Data))
		case fs.ModeDevice | fs.ModeCharDevice:
			got = append(got, fmt.Sprintf("%v %s %d,%d", f.Mode, f.Name, f.Major, f.Minor))
		default:
			got = append(got, fmt.Sprintf("%v %s", f.Mode, f.Name))
		}
	}
	want := []string{
		"Lrwxrwxrwx bin -> usr/bin",
		"drwxr-xr-x dev",
		"Dcrw------- dev/console 5,1",
		"Dcrw------- dev/kmsg 1,11",
		"Dcrw-rw-rw- dev/null 1,3",
		"drwxr-xr-x etc",
		"drwxr-xr-x etc/troupe",
		"-rw-r--r-- etc/troupe/release.pub",
		"-rwxr-xr-x init",
		"Lrwxrwxrwx lib -> usr/lib",
		"Lrwxrwxrwx lib64 -> usr/lib64",
		"drwxr-xr-x mnt",
		"drwxr-xr-x proc",
		"drwx------ root",
		"drwxr-xr-x run",
		"Lrwxrwxrwx sbin -> usr/sbin",
		"drwxr-xr-x sys",
		"dtrwxrwxrwx tmp",
		"drwxr-xr-x usr",
		"drwxr-xr-x usr/bin",
		"drwxr-xr-x usr/lib",
		"drwxr-xr-x usr/lib64",
		"drwxr-xr-x usr/sbin",
		"drwxr-xr-x var",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("archive (-want +got):\n%s", d)
	}
}

func TestAgentMustBeStatic(t *testing.T) {
	for want, prog := range map[string][]byte{
		"dynamically linked": fakeProgram(elf.EM_X86_64, "/lib64/ld-linux-x86-64.so.2", ""),
		"not an ELF program": []byte("#!/bin/sh\n"),
	} {
		if err := Agent(io.Discard, bytes.NewReader(prog), ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v, want one with %q", err, want)
		}
	}
}

func TestArch(t *testing.T) {
	for machine, want := range map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_RISCV: ""} {
		got, err := Arch(bytes.NewReader(fakeELF(machine, "")))
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%v: got %q, %v; want %q", machine, got, err, want)
		}
	}
}

// pkg/cpio writes the low 32 bits of a size that needs more, and the archive is garbage from there on.
func TestFilesOf4GiBAreRefused(t *testing.T) {
	cw := cpio.Newc.Writer(io.Discard)
	rec := cpio.Record{Info: cpio.Info{Name: "big", Mode: cpio.S_IFREG, FileSize: 4<<30 + 512}}
	if _, err := writeEntry(cw, "big", entry{rec: rec}, 1); err == nil {
		t.Error("a file of 4 GiB and 512 bytes was taken")
	}
	if _, err := readAtMost(strings.NewReader("12345"), 4); err == nil {
		t.Error("5 bytes were read where 4 are allowed")
	}
}

func FuzzModinfo(f *testing.F) {
	f.Add(fakeModule("depends=a,b", "softdep=pre: x post: y", "alias=pci:*", "firmware=f"))
	f.Add(fakeProgram(elf.EM_X86_64, "/lib64/ld.so", "$ORIGIN", "libc.so.6"))
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		mi, err := readModinfo(b)
		if err == nil && strings.ContainsAny(strings.Join(mi.aliases, ""), "\n\x00") {
			t.Errorf("an alias would break modules.alias: %q", mi.aliases)
		}
		if p, err := parseELF("/x", b); err == nil && strings.HasSuffix(p.interp, "\x00") {
			t.Errorf("the loader's name has its NUL: %q", p.interp)
		}
	})
}

func FuzzList(f *testing.F) {
	var b bytes.Buffer
	if err := Agent(&b, bytes.NewReader(fakeELF(elf.EM_X86_64, "")), ""); err != nil {
		f.Fatal(err)
	}
	frames, err := withoutZeros(b.Bytes())
	if err != nil {
		f.Fatal(err)
	}
	z, err := zstd.NewReader(frames)
	if err != nil {
		f.Fatal(err)
	}
	defer z.Close()
	plain, err := io.ReadAll(z)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plain)
	f.Add(b.Bytes())
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = withoutZeros(b) // hostile lengths end in an error
		c := newCPIOReader(bytes.NewReader(b))
		total := 0
		for {
			e, err := c.next()
			if err != nil {
				break
			}
			if total += len(e.Data) + headerSize; total > len(b) {
				t.Fatalf("%d bytes came out of %d", total, len(b))
			}
		}
	})
}

func xzOf(t testing.TB, b []byte) []byte {
	t.Helper()
	return squeeze(t, b, func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) })
}

func zstdOf(t testing.TB, b []byte) []byte {
	t.Helper()
	return squeeze(t, b, func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) })
}

func gzipOf(t testing.TB, b []byte) []byte {
	t.Helper()
	return squeeze(t, b, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
}

func squeeze(t testing.TB, b []byte, open func(io.Writer) (io.WriteCloser, error)) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := open(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// A UEFI boot loader hands several archives to the kernel as they are: the second is found at a multiple of 4 only.
func TestArchivesArePaddedToFourBytes(t *testing.T) {
	lengths := map[int]bool{}
	for i := range 40 {
		a := newArchive()
		a.bytes("init", 0o755, bytes.Repeat([]byte{byte(i), byte(i * 7), 3}, 100+i))
		var raw, padded bytes.Buffer
		if _, err := a.compress(&raw); err != nil {
			t.Fatal(err)
		}
		if _, err := a.writeTo(&padded); err != nil {
			t.Fatal(err)
		}
		if padded.Len()%align != 0 || !bytes.HasPrefix(padded.Bytes(), raw.Bytes()) {
			t.Errorf("archive of %d bytes is written as %d", raw.Len(), padded.Len())
		}
		lengths[raw.Len()%align] = true
		files, err := List(io.MultiReader(&padded, &raw))
		if err != nil || len(files) == 0 || len(files)%2 != 0 {
			t.Errorf("two archives: %d files, %v", len(files), err)
		}
	}
	if len(lengths) < 2 {
		t.Errorf("all archives tried have a length of the same kind: %v", lengths)
	}
}
