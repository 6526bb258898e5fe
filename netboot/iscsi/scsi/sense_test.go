package scsi

import (
	"encoding/hex"
	"testing"
)

func TestSenseData(t *testing.T) {
	for _, k := range []struct {
		name  string
		sense Sense
		want  string
	}{
		{"plain", senseWriteProtected, "70 00 07 00000000 0a 00000000 27 00 00 000000"},
		{"with an address", senseReadError.information(0x12345678), "f0 00 03 12345678 0a 00000000 11 00 00 000000"},
		{"with an address that four bytes do not hold", senseReadError.information(1 << 32), "70 00 03 00000000 0a 00000000 11 00 00 000000"},
		{"with a bit of the CDB", invalidCDB(1, 7), "70 00 05 00000000 0a 00000000 24 00 00 cf0001"},
		{"with a byte of the parameter list", invalidParameter(0x102, -1), "70 00 05 00000000 0a 00000000 26 00 00 800102"},
		{"descriptors: plain", descriptors(attentionPowerOn), "72 06 29 00 000000 00"},
		{"descriptors: with an address", descriptors(senseReadError.information(1 << 32)), "72 03 11 00 000000 0c 00 0a 80 00 0000000100000000"},
		{"descriptors: with a bit of the CDB", descriptors(invalidCDB(2, 5)), "72 05 24 00 000000 08 02 06 00 00 cd0002 00"},
	} {
		t.Run(k.name, func(t *testing.T) {
			got := k.sense.Append([]byte("before"))
			if string(got[:6]) != "before" {
				t.Fatal("what was there before is not")
			}
			if want := unhex(t, k.want); string(got[6:]) != string(want) {
				t.Errorf("\n got % x\nwant % x", got[6:], want)
			}
		})
	}
}

func descriptors(s Sense) Sense {
	s.Descriptor = true
	return s
}

// unhex reads hexadecimal digits, whatever spaces are among them.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	var digits []byte
	for _, r := range []byte(s) {
		if r != ' ' && r != '\n' && r != '\t' {
			digits = append(digits, r)
		}
	}
	b, err := hex.DecodeString(string(digits))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
