package testbed

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
)

// Defaults of a Node.
const (
	DefaultMemory = 1024    // MiB
	DefaultDisk   = 8 << 30 // bytes
)

// A Firmware is what a machine starts with.
type Firmware string

// The firmwares that the lab has.
const (
	BIOS Firmware = "bios" // SeaBIOS, and the iPXE ROM of the network card
	UEFI Firmware = "uefi" // OVMF with its own PXE
	// Direct is none: QEMU starts the kernel that the server's boot script names for the machine, at each boot anew. Where the
	// server does not answer, it starts what it was told the last time, as a machine does whose firmware goes on to its disk.
	// It saves some 20 s of each boot.
	Direct Firmware = "direct"
)

// A Node is one machine of the lab.
type Node struct {
	Name     string   `json:"name"`
	MAC      string   `json:"mac"`      // "": made from the name, and stays the same
	Firmware Firmware `json:"firmware"` // "": BIOS
	Memory   int      `json:"memory"`   // MiB; 0: DefaultMemory
	CPUs     int      `json:"cpus"`     // 0: 1
	Disk     int64    `json:"disk"`     // bytes, sparse; 0: DefaultDisk; below 0: no disk
	Serial   string   `json:"serial"`   // SMBIOS; "": "lab-" and the name
	UUID     string   `json:"uuid"`     // SMBIOS; "": made from the MAC
}

// Serve is the server that drives the lab's machines.
type Serve struct {
	// Args are the arguments of Config.Binary; none: the lab has no server until Lab.ServeStart is given some.
	Args []string `json:"args"`
	// Env is added to the lab's own environment, as in os/exec. The lab itself sets the variables of a proxy, by which
	// the server can fetch packages and repos over HTTP and HTTPS.
	Env []string `json:"env"`
}

// Config is what a lab is made of.
type Config struct {
	// Dir holds all that the lab keeps: sockets, disks, console output, logs. It is made if it is missing. Disks that
	// are there from an earlier lab are used as they are.
	Dir string
	// Binary is the troupe program: it is the half of the lab that lives inside the network, and it is the server. "":
	// this program, which then must call RunInside as that says.
	Binary string
	// Router is the server's address and the size of the network, e.g. 10.77.0.1/24.
	Router netip.Prefix
	Nodes  []Node
	Serve  Serve
	// Page is the address on the host at which the server's web page (port 8080 of Router) can be opened, e.g.
	// "127.0.0.1:0"; "": nowhere.
	Page string
	// Accel is "kvm" or "tcg"; "": what qemu.ProbeAccel says.
	Accel string
	Log   *slog.Logger `json:"-"` // nil: discard
}

// A name is also a file name and part of QEMU's options, where a comma would begin another one.
var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// complete checks c and fills in what zero values stand for.
func (c Config) complete() (Config, error) {
	var errs []error
	if c.Dir == "" {
		errs = append(errs, errors.New("no directory"))
	}
	if !c.Router.IsValid() || !c.Router.Addr().Is4() || c.Router.Bits() > 30 || c.Router.Masked().Addr() == c.Router.Addr() {
		errs = append(errs, fmt.Errorf("router %s: want an IPv4 address with its network's length, e.g. 10.77.0.1/24", c.Router))
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	names, macs := map[string]bool{}, map[string]string{}
	nodes := make([]Node, len(c.Nodes))
	for i, n := range c.Nodes {
		n, err := n.complete()
		if err != nil {
			errs = append(errs, fmt.Errorf("node %q: %w", n.Name, err))
			continue
		}
		if names[n.Name] {
			errs = append(errs, fmt.Errorf("node %q: there are two", n.Name))
		}
		if other, ok := macs[n.MAC]; ok {
			errs = append(errs, fmt.Errorf("node %q: MAC %s is that of node %q", n.Name, n.MAC, other))
		}
		names[n.Name], macs[n.MAC] = true, n.Name
		nodes[i] = n
	}
	c.Nodes = nodes
	return c, errors.Join(errs...)
}

func (n Node) complete() (Node, error) {
	if !nodeName.MatchString(n.Name) {
		return n, errors.New("a name has lower-case letters, digits and dashes, 63 at most")
	}
	sum := sha256.Sum256([]byte("troupe lab " + n.Name))
	if n.MAC == "" {
		n.MAC = net.HardwareAddr(append([]byte{0x52, 0x54, 0x00}, sum[:3]...)).String()
	}
	mac, err := net.ParseMAC(n.MAC)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || bytes.Equal(mac, make([]byte, 6)) {
		return n, fmt.Errorf("MAC %q is not the Ethernet address of a machine", n.MAC)
	}
	n.MAC = mac.String()
	n.Firmware = cmp.Or(n.Firmware, BIOS)
	if n.Firmware != BIOS && n.Firmware != UEFI && n.Firmware != Direct {
		return n, fmt.Errorf("firmware %q: want %q, %q or %q", n.Firmware, BIOS, UEFI, Direct)
	}
	n.Memory = cmp.Or(n.Memory, DefaultMemory)
	n.CPUs = cmp.Or(n.CPUs, 1)
	n.Disk = cmp.Or(n.Disk, DefaultDisk)
	if n.Memory < 128 || n.CPUs < 1 || n.CPUs > 255 {
		return n, fmt.Errorf("%d MiB of memory and %d CPUs: want 128 MiB and one CPU at least", n.Memory, n.CPUs)
	}
	n.Serial = cmp.Or(n.Serial, "lab-"+n.Name)
	if !serialText.MatchString(n.Serial) {
		return n, fmt.Errorf("serial %q: want letters, digits, dots and dashes", n.Serial)
	}
	if n.UUID == "" {
		id := sha256.Sum256(mac)
		id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80 // RFC 9562 section 5.8: version 8, made by our own rule
		n.UUID = fmt.Sprintf("%x-%x-%x-%x-%x", id[0:4], id[4:6], id[6:8], id[8:10], id[10:16])
	}
	if !uuidText.MatchString(n.UUID) {
		return n, fmt.Errorf("UUID %q: want 8-4-4-4-12 hexadecimal digits", n.UUID)
	}
	return n, nil
}

var (
	serialText = regexp.MustCompile(`^[A-Za-z0-9.-]+$`)
	uuidText   = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
)
