package bootloader

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestMakeGivesWhatFirmwareStarts(t *testing.T) {
	l, err := Make(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(l.EFI, []byte("MZ")) {
		t.Errorf("the program for UEFI begins with %q", l.EFI[:2])
	}
	if len(l.MBR) != 512 || l.MBR[510] != 0x55 || l.MBR[511] != 0xaa {
		t.Errorf("the first sector has %d bytes, and ends with %x", len(l.MBR), l.MBR[len(l.MBR)-2:])
	}
	if got, want := int(binary.LittleEndian.Uint16(l.Core[508:])), (len(l.Core)+511)/512-1; got != want {
		t.Errorf("core.img says that %d sectors follow its first, there are %d", got, want)
	}
	again, err := Make(t.Context())
	if err != nil || !bytes.Equal(l.EFI, again.EFI) || !bytes.Equal(l.Core, again.Core) {
		t.Errorf("the second time gives other bytes: %v", err)
	}
}
