package dhcp_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"go.uber.org/goleak"

	"github.com/troupe-dev/troupe/netboot/dhcp"
	"github.com/troupe-dev/troupe/netboot/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const patience = 20 * time.Second

// fleet declares one machine, and a range for all others.
type fleet struct{ mac string }

func (fleet) Network() (dhcp.Network, bool) {
	return dhcp.Network{
		Subnet: netip.MustParsePrefix("10.9.0.0/24"), Router: netip.MustParseAddr("10.9.0.254"),
		First: netip.MustParseAddr("10.9.0.100"), Last: netip.MustParseAddr("10.9.0.199"),
	}, true
}

func (f fleet) Lookup(mac net.HardwareAddr, _ string) (dhcp.Host, bool) {
	if mac.String() != f.mac {
		return dhcp.Host{}, false
	}
	return dhcp.Host{Name: "n1", Address: declared}, true
}

func (fleet) Declared(a netip.Addr) bool { return a == declared }

var declared = netip.MustParseAddr("10.9.0.11")

// serve runs a server on an interface of the test's own namespace until the test ends.
func serve(t *testing.T, s *dhcp.Server, iface string) {
	t.Helper()
	ports := []uint16{dhcp.ServerPort}
	if s.Mode == dhcp.ModeProxy {
		ports = append(ports, dhcp.PXEPort)
	}
	var conns []dhcp.Transport
	for _, p := range ports {
		c, err := dhcp.Listen(t.Context(), iface, p)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	leaks := goleak.IgnoreCurrent()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, conns...) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		goleak.VerifyNone(t, leaks)
	})
}

// wire joins the server's interface s0, 10.9.0.1, to c0 of another namespace.
func wire(t *testing.T) (here, client *nettest.NS) {
	t.Helper()
	here, client = nettest.Here(t), nettest.New(t)
	nettest.Veth(t, here, "s0", client, "c0")
	here.Addr(t, "s0", "10.9.0.1/24")
	return here, client
}

func dial(t *testing.T, ns *nettest.NS, opts ...nclient4.ClientOpt) *nclient4.Client {
	t.Helper()
	var c *nclient4.Client
	ns.Do(t, func() (err error) {
		c, err = nclient4.New("c0", append([]nclient4.ClientOpt{nclient4.WithRetry(5), nclient4.WithTimeout(2 * time.Second)}, opts...)...)
		return err
	})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// TestClientWithoutAddress: nclient4 leaves the broadcast flag clear, and does not answer ARP: the answers are raw frames.
func TestClientWithoutAddress(t *testing.T) {
	_, client := wire(t)
	serve(t, &dhcp.Server{Addresses: fleet{mac: client.MAC(t, "c0").String()}}, "s0")
	lease, err := dial(t, client).Request(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := lease.ACK.YourIPAddr.String(); got != declared.String() {
		t.Errorf("got %s, want %s", got, declared)
	}
	if got := lease.ACK.HostName(); got != "n1" {
		t.Errorf("host name is %q", got)
	}
}

// TestRenewal: a client with an address renews it by unicast, and is answered so.
func TestRenewal(t *testing.T) {
	_, client := wire(t)
	serve(t, &dhcp.Server{Addresses: fleet{}}, "s0")
	c := dial(t, client)
	lease, err := c.Request(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client.Addr(t, "c0", lease.ACK.YourIPAddr.String()+"/24")
	renew, err := dhcpv4.NewRenewFromAck(lease.ACK)
	if err != nil {
		t.Fatal(err)
	}
	ack := ask(t, client, lease.ACK.YourIPAddr.String()+":68", "10.9.0.1:67", renew.ToBytes(), dhcpv4.MessageTypeAck)
	if !ack.YourIPAddr.Equal(lease.ACK.YourIPAddr) {
		t.Errorf("renewed %s, want %s", ack.YourIPAddr, lease.ACK.YourIPAddr)
	}
}

// ask sends from one address of ns and waits for an answer of a type, whoever it comes from.
func ask(t *testing.T, ns *nettest.NS, from, to string, msg []byte, want dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	t.Helper()
	pc := socket(t, ns, from)
	send(t, pc, to, msg)
	for {
		if m := receive(t, pc); m.MessageType() == want && bytes.Equal(m.TransactionID[:], msg[4:8]) {
			return m
		}
	}
}

func socket(t *testing.T, ns *nettest.NS, addr string) net.PacketConn {
	t.Helper()
	var pc net.PacketConn
	ns.Do(t, func() (err error) {
		pc, err = net.ListenPacket("udp4", addr)
		return err
	})
	t.Cleanup(func() { _ = pc.Close() })
	if err := pc.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return pc
}

func send(t *testing.T, pc net.PacketConn, to string, msg []byte) {
	t.Helper()
	if _, err := pc.WriteTo(msg, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to))); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, pc net.PacketConn) *dhcpv4.DHCPv4 {
	t.Helper()
	b := make([]byte, 1500)
	n, _, err := pc.ReadFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	m, err := dhcpv4.FromBytes(b[:n])
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestUdhcpc: the client that initramfs images have. It prints what it got through a script.
func TestUdhcpc(t *testing.T) {
	_, client := wire(t)
	serve(t, &dhcp.Server{Addresses: fleet{}}, "s0")
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n[ \"$1\" = bound ] && echo \"$ip $mask $router $lease\"\nexit 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command("busybox", "udhcpc", "-i", "c0", "-f", "-n", "-q", "-s", script)
	cmd.Stdout, cmd.Stderr = &out, &out
	client.Start(t, cmd)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("udhcpc: %v\n%s", err, &out)
	}
	var got string
	for line := range strings.Lines(out.String()) {
		if strings.HasPrefix(line, "10.9.0.") {
			got = strings.TrimSpace(line)
		}
	}
	addr, rest, _ := strings.Cut(got, " ")
	if a, err := netip.ParseAddr(addr); err != nil || a.Less(netip.MustParseAddr("10.9.0.100")) || rest != "24 10.9.0.254 3600" {
		t.Errorf("udhcpc got %q\n%s", got, &out)
	}
}

// TestRelay plays a relay agent that adds option 82.
func TestRelay(t *testing.T) {
	_, client := wire(t)
	client.Addr(t, "c0", "10.9.0.250/24")
	serve(t, &dhcp.Server{Addresses: fleet{}}, "s0")
	m, err := dhcpv4.NewDiscovery(net.HardwareAddr{2, 0, 0, 0, 0, 9},
		dhcpv4.WithGatewayIP(net.IP{10, 9, 0, 250}),
		dhcpv4.WithOption(dhcpv4.OptRelayAgentInfo(dhcpv4.OptGeneric(dhcpv4.AgentCircuitIDSubOption, []byte("port 7")))))
	if err != nil {
		t.Fatal(err)
	}
	m.HopCount = 1
	offer := ask(t, client, "10.9.0.250:67", "10.9.0.1:67", m.ToBytes(), dhcpv4.MessageTypeOffer)
	if got := offer.RelayAgentInfo().Get(dhcpv4.AgentCircuitIDSubOption); string(got) != "port 7" {
		t.Errorf("circuit id came back as %q", got)
	}
}

// lossy loses every other packet that is sent.
type lossy struct {
	net.PacketConn
	mu sync.Mutex
	n  int
}

func (l *lossy) WriteTo(b []byte, a net.Addr) (int, error) {
	l.mu.Lock()
	l.n++
	lost := l.n%2 == 1
	l.mu.Unlock()
	if lost {
		return len(b), nil
	}
	return l.PacketConn.WriteTo(b, a)
}

func TestLossyNetwork(t *testing.T) {
	_, client := wire(t)
	serve(t, &dhcp.Server{Addresses: fleet{}}, "s0")
	var pc net.PacketConn
	client.Do(t, func() (err error) {
		pc, err = nclient4.NewRawUDPConn("c0", dhcp.ClientPort)
		return err
	})
	c, err := nclient4.NewWithConn(&lossy{PacketConn: pc}, client.MAC(t, "c0"), nclient4.WithRetry(5), nclient4.WithTimeout(300*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Request(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestJunkAndDownInterface: neither ends the server.
func TestJunkAndDownInterface(t *testing.T) {
	here, client := wire(t)
	client.Addr(t, "c0", "10.9.0.250/24")
	serve(t, &dhcp.Server{Addresses: fleet{}}, "s0")
	pc := socket(t, client, "10.9.0.250:0")
	for i := range 300 {
		send(t, pc, "10.9.0.1:67", bytes.Repeat([]byte{byte(i)}, i))
	}
	here.Down(t, "s0")
	here.Up(t, "s0")
	if _, err := dial(t, client).Request(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestManyMachines: each of a hundred that ask at once gets an address of its own.
func TestManyMachines(t *testing.T) {
	_, client := wire(t)
	client.Addr(t, "c0", "10.9.0.250/24")
	serve(t, &dhcp.Server{Addresses: fleet{}}, "s0")
	pc := socket(t, client, "10.9.0.250:67")
	const machines = 100
	relay := dhcpv4.WithGatewayIP(net.IP{10, 9, 0, 250})
	for i := range machines {
		m, err := dhcpv4.NewDiscovery(net.HardwareAddr{2, 0, 0, 0, 1, byte(i)}, relay)
		if err != nil {
			t.Fatal(err)
		}
		send(t, pc, "10.9.0.1:67", m.ToBytes())
	}
	owner := map[string]string{}
	for len(owner) < machines {
		m := receive(t, pc)
		mac, a := m.ClientHWAddr.String(), m.YourIPAddr.String()
		if m.MessageType() == dhcpv4.MessageTypeOffer {
			req, err := dhcpv4.NewRequestFromOffer(m, relay)
			if err != nil {
				t.Fatal(err)
			}
			send(t, pc, "10.9.0.1:67", req.ToBytes())
			continue
		}
		if was, taken := owner[a]; m.MessageType() != dhcpv4.MessageTypeAck || taken {
			t.Fatalf("%s got %s of %s, which %q has", mac, m.MessageType(), a, was)
		}
		owner[a] = mac
	}
}

func TestServeEndsWhenItsSocketDoes(t *testing.T) {
	wire(t)
	c, err := dhcp.Listen(t.Context(), "s0", dhcp.ServerPort)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	s := &dhcp.Server{Addresses: fleet{}}
	if err := s.Serve(t.Context(), c); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

func TestListenOnAnUnknownInterface(t *testing.T) {
	_, err := dhcp.Listen(t.Context(), "nosuch0", dhcp.ServerPort)
	if err == nil || !strings.Contains(err.Error(), "nosuch0") {
		t.Errorf("got %v", err)
	}
}

// TestProxyBesideDnsmasq: a foreign server gives addresses to all; the proxy speaks to what boots alone.
//
//	client c0 --- p0 \
//	                  br0 (here, 10.9.0.1)
//	dnsmasq d0 --- p1 /   (10.9.0.2)
func TestProxyBesideDnsmasq(t *testing.T) {
	here, client, foreign := nettest.Here(t), nettest.New(t), nettest.New(t)
	nettest.Veth(t, here, "p0", client, "c0")
	nettest.Veth(t, here, "p1", foreign, "d0")
	here.Bridge(t, "br0", "p0", "p1")
	here.Addr(t, "br0", "10.9.0.1/24")
	foreign.Addr(t, "d0", "10.9.0.2/24")
	startDnsmasq(t, foreign)
	serve(t, &dhcp.Server{Mode: dhcp.ModeProxy, HTTPPort: 8080}, "br0")

	client.Addr(t, "c0", "10.9.0.250/24")
	pc := socket(t, client, ":68")
	osOffers := offers(t, pc, client, "MSFT 5.0")
	pxeOffers := offers(t, pc, client, "PXEClient:Arch:00007:UNDI:003001", dhcpv4.WithGeneric(dhcpv4.OptionClientSystemArchitectureType, []byte{0, 7}))
	if _, ok := osOffers["10.9.0.1"]; ok {
		t.Error("the proxy answered an OS")
	}
	if m := pxeOffers["10.9.0.2"]; m == nil || m.YourIPAddr.IsUnspecified() {
		t.Errorf("the foreign server's offer: %v", m)
	}
	m := pxeOffers["10.9.0.1"]
	if m == nil || !m.YourIPAddr.IsUnspecified() || m.BootFileNameOption() != "snponly.efi" || m.ClassIdentifier() != "PXEClient" {
		t.Errorf("the proxy's offer: %v", m)
	}
}

func startDnsmasq(t *testing.T, ns *nettest.NS) {
	t.Helper()
	cmd := exec.Command("dnsmasq", "--keep-in-foreground", "--log-facility=-", "--port=0", "--interface=d0", "--conf-file=/dev/null",
		"--user=root", "--dhcp-range=10.9.0.60,10.9.0.69,1h", "--dhcp-authoritative", "--no-ping", "--leasefile-ro")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close() // dnsmasq has its own
	cmd.Stderr, cmd.Stdout = w, w
	ns.Start(t, cmd)
	t.Cleanup(func() { _ = r.Close() })
	var log strings.Builder
	for b := make([]byte, 4096); !strings.Contains(log.String(), "IP range"); {
		n, err := r.Read(b)
		log.Write(b[:n])
		if err != nil {
			t.Fatalf("dnsmasq: %v\n%s", err, log.String())
		}
	}
}

// offers broadcasts DISCOVERs until the foreign server has answered, and for one that boots the proxy too. It returns the
// offers by the server that made them.
func offers(t *testing.T, pc net.PacketConn, ns *nettest.NS, class string, mods ...dhcpv4.Modifier) map[string]*dhcpv4.DHCPv4 {
	t.Helper()
	m, err := dhcpv4.NewDiscovery(ns.MAC(t, "c0"), append(mods, dhcpv4.WithBroadcast(true), dhcpv4.WithOption(dhcpv4.OptClassIdentifier(class)))...)
	if err != nil {
		t.Fatal(err)
	}
	want := 1
	if strings.HasPrefix(class, "PXEClient") {
		want = 2
	}
	send(t, pc, "10.9.0.255:67", m.ToBytes())
	got := map[string]*dhcpv4.DHCPv4{}
	for len(got) < want {
		if o := receive(t, pc); o.TransactionID == m.TransactionID {
			got[fmt.Sprint(o.ServerIdentifier())] = o
		}
	}
	return got
}
