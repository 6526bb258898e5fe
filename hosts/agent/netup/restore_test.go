package netup

import (
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
