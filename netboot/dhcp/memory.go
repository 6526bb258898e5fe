package dhcp

import (
	"strings"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// maxRemembered bounds what packets with made-up MACs can make us remember.
const maxRemembered = 1 << 16

// chainWindow is how long after an offer to firmware an iPXE that asks is the one that the firmware was told to load.
const chainWindow = 3 * time.Minute

// boots tells the DISCOVER that begins a boot from those that belong to one: a repeated one has the same transaction,
// and iPXE asks again after firmware loaded it.
type boots struct {
	mu sync.Mutex
	by map[string]boot // by MAC
}

type boot struct {
	began   time.Time
	xid     dhcpv4.TransactionID
	chained bool // iPXE asked, after firmware
	program Program
}

func newBoots() *boots { return &boots{by: map[string]boot{}} }

func (bs *boots) begins(mac string, p Program, xid dhcpv4.TransactionID) bool {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	now := time.Now()
	last, known := bs.by[mac]
	known = known && now.Sub(last.began) < chainWindow
	if known && last.xid == xid {
		return false
	}
	if known && p == IPXE && last.program != IPXE && !last.chained {
		last.xid, last.chained = xid, true
		bs.by[mac] = last
		return false
	}
	if known || len(bs.by) < maxRemembered {
		bs.by[mac] = boot{began: now, xid: xid, program: p}
	}
	return true
}

func (bs *boots) sweep() {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	for mac, b := range bs.by {
		if time.Since(b.began) > chainWindow {
			delete(bs.by, mac)
		}
	}
}

// identities remembers the UUIDs that firmware told, of machines that are declared by them: the programs that such a
// machine runs later tell only its MAC.
type identities struct {
	mu sync.Mutex
	by map[string][]string // by MAC
}

func newIdentities() *identities { return &identities{by: map[string][]string{}} }

func (is *identities) get(mac string) []string {
	is.mu.Lock()
	defer is.mu.Unlock()
	return is.by[mac]
}

func (is *identities) put(mac string, uuids []string) {
	is.mu.Lock()
	defer is.mu.Unlock()
	if _, known := is.by[mac]; known || len(is.by) < maxRemembered {
		is.by[mac] = uuids
	}
}

// clean is a name that a machine chose for itself, with nothing in it that could upset a terminal or a log, and short.
func clean(name string) string {
	name = strings.Map(func(c rune) rune {
		if c == '-' || c == '.' || '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' {
			return c
		}
		return -1
	}, name)
	return name[:min(len(name), 63)]
}
