package efivar

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var esp = Partition{Number: 2, FirstBlock: 4096, Blocks: 262144, ID: strings.Repeat("0a", 16)}

const loader = `\EFI\TROUPE\GRUBX64.EFI`

// firmware has an entry of a program, one of the network and one of a disk, in that order.
func firmware(t *testing.T) Vars {
	t.Helper()
	v := Vars{t.TempDir()}
	entry := func(name string, path ...byte) []byte {
		b := binary.LittleEndian.AppendUint16([]byte{1, 0, 0, 0}, uint16(len(path)))
		return append(append(b, ucs2(name)...), path...)
	}
	end := []byte{0x7f, 0xff, 4, 0}
	mac := append(append([]byte{3, 11, 37, 0}, make([]byte, 33)...), end...)
	for name, content := range map[string][]byte{
		"Boot0000": entry("UiApp", end...),
		"Boot0001": entry("UEFI PXEv4", append([]byte{1, 1, 6, 0, 0, 3}, mac...)...),
		"Boot0002": entry("UEFI disk", end...),
		"Boot0003": {}, "BootOrder": {0, 0, 1, 0, 2, 0},
	} {
		if err := v.write(name, content); err != nil {
			t.Fatal(err)
		}
	}
	return v
}

func ensure(t *testing.T, v Vars, p Partition, want bool) {
	t.Helper()
	if wrote, err := v.Ensure("troupe", p, loader); err != nil || wrote != want {
		t.Errorf("Ensure wrote: %v, %v; want %v", wrote, err, want)
	}
}

func order(t *testing.T, v Vars, want ...byte) {
	t.Helper()
	got, err := v.read("BootOrder")
	if err != nil {
		t.Fatal(err)
	}
	var numbers []byte
	for i := 0; i < len(got); i += 2 {
		numbers = append(numbers, got[i])
	}
	if !bytes.Equal(numbers, want) {
		t.Errorf("boot order %v, want %v", numbers, want)
	}
}

func TestTheEntryComesBehindTheNetworkOnce(t *testing.T) {
	v := firmware(t)
	ensure(t, v, esp, true)
	order(t, v, 0, 1, 4, 2)
	ensure(t, v, esp, false)
	if err := v.write("BootOrder", []byte{4, 0, 1, 0}); err != nil { // somebody moved it
		t.Fatal(err)
	}
	ensure(t, v, esp, false)
	order(t, v, 4, 1)
	moved := esp
	moved.FirstBlock = 8192
	ensure(t, v, moved, true)
	entries, err := v.entries()
	if err != nil || len(entries) != 5 {
		t.Errorf("%d entries, %v: another disk is no other entry", len(entries), err)
	}
	if err := v.write("Boot0010", entries[4].content); err != nil { // a second one
		t.Fatal(err)
	}
	ensure(t, v, moved, true)
	if _, err := os.Stat(filepath.Join(v.Dir, "Boot0010"+global)); !os.IsNotExist(err) {
		t.Errorf("the second entry stays: %v", err)
	}
}

func TestTheEntryComesBehindTheNetworkThatThisBootCameBy(t *testing.T) {
	for _, c := range []struct{ now, behind byte }{{1, 1}, {5, 5}, {2, 5}} {
		v := firmware(t)
		entry, err := v.read("Boot0001")
		if err != nil {
			t.Fatal(err)
		}
		for name, content := range map[string][]byte{"Boot0005": entry, "BootOrder": {0, 0, 1, 0, 5, 0, 2, 0}, "BootCurrent": {c.now, 0}} {
			if err := v.write(name, content); err != nil {
				t.Fatal(err)
			}
		}
		ensure(t, v, esp, true)
		if c.behind == 1 {
			order(t, v, 0, 1, 4, 5, 2)
		} else {
			order(t, v, 0, 1, 5, 4, 2)
		}
	}
}

func TestFirmwareWithoutAnOrder(t *testing.T) {
	v := Vars{t.TempDir()}
	ensure(t, v, esp, true)
	order(t, v, 0)
	if _, err := v.Ensure("troupe", Partition{}, loader); err == nil {
		t.Error("a partition without GUID is taken")
	}
	if _, err := (Vars{filepath.Join(v.Dir, "none")}).Ensure("troupe", esp, loader); err == nil {
		t.Error("a machine without UEFI has an entry")
	}
}

func FuzzEntriesAreHostile(f *testing.F) {
	good, err := loadOption("troupe", esp, loader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(_ *testing.T, b []byte) {
		nameOf(b)
		option{content: b}.isNetwork()
	})
}
