package initramfs

import (
	"path"
	"slices"
	"strings"
)

// A machine boots from here on hardware that nobody has seen yet, so whole families of drivers are taken, not the ones
// that some machine was found to have. What is left out cannot be on the way to the root file system: wireless, sound,
// graphics, file systems that no node uses.

// takeDirs are directories below kernel/ that are taken whole, but for leaveOut.
var takeDirs = []string{
	"drivers/ata",
	"drivers/block",
	"drivers/char/hw_random", // without entropy a fresh machine's TLS and UUIDs wait
	"drivers/hv",
	"drivers/message/fusion", // LSI SCSI, and VMware's
	"drivers/mmc",
	"drivers/net",
	"drivers/nvme/host",
	"drivers/pci/controller", // VMD, behind which NVMe disks hide
	"drivers/phy",
	"drivers/scsi",
	"drivers/ufs",
	"drivers/usb/host",
	"drivers/usb/storage",
	"drivers/virtio",
	"drivers/watchdog",
	"drivers/xen",
	"fs/erofs",
	"fs/ext4",
	"fs/fat",
	"fs/overlayfs",
	"fs/squashfs",
	"net/8021q",
}

// takeNames are modules that are taken one by one, wherever they lie.
var takeNames = []string{
	// Keyboards, for the rescue shell.
	"atkbd", "hid", "hid_apple", "hid_cherry", "hid_generic", "hid_logitech_dj", "hid_logitech_hidpp", "hid_microsoft",
	"hyperv_keyboard", "i8042", "usbhid",
	// File names on the EFI system partition.
	"nls_ascii", "nls_cp437", "nls_iso8859_1", "nls_utf8",
	"efivarfs", "iscsi_ibft", "qemu_fw_cfg",
	// Of drivers/md what the agent can set up by itself; arrays and volumes need tools that are not here.
	"dm_mod", "dm_snapshot", "dm_verity",
	// Check sums of file systems and of dm-verity, by name only (a symbol would show in modules.dep).
	"crc32c_generic", "crc32c_intel", "crc32_pclmul", "crct10dif_generic", "crct10dif_pclmul", "sha256_generic",
	"sha256", "sha256_ssse3", "sha256_arm64", "sha2_ce", "crct10dif_ce",
}

// leaveOut are directories and modules below takeDirs that no machine boots through.
var leaveOut = []string{
	"drivers/block/aoe", "drivers/block/drbd", "drivers/block/rbd", "drivers/block/rnbd", "drivers/block/pktcdvd",
	"drivers/block/floppy", "drivers/block/null_blk", "drivers/block/xen-blkback",
	"drivers/net/appletalk", "drivers/net/arcnet", "drivers/net/can", "drivers/net/fddi", "drivers/net/hamradio",
	"drivers/net/hippi", "drivers/net/ieee802154", "drivers/net/plip", "drivers/net/ppp", "drivers/net/slip",
	"drivers/net/wan", "drivers/net/wireless", "drivers/net/wireguard", "drivers/net/wwan", "drivers/net/xen-netback",
	"drivers/net/sb1000", "drivers/net/gtp", "drivers/net/mhi_net", "drivers/net/netdevsim", "drivers/net/vsockmon",
	"drivers/net/thunderbolt", "drivers/net/thunderbolt-net",
	"drivers/net/ethernet/8390/axnet_cs", "drivers/net/ethernet/8390/pcnet_cs", // PCMCIA
	"drivers/net/ethernet/3com/3c574_cs", "drivers/net/ethernet/3com/3c589_cs", "drivers/net/ethernet/amd/nmclan_cs",
	"drivers/net/ethernet/smsc/smc91c92_cs", "drivers/net/ethernet/fujitsu", "drivers/net/ethernet/xircom",
	"drivers/net/ethernet/mellanox/mlxsw", // switches' own chips
	"drivers/net/usb/cdc-phonet", "drivers/net/usb/hso", "drivers/net/usb/kaweth", "drivers/net/usb/sierra_net",
	"drivers/nvme/host/nvme-rdma", // takes all of InfiniBand with it
	"drivers/phy/ti",
	"drivers/scsi/fcoe", "drivers/scsi/bnx2fc", "drivers/scsi/pcmcia", "drivers/scsi/scsi_debug", "drivers/scsi/st",
	"drivers/scsi/ch", "drivers/scsi/bfa", "drivers/scsi/qla4xxx", "drivers/scsi/qedf", "drivers/scsi/qedi",
	"drivers/scsi/cxgbi", "drivers/scsi/bnx2i", "drivers/scsi/elx", "drivers/scsi/csiostor", "drivers/scsi/xen-scsifront",
	"drivers/scsi/qla2xxx/tcm_qla2xxx", "drivers/scsi/ibmvscsi_tgt",
	"drivers/xen/xen-scsiback", "drivers/xen/xen-pciback", "drivers/xen/pvcalls-back", "drivers/xen/pvcalls-front",
	"drivers/usb/storage/ums-realtek",
	"drivers/watchdog/mei_wdt",
}

// needed are modules without which no node reaches its root; each must be there or be built into the kernel.
var needed = []string{"dm_verity", "erofs", "ext4", "loop", "overlay"}

// wanted says whether the module at rel, below kernel/ and without its suffix, is one to take.
func wanted(rel string) bool {
	return slices.Contains(takeNames, moduleName(path.Base(rel))) || below(rel, takeDirs) && !below(rel, leaveOut)
}

func below(rel string, dirs []string) bool {
	for _, d := range dirs {
		if rel == d || strings.HasPrefix(rel, d+"/") {
			return true
		}
	}
	return false
}

// moduleName is how the kernel spells the name of a module: its file may have dashes for underscores.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }
