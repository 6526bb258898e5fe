package initramfs

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"strings"
)

// A section is one of a fakeELF.
type section struct {
	name string
	kind elf.SectionType
	link uint32 // the number of another section, from 1
	data []byte
}

// fakeELF makes a 64-bit little-endian ELF file that has the given sections, and a PT_INTERP where interp is not "". It
// has no code: nobody runs it.
func fakeELF(m elf.Machine, interp string, secs ...section) []byte {
	var names, body bytes.Buffer
	names.WriteByte(0)
	secs = append(secs, section{name: ".shstrtab", kind: elf.SHT_STRTAB})
	heads := make([]elf.Section64, 1, len(secs)+1)
	var progs []elf.Prog64
	const start = 64 + 56 // after the ELF header and room for one program header
	if interp != "" {
		progs = append(progs, elf.Prog64{Type: uint32(elf.PT_INTERP), Off: start, Filesz: uint64(len(interp) + 1)})
		body.WriteString(interp + "\x00")
	}
	for i, s := range secs {
		h := elf.Section64{Name: uint32(names.Len()), Type: uint32(s.kind), Off: uint64(start + body.Len()), Link: s.link}
		names.WriteString(s.name + "\x00")
		if i == len(secs)-1 {
			s.data = names.Bytes()
		}
		h.Size = uint64(len(s.data))
		body.Write(s.data)
		heads = append(heads, h)
	}
	head := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_DYN), Machine: uint16(m), Version: 1, Ehsize: 64,
		Phoff: 64, Phentsize: 56, Phnum: uint16(len(progs)),
		Shoff: uint64(start + body.Len()), Shentsize: 64, Shnum: uint16(len(heads)), Shstrndx: uint16(len(heads) - 1),
	}
	var out bytes.Buffer
	put := func(v any) {
		if err := binary.Write(&out, binary.LittleEndian, v); err != nil {
			panic(err) // a bytes.Buffer takes all, and the types are of fixed size
		}
	}
	put(head)
	put(progs)
	out.Write(make([]byte, start-out.Len()))
	out.Write(body.Bytes())
	put(heads)
	return out.Bytes()
}

// fakeModule is a kernel module that says of itself what the strings "key=value" say.
func fakeModule(info ...string) []byte {
	return fakeELF(elf.EM_X86_64, "", section{name: ".modinfo", kind: elf.SHT_PROGBITS, data: []byte(strings.Join(info, "\x00") + "\x00")})
}

// fakeProgram is a program or a library that needs libraries, and looks for them in runpath first.
func fakeProgram(m elf.Machine, interp, runpath string, needed ...string) []byte {
	var dyn bytes.Buffer
	strs := []byte{0}
	add := func(tag elf.DynTag, s string) {
		dyn.Write(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, uint64(tag)), uint64(len(strs))))
		strs = append(append(strs, s...), 0)
	}
	for _, n := range needed {
		add(elf.DT_NEEDED, n)
	}
	if runpath != "" {
		add(elf.DT_RUNPATH, runpath)
	}
	dyn.Write(make([]byte, 16)) // DT_NULL
	return fakeELF(m, interp,
		section{name: ".dynstr", kind: elf.SHT_STRTAB, data: strs},
		section{name: ".dynamic", kind: elf.SHT_DYNAMIC, link: 1, data: dyn.Bytes()})
}
