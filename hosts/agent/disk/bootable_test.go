package disk

import (
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/hosts/agent/esp"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

func TestACacheHasRoomForWhatFirmwareBoots(t *testing.T) {
	for size, espBytes := range map[int64]int64{1 << 30: 128 << 20, 5 << 30: 256 << 20, 20 << 30: 512 << 20} {
		d := newLoopDisk(t, size)
		found, err := d.maker().Ensure(t.Context(), agentapi.Disks{})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(found.Path, "p1") {
			t.Errorf("the cache is on %s: its number is no longer 1", found.Path)
		}
		b, err := d.maker().Scanner.Bootable(found.Path)
		if err != nil || b.Disk != d.dev || b.Block != 512 || b.ESP.Size != espBytes || b.ESP.First != 2<<20 || b.BIOS.Size != 1<<20 || len(b.ESP.ID) != 32 {
			t.Errorf("a disk of %d MiB: %+v, %v", size>>20, b, err)
		}
		e, err := esp.Open(d.dev, b.ESP.First, b.ESP.Size, 512)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []bool{false, true} {
			if disks, err := d.maker().Scanner.Scan(); err != nil || disks[0].Boots != want {
				t.Errorf("a disk of %d MiB boots: %+v, %v; want %v", size>>20, disks, err, want)
			}
			if _, err := e.Ensure([]byte("loader"), esp.Boot{}); err == nil { // what is not there is no boot, but the file system is made
				t.Error("no kernel is put on the disk without an error")
			}
		}
		for n, kind := range map[string]string{"2": "EFI system partition", "3": "BIOS boot partition"} {
			if out := run(t, "sgdisk", "-i", n, d.file); !strings.Contains(out, kind) {
				t.Errorf("partition %s of a disk of %d MiB is no %s:\n%s", n, size>>20, kind, out)
			}
		}
	}
}

func TestASmallCacheHasNoneAndWorks(t *testing.T) {
	d := newLoopDisk(t, 256<<20)
	found, err := d.maker().Ensure(t.Context(), agentapi.Disks{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := d.maker().Scanner.Bootable(found.Path)
	if err != nil || b.Disk != d.dev || b.ESP.Size != 0 || b.BIOS.Size != 0 {
		t.Errorf("got %+v, %v", b, err)
	}
}

func TestLargeBlocksGetAFAT32ThatIsOne(t *testing.T) {
	for _, c := range []struct{ size, block, want int64 }{
		{2 << 30, 4096, 0}, {8 << 30, 4096, 512 << 20}, {512 << 20, 512, 0}, {1 << 30, 512, 128 << 20},
	} {
		if got := espSize(c.size, c.block); got != c.want {
			t.Errorf("%d MiB in blocks of %d: %d MiB, want %d", c.size>>20, c.block, got>>20, c.want>>20)
		}
	}
}
