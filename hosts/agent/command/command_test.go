package command

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// program is the beginning of an ELF file whose program headers lie at phoff. Those are of class 64, or of 32.
func program(t testing.TB, class elf.Class, phoff int, interp string) []byte {
	t.Helper()
	ident := [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(class), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)}
	at, size := phoff+4096, len(interp)+1 // beyond the page of the headers
	var head, table any
	if class == elf.ELFCLASS64 {
		head = elf.Header64{Ident: ident, Phoff: uint64(phoff), Phentsize: 56, Phnum: 2}
		table = []elf.Prog64{{Type: uint32(elf.PT_LOAD)}, {Type: uint32(elf.PT_INTERP), Off: uint64(at), Filesz: uint64(size)}}
	} else {
		head = elf.Header32{Ident: ident, Phoff: uint32(phoff), Phentsize: 32, Phnum: 2}
		table = []elf.Prog32{{Type: uint32(elf.PT_LOAD)}, {Type: uint32(elf.PT_INTERP), Off: uint32(at), Filesz: uint32(size)}}
	}
	file := make([]byte, at+size)
	for off, v := range map[int]any{0: head, phoff: table} {
		if _, err := binary.Encode(file[off:], binary.NativeEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	copy(file[at:], interp)
	return file
}

// written is a file that can be executed.
func written(t *testing.T, name, content string) string {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

// isRead says whether f reads the file at path.
func isRead(t *testing.T, path string, f func()) bool {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_ACCESS); err != nil {
		t.Fatal(err)
	}
	f()
	n, err := unix.Read(fd, make([]byte, 4096))
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		t.Fatal(err)
	}
	return n > 0
}

// Whatever the kernel reads before the start of a program returns is read before the start.
func TestAllThatAStartWaitsForIsRead(t *testing.T) {
	dir := t.TempDir()
	loader := written(t, filepath.Join(dir, "ld.so"), string(program(t, elf.ELFCLASS64, 64, "")))
	near := written(t, filepath.Join(dir, "near"), string(program(t, elf.ELFCLASS64, 64, loader)))
	script := written(t, filepath.Join(dir, "script"), "#! "+near+" -e\n")
	for name, path := range map[string]string{
		"of 64 bits":                near,
		"of 32 bits":                written(t, filepath.Join(dir, "32"), string(program(t, elf.ELFCLASS32, 52, loader))),
		"its headers far away":      written(t, filepath.Join(dir, "far"), string(program(t, elf.ELFCLASS64, 1<<20, loader))),
		"a script":                  script,
		"a script's script":         written(t, filepath.Join(dir, "outer"), "#!"+script+"\n"),
		"a script without an end":   written(t, filepath.Join(dir, "short"), "#!"+near),
		"the interpreter by itself": loader,
	} {
		if !isRead(t, loader, func() { New(t.Context(), path) }) {
			t.Errorf("%s: the loader is not read", name)
		}
	}
}

func TestInterpreterOfTheShell(t *testing.T) {
	f, err := elf.Open("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := ""
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b := make([]byte, p.Filesz)
			if _, err := p.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
			want = strings.TrimRight(string(b), "\x00")
		}
	}
	if got := read("/bin/sh"); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// What the kernel would not start, or what has no end, is left to the start.
func TestAHostileProgramIsLeftToTheStart(t *testing.T) {
	dir := t.TempDir()
	loop := filepath.Join(dir, "loop")
	many := program(t, elf.ELFCLASS64, 64, "/x")
	binary.NativeEndian.PutUint16(many[56:], 0xffff)
	for name, content := range map[string]string{
		"itself":                           "#!" + loop + "\n",
		"nothing":                          "",
		"half a header":                    string(many[:40]),
		"more program headers than can be": string(many),
	} {
		if cmd := New(t.Context(), written(t, loop, content)); cmd.Path != loop {
			t.Errorf("%s: path %s", name, cmd.Path)
		}
	}
	New(t.Context(), filepath.Join(dir, "nowhere"))
}

func FuzzInterpreter(f *testing.F) {
	f.Add(program(f, elf.ELFCLASS64, 64, "/lib64/ld-linux-x86-64.so.2"))
	f.Add(program(f, elf.ELFCLASS32, 52, "/lib/ld-linux.so.2"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got := interpreter(bytes.NewReader(b)); len(got) > page || strings.Contains(got, "\x00") || !bytes.Contains(b, []byte(got)) {
			t.Errorf("interpreter %q", got)
		}
	})
}
