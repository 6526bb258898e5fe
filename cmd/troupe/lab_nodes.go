package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/troupe-dev/troupe/testbed"
)

// labNodes are the flags that say which machines a lab has.
type labNodes struct {
	count        int
	each         []string
	uefi         []string
	memory, cpus int
	disk         string
}

// choose picks machines among those of the fleet's hosts, or makes others. A name that a host has gets its identity.
func (o labNodes) choose(known []testbed.Node) ([]testbed.Node, error) {
	disk, err := parseSize(o.disk)
	if err != nil {
		return nil, fmt.Errorf("flag --disk: %w", err)
	}
	nodes := known
	if o.count > 0 || len(o.each) > 0 {
		nodes = nil
	}
	for i := range o.count {
		nodes = append(nodes, identity(known, fmt.Sprintf("n%d", i+1)))
	}
	for _, text := range o.each {
		n, err := parseNode(text, known)
		if err != nil {
			return nil, fmt.Errorf("flag --node %q: %w", text, err)
		}
		nodes = append(nodes, n)
	}
	for _, name := range o.uefi {
		i := slices.IndexFunc(nodes, func(n testbed.Node) bool { return n.Name == name })
		if i < 0 && name != "all" {
			return nil, fmt.Errorf("flag --uefi: the lab has no machine %q", name)
		}
		if i >= 0 {
			nodes[i].Firmware = testbed.UEFI
		}
	}
	for i := range nodes {
		n := &nodes[i]
		if slices.Contains(o.uefi, "all") {
			n.Firmware = testbed.UEFI
		}
		n.Memory, n.CPUs, n.Disk = cmp.Or(n.Memory, o.memory), cmp.Or(n.CPUs, o.cpus), cmp.Or(n.Disk, disk)
	}
	if len(nodes) == 0 {
		return nil, errors.New("the lab has no machines: give a fleet with hosts, --nodes or --node")
	}
	return nodes, nil
}

func identity(known []testbed.Node, name string) testbed.Node {
	i := slices.IndexFunc(known, func(n testbed.Node) bool { return n.Name == name })
	if i < 0 {
		return testbed.Node{Name: name}
	}
	return known[i]
}

// parseNode reads NAME[=FIRMWARE][,KEY=VALUE]….
func parseNode(text string, known []testbed.Node) (testbed.Node, error) {
	parts := strings.Split(text, ",")
	name, firmware, _ := strings.Cut(parts[0], "=")
	n := identity(known, name)
	n.Firmware = testbed.Firmware(firmware)
	for _, part := range parts[1:] {
		key, value, _ := strings.Cut(part, "=")
		var err error
		switch key {
		case "mac":
			n.MAC = value
		case "memory":
			n.Memory, err = strconv.Atoi(value)
		case "cpus":
			n.CPUs, err = strconv.Atoi(value)
		case "disk":
			n.Disk, err = parseSize(value)
		default:
			err = errors.New("want mac, memory, cpus or disk")
		}
		if err != nil {
			return n, fmt.Errorf("%q: %w", part, err)
		}
	}
	return n, nil
}

// parseSize reads a number of bytes, or of KiB, MiB, GiB or TiB by their first letters; "none" is -1.
func parseSize(text string) (int64, error) {
	if text == "none" {
		return -1, nil
	}
	digits := strings.TrimRight(text, "KMGT")
	shift := map[string]int{"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
	by, ok := shift[text[len(digits):]]
	n, err := strconv.ParseInt(digits, 10, 64)
	if !ok || err != nil || n <= 0 || n > math.MaxInt64>>by {
		return 0, fmt.Errorf(`size %q: want a number and K, M, G or T, or "none"`, text)
	}
	return n << by, nil
}

// printNodes prints a table of machines.
func printNodes(w io.Writer, nodes []testbed.NodeStatus) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tFIRMWARE\tMAC\tMEMORY\tPOWER\tSINCE\tLINK\tRESETS\tCONSOLE")
	for _, n := range nodes {
		power, link, since := "off", "up", ""
		if n.On {
			power = "on"
		}
		if !n.Link {
			link = "down"
		}
		if !n.Since.IsZero() {
			since = time.Since(n.Since).Truncate(time.Second).String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d MiB\t%s\t%s\t%s\t%d\t%s\n", n.Name, n.Firmware, n.MAC, n.Memory, power, since, link, n.Resets, consoleText(n))
	}
	return t.Flush()
}

// consoleText says in a few words what a console did since power on.
func consoleText(n testbed.NodeStatus) string {
	switch said := n.Console - n.Booted; {
	case n.Error != "":
		return n.Error
	case n.Silent:
		return "silent"
	case said == 0:
		return "nothing yet"
	default:
		return fmt.Sprintf("%d bytes", said)
	}
}
