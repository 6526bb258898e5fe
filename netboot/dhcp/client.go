package dhcp

import (
	"bytes"
	"encoding/hex"
	"net"
	"slices"
	"strings"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

// A Program is what speaks DHCP on a machine. It decides which boot options an answer carries.
type Program uint8

// The programs that are told apart.
const (
	Other        Program = iota // an operating system, or an agent: it gets an address and no boot options
	PXEFirmware                 // option 60 "PXEClient": boots a file by TFTP
	HTTPFirmware                // option 60 "HTTPClient": boots a URL
	IPXE                        // option 77 "iPXE" or an option 175: runs a script by HTTP
)

func (p Program) String() string {
	return [...]string{"other", "PXE firmware", "HTTP firmware", "iPXE"}[p]
}

const (
	classPXE  = "PXEClient"
	classHTTP = "HTTPClient"

	// optIPXE is the encapsulated options of iPXE (and, before it, of Etherboot).
	optIPXE = dhcpv4.GenericOptionCode(175)
)

// A Client is what a request says of the machine that sent it.
type Client struct {
	MAC     net.HardwareAddr // six bytes
	UUIDs   []string         // SMBIOS UUID, lower case with dashes, in each byte order that it may be meant in, likeliest first
	Arch    uint16           // option 93; 0, a BIOS, where the request has none
	Program Program
	Class   string // option 60
}

func clientOf(req *dhcpv4.DHCPv4) Client {
	c := Client{MAC: req.ClientHWAddr, Class: req.ClassIdentifier()}
	if archs := req.ClientArch(); len(archs) > 0 {
		c.Arch = uint16(archs[0])
	}
	switch {
	case isIPXE(req):
		c.Program = IPXE
	case strings.HasPrefix(c.Class, classHTTP):
		c.Program = HTTPFirmware
	case strings.HasPrefix(c.Class, classPXE):
		c.Program = PXEFirmware
	}
	if id, ok := machineID(req); ok {
		c.UUIDs = uuidForms(id)
	}
	return c
}

// isIPXE looks at the raw bytes: iPXE sends its user class as plain text, not as RFC 3004's list of counted strings.
func isIPXE(req *dhcpv4.DHCPv4) bool {
	class := req.Options.Get(dhcpv4.OptionUserClassInformation)
	return bytes.Equal(class, []byte("iPXE")) || slices.Contains(req.UserClass(), "iPXE") || req.Options.Has(optIPXE)
}

// machineID finds a UUID in option 97 (RFC 4578 section 2.3: a type, always 0, and 16 bytes) or in a client identifier
// of that form, or in one that holds a DUID-UUID (RFC 4361 section 6.1: 255, IAID, DUID; RFC 6355: type 4).
func machineID(req *dhcpv4.DHCPv4) (id [16]byte, ok bool) {
	const uuidType, duidLen = 0, 1 + 4 + 2
	duid := req.Options.Get(dhcpv4.OptionClientIdentifier)
	for _, b := range [][]byte{req.Options.Get(dhcpv4.OptionClientMachineIdentifier), duid} {
		if len(b) == 1+len(id) && b[0] == uuidType {
			copy(id[:], b[1:])
			return id, usableUUID(id)
		}
	}
	if len(duid) == duidLen+len(id) && duid[0] == 255 && duid[5] == 0 && duid[6] == 4 {
		copy(id[:], duid[duidLen:])
		return id, usableUUID(id)
	}
	return id, false
}

// usableUUID refuses what boards have whose maker never set one.
func usableUUID(id [16]byte) bool {
	for _, b := range id[1:] {
		if b != id[0] {
			return true
		}
	}
	return id[0] != 0 && id[0] != 0xff
}

// uuidForms writes id as people and kernels do. SMBIOS 2.6 stores the first three fields little-endian, and firmware, also the
// iPXE of 2019, copies them into option 97 as they lie there. RFC 4578 does not say so: some other program may have put
// them in network order.
func uuidForms(id [16]byte) []string {
	swapped := id
	slices.Reverse(swapped[0:4])
	slices.Reverse(swapped[4:6])
	slices.Reverse(swapped[6:8])
	return slices.Compact([]string{formatUUID(swapped), formatUUID(id)})
}

func formatUUID(id [16]byte) string {
	h := hex.EncodeToString(id[:])
	return h[0:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// loaders are the files that start iPXE on an architecture, best first; none where there is no iPXE for it.
// The ones that use the firmware's own driver come first: they have only the network card that the firmware booted from,
// so that iPXE speaks from the MAC that the machine is known by, and drive cards that iPXE has no driver for.
func loaders(arch uint16) []string {
	switch iana.Arch(arch) {
	case iana.INTEL_X86PC:
		return []string{"undionly.kpxe"}
	case iana.EFI_X86_64, iana.EFI_BC, iana.EFI_X86_64_HTTP, iana.EFI_BC_HTTP:
		return []string{"snponly.efi", "ipxe.efi"}
	case iana.EFI_ARM64, iana.EFI_ARM64_HTTP:
		return []string{"snponly-arm64.efi", "ipxe-arm64.efi"}
	}
	return nil
}
