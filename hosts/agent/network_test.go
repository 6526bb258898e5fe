package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
)

// ownNetwork runs the test that calls it once more, in a network namespace of its own. It says whether this is that run;
// the other one has nothing left to do.
func ownNetwork(t *testing.T) bool {
	t.Helper()
	const env = "TROUPE_TEST_OWN_NETWORK"
	if os.Getenv(env) != "" {
		return true
	}
	keepThread(t)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), env+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	t.Logf("in a network namespace:\n%s", out)
	if err != nil {
		t.Error(err)
	}
	return false
}

// keepThread keeps the test's thread for as long as the test runs: Pdeathsig is sent when the thread ends that started a
// process, and a goroutine that ends locked to its thread takes that with it.
func keepThread(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

// A lan is a network namespace with a DHCP server, joined to this one by a cable once plug is called.
type lan struct {
	t      *testing.T
	holder *exec.Cmd // its process is the namespace
}

func newLAN(t *testing.T) *lan {
	t.Helper()
	keepThread(t)
	l := &lan{t: t, holder: exec.Command("sleep", "infinity")}
	l.start(l.holder, syscall.CLONE_NEWNET)
	return l
}

// start starts a program that is killed when the test ends.
func (l *lan) start(cmd *exec.Cmd, flags uintptr) {
	l.t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
}

func (l *lan) pid() string { return fmt.Sprint(l.holder.Process.Pid) }

// plug makes the interface name with that MAC address here, and serves it addresses of 10.x.0.0/24.
func (l *lan) plug(name, mac string, x int) {
	l.t.Helper()
	ip := func(args ...string) {
		l.t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			l.t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	inside := []string{"nsenter", "-t", l.pid(), "-n"}
	ip("link", "add", name, "address", mac, "type", "veth", "peer", "name", "srv", "netns", l.pid())
	for _, args := range [][]string{{"ip", "link", "set", "lo", "up"}, {"ip", "addr", "add", fmt.Sprintf("10.%d.0.1/24", x), "dev", "srv"}, {"ip", "link", "set", "srv", "up"}} {
		args = append(inside[1:len(inside):len(inside)], args...)
		if out, err := exec.Command(inside[0], args...).CombinedOutput(); err != nil {
			l.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	l.start(exec.Command(inside[0], append(inside[1:len(inside):len(inside)],
		"dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=srv", "--bind-interfaces", "--dhcp-authoritative", "--no-ping", "--user=root",
		"--log-facility="+filepath.Join(l.t.TempDir(), "log"), "--dhcp-leasefile="+filepath.Join(l.t.TempDir(), "leases"),
		fmt.Sprintf("--dhcp-range=10.%d.0.50,10.%d.0.60,255.255.255.0,1h", x, x), fmt.Sprintf("--dhcp-option=option:router,10.%d.0.1", x),
		fmt.Sprintf("--dhcp-option=option:dns-server,10.%d.0.1", x))...), 0)
}

// listen opens a TCP port in the namespace.
func (l *lan) listen() net.Listener {
	l.t.Helper()
	ns, err := os.Open("/proc/" + l.pid() + "/ns/net")
	if err != nil {
		l.t.Fatal(err)
	}
	defer ns.Close()
	var lis net.Listener
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends in the other namespace
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err == nil {
			lis, err = net.Listen("tcp", "0.0.0.0:0")
		}
	}()
	<-done
	if err != nil {
		l.t.Fatal(err)
	}
	return lis
}

// asked is a transport that says when it is used first.
type asked struct {
	http.RoundTripper
	once  sync.Once
	first chan struct{}
}

func (a *asked) RoundTrip(r *http.Request) (*http.Response, error) {
	a.once.Do(func() { close(a.first) })
	return a.RoundTripper.RoundTrip(r)
}

// TestBootLeavesANetworkWithoutItsServer has a machine whose boot interface comes so late that another one, on a network
// with DHCP, gets the first lease.
func TestBootLeavesANetworkWithoutItsServer(t *testing.T) {
	if !ownNetwork(t) {
		return
	}
	const bootMAC = "52:54:00:77:00:01"
	office, home := newLAN(t), newLAN(t)
	var s agentapitest.Server
	srv := httptest.NewUnstartedServer(&s)
	srv.Listener = home.listen()
	srv.Start()
	defer srv.Close()
	_, port, err := net.SplitHostPort(srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	dials, stopDials := context.WithCancel(t.Context())
	defer stopDials() // net/http lets a dial go on that nobody waits for
	rt := &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
		return new(net.Dialer).DialContext(dials, network, addr)
	}}
	transport := &asked{RoundTripper: rt, first: make(chan struct{})}
	client, err := agentapi.NewClient("http://10.77.0.1:"+port, transport)
	if err != nil {
		t.Fatal(err)
	}
	b := &boot{
		log: slog.New(slog.NewTextHandler(t.Output(), nil)), cmd: Cmdline{MAC: bootMAC}, client: client, id: agentapi.Identity{MAC: bootMAC},
		resolv: filepath.Join(t.TempDir(), "resolv.conf"), patience: 3 * time.Second,
	}
	b.finder = netup.Finder{MAC: bootMAC, Log: b.log}
	office.plug("office", "52:54:00:77:00:02", 78)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	l, err := b.finder.Find(ctx)
	if err != nil {
		t.Fatal(err)
	}
	b.speak()
	b.take(l)
	if b.lease.Load().Interface != "office" {
		t.Errorf("first lease: %+v", b.lease.Load())
	}
	type end struct {
		stop func()
		err  error
	}
	met := make(chan end, 1)
	go func() {
		stop, err := b.meet(ctx, ctx)
		met <- end{stop, err}
	}()
	<-transport.first // in vain
	home.plug("home", bootMAC, 77)
	got := <-met
	if got.err != nil {
		t.Fatal(got.err)
	}
	got.stop()
	got.stop()
	if l := b.lease.Load(); l.Interface != "home" || len(s.Hellos()) != 1 {
		t.Errorf("%d hellos, lease %+v", len(s.Hellos()), l)
	}
	if conf, err := os.ReadFile(b.resolv); err != nil || !strings.Contains(string(conf), "nameserver 10.77.0.1") {
		t.Errorf("resolv.conf: %q, %v", conf, err)
	}
	out, err := exec.Command("ip", "-4", "addr").CombinedOutput()
	if err != nil || strings.Contains(string(out), "10.78.") {
		t.Errorf("addresses: %v\n%s", err, out)
	}
	var where []string
	for _, m := range b.rep.pending() {
		_, name, _ := strings.Cut(m.Detail, " on ")
		where = append(where, string(m.Stage)+" on "+name)
	}
	if n := len(where); n < 2 || where[0] != "agent-up on office" || where[n-1] != "agent-up on home" {
		t.Errorf("marks %q", where)
	}
}

// silentUntil is a transport to a server that is away until a condition holds, and then has nothing for this machine.
type silentUntil func() bool

func (s silentUntil) RoundTrip(r *http.Request) (*http.Response, error) {
	if !s() {
		return nil, errors.New("nobody there")
	}
	return answer(r, http.StatusOK, agentapi.Assignment{Version: "1", State: agentapi.Unclaimed})
}

func TestBootKeepsItsLeaseWhileTheServerIsAway(t *testing.T) {
	if !ownNetwork(t) {
		return
	}
	const mac = "52:54:00:77:00:01"
	newLAN(t).plug("home", mac, 77)
	b := &boot{log: slog.New(slog.NewTextHandler(t.Output(), nil)), cmd: Cmdline{MAC: mac}, resolv: filepath.Join(t.TempDir(), "resolv.conf")}
	b.finder = netup.Finder{MAC: mac, Log: b.log}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	first, err := b.finder.Find(ctx)
	if err != nil {
		t.Fatal(err)
	}
	first.Duration = 10 * time.Second
	b.client, err = agentapi.NewClient("http://10.77.0.1", silentUntil(func() bool { return b.lease.Load() != first }))
	if err != nil {
		t.Fatal(err)
	}
	b.speak()
	b.take(first)
	stop, err := b.meet(ctx, ctx)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if l := b.lease.Load(); l.Address != first.Address || l.Duration != time.Hour {
		t.Errorf("renewed lease: %+v", l)
	}
}

// status is a transport to a host that answers each request with that, and how; 0 is one that is away.
type status struct {
	code int
	body any
}

func (s status) RoundTrip(r *http.Request) (*http.Response, error) {
	if s.code == 0 {
		return nil, errors.New("nobody there")
	}
	return answer(r, s.code, s.body)
}

// TestBootLeavesOnlyForAnotherNetwork has machines that are not answered, or not what they ask for, for an hour.
func TestBootLeavesOnlyForAnotherNetwork(t *testing.T) {
	if !ownNetwork(t) {
		return
	}
	const mac, other = "52:54:00:77:00:01", "52:54:00:77:00:02"
	away := status{}
	notReady := status{http.StatusServiceUnavailable, agentapi.Error{Message: "no fleet is in force yet"}}
	proxy := status{http.StatusServiceUnavailable, "<h1>no such host</h1>"}
	type test struct {
		booted string
		server status
		want   error
	}
	greet := func(tests ...test) {
		for _, tt := range tests {
			synctest.Test(t, func(t *testing.T) {
				client, err := agentapi.NewClient("http://10.77.0.1", tt.server)
				if err != nil {
					t.Fatal(err)
				}
				b := &boot{log: nothing, cmd: Cmdline{MAC: tt.booted}, client: client, patience: strangerPatience}
				b.speak()
				b.lease.Store(&netup.Lease{MAC: mac, Interface: "home"})
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				if err := b.greet(ctx); !errors.Is(err, tt.want) {
					t.Errorf("booted from %q, server %+v: %v, want %v", tt.booted, tt.server, err, tt.want)
				}
			})
		}
	}
	newLAN(t).plug("home", mac, 77)
	greet( // nowhere else to go
		test{mac, away, context.DeadlineExceeded},
		test{other, away, context.DeadlineExceeded},
		test{"", away, context.DeadlineExceeded},
	)
	newLAN(t).plug("office", other, 78)
	greet(
		test{mac, away, context.DeadlineExceeded},
		test{other, away, errStranger},
		test{"", away, errStranger},
		test{other, proxy, errStranger},
		test{other, notReady, context.DeadlineExceeded},
		test{"", notReady, context.DeadlineExceeded},
	)
}

// TestBootMarksEachNetworkOnce takes leases as a machine does whose server is away.
func TestBootMarksEachNetworkOnce(t *testing.T) {
	client, err := agentapi.NewClient("http://10.77.0.1", status{})
	if err != nil {
		t.Fatal(err)
	}
	b := &boot{log: nothing, client: client, resolv: filepath.Join(t.TempDir(), "resolv.conf")}
	b.speak()
	for _, l := range []netup.Lease{
		{Interface: "eth0", Address: netip.MustParsePrefix("10.77.0.11/24"), Duration: time.Hour},
		{Interface: "eth0", Address: netip.MustParsePrefix("10.77.0.11/24"), Duration: time.Minute},
		{Interface: "eth0", Address: netip.MustParsePrefix("10.77.0.12/24")},
		{Interface: "eth1", Address: netip.MustParsePrefix("10.77.0.12/24")},
		{Interface: "eth1", Address: netip.MustParsePrefix("10.77.0.12/24")},
	} {
		b.take(&l)
	}
	var got []string
	for _, m := range b.rep.pending() {
		got = append(got, string(m.Stage)+": "+m.Detail)
	}
	want := []string{"agent-up: 10.77.0.11 on eth0", "agent-up: 10.77.0.12 on eth0", "agent-up: 10.77.0.12 on eth1"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("marks (-want +got):\n%s", diff)
	}
}
