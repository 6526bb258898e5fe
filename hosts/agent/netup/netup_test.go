package netup

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netlink"
)

// TestMain runs all tests in a network namespace of their own.
func TestMain(m *testing.M) {
	if os.Getenv("TROUPE_NETUP_TEST") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "TROUPE_NETUP_TEST=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const mac = "52:54:00:77:00:01"

// A wire is a veth pair; its other end is in a network namespace where a real DHCP server runs.
type wire struct {
	t      *testing.T
	holder *exec.Cmd // its process is the namespace
	server *exec.Cmd
	dir    string
	name   string
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func newWire(t *testing.T, name string) *wire {
	t.Helper()
	return newWireTo(t, name, mac)
}

// newWireTo is a wire to an interface with that MAC address.
func newWireTo(t *testing.T, name, mac string) *wire {
	t.Helper()
	w := &wire{t: t, name: name, dir: t.TempDir(), holder: exec.Command("sleep", "infinity")}
	w.holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := w.holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.stopServer()
		_ = w.holder.Process.Kill()
		_ = w.holder.Wait() // killed
	})
	pid := fmt.Sprint(w.holder.Process.Pid)
	run(t, "ip", "link", "add", name, "address", mac, "type", "veth", "peer", "name", "srv", "netns", pid)
	t.Cleanup(func() { w.inside("ip", "link", "del", "srv") }) // at once; with its namespace it would go some time later
	w.inside("ip", "addr", "add", "10.77.0.1/24", "dev", "srv")
	w.inside("ip", "link", "set", "srv", "up")
	return w
}

func (w *wire) inside(args ...string) string {
	w.t.Helper()
	return run(w.t, append([]string{"nsenter", "-t", fmt.Sprint(w.holder.Process.Pid), "-n"}, args...)...)
}

// serve starts dnsmasq and returns once it answers.
func (w *wire) serve(args ...string) {
	w.t.Helper()
	w.stopServer()
	log := filepath.Join(w.dir, "dnsmasq.log")
	base := []string{
		"-t", fmt.Sprint(w.holder.Process.Pid), "-n", "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=srv", "--bind-interfaces",
		"--dhcp-authoritative", "--no-ping", "--log-dhcp", "--user=root", "--log-facility=" + log, "--dhcp-leasefile=" + filepath.Join(w.dir, "leases"),
	}
	w.server = exec.Command("nsenter", append(base, args...)...)
	w.server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := w.server.Start(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *wire) stopServer() {
	if w.server != nil {
		_ = w.server.Process.Kill()
		_ = w.server.Wait() // killed
		w.server = nil
	}
}

func find(t *testing.T, f *Finder) *Lease {
	t.Helper()
	f.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	l, err := f.Find(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestFindAgainstDnsmasq(t *testing.T) {
	w := newWire(t, "one")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h", "--dhcp-host="+mac+",10.77.0.11,n1",
		"--dhcp-option=option:router,10.77.0.1", "--dhcp-option=option:dns-server,10.77.0.1,10.77.0.2", "--dhcp-option=option:domain-name,lab.test",
		"--dhcp-option=option:mtu,1400", "--dhcp-vendorclass=set:agent,"+VendorClass, "--dhcp-ignore=tag:!agent") // only who says the class is answered
	l := find(t, &Finder{MAC: mac})
	if l.Asked <= 0 || l.Asked > bootClock() {
		t.Errorf("asked for %v after the boot", l.Asked)
	}
	l.ACK, l.Asked = nil, 0
	want := &Lease{
		Interface: "one", MAC: mac, Address: netip.MustParsePrefix("10.77.0.11/24"), Server: netip.MustParseAddr("10.77.0.1"),
		Routes: []Route{{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.77.0.1")}},
		DNS:    []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("10.77.0.2")}, Domain: "lab.test", MTU: 1400, Duration: time.Hour,
	}
	if diff := cmp.Diff(want, l, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("lease (-want +got):\n%s", diff)
	}
	if out := run(t, "ip", "route"); !strings.Contains(out, "default via 10.77.0.1 dev one") {
		t.Errorf("routes:\n%s", out)
	}
	if out := run(t, "ip", "addr", "show", "one"); !strings.Contains(out, "inet 10.77.0.11/24") || !strings.Contains(out, "mtu 1400") || !strings.Contains(out, "valid_lft forever") {
		t.Errorf("addresses:\n%s", out)
	}
	if got := l.ResolvConf(); got != ResolvConfMark+"search lab.test\nnameserver 10.77.0.1\nnameserver 10.77.0.2\n" {
		t.Errorf("resolv.conf %q", got)
	}
}

// TestFindTakesALeaseThatDoesNotFitWhole has a router that no machine could use, the broadcast address of the network, and
// then an MTU that the interface does not have. (No DHCP server can tell one that is too large for a veth.)
func TestFindTakesALeaseThatDoesNotFitWhole(t *testing.T) {
	w := newWire(t, "odd")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h", "--dhcp-option=121,10.1.0.0/16,10.77.0.255,10.2.0.0/16,10.77.0.9")
	l := find(t, &Finder{MAC: mac})
	if len(l.Routes) != 2 {
		t.Errorf("lease: %+v", l)
	}
	if out := run(t, "ip", "route"); !strings.Contains(out, "10.2.0.0/16 via 10.77.0.9") || strings.Contains(out, "10.1.0.0") {
		t.Errorf("routes:\n%s", out)
	}
	run(t, "ip", "addr", "flush", "dev", "odd")
	l.MTU = 1 << 20
	if err := l.Apply(slog.New(slog.NewTextHandler(t.Output(), nil))); err != nil {
		t.Error(err)
	}
	if out := run(t, "ip", "addr", "show", "odd"); !strings.Contains(out, "inet "+l.Address.String()) || !strings.Contains(out, "mtu 1500") {
		t.Errorf("addresses:\n%s", out)
	}
}

func TestFindWaitsForAServerThatComesLate(t *testing.T) {
	w := newWire(t, "late")
	drivers := make(chan struct{})
	close(drivers)
	looked := 0
	l := find(t, &Finder{MAC: mac, Drivers: drivers, Rescan: func() {
		if looked++; looked == 1 {
			w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h", "--dhcp-option=121,10.0.0.0/8,10.77.0.9,0.0.0.0/0,10.77.0.1")
		}
	}})
	if looked == 0 || !strings.HasPrefix(l.Address.String(), "10.77.0.5") {
		t.Errorf("address %s after %d looks", l.Address, looked)
	}
	if out := run(t, "ip", "route"); !strings.Contains(out, "10.0.0.0/8 via 10.77.0.9") || !strings.Contains(out, "default via 10.77.0.1") {
		t.Errorf("routes:\n%s", out)
	}
}

func TestFindTakesAnotherInterfaceWhereItsOwnIsSilent(t *testing.T) {
	w := newWire(t, "good")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h")
	run(t, "ip", "link", "add", "silent", "address", "52:54:00:77:00:99", "type", "veth", "peer", "name", "nobody")
	t.Cleanup(func() { run(t, "ip", "link", "del", "silent") })
	run(t, "ip", "link", "set", "nobody", "up")
	l := find(t, &Finder{MAC: "52:54:00:77:00:99"})
	if l.Interface != "good" {
		t.Errorf("lease on %s", l.Interface)
	}
}

// TestFindGoesOnFromAnInterfaceThatLedNowhere has two networks with DHCP, the first of which is the wrong one.
func TestFindGoesOnFromAnInterfaceThatLedNowhere(t *testing.T) {
	first, second := newWire(t, "first"), newWireTo(t, "second", "52:54:00:77:00:02")
	for _, w := range []*wire{first, second} {
		w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h", "--dhcp-option=option:router,10.77.0.1")
	}
	f := &Finder{}
	for _, want := range []string{"first", "second", "first"} {
		l := find(t, f)
		if l.Interface != want {
			t.Errorf("lease on %s, want %s", l.Interface, want)
		}
		if err := f.GiveUp(l); err != nil {
			t.Fatal(err)
		}
		if out := run(t, "ip", "-4", "addr", "show", "dev", want) + run(t, "ip", "route"); strings.Contains(out, "10.77.0.") {
			t.Errorf("left of the lease that was given up:\n%s", out)
		}
	}
}

func TestFindWaitsForTheDriver(t *testing.T) {
	drivers := make(chan struct{})
	got := make(chan *Lease)
	go func() { got <- find(t, &Finder{MAC: mac, Drivers: drivers}) }() // before there is any interface
	w := newWire(t, "slow")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h")
	if l := <-got; l.Interface != "slow" {
		t.Errorf("lease on %s", l.Interface)
	}
}

// keep runs a Keeper over a lease that is kept as JSON in between, as over switch_root.
func keep(t *testing.T, l *Lease) (saved <-chan *Lease) {
	t.Helper()
	b, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	var kept Lease
	if err := json.Unmarshal(b, &kept); err != nil {
		t.Fatal(err)
	}
	ch := make(chan *Lease, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		k := Keeper{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Save: func(l *Lease) { ch <- l }}
		_ = k.Keep(ctx, &kept) // ends with its context
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return ch
}

// discovers are the DHCPDISCOVERs that its servers saw; it tells them by the address that each asks for.
func (w *wire) discovers() (asks []string) {
	w.t.Helper()
	log, err := os.ReadFile(filepath.Join(w.dir, "dnsmasq.log"))
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if _, ask, ok := strings.Cut(line, "DHCPDISCOVER(srv) "); ok {
			asks = append(asks, strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(ask), mac)))
		}
	}
	return asks
}

func TestKeepRenewsAndRepairs(t *testing.T) {
	w := newWire(t, "keep")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,2m")
	l := find(t, &Finder{MAC: mac})
	before := w.discovers()
	l.Duration = 10 * time.Second // dnsmasq gives two minutes at least; a server may give less
	saved := keep(t, l)
	run(t, "ip", "addr", "flush", "dev", "keep")
	if n := <-saved; n.Address != l.Address || n.Duration != 2*time.Minute {
		t.Errorf("renewed: %+v", n)
	}
	// It looks for the address each time before it renews.
	if gone, err := l.Missing(); gone || err != nil {
		t.Errorf("the address that went away: gone %v, %v", gone, err)
	}
	if diff := cmp.Diff(before, w.discovers()); diff != "" {
		t.Errorf("a renewal began from the start, with a DHCPDISCOVER:\n%s", diff)
	}
}

// TestKeepFollowsARenamedInterface has what udev does once the OS has booted.
func TestKeepFollowsARenamedInterface(t *testing.T) {
	w := newWire(t, "before")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,2m")
	l := find(t, &Finder{MAC: mac})
	run(t, "ip", "link", "set", "before", "down") // an older kernel renames no other; the address stays
	run(t, "ip", "link", "set", "before", "name", "after")
	run(t, "ip", "addr", "flush", "dev", "after")
	run(t, "ip", "link", "set", "after", "up")
	l.Duration = 10 * time.Second
	n := <-keep(t, l)
	if n.Interface != "after" || n.Address != l.Address {
		t.Errorf("renewed: %+v", n)
	}
	if gone, err := n.Missing(); gone || err != nil {
		t.Errorf("the address is not on the interface: gone %v, %v", gone, err)
	}
	if err := l.remove(); err != nil { // by its old name
		t.Error(err)
	}
	if gone, err := l.Missing(); !gone || err != nil {
		t.Errorf("after its removal: gone %v, %v", gone, err)
	}
}

// TestKeepGoesOnWithAServerAtAnotherAddress has a DHCP server that moved: its answers no longer say that they are of the
// server that gave the lease.
func TestKeepGoesOnWithAServerAtAnotherAddress(t *testing.T) {
	const mine = "10.77.0.33"
	for _, tt := range []struct {
		name     string
		duration time.Duration
		age      time.Duration
		discover string // what the DHCPDISCOVER asks for; "" for none
	}{
		{"rebinds", time.Hour, 55 * time.Minute, ""},
		{"rebinds without end", 0, 3 * time.Hour, ""},
		{"expired", time.Hour, 2 * time.Hour, mine},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWire(t, "moved")
			pool := "--dhcp-range=10.77.0.20,10.77.0.60,255.255.255.0,2m"
			w.serve(pool, "--dhcp-host="+mac+","+mine)
			l := find(t, &Finder{MAC: mac})
			w.stopServer()
			w.inside("ip", "addr", "flush", "dev", "srv")
			w.inside("ip", "addr", "add", "10.77.0.2/24", "dev", "srv")
			before := len(w.discovers())
			w.serve(pool)
			l.Duration, l.Asked = tt.duration, l.Asked-tt.age
			n := <-keep(t, l)
			if n.Server.String() != "10.77.0.2" || n.Address != l.Address || n.Duration != 2*time.Minute || n.age() > time.Minute {
				t.Errorf("renewed: %+v", n)
			}
			asks := slices.Compact(w.discovers()[before:]) // the client repeats itself where the server takes its time
			if got := strings.Join(asks, ", "); got != tt.discover {
				t.Errorf("asked with DHCPDISCOVER for %q, want %q", got, tt.discover)
			}
		})
	}
}

func TestLeaseStates(t *testing.T) {
	for _, tt := range []struct {
		duration, age      time.Duration
		rebinding, expired bool
	}{
		{time.Hour, 0, false, false},
		{time.Hour, 52 * time.Minute, false, false},
		{time.Hour, 53 * time.Minute, true, false},
		{time.Hour, time.Hour, true, true},
		{0, time.Hour, false, false},
		{0, 3 * time.Hour, true, false},
	} {
		l := &Lease{Duration: tt.duration, Asked: bootClock() - tt.age}
		if l.rebinding() != tt.rebinding || l.expired() != tt.expired {
			t.Errorf("lease of %v after %v: rebinding %v, expired %v", tt.duration, tt.age, l.rebinding(), l.expired())
		}
	}
}

func TestKeepTakesAnotherAddressWhenTheServerSaysNo(t *testing.T) {
	w := newWire(t, "nak")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,2m")
	l := find(t, &Finder{MAC: mac})
	w.stopServer()
	if err := os.Remove(filepath.Join(w.dir, "leases")); err != nil {
		t.Fatal(err)
	}
	w.serve("--dhcp-range=10.77.0.70,10.77.0.80,255.255.255.0,2m", "--dhcp-option=option:router,10.77.0.1")
	l.Duration = 10 * time.Second
	n := <-keep(t, l)
	if !netip.MustParsePrefix("10.77.0.64/27").Contains(n.Address.Addr()) {
		t.Errorf("address %s", n.Address)
	}
	out := run(t, "ip", "addr", "show", "nak")
	if strings.Contains(out, l.Address.String()) || !strings.Contains(out, n.Address.String()) {
		t.Errorf("addresses:\n%s", out)
	}
	if out := run(t, "ip", "route"); !strings.Contains(out, "default via 10.77.0.1 dev nak") {
		t.Errorf("routes:\n%s", out)
	}
}

func TestMissingAndApply(t *testing.T) {
	w := newWire(t, "gone")
	w.serve("--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h")
	l := find(t, &Finder{MAC: mac})
	if gone, err := l.Missing(); gone || err != nil {
		t.Errorf("Missing: %v, %v", gone, err)
	}
	run(t, "ip", "addr", "flush", "dev", "gone")
	if gone, err := l.Missing(); !gone || err != nil {
		t.Errorf("Missing after a flush: %v, %v", gone, err)
	}
	if err := l.Apply(slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if gone, err := l.Missing(); gone || err != nil {
		t.Errorf("Missing after Apply: %v, %v", gone, err)
	}
}

// FuzzNewLease feeds answers of a hostile DHCP server.
func FuzzNewLease(f *testing.F) {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		f.Fatal(err)
	}
	ack, err := dhcpv4.New(dhcpv4.WithYourIP(net.IPv4(10, 77, 0, 11)), dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithRouter(net.IPv4(10, 77, 0, 1)),
		dhcpv4.WithDNS(net.IPv4(10, 77, 0, 1)), dhcpv4.WithOption(dhcpv4.OptDomainName("lab.test")), dhcpv4.WithLeaseTime(60))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ack.ToBytes())
	ack.UpdateOption(dhcpv4.OptClasslessStaticRoute(&dhcpv4.Route{Dest: &net.IPNet{IP: net.IPv4(10, 0, 0, 0), Mask: net.CIDRMask(8, 32)}, Router: net.IPv4(10, 77, 0, 9)}))
	f.Add(ack.ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		l, err := newLease(Link{Name: "eth0", MAC: hw}, m, 0)
		if err != nil {
			return
		}
		if !l.Address.IsValid() || !l.Address.Addr().Is4() {
			t.Errorf("address %v", l.Address)
		}
		for _, r := range l.Routes {
			if !r.To.IsValid() {
				t.Errorf("route %+v", r)
			}
		}
		for line := range strings.Lines(strings.TrimPrefix(l.ResolvConf(), ResolvConfMark)) {
			if f := strings.Fields(line); len(f) != 2 || f[0] != "search" && f[0] != "nameserver" {
				t.Errorf("line %q in resolv.conf", line)
			}
		}
	})
}

func TestLinksPutTheBootInterfaceFirst(t *testing.T) {
	for name, addr := range map[string]string{"a0": "52:54:00:00:00:0a", "b0": "52:54:00:00:00:0b"} {
		run(t, "ip", "link", "add", name, "address", addr, "type", "veth", "peer", "name", name+"p")
		t.Cleanup(func() { run(t, "ip", "link", "del", name) })
	}
	links, err := Links("52:54:00:00:00:0B")
	if err != nil || len(links) < 4 || links[0].Name != "b0" {
		t.Errorf("Links: %+v, %v", links, err)
	}
	if _, err := netlink.LinkByName("lo"); err != nil {
		t.Fatal(err)
	}
	for _, l := range links { // an interface of a test before may still be on its way out
		if l.Name == "lo" {
			t.Error("the loopback is among them")
		}
	}
}
