package inventory

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{
		"proc/meminfo": "MemTotal:        1001234 kB\nMemFree: 5 kB\n",
		"proc/cpuinfo": "processor\t: 0\nmodel name\t: QEMU Virtual CPU\nphysical id\t: 0\ncore id\t\t: 0\n\n" +
			"processor\t: 1\nmodel name\t: QEMU Virtual CPU\nphysical id\t: 1\ncore id\t\t: 0\n\n" +
			"processor\t: 2\nmodel name\t: QEMU Virtual CPU\nphysical id\t: 1\ncore id\t\t: 0\n",
		"sys/class/dmi/id/sys_vendor":     "QEMU\n",
		"sys/class/dmi/id/product_name":   "Standard PC\n",
		"sys/class/dmi/id/product_serial": "Not Specified\n",
		"sys/class/dmi/id/product_uuid":   "0A1B2C3D-0000-4000-8000-525400770001\n",
		"sys/class/dmi/id/bios_vendor":    "SeaBIOS\n",
		"sys/class/dmi/id/bios_version":   "1.16\n",
		"sys/class/net/eth0/address":      "52:54:00:77:00:01\n",
		"sys/class/net/eth0/carrier":      "1\n",
		"sys/class/net/eth0/speed":        "-1\n",
		"sys/class/net/lo/address":        "00:00:00:00:00:00\n",
		"sys/firmware/efi/fw":             "64\n",
		"sys/bus/virtio_net/x":            "",
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "sys/class/net/eth0/device"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../../../bus/virtio_net", filepath.Join(dir, "sys/class/net/eth0/device/driver")); err != nil {
		t.Fatal(err)
	}

	got := Reader{Proc: filepath.Join(dir, "proc"), Sys: filepath.Join(dir, "sys")}.Read()
	if got.CPU.Arch == "" {
		t.Error("no architecture")
	}
	got.CPU.Arch = ""
	want := agentapi.Inventory{
		CPU:    agentapi.CPU{Model: "QEMU Virtual CPU", Sockets: 2, Cores: 2, Threads: 3},
		Memory: 1001234 << 10,
		NICs:   []agentapi.NIC{{Name: "eth0", MAC: "52:54:00:77:00:01", Driver: "virtio_net", Up: true}},
		SMBIOS: agentapi.SMBIOS{
			Vendor: "QEMU", Product: "Standard PC", UUID: "0a1b2c3d-0000-4000-8000-525400770001", BIOS: "SeaBIOS 1.16",
		},
		Firmware: "uefi",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("inventory (-want +got):\n%s", diff)
	}
}

func TestReadOfThisMachine(t *testing.T) {
	inv := Reader{}.Read()
	if inv.Memory < 64<<20 || inv.CPU.Threads < 1 || inv.CPU.Cores < 1 {
		t.Errorf("implausible: %+v", inv)
	}
}

func TestReadOfNothingIsNoError(t *testing.T) {
	inv := Reader{Proc: t.TempDir(), Sys: t.TempDir()}.Read()
	if inv.Memory != 0 || inv.NICs != nil || inv.Firmware != "bios" {
		t.Errorf("made up: %+v", inv)
	}
}
