package netup

import (
	"encoding/json"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
)

func TestRestoreSetsAgainWhatWasTakenAway(t *testing.T) {
	w := newWire(t, "root")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h", "--dhcp-option=option:router,10.77.0.1")
	l := find(t, &Finder{MAC: mac})
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	for _, peer := range []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("192.0.2.1")} {
		if changed, err := l.Restore(peer, log); changed || err != nil {
			t.Errorf("a whole network: changed %v, %v", changed, err)
		}
		for _, harm := range []string{"addr flush dev root", "link set root down", "route flush dev root"} {
			run(t, append([]string{"ip"}, strings.Fields(harm)...)...)
			if changed, err := l.Restore(peer, log); !changed || err != nil {
				t.Errorf("after %q: changed %v, %v", harm, changed, err)
			}
			out := run(t, "ip", "-4", "addr", "show", "dev", "root") + run(t, "ip", "route", "get", peer.String())
			if !strings.Contains(out, "inet "+l.Address.String()) || !strings.Contains(out, "src "+l.Address.Addr().String()) || !strings.Contains(out, "UP") {
				t.Errorf("after %q:\n%s", harm, out)
			}
		}
	}
}

// TestAKeptLeaseIsAssumedAndAskedFor has a boot with no DHCP server, after one that had one.
func TestAKeptLeaseIsAssumedAndAskedFor(t *testing.T) {
	w := newWire(t, "root")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h", "--dhcp-option=option:router,10.77.0.1")
	l := find(t, &Finder{MAC: mac})
	b, err := json.Marshal(l.Kept())
	if err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "addr", "flush", "dev", "root")
	run(t, "ip", "link", "set", "root", "down")
	var kept Lease
	if err := json.Unmarshal(b, &kept); err != nil {
		t.Fatal(err)
	}
	if err := kept.Assume(slog.New(slog.NewTextHandler(t.Output(), nil))); err != nil {
		t.Fatal(err)
	}
	out := run(t, "ip", "-4", "addr", "show", "dev", "root") + run(t, "ip", "route")
	if !strings.Contains(out, "inet "+l.Address.String()) || !strings.Contains(out, "default via 10.77.0.1") || !strings.Contains(out, "UP") {
		t.Errorf("assumed:\n%s", out)
	}
	if kept.renewAfter()-kept.age() > 0 || !kept.expired() {
		t.Errorf("it is not asked for at once: %+v", kept)
	}
	other := *l
	other.Asked, other.ACK = l.Asked+5, append([]byte{1}, l.ACK...)
	if again, err := json.Marshal(other.Kept()); err != nil || string(again) != string(b) {
		t.Errorf("a renewal is written anew: %s, %v", again, err)
	}
}
