package command

import (
	"bytes"
	"encoding/binary"
	"io"
)

// tables is how large the program headers of an ELF file may be together, in bytes (load_elf_phdrs in Linux, fs/binfmt_elf.c).
const tables = 64 << 10

// A layout says where the fields of an ELF file lie, in bytes from the beginning of its header and of a program header
// (elf(5)). Package debug/elf would read all sections, too, which the kernel does not.
type layout struct {
	phoff, phentsize, phnum int // in the header
	offset, filesz          int // in a program header
	entry                   int // bytes of a program header
	word                    func([]byte) uint64
}

func layoutOf(class byte) layout {
	if class == 1 { // ELFCLASS32
		word := func(b []byte) uint64 { return uint64(binary.NativeEndian.Uint32(b)) }
		return layout{phoff: 28, phentsize: 42, phnum: 44, offset: 4, filesz: 16, entry: 32, word: word}
	}
	return layout{phoff: 32, phentsize: 54, phnum: 56, offset: 8, filesz: 32, entry: 56, word: binary.NativeEndian.Uint64}
}

// interpreter reads the program headers of an ELF file and the path of the loader that they name (PT_INTERP); "": they name
// none, or it is no such file, or none that the kernel takes.
func interpreter(f io.ReaderAt) string {
	const ptInterp = 3
	head := make([]byte, 64)
	_, _ = f.ReadAt(head, 0) // the start tells what is wrong
	if !bytes.HasPrefix(head, []byte("\x7fELF")) {
		return ""
	}
	l := layoutOf(head[4])
	size := int(binary.NativeEndian.Uint16(head[l.phnum:])) * l.entry
	if int(binary.NativeEndian.Uint16(head[l.phentsize:])) != l.entry || size > tables {
		return ""
	}
	for table := readAt(f, l.word(head[l.phoff:]), size); len(table) > 0; table = table[l.entry:] {
		if binary.NativeEndian.Uint32(table) != ptInterp {
			continue
		}
		n := l.word(table[l.filesz:])
		if n > page { // PATH_MAX
			return ""
		}
		path, _, _ := bytes.Cut(readAt(f, l.word(table[l.offset:]), int(n)), []byte{0})
		return string(path)
	}
	return ""
}

// readAt is n bytes of a file; nil where it does not have all of them.
func readAt(f io.ReaderAt, off uint64, n int) []byte {
	if off > 1<<62 { // no file is that long
		return nil
	}
	b := make([]byte, n)
	if got, _ := f.ReadAt(b, int64(off)); got < n {
		return nil
	}
	return b
}
