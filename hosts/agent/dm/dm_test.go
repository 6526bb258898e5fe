package dm

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/verity"
)

func TestTable(t *testing.T) {
	got := table(Image{Device: unix.Mkdev(7, 3), Data: 300 * verity.BlockSize, Root: verity.Root{0xab}})
	want := "1 7:3 7:3 4096 4096 300 301 sha256 ab00000000000000000000000000000000000000000000000000000000000000 -"
	if got != want {
		t.Errorf("table\n got %s\nwant %s", got, want)
	}
}

// entry is one of the list of devices; next is how far the one after it is away.
func entry(device uint64, next uint32, name string) []byte {
	b := binary.NativeEndian.AppendUint64(nil, device)
	b = binary.NativeEndian.AppendUint32(b, next)
	b = append(b, name...)
	return append(b, make([]byte, max(1, int(next)-len(b)))...)
}

func names(all []*Device) []string {
	var out []string
	for _, d := range all {
		out = append(out, d.root())
	}
	return out
}

func TestListHasOurDevicesOnly(t *testing.T) {
	b := append(entry(1, 40, "troupe-aa-0"), entry(2, 40, "somebody's")...)
	b = append(b, entry(3, 0, "troupe-bb-1")...)
	got, err := parseList(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"aa", "bb"}, names(got)); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
	if got, err := parseList(make([]byte, 64)); err != nil || got != nil {
		t.Errorf("of an empty list: %v, %v", names(got), err)
	}
}

func FuzzParseList(f *testing.F) {
	f.Add(entry(1, 40, "troupe-aa-0"))
	f.Add(entry(1, 0xffffffff, "x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseList(b)
		if err == nil && len(all)*13 > len(b) {
			t.Errorf("%d devices in %d bytes", len(all), len(b))
		}
	})
}
