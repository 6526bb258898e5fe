package dhcp

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"github.com/troupe-dev/troupe/internal/quiet"
)

const (
	discover = dhcpv4.MessageTypeDiscover
	reqType  = dhcpv4.MessageTypeRequest
	ack      = dhcpv4.MessageTypeAck
	nak      = dhcpv4.MessageTypeNak
)

// kind is a message's type; none for no message.
func kind(m *dhcpv4.DHCPv4) dhcpv4.MessageType {
	if m == nil {
		return dhcpv4.MessageTypeNone
	}
	return m.MessageType()
}

func wantKind(t *testing.T, what string, m *dhcpv4.DHCPv4, want dhcpv4.MessageType) {
	t.Helper()
	if kind(m) != want {
		t.Errorf("%s: got %s, want %s", what, kind(m), want)
	}
}

func TestDeclaredHostGetsItsAddressAndTheNetworksOptions(t *testing.T) {
	d := newDesk(t, ModeServer)
	d.fleet.declare(mac1.String(), Host{Name: "n1", Address: ip("10.9.0.11")})
	offer := d.broadcast(discover, mac1, requested(ip("10.9.0.100")))
	got := strings.Join([]string{
		kind(offer).String(), offer.YourIPAddr.String(), offer.ServerIdentifier().String(),
		net.IP(offer.SubnetMask()).String(), offer.Router()[0].String(), offer.DNS()[0].String(), offer.NTPServers()[0].String(),
		offer.DomainName(), offer.HostName(), offer.IPAddressLeaseTime(0).String(),
	}, " ")
	if want := "OFFER 10.9.0.11 10.9.0.1 255.255.255.0 10.9.0.254 10.9.0.53 10.9.0.123 example n1 1h0m0s"; got != want {
		t.Errorf("offer:\n got %s\nwant %s", got, want)
	}
	if a := d.lease(mac1); a != ip("10.9.0.11") {
		t.Errorf("leased %s", a)
	}
	if _, ok := d.store.get(mac1); ok {
		t.Error("a declared address was stored as a lease")
	}
}

// TestRequest has every kind of REQUEST (RFC 2131 section 4.3.2) from a machine that has a lease, one that is declared, and
// one that is neither.
func TestRequest(t *testing.T) {
	const none = dhcpv4.MessageTypeNone
	declared, foreign, outside := ip("10.9.0.11"), ip("10.9.0.77"), ip("192.168.1.5")
	ciaddr := func(a netip.Addr) dhcpv4.Modifier { return dhcpv4.WithClientIP(a.AsSlice()) }
	tests := []struct {
		name    string
		mac     net.HardwareAddr
		unicast bool
		mods    func(leased netip.Addr) []dhcpv4.Modifier
		want    dhcpv4.MessageType
	}{
		{"selecting another server", mac1, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(a), serverID(foreign)} }, none},
		{"selecting, what was leased", mac1, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(a), serverID(server)} }, ack},
		{"selecting, somebody's lease", mac3, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(a), serverID(server)} }, nak},
		{"selecting, somebody's declared address", mac3, false, func(netip.Addr) []dhcpv4.Modifier {
			return []dhcpv4.Modifier{requested(declared), serverID(server)}
		}, nak},
		{"selecting, no address", mac1, false, func(netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{serverID(server)} }, none},
		{"init-reboot, right", mac1, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(a)} }, ack},
		{"init-reboot, another address", mac1, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(other(a))} }, nak},
		{"init-reboot, another network", mac1, false, func(netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(outside)} }, nak},
		{"init-reboot, no record", mac3, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(other(a))} }, none},
		{"init-reboot, declared, right", mac2, false, func(netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(declared)} }, ack},
		{"init-reboot, declared, an old one", mac2, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{requested(a)} }, nak},
		{"renewing, right", mac1, true, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{ciaddr(a)} }, ack},
		{"renewing, another address", mac1, true, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{ciaddr(other(a))} }, nak},
		{"renewing, no record", mac3, true, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{ciaddr(other(a))} }, nak},
		{"renewing, declared", mac2, true, func(netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{ciaddr(declared)} }, ack},
		{"rebinding, right", mac1, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{ciaddr(a)} }, ack},
		{"rebinding, no record", mac3, false, func(a netip.Addr) []dhcpv4.Modifier { return []dhcpv4.Modifier{ciaddr(other(a))} }, none},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newDesk(t, ModeServer)
			d.fleet.declare(mac2.String(), Host{Name: "n2", Address: declared})
			leased := d.lease(mac1)
			to := broadcast
			if tt.unicast {
				to = server
			}
			got, _ := d.send(to, ServerPort, message(t, reqType, tt.mac, tt.mods(leased)...))
			wantKind(t, "answer", got, tt.want)
		})
	}
}

// other is another address of the dynamic range.
func other(a netip.Addr) netip.Addr {
	if a == ip("10.9.0.103") {
		return ip("10.9.0.100")
	}
	return a.Next()
}

func TestLeaseIsStoredBeforeItsAck(t *testing.T) {
	d := newDesk(t, ModeServer)
	offer := d.broadcast(discover, mac1)
	if _, ok := d.store.get(mac1); ok {
		t.Error("an offer was stored")
	}
	a := addrOf(offer.YourIPAddr)
	d.store.broken = true
	if m := d.broadcast(reqType, mac1, requested(a), serverID(server)); m != nil {
		t.Errorf("got %s though the store is broken", kind(m))
	}
	d.store.broken = false
	m := d.broadcast(reqType, mac1, requested(a), serverID(server), dhcpv4.WithOption(dhcpv4.OptHostName("my\x1b[0mname")))
	wantKind(t, "the next request", m, ack)
	l, ok := d.store.get(mac1)
	if !ok || l.Address != a || l.Hostname != "my0mname" {
		t.Errorf("stored %+v, %t", l, ok)
	}
}

func TestLeasesSurviveARestart(t *testing.T) {
	d := newDesk(t, ModeServer)
	a1, a2 := d.lease(mac1), d.lease(mac2)
	d.restart()
	wantKind(t, "init-reboot after a restart", d.broadcast(reqType, mac1, requested(a1)), ack)
	offer := d.broadcast(discover, mac3, requested(a2))
	if got := addrOf(offer.YourIPAddr); got == a1 || got == a2 {
		t.Errorf("offered %s, which is leased", got)
	}
}

func TestMachineThatBecomesDeclaredGivesItsLeaseBack(t *testing.T) {
	d := newDesk(t, ModeServer)
	old := d.lease(mac1)
	d.fleet.declare(mac1.String(), Host{Name: "n1", Address: ip("10.9.0.11")})
	wantKind(t, "renewing the old address", d.broadcast(reqType, mac1, dhcpv4.WithClientIP(old.AsSlice())), nak)
	if a := d.lease(mac1); a != ip("10.9.0.11") {
		t.Errorf("leased %s, want the declared address", a)
	}
	if l, ok := d.store.get(mac1); ok {
		t.Errorf("still stored: %+v", l)
	}
}

func TestAddressThatBecomesDeclaredIsTakenFromItsHolder(t *testing.T) {
	d := newDesk(t, ModeServer)
	a := d.lease(mac1)
	d.fleet.declare(mac2.String(), Host{Name: "n2", Address: a})
	wantKind(t, "renewing", d.broadcast(reqType, mac1, dhcpv4.WithClientIP(a.AsSlice())), nak)
	if b := d.lease(mac1); b == a {
		t.Errorf("leased %s again", b)
	}
	if b := d.lease(mac2); b != a {
		t.Errorf("n2 leased %s, want %s", b, a)
	}
}

// TestUUID: firmware tells the UUID with its first fields swapped; an OS tells no UUID at all.
func TestUUID(t *testing.T) {
	const uuid = "11223344-5566-7788-99aa-bbccddeeff00"
	raw := []byte{0, 0x44, 0x33, 0x22, 0x11, 0x66, 0x55, 0x88, 0x77, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0}
	network := append([]byte{0}, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0)
	for name, id := range map[string]dhcpv4.Option{
		"option 97":                   dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, raw),
		"option 97, in network order": dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, network),
		"option 61":                   dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, raw),
		"option 61, DUID-UUID":        dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, append([]byte{255, 1, 2, 3, 4, 0, 4}, network[1:]...)),
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, ModeServer)
			want := ip("10.9.0.11")
			d.fleet.declare(uuid, Host{Name: "n1", Address: want})
			offer := d.broadcast(discover, mac1, dhcpv4.WithOption(id))
			if got := addrOf(offer.YourIPAddr); got != want {
				t.Errorf("with the UUID: offered %s, want %s", got, want)
			}
			if a := d.lease(mac1); a != want {
				t.Errorf("later, without: leased %s, want %s", a, want)
			}
			if a := d.lease(mac2); a == want {
				t.Error("another machine got the address")
			}
		})
	}
	t.Run("of a board whose maker set none", func(t *testing.T) {
		zero := dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, make([]byte, 17))
		if c := clientOf(message(t, discover, mac1, dhcpv4.WithOption(zero))); len(c.UUIDs) != 0 {
			t.Errorf("got %v", c.UUIDs)
		}
	})
}

func TestRangeIsExhausted(t *testing.T) {
	d := newDesk(t, ModeServer)
	seen := map[netip.Addr]bool{}
	for i := range byte(4) {
		seen[d.lease(net.HardwareAddr{2, 0, 0, 0, 1, i})] = true
	}
	if len(seen) != 4 {
		t.Fatalf("four machines share %d addresses", len(seen))
	}
	wantKind(t, "an OS", d.broadcast(discover, mac1), dhcpv4.MessageTypeNone)
	if len(d.events) > 0 {
		t.Errorf("events: %+v, want none: an OS boots nothing", d.events)
	}
	wantKind(t, "firmware", d.broadcast(discover, mac2, class("PXEClient:Arch:00007"), arch(7)), dhcpv4.MessageTypeNone)
	if len(d.events) != 1 || !errors.Is(d.events[0].Err, errExhausted) || !bytes.Equal(d.events[0].MAC, mac2) {
		t.Errorf("events: %+v, want one that says that the range is exhausted", d.events)
	}
}

// TestOnlyBootsAreObserved: whatever befalls a client that boots nothing is told to the log alone.
func TestOnlyBootsAreObserved(t *testing.T) {
	d := newDesk(t, ModeServer)
	var log bytes.Buffer
	d.server.Log = slog.New(slog.NewTextHandler(&log, nil))
	d.restart()
	a := d.lease(mac1)
	d.broadcast(dhcpv4.MessageTypeDecline, mac1, requested(a), serverID(server))
	d.fleet.declare(mac2.String(), Host{Name: "n2", Address: ip("10.9.0.11")})
	d.broadcast(dhcpv4.MessageTypeDecline, mac2, requested(ip("10.9.0.11")), serverID(server))
	d.fleet.network.First, d.fleet.network.Last = netip.Addr{}, netip.Addr{} // a commit took the range away
	wantKind(t, "renewing", d.broadcast(reqType, mac1, dhcpv4.WithClientIP(a.AsSlice())), nak)
	for _, c := range []string{"", "MSFT 5.0", "android-dhcp-14", "troupe-agent", "U-Boot.armv8"} {
		wantKind(t, c, d.broadcast(discover, mac1, class(c)), dhcpv4.MessageTypeNone)
	}
	if len(d.events) > 0 {
		t.Errorf("events: %+v, want none", d.events)
	}
	for _, want := range []string{"another machine uses an address of the dynamic range", "host=n2", errNoRange.Error()} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, &log)
		}
	}
}

func TestLeaseExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, ModeServer)
		macs := make([]net.HardwareAddr, 4)
		had := map[string]netip.Addr{}
		for i := range macs {
			macs[i] = net.HardwareAddr{2, 0, 0, 0, 1, byte(i)}
			had[macs[i].String()] = d.lease(macs[i])
		}
		time.Sleep(30 * time.Minute)
		wantKind(t, "renewing at half time", d.broadcast(reqType, macs[0], dhcpv4.WithClientIP(had[macs[0].String()].AsSlice())), ack)
		time.Sleep(31 * time.Minute)
		got := d.lease(mac1) // takes the address of one that has gone
		if got == had[macs[0].String()] {
			t.Errorf("took %s, which was renewed", got)
		}
		if n := len(d.store.leases); n != 4 {
			t.Errorf("%d leases are stored for four addresses", n)
		}
		for _, m := range macs[1:] {
			if had[m.String()] == got {
				continue
			}
			wantKind(t, "one that comes back late", d.broadcast(reqType, m, requested(had[m.String()])), ack)
		}
		time.Sleep(expiredKeep + 2*time.Hour)
		d.r.pool.sweep(t.Context())
		if n := len(d.store.leases); n != 0 {
			t.Errorf("%d leases are stored a day later", n)
		}
	})
}

func TestOfferIsHeldForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, ModeServer)
		d.fleet.network.Last = d.fleet.network.First
		wantKind(t, "the first machine", d.broadcast(discover, mac1), dhcpv4.MessageTypeOffer)
		wantKind(t, "the second", d.broadcast(discover, mac2), dhcpv4.MessageTypeNone)
		time.Sleep(offerHold + time.Second)
		wantKind(t, "the second, later", d.broadcast(discover, mac2), dhcpv4.MessageTypeOffer)
		wantKind(t, "the first, too late", d.broadcast(reqType, mac1, requested(d.fleet.network.First), serverID(server)), nak)
	})
}

// TestOfferTakesNothingAway: an address whose lease has run out is offered to another machine, which never asks for it.
func TestOfferTakesNothingAway(t *testing.T) {
	for _, comesBack := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			d := newDesk(t, ModeServer)
			d.fleet.network.Last = d.fleet.network.First
			a := d.lease(mac1)
			time.Sleep(2 * time.Hour)
			wantKind(t, "another machine", d.broadcast(discover, mac2), dhcpv4.MessageTypeOffer)
			wantKind(t, "its old holder meanwhile", d.broadcast(reqType, mac1, requested(a)), nak)
			time.Sleep(offerHold + time.Second)
			d.r.pool.sweep(t.Context())
			if comesBack {
				wantKind(t, "its old holder, a minute later", d.broadcast(reqType, mac1, requested(a)), ack)
				return
			}
			time.Sleep(expiredKeep)
			d.r.pool.sweep(t.Context())
			if l, ok := d.store.get(mac1); ok {
				t.Errorf("still stored: %+v", l)
			}
			d.restart()
			if n := len(d.r.pool.leases); n != 0 {
				t.Errorf("%d leases after a restart", n)
			}
		})
	}
}

// TestTwoLeasesOfOneAddress are what a crash leaves while an address changes hands. The one that is gone is not kept.
func TestTwoLeasesOfOneAddress(t *testing.T) {
	d := newDesk(t, ModeServer)
	a := ip("10.9.0.100")
	d.store.leases[mac1.String()] = Lease{MAC: mac1.String(), Address: a, Expires: time.Now().Add(-time.Minute)}
	d.store.leases[mac2.String()] = Lease{MAC: mac2.String(), Address: a, Expires: time.Now().Add(time.Hour)}
	d.restart()
	if l, ok := d.store.get(mac1); ok {
		t.Errorf("still stored: %+v", l)
	}
	wantKind(t, "its holder", d.broadcast(reqType, mac2, requested(a)), ack)
	wantKind(t, "the one before", d.broadcast(reqType, mac1, requested(a), serverID(server)), nak)
}

// lockedStore is a memStore that wants the record's lock to be held while it is changed.
type lockedStore struct {
	*memStore
	t *testing.T
	p *pool
}

func (s *lockedStore) check(mac string) {
	s.t.Helper()
	if lock := &s.p.writing[startOf(mac, uint32(len(s.p.writing)))]; lock.TryLock() {
		lock.Unlock()
		s.t.Errorf("the record of %s changes while another change of it may be under way", mac)
	}
}

func (s *lockedStore) Put(ctx context.Context, l Lease) error {
	s.check(l.MAC)
	return s.memStore.Put(ctx, l)
}

func (s *lockedStore) Delete(ctx context.Context, mac string) error {
	s.check(mac)
	return s.memStore.Delete(ctx, mac)
}

// TestOneChangeOfARecordAtATime: a machine whose old address is taken up by another may be given a new one at that moment.
func TestOneChangeOfARecordAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, ModeServer)
		d.r.pool.store = &lockedStore{d.store, t, d.r.pool}
		d.fleet.network.Last = d.fleet.network.First
		d.lease(mac1)
		time.Sleep(2 * time.Hour)
		a := d.lease(mac2)
		if _, ok := d.store.get(mac1); ok {
			t.Error("the lease before is still stored")
		}
		d.send(server, ServerPort, message(t, dhcpv4.MessageTypeRelease, mac2, dhcpv4.WithClientIP(a.AsSlice())))
		d.lease(mac3)
		time.Sleep(expiredKeep + 2*time.Hour)
		d.r.pool.sweep(t.Context())
		if n := len(d.store.leases); n != 0 {
			t.Errorf("%d leases are stored a day later", n)
		}
	})
}

func TestDecline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, ModeServer)
		a, b := d.lease(mac1), d.lease(mac2)
		d.broadcast(dhcpv4.MessageTypeDecline, mac1, requested(b), serverID(server))
		wantKind(t, "renewing what another machine declined", d.broadcast(reqType, mac2, dhcpv4.WithClientIP(b.AsSlice())), ack)
		d.broadcast(dhcpv4.MessageTypeDecline, mac1, requested(a), serverID(server))
		if got := d.lease(mac1); got == a {
			t.Errorf("leased %s, which was declined", a)
		}
		time.Sleep(declineHold + time.Second)
		d.r.pool.sweep(t.Context())
		offer := d.broadcast(discover, mac3, requested(a))
		if got := addrOf(offer.YourIPAddr); got != a {
			t.Errorf("offered %s, want %s, which has rested", got, a)
		}
	})
}

func TestRelease(t *testing.T) {
	d := newDesk(t, ModeServer)
	a := d.lease(mac1)
	d.send(server, ServerPort, message(t, dhcpv4.MessageTypeRelease, mac2, dhcpv4.WithClientIP(a.AsSlice())))
	if _, ok := d.store.get(mac1); !ok {
		t.Error("another machine released the lease")
	}
	d.send(server, ServerPort, message(t, dhcpv4.MessageTypeRelease, mac1, dhcpv4.WithClientIP(a.AsSlice())))
	if _, ok := d.store.get(mac1); ok {
		t.Error("the lease is still stored")
	}
	if b := d.lease(mac1); b != a {
		t.Errorf("leased %s after a release, want %s again", b, a)
	}
}

func TestInform(t *testing.T) {
	d := newDesk(t, ModeServer)
	m, reply := d.send(server, ServerPort, message(t, dhcpv4.MessageTypeInform, mac1, dhcpv4.WithClientIP(net.IP{10, 9, 0, 200})))
	wantKind(t, "answer", m, ack)
	if !m.YourIPAddr.IsUnspecified() || m.Options.Has(dhcpv4.OptionIPAddressLeaseTime) {
		t.Errorf("the answer gives an address:\n%s", m.Summary())
	}
	if reply.To != netip.MustParseAddrPort("10.9.0.200:68") {
		t.Errorf("sent to %s", reply.To)
	}
}

func TestNobodyIsAnsweredOnAForeignNetwork(t *testing.T) {
	d := newDesk(t, ModeServer)
	d.fleet.network.Subnet = netip.MustParsePrefix("10.8.0.0/24")
	wantKind(t, "DISCOVER", d.broadcast(discover, mac1), dhcpv4.MessageTypeNone)
	d.fleet.network.Subnet = netip.MustParsePrefix("10.9.0.0/24")
	wantKind(t, "through a relay elsewhere", d.broadcast(discover, mac1, dhcpv4.WithGatewayIP(net.IP{10, 8, 0, 1})), dhcpv4.MessageTypeNone)
	d.fleet.unknown = true
	wantKind(t, "before the first fleet", d.broadcast(discover, mac1), dhcpv4.MessageTypeNone)
}

func TestDestination(t *testing.T) {
	agentInfo := dhcpv4.WithOption(dhcpv4.OptRelayAgentInfo(dhcpv4.OptGeneric(dhcpv4.AgentCircuitIDSubOption, []byte("port 7"))))
	relay := dhcpv4.WithGatewayIP(net.IP{10, 9, 0, 250})
	tests := []struct {
		name string
		m    *dhcpv4.DHCPv4
		want string // address, and MAC where a frame is sent
	}{
		{"no address, no broadcast flag", message(t, discover, mac1), "10.9.0.11:68 02:00:00:00:00:01"},
		{"broadcast flag", message(t, discover, mac1, dhcpv4.WithBroadcast(true)), "255.255.255.255:68"},
		{"renewing", message(t, reqType, mac1, dhcpv4.WithClientIP(net.IP{10, 9, 0, 11})), "10.9.0.11:68"},
		{"NAK", message(t, reqType, mac1, dhcpv4.WithClientIP(net.IP{10, 9, 0, 100})), "255.255.255.255:68"},
		{"relayed", message(t, discover, mac1, relay, agentInfo), "10.9.0.250:67"},
		{"NAK, relayed", message(t, reqType, mac1, relay, agentInfo, requested(ip("10.9.0.100"))), "10.9.0.250:67"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newDesk(t, ModeServer)
			d.fleet.declare(mac1.String(), Host{Name: "n1", Address: ip("10.9.0.11")})
			m, reply := d.send(broadcast, ServerPort, tt.m)
			if m == nil {
				t.Fatal("no answer")
			}
			if got := strings.TrimSpace(reply.To.String() + " " + reply.MAC.String()); got != tt.want {
				t.Errorf("sent to %s, want %s", got, tt.want)
			}
			if reply.From != server {
				t.Errorf("sent from %s, want %s", reply.From, server)
			}
			if want := tt.m.Options.Get(dhcpv4.OptionRelayAgentInformation); !bytes.Equal(m.Options.Get(dhcpv4.OptionRelayAgentInformation), want) {
				t.Errorf("option 82 is %q, want %q", m.Options.Get(dhcpv4.OptionRelayAgentInformation), want)
			}
			if relayed := tt.m.GatewayIPAddr.String() != "0.0.0.0"; relayed && kind(m) == nak && !m.IsBroadcast() {
				t.Error("a relayed NAK without the broadcast flag")
			}
		})
	}
}

func TestLinkSelection(t *testing.T) {
	d := newDesk(t, ModeServer)
	link := dhcpv4.WithOption(dhcpv4.OptRelayAgentInfo(dhcpv4.OptGeneric(dhcpv4.LinkSelectionSubOption, []byte{10, 9, 0, 0})))
	m := d.broadcast(discover, mac1, dhcpv4.WithGatewayIP(net.IP{172, 16, 0, 1}), link)
	wantKind(t, "a relay that speaks for its link", m, dhcpv4.MessageTypeOffer)
}

// bootOptions is what an answer says of booting, as text.
func bootOptions(m *dhcpv4.DHCPv4) map[string]string {
	o := map[string]string{}
	if m.BootFileName != "" {
		o["file"] = m.BootFileName
	}
	if !m.ServerIPAddr.IsUnspecified() {
		o["next server"] = m.ServerIPAddr.String()
	}
	for name, code := range map[string]dhcpv4.OptionCode{
		"60": dhcpv4.OptionClassIdentifier, "66": dhcpv4.OptionTFTPServerName, "67": dhcpv4.OptionBootfileName,
	} {
		if v := m.Options.Get(code); v != nil {
			o[name] = string(v)
		}
	}
	if v := m.Options.Get(dhcpv4.OptionVendorSpecificInformation); v != nil {
		o["43"] = net.HardwareAddr(v).String()
	}
	if v := m.Options.Get(optIPXE); v != nil {
		o["175"] = net.HardwareAddr(v).String()
	}
	return o
}

func arch(a iana.Arch) dhcpv4.Modifier { return dhcpv4.WithOption(dhcpv4.OptClientArch(a)) }

func TestBootOptions(t *testing.T) {
	pxe := func(file string) map[string]string {
		return map[string]string{"60": "PXEClient", "43": "06:01:08:ff", "66": "10.9.0.1", "67": file, "file": file, "next server": "10.9.0.1"}
	}
	url := func(class, url string) map[string]string {
		return map[string]string{"60": class, "66": "10.9.0.1", "67": url, "file": url, "next server": "10.9.0.1"}
	}
	const script = "http://10.9.0.1:8080/boot/ipxe?mac=02:00:00:00:00:01&arch=7&uuid=${uuid}&serial=${serial:uristring}"
	ipxe := map[string]string{"175": "b0:01:01", "66": "10.9.0.1", "67": script, "file": script, "next server": "10.9.0.1"}
	ipxeProxy := map[string]string{"60": "PXEClient", "43": "06:01:08:ff", "66": "10.9.0.1", "67": script, "file": script, "next server": "10.9.0.1"}
	none := map[string]string{}
	tests := []struct {
		name          string
		mods          []dhcpv4.Modifier
		server, proxy map[string]string // proxy nil: no answer
		noLoader      bool
	}{
		{name: "BIOS", mods: []dhcpv4.Modifier{class("PXEClient:Arch:00000:UNDI:002001"), arch(0)}, server: pxe("undionly.kpxe"), proxy: pxe("undionly.kpxe")},
		{name: "BIOS without option 93", mods: []dhcpv4.Modifier{class("PXEClient")}, server: pxe("undionly.kpxe"), proxy: pxe("undionly.kpxe")},
		{name: "UEFI x64", mods: []dhcpv4.Modifier{class("PXEClient:Arch:00007:UNDI:003001"), arch(7)}, server: pxe("snponly.efi"), proxy: pxe("snponly.efi")},
		{name: "UEFI x64, old number", mods: []dhcpv4.Modifier{class("PXEClient:Arch:00009"), arch(9)}, server: pxe("snponly.efi"), proxy: pxe("snponly.efi")},
		{name: "UEFI arm64", mods: []dhcpv4.Modifier{class("PXEClient:Arch:00011"), arch(11)}, server: none, noLoader: true},
		{name: "UEFI 32-bit", mods: []dhcpv4.Modifier{class("PXEClient:Arch:00006"), arch(6)}, server: none, noLoader: true},
		{
			name: "UEFI HTTP", mods: []dhcpv4.Modifier{class("HTTPClient:Arch:00016:UNDI:003001"), arch(16)},
			server: url("HTTPClient", "http://10.9.0.1:8080/boot/files/snponly.efi"), proxy: url("HTTPClient", "http://10.9.0.1:8080/boot/files/snponly.efi"),
		},
		{name: "iPXE by its user class", mods: []dhcpv4.Modifier{class("PXEClient:Arch:00007"), arch(7), dhcpv4.WithUserClass("iPXE", false)}, server: ipxe, proxy: ipxeProxy},
		{name: "iPXE by a counted user class", mods: []dhcpv4.Modifier{class("PXEClient:Arch:00007"), arch(7), dhcpv4.WithUserClass("iPXE", true)}, server: ipxe, proxy: ipxeProxy},
		{
			name: "iPXE by option 175", mods: []dhcpv4.Modifier{class("PXEClient:Arch:00007"), arch(7), dhcpv4.WithGeneric(optIPXE, []byte{19, 1, 1})},
			server: ipxe, proxy: ipxeProxy,
		},
		{name: "an agent", mods: []dhcpv4.Modifier{class("troupe-agent")}, server: none},
		{name: "an OS", server: none},
	}
	for _, tt := range tests {
		for _, mode := range []Mode{ModeServer, ModeProxy} {
			t.Run(tt.name+map[Mode]string{ModeServer: "", ModeProxy: ", by proxy"}[mode], func(t *testing.T) {
				d := newDesk(t, mode)
				want := map[Mode]map[string]string{ModeServer: tt.server, ModeProxy: tt.proxy}[mode]
				m := d.broadcast(discover, mac1, tt.mods...)
				if m == nil && want != nil || m != nil && want == nil {
					t.Fatalf("answer: %v, want %v", m, want)
				}
				if m != nil {
					if diff := cmp.Diff(want, bootOptions(m)); diff != "" {
						t.Errorf("options (-want +got):\n%s", diff)
					}
				}
				if mode == ModeProxy && m != nil && (!m.YourIPAddr.IsUnspecified() || m.Options.Has(dhcpv4.OptionIPAddressLeaseTime)) {
					t.Errorf("a proxy gives an address:\n%s", m.Summary())
				}
				d.wantEvent(t, tt.noLoader, len(want) > 0)
			})
		}
	}
}

func (d *desk) wantEvent(t *testing.T, failure, offer bool) {
	t.Helper()
	switch {
	case !failure && !offer:
		if len(d.events) != 0 {
			t.Errorf("events: %+v, want none", d.events)
		}
	case len(d.events) != 1 || (d.events[0].Err != nil) != failure || !bytes.Equal(d.events[0].MAC, mac1):
		t.Errorf("events: %+v, want one, failure %t", d.events, failure)
	}
}

func TestConfiguredURL(t *testing.T) {
	d := newDesk(t, ModeServer)
	d.server.URL = "https://boot.example/"
	m := d.broadcast(discover, mac1, class("HTTPClient"), arch(16))
	if got, want := m.BootFileNameOption(), "https://boot.example/boot/files/snponly.efi"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestURLTooLongForTheField(t *testing.T) {
	d := newDesk(t, ModeServer)
	d.server.URL = "http://" + strings.Repeat("x", 150)
	m := d.broadcast(discover, mac1, class("HTTPClient"), arch(16))
	if m.BootFileName != "" || len(m.BootFileNameOption()) < 150 {
		t.Errorf("file %q, option 67 %q", m.BootFileName, m.BootFileNameOption())
	}
}

// TestProxyPort: on 4011 a REQUEST is ours; on 67 it is for the server that gives the address.
func TestProxyPort(t *testing.T) {
	d := newDesk(t, ModeProxy)
	m := message(t, reqType, mac1, class("PXEClient:Arch:00007"), arch(7), dhcpv4.WithClientIP(net.IP{10, 9, 0, 50}), requested(ip("10.9.0.50")))
	got, _ := d.send(broadcast, ServerPort, m)
	wantKind(t, "on 67", got, dhcpv4.MessageTypeNone)
	from := netip.MustParseAddrPort("10.9.0.50:4011")
	reply, ok := d.r.answer(t.Context(), Packet{Data: m.ToBytes(), From: from, To: server, Port: PXEPort, Local: []netip.Addr{server}})
	if !ok {
		t.Fatal("no answer on 4011")
	}
	got, err := dhcpv4.FromBytes(reply.Data)
	if err != nil || kind(got) != ack || got.BootFileNameOption() != "snponly.efi" || reply.To != from {
		t.Errorf("on 4011: %v to %s, %v", got, reply.To, err)
	}
	got, _ = d.send(server, PXEPort, message(t, reqType, mac1, class("MSFT 5.0")))
	wantKind(t, "an OS on 4011", got, dhcpv4.MessageTypeNone)
}

// TestABootBeginsOnce: an offer is told of once for each boot, however often firmware asks, and iPXE after it.
func TestABootBeginsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, ModeServer)
		firmware := []dhcpv4.Modifier{class("PXEClient:Arch:00007"), arch(7)}
		ipxe := append(firmware, dhcpv4.WithUserClass("iPXE", false))
		xid := func(n byte) dhcpv4.Modifier { return dhcpv4.WithTransactionID(dhcpv4.TransactionID{n}) }
		steps := []struct {
			name string
			wait time.Duration
			mods []dhcpv4.Modifier
			want int // events so far
		}{
			{"firmware", 0, append(firmware, xid(1)), 1},
			{"firmware again", 4 * time.Second, append(firmware, xid(1)), 1},
			{"the iPXE that it loaded", 5 * time.Second, append(ipxe, xid(2)), 1},
			{"that iPXE again", time.Second, append(ipxe, xid(2)), 1},
			{"the OS", 20 * time.Second, []dhcpv4.Modifier{xid(3)}, 1},
			{"firmware, after a reset", time.Minute, append(firmware, xid(4)), 2},
			{"iPXE in a ROM, much later", time.Hour, append(ipxe, xid(5)), 3},
		}
		for _, s := range steps {
			time.Sleep(s.wait)
			d.broadcast(discover, mac1, s.mods...)
			if len(d.events) != s.want {
				t.Fatalf("%s: %d events, want %d: %+v", s.name, len(d.events), s.want, d.events)
			}
		}
	})
}

func TestMalformed(t *testing.T) {
	good := message(t, discover, mac1).ToBytes()
	edit := func(at int, v ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], v)
		return b
	}
	for name, b := range map[string][]byte{
		"empty":                  {},
		"short":                  good[:100],
		"no magic cookie":        edit(236, 0),
		"a reply":                edit(0, 2),
		"not Ethernet":           edit(1, 32),
		"a long hardware length": edit(2, 255),
		"an option too long":     append(bytes.Clone(good[:240]), 53, 200, 1),
		"a multicast address":    edit(28, 1),
		"no address":             edit(28, 0, 0, 0, 0, 0, 0),
		"plain BOOTP":            edit(240, 255),
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, ModeServer)
			var log bytes.Buffer
			d.server.Log = slog.New(slog.NewTextHandler(&log, nil))
			d.restart()
			if _, ok := d.r.answer(t.Context(), Packet{Data: b, To: broadcast, Local: []netip.Addr{server}}); ok {
				t.Error("was answered")
			}
			if n := strings.Count(log.String(), "\n"); n != 1 {
				t.Errorf("%d log lines, want 1:\n%s", n, &log)
			}
		})
	}
}

// TestNoEndOption: some ROMs fill the packet to its last byte.
func TestNoEndOption(t *testing.T) {
	d := newDesk(t, ModeServer)
	b := message(t, discover, mac1).ToBytes()
	b = b[:bytes.LastIndexByte(b, 255)]
	if _, ok := d.r.answer(t.Context(), Packet{Data: b, To: broadcast, Local: []netip.Addr{server}}); !ok {
		t.Error("was not answered")
	}
}

func TestLogIsRateLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, ModeServer)
		var log bytes.Buffer
		d.server.Log = slog.New(slog.NewTextHandler(&log, nil))
		d.restart()
		flood := func() {
			for range 1000 {
				d.r.answer(t.Context(), Packet{Data: []byte("junk")})
			}
		}
		flood()
		time.Sleep(2 * time.Second)
		flood()
		if n := strings.Count(log.String(), "\n"); n != 2*quiet.LinesPerSecond {
			t.Errorf("%d log lines for 2000 packets, want %d", n, 2*quiet.LinesPerSecond)
		}
		if !strings.Contains(log.String(), "suppressed=990") {
			t.Errorf("the log does not say how many lines it lacks:\n%s", &log)
		}
	})
}

// TestOffersAreRateLimited: each DISCOVER of another transaction is a boot, as far as anybody can tell.
func TestOffersAreRateLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t, ModeServer)
		var log bytes.Buffer
		d.server.Log = slog.New(slog.NewTextHandler(&log, nil))
		d.restart()
		for n := range byte(200) {
			d.broadcast(discover, mac1, class("PXEClient:Arch:00007"), arch(7), dhcpv4.WithTransactionID(dhcpv4.TransactionID{n}))
		}
		if n := strings.Count(log.String(), "DHCP offer"); len(d.events) != 200 || n != quiet.LinesPerSecond {
			t.Errorf("%d log lines for %d offers, want %d for 200", n, len(d.events), quiet.LinesPerSecond)
		}
		log.Reset()
		time.Sleep(time.Second)
		for range 200 {
			a := d.lease(mac2)
			d.send(server, ServerPort, message(t, dhcpv4.MessageTypeRelease, mac2, dhcpv4.WithClientIP(a.AsSlice())))
		}
		if n := strings.Count(log.String(), "address released"); n != quiet.LinesPerSecond {
			t.Errorf("%d log lines for 200 releases, want %d", n, quiet.LinesPerSecond)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	for _, m := range []*dhcpv4.DHCPv4{
		message(f, discover, mac1, class("PXEClient:Arch:00007"), arch(7)),
		message(f, reqType, mac1, requested(ip("10.9.0.100")), serverID(server)),
		message(f, reqType, mac2, dhcpv4.WithClientIP(net.IP{10, 9, 0, 101})),
		message(f, dhcpv4.MessageTypeInform, mac1, dhcpv4.WithUserClass("iPXE", false)),
		message(f, dhcpv4.MessageTypeDecline, mac1, requested(ip("10.9.0.100"))),
		message(f, discover, mac1, dhcpv4.WithOption(dhcpv4.OptRelayAgentInfo(dhcpv4.OptGeneric(dhcpv4.LinkSelectionSubOption, []byte{1}))),
			dhcpv4.WithGatewayIP(net.IP{10, 9, 0, 250}), dhcpv4.WithGeneric(dhcpv4.OptionClientIdentifier, []byte{255, 0, 0})),
	} {
		f.Add(m.ToBytes(), uint16(67))
		f.Add(m.ToBytes(), uint16(4011))
	}
	f.Fuzz(func(t *testing.T, b []byte, port uint16) {
		for _, mode := range []Mode{ModeServer, ModeProxy} {
			s := &Server{Mode: mode, Addresses: testFleet()}
			r, err := newResponder(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			reply, ok := r.answer(t.Context(), Packet{Data: b, To: broadcast, Port: port, Local: []netip.Addr{server}})
			if !ok {
				continue
			}
			m, err := dhcpv4.FromBytes(reply.Data)
			if err != nil {
				t.Fatalf("the answer cannot be parsed: %v", err)
			}
			if m.OpCode != dhcpv4.OpcodeBootReply || !bytes.Equal(m.TransactionID[:], b[4:8]) {
				t.Fatalf("the answer is not one to this packet: %s", m.Summary())
			}
			if a := addrOf(m.YourIPAddr); a.IsValid() && !s.Addresses.(*fleet).network.dynamic(a) {
				t.Fatalf("gave %s, which is not in the range", a)
			}
		}
	})
}
