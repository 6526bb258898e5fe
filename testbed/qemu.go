package testbed

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/troupe-dev/troupe/internal/qemu"
)

// What the lab needs of Debian's package ovmf. Of ipxe-qemu it needs the network card's ROM.
const (
	ovmfCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	ovmfVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// netdevID is QEMU's name for a machine's network cable.
const netdevID = "net0"

// qemuArgs are the arguments for a machine that waits for "cont" on the monitor, which is descriptor 3. All files are in
// the working directory.
func qemuArgs(n Node, tap, accel string) []string {
	args := []string{
		// Nothing of the host's configuration, and no devices but those that are named here.
		"-no-user-config", "-nodefaults", "-S",
		"-name", n.Name,
		// Without graphics SeaBIOS, and iPXE through it, talk to the serial port.
		"-machine", "q35,graphics=off,vmport=off,usb=off,smbus=off,sata=off",
		"-display", "none",
		"-smp", strconv.Itoa(n.CPUs),
		"-m", strconv.Itoa(n.Memory),
		"-smbios", fmt.Sprintf("type=1,manufacturer=troupe,product=lab,serial=%s,uuid=%s", n.Serial, n.UUID),
		"-chardev", "socket,id=monitor,fd=3", "-mon", "chardev=monitor,mode=control",
		"-chardev", "socket,id=console,path=" + consoleSock + ",server=on,wait=off,logfile=" + consoleFile + ",logappend=on",
		"-serial", "chardev:console",
		"-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng",
		"-netdev", "tap,id=" + netdevID + ",ifname=" + tap + ",script=no,downscript=no",
		// A machine whose boot failed tries again, as one in a rack would be told to.
		"-boot", "menu=off,strict=on,reboot-timeout=5000",
	}
	args = append(args, qemu.AccelArgs(accel)...)
	nic := "virtio-net-pci,netdev=" + netdevID + ",mac=" + n.MAC + ",bootindex=0"
	switch n.Firmware {
	case Direct:
		nic = strings.TrimSuffix(nic, ",bootindex=0") + ",romfile=" // the kernel has that index
		// A reset ends QEMU, since what is started then is to be asked for anew.
		args = append(args, "-no-reboot")
	case UEFI:
		// No ROM: OVMF has a driver for the card, and its own PXE is what the lab is about.
		nic += ",romfile="
		args = append(args,
			"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+ovmfCode,
			"-drive", "if=pflash,unit=1,format=raw,file="+varsFile)
	}
	args = append(args, "-device", nic)
	if n.Disk >= 0 {
		args = append(args,
			// The page cache outlives QEMU, and a lab need not outlive its host.
			"-drive", "if=none,id=disk,format=raw,cache=unsafe,discard=unmap,file="+diskFile,
			"-device", "virtio-blk-pci,drive=disk,serial="+n.Name[:min(len(n.Name), 20)]+diskIndex(n.Firmware)) // 20: the width of the field (virtio 1.2 section 5.2.6)
	}
	return args
}

// diskIndex puts the disk behind the network in the order of what firmware boots.
func diskIndex(f Firmware) string {
	if f == Direct {
		return ""
	}
	return ",bootindex=1"
}
