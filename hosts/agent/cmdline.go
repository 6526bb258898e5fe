package agent

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
)

// ownBoot is what troupe.boot= says where a machine was started from its own disk: that cannot name each boot.
const ownBoot = "local"

// A Cmdline is what the server told the agent through the kernel's command line.
type Cmdline struct {
	Server string        // troupe.server=http://HOST:PORT
	MAC    string        // troupe.mac=, of the interface that the machine booted from; "" where it is not known
	Boot   string        // troupe.boot=, the name of this boot
	Kernel digest.Digest // troupe.kernel=
	// Dead is a release with whose kernel no agent came up: troupe.dead=
	Dead digest.Digest
	// Watchdog is how long the system may take from the switch of root to the agent's service: troupe.watchdog=SECONDS. 0
	// where it is not said, below 0 for no watchdog (troupe.watchdog=off).
	Watchdog time.Duration
	// Alone is how long a boot looks for a server before it does without: troupe.alone=SECONDS; 0 where it is not said.
	Alone time.Duration
	Args  []string // all arguments
}

// ParseCmdline reads what /proc/cmdline has. A missing or malformed argument of ours is left out, and named in the
// error: a machine boots as far as it can.
func ParseCmdline(s string) (Cmdline, error) {
	c := Cmdline{Args: splitArgs(s)}
	var bad []string
	for _, a := range c.Args {
		key, value, _ := strings.Cut(a, "=")
		switch key {
		case "troupe.server":
			c.Server = strings.TrimRight(value, "/")
		case "troupe.mac":
			mac, err := net.ParseMAC(value)
			if err != nil || len(mac) != 6 {
				bad = append(bad, a)
				continue
			}
			c.MAC = mac.String()
		case "troupe.boot":
			c.Boot = value
		case "troupe.kernel", "troupe.dead":
			d, err := digest.Parse(value)
			switch {
			case err != nil:
				bad = append(bad, a)
			case key == "troupe.dead":
				c.Dead = d
			default:
				c.Kernel = d
			}
		case "troupe.watchdog", "troupe.alone":
			secs, err := strconv.Atoi(value)
			switch {
			case a == "troupe.watchdog=off":
				c.Watchdog = -1
			case err != nil || secs < 1 || secs > 3600:
				bad = append(bad, a)
			case key == "troupe.alone":
				c.Alone = time.Duration(secs) * time.Second
			default:
				c.Watchdog = time.Duration(secs) * time.Second
			}
		}
	}
	if len(bad) > 0 {
		return c, fmt.Errorf("kernel command line: malformed %s", strings.Join(bad, ", "))
	}
	return c, nil
}

// splitArgs splits at spaces, but for those between double quotes, as the kernel does (lib/cmdline.c, next_arg).
func splitArgs(s string) []string {
	quoted := false
	args := strings.FieldsFunc(s, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && (r == ' ' || r == '\t' || r == '\n')
	})
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, `"`, "")
	}
	return args
}

// lacks returns those of want that the kernel was not started with, counting repeats.
func (c Cmdline) lacks(want []string) []string {
	have := slices.Clone(c.Args)
	var missing []string
	for _, w := range want {
		for _, a := range splitArgs(w) {
			if i := slices.Index(have, a); i >= 0 {
				have = slices.Delete(have, i, i+1)
			} else {
				missing = append(missing, a)
			}
		}
	}
	return missing
}

// rawArgs splits a command line as splitArgs does, and leaves quotes where they are.
func rawArgs(s string) []string {
	quoted := false
	return strings.FieldsFunc(s, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && (r == ' ' || r == '\t' || r == '\n')
	})
}

// nextArgs are the arguments with which a machine starts the kernel of a release by itself: what the server gives every
// machine, as this boot has it, then the role's. In the server's order the former stand before troupe.kernel= and the
// latter behind it. What speaks of this boot alone, or of a boot loader, is left out. A boot whose line has no such mark was
// started by hand: all of it counts as the machine's.
func nextArgs(now string, kernel digest.Digest, role []string, own ...string) []string {
	var out []string
	for _, a := range rawArgs(now) {
		key, _, _ := strings.Cut(a, "=")
		if key == "troupe.kernel" {
			break
		}
		switch key {
		case "initrd", "BOOT_IMAGE", "troupe.boot", "troupe.dead":
		default:
			out = append(out, a)
		}
	}
	out = append(append(out, own...), "troupe.kernel="+kernel.String())
	for _, r := range role {
		out = append(out, rawArgs(r)...)
	}
	return out
}
