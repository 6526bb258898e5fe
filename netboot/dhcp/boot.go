package dhcp

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// Values of the options that only firmware understands.
var (
	// Vendor options (43) of PXE: PXE_DISCOVERY_CONTROL (6), one byte, bit 3 set: do not look for a boot server, take the
	// file that this packet names (PXE specification 2.1, table 2-1); then the end of the encapsulated options.
	pxeUseBootFile = []byte{6, 1, 8, 255}

	// Encapsulated options of iPXE: no-pxedhcp (176), one byte, set: do not wait for a ProxyDHCP server after this
	// offer. That saves each boot of an iPXE ROM the seconds in which it would only listen.
	ipxeNoProxy = []byte{176, 1, 1}
)

// What firmware does with the answers, seen on QEMU 7.2 with Debian 12's ipxe-qemu 20190125 and OVMF 2022.11:
//
//   - An iPXE ROM under SeaBIOS, and QEMU's EFI ROM of e1000 under OVMF, are iPXE from the first DISCOVER: no TFTP.
//   - OVMF's PXE waits 4 s for further offers whatever the first one says, asks TFTP for the size, refuses, asks again.
//   - OVMF's HTTP boot does the same wait, then HEAD and GET, with a Host header that lacks the port.
//   - snponly.efi (170 KB) is in its script 2 s after it was loaded; ipxe.efi (850 KB) takes 6 s, and may open another card.
//   - iPXE expands ${uuid} and ${serial:uristring} in option 67, and percent-encodes the colons of a MAC.
//   - In proxy mode, beside dnsmasq, the BIOS ROM and OVMF with PXE boot the same way.

// boot adds to an answer what starts the next program on the machine; nothing for a client that did not ask to boot. It
// returns what it offers, for people, and an error where the server has nothing for this machine.
func (r *responder) boot(m *dhcpv4.DHCPv4, c Client, server netip.Addr) (string, error) {
	switch c.Program {
	case IPXE:
		url := r.scriptURL(c, server)
		r.setFile(m, server, url)
		if r.cfg.Mode == ModeProxy {
			m.UpdateOption(dhcpv4.OptClassIdentifier(classPXE)) // else iPXE takes the answer for an address offer without an address
			m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionVendorSpecificInformation, pxeUseBootFile))
			return "iPXE: " + url, nil
		}
		m.UpdateOption(dhcpv4.OptGeneric(optIPXE, ipxeNoProxy))
		return "iPXE: " + url, nil
	case PXEFirmware:
		file, err := r.loader(c)
		if err != nil {
			return "", err
		}
		r.setFile(m, server, file)
		m.UpdateOption(dhcpv4.OptClassIdentifier(classPXE))
		m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionVendorSpecificInformation, pxeUseBootFile))
		return "TFTP: " + file, nil
	case HTTPFirmware:
		file, err := r.loader(c)
		if err != nil {
			return "", err
		}
		url := r.baseURL(server) + "/boot/files/" + file
		r.setFile(m, server, url)
		m.UpdateOption(dhcpv4.OptClassIdentifier(classHTTP)) // UEFI 2.10 section 24.7.3.1: only such an offer is one
		return "HTTP: " + url, nil
	}
	return "", nil
}

// setFile names the file in the options and in the fields of BOOTP, since firmware reads either; a URL that is too long
// for the field stands in the option alone.
func (r *responder) setFile(m *dhcpv4.DHCPv4, server netip.Addr, file string) {
	m.ServerIPAddr = server.AsSlice()
	m.UpdateOption(dhcpv4.OptTFTPServerName(server.String()))
	m.UpdateOption(dhcpv4.OptBootFileName(file))
	if len(file) < 128 {
		m.BootFileName = file
	}
}

// loader is the first file for the client's architecture that the server has.
func (r *responder) loader(c Client) (string, error) {
	names := loaders(c.Arch)
	for _, name := range names {
		if r.cfg.HasFile == nil || r.cfg.HasFile(name) {
			return name, nil
		}
	}
	if len(names) == 0 {
		return "", fmt.Errorf("there is no iPXE for architecture %#x", c.Arch)
	}
	return "", fmt.Errorf("no iPXE for architecture %#x is installed: looked for %s", c.Arch, strings.Join(names, ", "))
}

// scriptURL has the MAC that the request came from, which is the card that the machine boots from whatever number iPXE
// gave it; what DHCP does not tell is left to iPXE, which expands its settings in a file name.
func (r *responder) scriptURL(c Client, server netip.Addr) string {
	return fmt.Sprintf("%s/boot/ipxe?mac=%s&arch=%d&uuid=${uuid}&serial=${serial:uristring}", r.baseURL(server), c.MAC, c.Arch)
}

func (r *responder) baseURL(server netip.Addr) string {
	if r.cfg.URL != "" {
		return strings.TrimSuffix(r.cfg.URL, "/")
	}
	port := r.cfg.HTTPPort
	if port == 0 || port == 80 {
		return "http://" + server.String()
	}
	return "http://" + netip.AddrPortFrom(server, port).String()
}
