// Package nettest makes networks for tests: namespaces (network_namespaces(7)) joined by virtual Ethernet (veth(4)). The test
// binary itself runs in one (see Main), so nothing here touches the machine's own network, and what is made is gone when
// the tests are. Who is not root becomes it in a user namespace.
package nettest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// An NS is a network namespace.
type NS struct {
	handle netns.NsHandle
	links  *netlink.Handle
}

const inside = "NETTEST_INSIDE"

// Main is for TestMain. It runs the tests in a second process that is in a network namespace of its own, and returns the
// status to exit with. A server opens sockets while it runs, in whichever thread that happens to be: so the namespace
// must be the whole process's.
func Main(m *testing.M) int {
	if os.Getenv(inside) != "" {
		return m.Run()
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...) //nolint:noctx // it is the tests, and go test bounds those
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	runtime.LockOSThread() // Pdeathsig is about the thread that starts the process
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "running the tests in a network namespace:", err)
		return 2
	}
	return 0
}

// Here is the namespace of the test process.
func Here(t testing.TB) *NS {
	t.Helper()
	h, err := netns.Get()
	check(t, err, "opening the network namespace")
	ns := open(t, h)
	ns.Up(t, "lo")
	return ns
}

// New makes a namespace in which only the loopback is up.
func New(t testing.TB) *NS {
	t.Helper()
	var h netns.NsHandle
	err := onOwnThread(func() error {
		var err error
		h, err = netns.New()
		return err
	})
	check(t, err, "making a network namespace")
	ns := open(t, h)
	ns.Up(t, "lo")
	return ns
}

func open(t testing.TB, h netns.NsHandle) *NS {
	t.Helper()
	links, err := netlink.NewHandleAt(h)
	check(t, err, "opening netlink")
	t.Cleanup(func() {
		links.Close()
		_ = h.Close() // it goes when its last process and interface do
	})
	return &NS{handle: h, links: links}
}

// onOwnThread runs f on a thread that ends with it, so that whatever f does to its thread's namespace stays there.
func onOwnThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

// Do runs f inside the namespace. Sockets that f opens, and processes that it starts, stay in it.
func (ns *NS) Do(t testing.TB, f func() error) {
	t.Helper()
	err := onOwnThread(func() error {
		if err := netns.Set(ns.handle); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		t.Fatalf("in the network namespace: %v", err)
	}
}

// Start starts cmd inside the namespace. It is killed when the test ends, if it has not ended by then, and also when the
// test process dies: the kernel kills it with the thread that started it, which is kept for that.
func (ns *NS) Start(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, over := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // and never unlocked, as in onOwnThread
		err := netns.Set(ns.handle)
		if err == nil {
			err = cmd.Start()
		}
		started <- err
		<-over
	}()
	check(t, <-started, "starting "+cmd.Path)
	t.Cleanup(func() {
		defer close(over)
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it may have ended
		_ = cmd.Wait()                                      // or have been waited for
	})
}

// Veth joins two namespaces by a cable, whose ends are named so, and up.
func Veth(t testing.TB, a *NS, nameA string, b *NS, nameB string) {
	t.Helper()
	l := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: nameA}, PeerName: nameB, PeerNamespace: netlink.NsFd(b.handle),
	}
	check(t, a.links.LinkAdd(l), "adding "+nameA)
	t.Cleanup(func() { _ = a.links.LinkDel(l) }) // a namespace may outlive the test
	a.Up(t, nameA)
	b.Up(t, nameB)
}

// Bridge joins interfaces of the namespace by a switch, which is an interface too, named name.
func (ns *NS) Bridge(t testing.TB, name string, ports ...string) {
	t.Helper()
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	check(t, ns.links.LinkAdd(br), "adding "+name)
	t.Cleanup(func() { _ = ns.links.LinkDel(br) }) // the namespace may outlive the test
	for _, p := range ports {
		check(t, ns.links.LinkSetMasterByIndex(ns.link(t, p), ns.link(t, name).Attrs().Index), "adding "+p+" to "+name)
	}
	ns.Up(t, name)
}

// Tap makes a tap device for a virtual machine.
func (ns *NS) Tap(t testing.TB, name string) {
	t.Helper()
	// A tap is made in the namespace of the thread, whatever the handle says.
	ns.Do(t, func() error {
		return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP})
	})
	t.Cleanup(func() { _ = ns.links.LinkDel(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}}) })
	ns.Up(t, name)
}

// Up brings an interface up.
func (ns *NS) Up(t testing.TB, name string) {
	t.Helper()
	check(t, ns.links.LinkSetUp(ns.link(t, name)), "bringing up "+name)
}

// Down brings an interface down.
func (ns *NS) Down(t testing.TB, name string) {
	t.Helper()
	check(t, ns.links.LinkSetDown(ns.link(t, name)), "bringing down "+name)
}

// Addr gives an interface an address with a prefix length, as in "10.0.0.1/24".
func (ns *NS) Addr(t testing.TB, name, cidr string) {
	t.Helper()
	a, err := netlink.ParseAddr(cidr)
	check(t, err, "parsing "+cidr)
	check(t, ns.links.AddrAdd(ns.link(t, name), a), "adding "+cidr+" to "+name)
}

// MAC is the hardware address of an interface.
func (ns *NS) MAC(t testing.TB, name string) net.HardwareAddr {
	t.Helper()
	return ns.link(t, name).Attrs().HardwareAddr
}

func (ns *NS) link(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := ns.links.LinkByName(name)
	check(t, err, "looking up "+name)
	return l
}

func check(t testing.TB, err error, what string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
