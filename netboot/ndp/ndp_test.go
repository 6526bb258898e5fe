package ndp

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"

	"github.com/troupe-dev/troupe/netboot/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var (
	ours    = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	machine = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

// solicitation is what a machine sends to all routers.
func solicitation() []byte {
	b := make([]byte, icmpOff+solLen)
	copy(b, allRouters)
	copy(b[6:], machine)
	b[12], b[13] = 0x86, 0xdd
	ip := b[etherLen:]
	ip[0], ip[5], ip[6], ip[7] = 0x60, solLen, protocolICMP, hopLimit
	copy(ip[8:], linkLocal(machine))
	copy(ip[24:], net.ParseIP("ff02::2"))
	ip[ipLen] = typeSolicitation
	return b
}

func everybody(net.HardwareAddr) bool { return true }

// TestAnswer reads the answer with another implementation of ICMPv6.
func TestAnswer(t *testing.T) {
	s := &Server{MAC: ours, Booting: everybody}
	adv, ok := s.answer(solicitation())
	if !ok {
		t.Fatal("not answered")
	}
	if !bytes.Equal(adv[0:6], machine) || !bytes.Equal(adv[6:12], ours) {
		t.Errorf("from %x to %x", adv[6:12], adv[0:6])
	}
	h, err := ipv6.ParseHeader(adv[etherLen:])
	if err != nil {
		t.Fatal(err)
	}
	if h.HopLimit != 255 || h.Src.String() != "fe80::ff:fe00:1" || h.Dst.String() != "fe80::ff:fe00:2" || h.PayloadLen != advLen {
		t.Errorf("header %v", h)
	}
	msg := bytes.Clone(adv[icmpOff:])
	m, err := icmp.ParseMessage(protocolICMP, msg)
	if err != nil || m.Type != ipv6.ICMPTypeRouterAdvertisement {
		t.Fatalf("message %v, %v", m, err)
	}
	if got := checksum(adv[etherLen+8:etherLen+40], msg); got != 0 {
		t.Errorf("the checksum is wrong by %#x", got)
	}
	body, err := m.Body.Marshal(protocolICMP)
	if want := make([]byte, advLen-4); err != nil || !bytes.Equal(body, want) {
		t.Errorf("it says %x, want nothing: no router, no DHCPv6, no prefix", body)
	}
}

func TestNotAnswered(t *testing.T) {
	edit := func(at int, v ...byte) []byte {
		b := solicitation()
		copy(b[at:], v)
		return b
	}
	s := &Server{MAC: ours, Booting: everybody}
	for name, b := range map[string][]byte{
		"short":               solicitation()[:icmpOff+solLen-1],
		"IPv4":                edit(12, 8, 0),
		"through a router":    edit(etherLen+7, 254),
		"another message":     edit(icmpOff, 128),
		"not from link-local": edit(etherLen+8, 0x20, 0x01),
		"empty":               nil,
	} {
		if _, ok := s.answer(b); ok {
			t.Errorf("%s: answered", name)
		}
	}
	s.Booting = func(mac net.HardwareAddr) bool { return !bytes.Equal(mac, machine) }
	if _, ok := s.answer(solicitation()); ok {
		t.Error("answered a machine that does not boot")
	}
}

// TestKernelAsks: Linux solicits when its interface comes up, and then has heard of a router that is none.
func TestKernelAsks(t *testing.T) {
	here, client := nettest.Here(t), nettest.New(t)
	nettest.Veth(t, here, "s0", client, "c0")
	c, err := Listen(t.Context(), "s0")
	if err != nil {
		t.Fatal(err)
	}
	leaks := goleak.IgnoreCurrent()
	asked := make(chan net.HardwareAddr, 10)
	s := &Server{MAC: c.MAC(), Booting: func(mac net.HardwareAddr) bool { asked <- mac; return true }}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, c) }()

	var raw *net.IPConn
	client.Do(t, func() (err error) {
		raw, err = net.ListenIP("ip6:ipv6-icmp", &net.IPAddr{IP: net.IPv6unspecified})
		return err
	})
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 1500); ; {
		n, from, err := raw.ReadFrom(b)
		if err != nil {
			t.Fatalf("waiting for an advertisement: %v", err)
		}
		if n > 0 && b[0] == typeAdvertisement {
			if want := net.IP(linkLocal(c.MAC())); !from.(*net.IPAddr).IP.Equal(want) {
				t.Errorf("from %s, want %s", from, want)
			}
			break
		}
	}
	if got, want := <-asked, client.MAC(t, "c0"); !bytes.Equal(got, want) {
		t.Errorf("%s asked, want %s", got, want)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	goleak.VerifyNone(t, leaks)
}

func TestServeEndsWhenItsSocketDoes(t *testing.T) {
	nettest.Here(t)
	c, err := Listen(t.Context(), "lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	s := &Server{MAC: ours, Booting: everybody}
	if err := s.Serve(t.Context(), c); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(solicitation())
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &Server{MAC: ours, Booting: everybody}
		if adv, ok := s.answer(b); ok && !bytes.Equal(adv[0:6], b[6:12]) {
			t.Fatalf("answered %x to %x", b[6:12], adv[0:6])
		}
	})
}
