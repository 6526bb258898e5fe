// Package netboot answers machines that boot from the network: DHCP (RFC 2131, with the PXE options of RFC 4578), TFTP
// (RFC 1350, 2347-2349), iPXE scripts and HTTP. It decides nothing: it asks a Director what a machine shall boot, asks
// Blobs for bytes, and tells an Observer how far each machine came.
package netboot

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
)

// ErrNotFound is returned (wrapped) by Blobs for bytes that it does not have.
var ErrNotFound = errors.New("not found")

// Arch is a client system architecture (RFC 4578 section 2.1, and IANA's "Processor Architecture Types").
type Arch uint16

// The architectures that troupe tells apart.
const (
	ArchBIOS      Arch = 0x00 // x86 PC BIOS
	ArchEFI32     Arch = 0x06 // x86 UEFI
	ArchEFI64     Arch = 0x07 // x64 UEFI
	ArchEFIBC     Arch = 0x09 // x64 UEFI, as RFC 4578's first text numbered it; much firmware sends it
	ArchEFIARM64  Arch = 0x0b // ARM 64-bit UEFI
	ArchHTTPx64   Arch = 0x10 // x64 UEFI that boots from HTTP
	ArchHTTPARM64 Arch = 0x13 // ARM 64-bit UEFI that boots from HTTP
)

// A Machine is what a request says of the machine that sent it.
type Machine struct {
	MAC    net.HardwareAddr
	UUID   string // SMBIOS, lower case with dashes; "" where the request had none
	Serial string // SMBIOS; only iPXE tells it
	Arch   Arch
}

// A Boot is what a machine shall boot.
type Boot struct {
	ID     string        // of this attempt; handed to the agent in the kernel's command line
	Title  string        // one line for the person at the console
	Kernel digest.Digest // "" while there is nothing to boot yet: the machine shows Title, waits and asks again
	// Initrds are concatenated in this order. Each but the last must be a multiple of 4 bytes long: a kernel that UEFI
	// starts joins them without padding (seen with Linux 6.1), and then finds no cpio archive at an odd place.
	Initrds []digest.Digest
	Args    []string // of the kernel, without initrd=; troupe.server is added by the server
	// Local says that the machine can start something from a disk of its own, where nobody answers any more.
	Local bool
	// Disk, where it is set, is booted in place of Kernel: iPXE attaches it, describes it in the iBFT and starts the boot
	// loader that is on it.
	Disk *Disk
}

// A Disk is a logical unit of an iSCSI target on the server that the machine boots from.
type Disk struct {
	Port      uint16 // of the portal; its address is the one that the machine reaches the server at
	Target    string
	LUN       uint16
	Initiator string // the name that the machine logs in with
	// User and Secret prove the machine to the target, MutualUser and MutualSecret the target to the machine.
	User, Secret, MutualUser, MutualSecret string
}

// A Director says what a machine shall boot. It is asked several times during one boot and answers from memory.
type Director interface {
	Boot(ctx context.Context, m Machine) (Boot, error)
}

// Blobs gives bytes by digest. What it opens is served with Range, so it must seek. An unknown digest is ErrNotFound.
type Blobs interface {
	Open(ctx context.Context, d digest.Digest) (io.ReadSeekCloser, error)
}

// A Stage is how far a boot came, as the servers here can see it.
type Stage string

// The stages in the order in which they happen.
const (
	StageOffer  Stage = "dhcp-offer" // firmware or iPXE was offered what to boot: a new boot begins
	StageTFTP   Stage = "tftp"       // the boot loader was sent
	StageScript Stage = "script"     // iPXE was sent its script
	StageKernel Stage = "kernel"     // the kernel and the initramfs were sent
	StageDisk   Stage = "disk"       // in place of it: the boot loader logged in to the disk that it was told to boot
	StageBooted Stage = "booted"     // the system on that disk logged in for itself
)

// An Event is one machine reaching one stage, or failing to.
type Event struct {
	MAC    net.HardwareAddr // nil where it is not known: see Peer
	Peer   netip.Addr       // the address that the machine spoke from, where it had one
	Stage  Stage
	Time   time.Time
	Detail string // for people
	Err    error  // nil where the stage was reached
}

// An Observer hears of each stage that a machine reaches. It must not block.
type Observer interface {
	Observe(Event)
}
