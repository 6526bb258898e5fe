package api

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// RoleToChoose stands in a proposed host entry for the role that a person must choose: a fleet in which nobody did is
// refused, for a role that it does not have, at that line.
const RoleToChoose = "choose-a-role"

// propose gives each unclaimed machine a name, an address and a host entry that no declared host and no other
// unclaimed machine has.
func (r *Records) propose(unclaimed []Host) {
	if len(unclaimed) == 0 {
		return
	}
	names := map[string]bool{}
	var next netip.Addr
	taken := map[netip.Addr]bool{}
	if r.Fleet != nil {
		next = r.Fleet.Network.Subnet.Masked().Addr()
		taken[r.Fleet.Network.Router] = true
		for _, h := range r.Fleet.Hosts {
			names[h.Name], taken[h.Address] = true, true
			if next.IsValid() && r.Fleet.Network.Subnet.Contains(h.Address) && next.Less(h.Address) {
				next = h.Address // new hosts go after the last one
			}
		}
		for _, a := range r.Fleet.Network.DNS {
			taken[a] = true
		}
	}
	for i := range unclaimed {
		h := &unclaimed[i]
		p := &Proposal{Name: freeName(*h, names)}
		names[p.Name] = true
		if p.Address = r.freeAddress(next, taken); p.Address.IsValid() {
			taken[p.Address], next = true, p.Address
		}
		h.Propose = p
		h.Entry = HostEntry(*h, RoleToChoose)
	}
}

// freeAddress is the first address after after that a host may have; the zero Addr if there is none. It looks at no
// more than 65,536 of them.
func (r *Records) freeAddress(after netip.Addr, taken map[netip.Addr]bool) netip.Addr {
	if r.Fleet == nil || !after.IsValid() {
		return netip.Addr{}
	}
	n := r.Fleet.Network
	a := after.Next()
	for range 1 << 16 {
		if !n.Subnet.Contains(a) || a.Is4() && !n.Subnet.Contains(a.Next()) { // the end, and IPv4's broadcast address
			return netip.Addr{}
		}
		if !taken[a] && !n.Dynamic.Contains(a) {
			return a
		}
		a = a.Next()
	}
	return netip.Addr{}
}

// freeName makes a host name of the machine's serial number, else of its MAC, that is not in taken.
func freeName(h Host, taken map[string]bool) string {
	serial := h.Serial
	if serial == "" && h.Inventory != nil {
		serial = h.Inventory.SMBIOS.Serial
	}
	name := hostName(serial)
	if name == "" {
		name = "m" + strings.ReplaceAll(h.MAC, ":", "")
	}
	free := name
	for i := 2; taken[free]; i++ {
		free = name + "-" + strconv.Itoa(i)
	}
	return free
}

// hostName makes a host name (RFC 1123 section 2.1) of a serial number; "" where that is one of those that vendors put
// there when they have none, or has too little in it.
func hostName(serial string) string {
	var b strings.Builder
	for _, c := range strings.ToLower(serial) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			b.WriteRune(c)
		}
	}
	s := b.String()
	if len(s) < 4 || len(s) > 32 || strings.Trim(s, s[:1]) == "" || strings.Contains("01234567890", s) {
		return ""
	}
	for _, none := range []string{"none", "notspecified", "tobefilledbyoem", "systemserialnumber", "default", "unknown"} {
		if strings.HasPrefix(s, none) {
			return ""
		}
	}
	if s[0] >= '0' && s[0] <= '9' {
		s = "s" + s
	}
	return s
}

// HostEntry is CUE that declares the unclaimed machine h in a role, its inventory as comments above it.
func HostEntry(h Host, role string) string {
	var b strings.Builder
	for _, line := range Summary(h) {
		fmt.Fprintf(&b, "// %s\n", commentText(line))
	}
	p := Proposal{Name: freeName(h, nil)}
	if h.Propose != nil {
		p = *h.Propose
	}
	fmt.Fprintf(&b, "hosts: %s: {mac: %s", strconv.Quote(p.Name), strconv.Quote(h.MAC))
	if p.Address.IsValid() {
		fmt.Fprintf(&b, ", address: %s", strconv.Quote(p.Address.String()))
	}
	fmt.Fprintf(&b, ", role: %s}\n", strconv.Quote(role))
	return b.String()
}

// Summary is what a machine is made of, in a few lines for people.
func Summary(h Host) []string {
	inv := h.Inventory
	if inv == nil {
		return []string{"inventory not reported yet"}
	}
	var lines []string
	if s := strings.TrimSpace(inv.SMBIOS.Vendor + " " + inv.SMBIOS.Product); s != "" {
		if inv.SMBIOS.Serial != "" {
			s += ", serial " + inv.SMBIOS.Serial
		}
		lines = append(lines, s)
	}
	lines = append(lines, fmt.Sprintf("%d x %s (%d threads), %s memory, %s",
		max(1, inv.CPU.Sockets), strings.TrimSpace(inv.CPU.Model), inv.CPU.Threads, Bytes(inv.Memory), inv.Firmware))
	for _, d := range inv.Disks {
		lines = append(lines, diskLine(d))
	}
	for _, n := range inv.NICs {
		lines = append(lines, nicLine(n))
	}
	return lines
}

func diskLine(d agentapi.Disk) string {
	s := fmt.Sprintf("disk %s: %s", d.Name, Bytes(d.Size))
	if d.Model != "" {
		s += ", " + strings.TrimSpace(d.Model)
	}
	if d.Holds != "" {
		s += ", holds " + d.Holds
	}
	return strings.Replace(s, "holds blank", "blank", 1)
}

func nicLine(n agentapi.NIC) string {
	s := fmt.Sprintf("nic %s: %s", n.Name, n.MAC)
	if n.Driver != "" {
		s += ", " + n.Driver
	}
	if n.Speed > 0 {
		s += fmt.Sprintf(", %d Mbit/s", n.Speed)
	}
	if !n.Up {
		s += ", no link"
	}
	return s
}

// commentText makes a string from a machine's firmware fit for a CUE comment: one line, of bounded length.
func commentText(s string) string {
	const most = 200 // characters
	runes := []rune(strings.Map(func(c rune) rune {
		if !strconv.IsPrint(c) {
			return ' '
		}
		return c
	}, s))
	return string(runes[:min(len(runes), most)])
}

// Bytes writes a number of bytes for people: three digits and a binary unit.
func Bytes(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1024, 0
	const units = "KMGTPE"
	for v >= 999.5 && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	digits := 0
	switch {
	case v < 9.995:
		digits = 2
	case v < 99.95:
		digits = 1
	}
	s := strconv.FormatFloat(v, 'f', digits, 64)
	if strings.Contains(s, ".") {
		s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	return fmt.Sprintf("%s %ciB", s, units[unit])
}
