// Package inventory reads what a machine is made of from /proc and /sys, and from what its firmware says of it there
// (SMBIOS, DMTF DSP0134, as /sys/class/dmi/id shows it).
package inventory

import (
	"bufio"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// A Reader reads below Proc and Sys; the zero value reads the machine that it runs on. What cannot be read is left out:
// an inventory with a gap is worth more than none.
type Reader struct {
	Proc string // "" means /proc
	Sys  string // "" means /sys
}

// Read is all but the disks, which need more than a look at files: see package disk.
func (r Reader) Read() agentapi.Inventory {
	if r.Proc == "" {
		r.Proc = "/proc"
	}
	if r.Sys == "" {
		r.Sys = "/sys"
	}
	inv := agentapi.Inventory{CPU: r.cpu(), Memory: r.memory(), NICs: r.nics(), SMBIOS: r.smbios(), Firmware: "bios"}
	if _, err := os.Stat(filepath.Join(r.Sys, "firmware/efi")); err == nil {
		inv.Firmware = "uefi"
	}
	return inv
}

func (r Reader) smbios() agentapi.SMBIOS {
	id := func(name string) string { return clean(read(r.Sys, "class/dmi/id", name)) }
	s := agentapi.SMBIOS{
		Vendor: id("sys_vendor"), Product: id("product_name"), Serial: id("product_serial"),
		UUID: strings.ToLower(id("product_uuid")), Board: strings.TrimSpace(id("board_vendor") + " " + id("board_name")),
		BIOS: strings.TrimSpace(id("bios_vendor") + " " + id("bios_version")),
	}
	// Boards that nobody set up all say the same: no identity.
	if strings.Trim(s.UUID, "0-") == "" || strings.Trim(s.UUID, "f-") == "" {
		s.UUID = ""
	}
	return s
}

// clean leaves out what makers write where they had nothing to say.
func clean(s string) string {
	switch strings.ToLower(strings.TrimRight(s, ".")) {
	case "not specified", "to be filled by o.e.m", "default string", "none", "system serial number", "system product name", "system manufacturer", "0123456789":
		return ""
	}
	return s
}

func (r Reader) cpu() agentapi.CPU {
	var u unix.Utsname
	c := agentapi.CPU{}
	if unix.Uname(&u) == nil {
		c.Arch = unix.ByteSliceToString(u.Machine[:])
	}
	f, err := os.Open(filepath.Join(r.Proc, "cpuinfo"))
	if err != nil {
		return c
	}
	defer f.Close()
	sockets, cores := map[string]bool{}, map[string]bool{}
	var socket string
	for s := bufio.NewScanner(f); s.Scan(); {
		key, value, _ := strings.Cut(s.Text(), ":")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		switch key {
		case "processor":
			c.Threads++
			socket = ""
		case "model name":
			c.Model = value
		case "physical id":
			socket = value
			sockets[value] = true
		case "core id":
			cores[socket+"/"+value] = true
		}
	}
	c.Sockets, c.Cores = max(1, len(sockets)), len(cores)
	if c.Cores == 0 { // ARM does not say
		c.Cores = c.Threads
	}
	return c
}

// memory is what the kernel can use, in bytes: somewhat less than what is plugged in.
func (r Reader) memory() int64 {
	for line := range strings.Lines(read(r.Proc, "meminfo")) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "MemTotal:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0
			}
			return kib << 10
		}
	}
	return 0
}

// nics are the interfaces that hang on a device: no bridges, no loopback.
func (r Reader) nics() []agentapi.NIC {
	dir := filepath.Join(r.Sys, "class/net")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []agentapi.NIC
	for _, e := range entries {
		nic := filepath.Join(dir, e.Name())
		driver, err := os.Readlink(filepath.Join(nic, "device/driver"))
		if err != nil {
			continue
		}
		n := agentapi.NIC{
			Name: e.Name(), MAC: strings.ToLower(read(nic, "address")), Driver: filepath.Base(driver), Up: read(nic, "carrier") == "1",
		}
		if speed, err := strconv.Atoi(read(nic, "speed")); err == nil && speed > 0 {
			n.Speed = speed
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b agentapi.NIC) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// read is the content of a small file without the space around it; "" where it cannot be read.
func read(path ...string) string {
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
