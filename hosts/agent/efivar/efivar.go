// Package efivar keeps one boot entry in the settings of UEFI firmware (specification 2.10, section 3.1), through Linux's
// efivarfs.
package efivar

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
)

const (
	// Dir is where efivarfs is mounted.
	Dir = "/sys/firmware/efi/efivars"
	// global is the vendor of BootOrder and the like.
	global = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	// attributes of such a variable: it is kept without power, and firmware and system see it.
	attributes = 7
	// maxEntry bounds what is read of a variable, in bytes.
	maxEntry = 64 << 10
)

// A Partition is one of a GPT.
type Partition struct {
	Number             uint32
	FirstBlock, Blocks uint64
	ID                 string // its GUID as it lies on disk, 32 hex digits
}

// A Vars is a directory of efivarfs.
type Vars struct{ Dir string }

// Ensure makes the firmware have one entry of that name, which starts the file of a partition, behind the entries for the
// network. It is given its place once: where somebody moves it afterwards, it stays. Nothing is written where nothing
// changed, since the memory of firmware wears out. It says whether it wrote.
func (v Vars) Ensure(name string, p Partition, file string) (written bool, err error) {
	want, err := loadOption(name, p, file)
	if err != nil {
		return false, err
	}
	entries, err := v.entries()
	if err != nil {
		return false, err
	}
	number, found := uint16(0), false
	for _, e := range entries {
		if e.name != name {
			continue
		}
		if found { // an older one of ours, of another disk perhaps
			if err := os.Remove(v.path(e.variable())); err != nil {
				return written, fmt.Errorf("removing the boot entry %s: %w", e.variable(), err)
			}
			written = true
			continue
		}
		number, found = e.number, true
		if !bytes.Equal(e.content, want) {
			if err := v.write(e.variable(), want); err != nil {
				return written, err
			}
			written = true
		}
	}
	if !found {
		for slices.ContainsFunc(entries, func(e option) bool { return e.number == number }) {
			number++
		}
		if err := v.write(option{number: number}.variable(), want); err != nil {
			return written, err
		}
		written = true
	}
	moved, err := v.order(number, entries)
	return written || moved, err
}

// order puts a number into BootOrder where it is not there: behind the entry for the network that this boot came by, or else behind
// the last one for the network, or else at the end. Firmware has several, and each that does not answer takes a minute.
func (v Vars) order(number uint16, entries []option) (written bool, err error) {
	b, err := v.read("BootOrder")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	var order []uint16
	for ; len(b) >= 2; b = b[2:] {
		order = append(order, binary.LittleEndian.Uint16(b))
	}
	if slices.Contains(order, number) {
		return false, nil
	}
	now, err := v.read("BootCurrent")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	at := len(order)
	for i, n := range order {
		if slices.ContainsFunc(entries, func(e option) bool { return e.number == n && e.isNetwork() }) {
			at = i + 1
			if len(now) >= 2 && n == binary.LittleEndian.Uint16(now) {
				break
			}
		}
	}
	var out []byte
	for _, n := range slices.Insert(order, at, number) {
		out = binary.LittleEndian.AppendUint16(out, n)
	}
	return true, v.write("BootOrder", out)
}

// An option is a boot entry of the firmware.
type option struct {
	number  uint16
	name    string
	content []byte
}

func (o option) variable() string { return fmt.Sprintf("Boot%04X", o.number) }

// entries are all boot entries that there are. One that is no valid entry has no name.
func (v Vars) entries() ([]option, error) {
	files, err := os.ReadDir(v.Dir)
	if err != nil {
		return nil, fmt.Errorf("listing the variables of the firmware: %w", err)
	}
	var out []option
	for _, f := range files {
		digits, ok := strings.CutPrefix(strings.TrimSuffix(f.Name(), global), "Boot")
		n, err := strconv.ParseUint(digits, 16, 16)
		if !ok || len(digits) != 4 || err != nil || !strings.HasSuffix(f.Name(), global) {
			continue
		}
		o := option{number: uint16(n)}
		if o.content, err = v.read(o.variable()); err != nil {
			return nil, err
		}
		o.name = nameOf(o.content)
		out = append(out, o)
	}
	return out, nil
}

// nameOf is the description of an EFI_LOAD_OPTION: attributes (4), length of the device path (2), UCS-2 up to a zero.
func nameOf(b []byte) string {
	var units []uint16
	for i := 6; i+1 < len(b); i += 2 {
		u := binary.LittleEndian.Uint16(b[i:])
		if u == 0 {
			return string(utf16.Decode(units))
		}
		units = append(units, u)
	}
	return ""
}

// isNetwork says whether the device path has a MAC address (type 3, subtype 11; section 10.3.4.11).
func (o option) isNetwork() bool {
	b := o.content
	at := 6
	for ; at+1 < len(b) && binary.LittleEndian.Uint16(b[at:]) != 0; at += 2 {
	}
	at += 2
	for at+4 <= len(b) {
		length := int(binary.LittleEndian.Uint16(b[at+2:]))
		if b[at] == 3 && b[at+1] == 11 {
			return true
		}
		if b[at]&0x7f == 0x7f || length < 4 {
			return false
		}
		at += length
	}
	return false
}

func (v Vars) path(name string) string { return filepath.Join(v.Dir, name+global) }

// read is the content of a variable without its attributes.
func (v Vars) read(name string) ([]byte, error) {
	b, err := os.ReadFile(v.path(name))
	if err != nil {
		return nil, fmt.Errorf("reading the variable %s of the firmware: %w", name, err)
	}
	if len(b) < 4 || len(b) > maxEntry {
		return nil, nil
	}
	return b[4:], nil
}

// write sets a variable, which efivarfs wants in one call of write(2).
func (v Vars) write(name string, content []byte) error {
	f, err := os.OpenFile(v.path(name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return fmt.Errorf("writing the variable %s of the firmware: %w", name, err)
	}
	_, err = f.Write(append(binary.LittleEndian.AppendUint32(nil, attributes), content...))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("writing the variable %s of the firmware: %w", name, err)
	}
	return nil
}

// loadOption is an EFI_LOAD_OPTION (section 3.1.3) with the short path of a file on a hard disk (10.3.5.1, 10.3.5.4).
func loadOption(name string, p Partition, file string) ([]byte, error) {
	le := binary.LittleEndian
	id, err := hex.DecodeString(p.ID)
	if err != nil || len(id) != 16 {
		return nil, fmt.Errorf("a partition's GUID %q is none", p.ID)
	}
	path := []byte{4, 1, 42, 0}
	path = le.AppendUint32(path, p.Number)
	path = le.AppendUint64(path, p.FirstBlock)
	path = le.AppendUint64(path, p.Blocks)
	path = append(append(path, id...), 2, 2) // of a GPT, named by a GUID
	text := ucs2(file)
	path = append(path, 4, 4)
	path = le.AppendUint16(path, uint16(4+len(text))) //nolint:gosec // a name of ours
	path = append(append(path, text...), 0x7f, 0xff, 4, 0)
	out := le.AppendUint32(nil, 1)                // active
	out = le.AppendUint16(out, uint16(len(path))) //nolint:gosec // some hundred bytes
	return append(append(out, ucs2(name)...), path...), nil
}

// ucs2 is a text with its zero.
func ucs2(s string) []byte {
	var out []byte
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		out = binary.LittleEndian.AppendUint16(out, u)
	}
	return out
}
