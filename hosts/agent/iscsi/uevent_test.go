package iscsi

import (
	"encoding/hex"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The bytes are those of struct iscsi_uevent on a machine with the low byte first, worked out from iscsi_if.h.
func TestEncode(t *testing.T) {
	const handle = 0xffffffffc0a81234
	for name, tt := range map[string]struct {
		e    event
		want string
	}{
		"create session": {createSessionRequest(128, 64), "48000000" + "0b00" + "0100" + "07000000" + "00000000" +
			"0b000000" + "00000000" + "3412a8c0ffffffff" + "00000000" + "8000" + "4000" + "0000000000000000" + "0000000000000000" +
			"00000000000000000000000000000000"},
		"bind": {bindRequest(3, 9), "48000000" + "0f00" + "0100" + "07000000" + "00000000" +
			"0f000000" + "00000000" + "3412a8c0ffffffff" + "03000000" + "00000000" + "0900000000000000" + "01000000" + "00000000" +
			"00000000000000000000000000000000"},
		"parameter": {paramRequest(3, paramRecovery, "-1"), "4b000000" + "1000" + "0100" + "07000000" + "00000000" +
			"10000000" + "00000000" + "3412a8c0ffffffff" + "03000000" + "00000000" + "13000000" + "03000000" + "0000000000000000" +
			"00000000000000000000000000000000" + "2d3100"},
		"stop": {stopRequest(3, stopRecover), "48000000" + "1200" + "0100" + "07000000" + "00000000" +
			"12000000" + "00000000" + "3412a8c0ffffffff" + "03000000" + "00000000" + "0000000000000000" + "03000000" + "00000000" +
			"00000000000000000000000000000000"},
	} {
		if diff := cmp.Diff(tt.want, hex.EncodeToString(tt.e.encode(handle, 7))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestDecode(t *testing.T) {
	in := tells(pduReceived, 3, 0)
	h := header{0: 0x23, 7: 5}
	in.data = append(h[:], "a=b\x00c\x00\x00\x00"...)
	b := append(in.encode(0, 1), tells(connFailed, 3, 0, 1020).encode(0, 2)...)
	events, err := decodeEvents(b)
	if err != nil || len(events) != 2 {
		t.Fatalf("%d events, %v", len(events), err)
	}
	got, data, err := events[0].pdu()
	if err != nil || got != h || string(data) != "a=b\x00c" {
		t.Errorf("PDU %x %q, %v", got, data, err)
	}
	if events[1].kind != connFailed || events[1].session() != 3 || connError(events[1].word(2)).Error() != "the kernel gave up the connection with 1020 connection closed" {
		t.Errorf("event %+v", events[1])
	}
}

func FuzzDecode(f *testing.F) {
	in := tells(pduReceived, 3, 0)
	in.data = make([]byte, headerSize+3)
	f.Add(in.encode(1, 2))
	f.Add(append(tells(connFailed, 1, 0, 1020).encode(0, 0), 1, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		events, _ := decodeEvents(b)
		if len(events)*(nlHeader+eventSize) > len(b)+3 {
			t.Errorf("%d events in %d bytes", len(events), len(b))
		}
		for _, e := range events {
			h, data, err := e.pdu()
			if err == nil && len(data) != h.dataLength() {
				t.Errorf("a PDU with %d bytes of %d", len(data), h.dataLength())
			}
		}
	})
}
