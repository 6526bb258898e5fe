package iscsi

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/netup"
)

// A netns is a network namespace with one thread in it, and an interface "root".
type netns struct {
	t    *testing.T
	path string
	jobs chan func()
}

func newNetns(t *testing.T) *netns {
	t.Helper()
	n := &netns{t: t, jobs: make(chan func())}
	ready, done := make(chan error), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread is thrown away
		err := unix.Unshare(unix.CLONE_NEWNET)
		n.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", unix.Getpid(), unix.Gettid())
		ready <- err
		for job := range n.jobs {
			job()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		close(n.jobs)
		<-done
	})
	n.ip("link add root address 52:54:00:77:00:01 type veth peer name other")
	n.ip("link set other up")
	return n
}

func (n *netns) ip(args string) string {
	n.t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + n.path, "ip"}, strings.Fields(args)...)...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("ip %s: %v\n%s", args, err, out)
	}
	return string(out)
}

// What anything does to the network of a root is undone, at once: the system may stand still until then.
func TestGuard(t *testing.T) {
	n := newNetns(t)
	lease := &netup.Lease{
		Interface: "root", MAC: "52:54:00:77:00:01", Address: netip.MustParsePrefix("10.77.0.5/24"),
		Routes: []netup.Route{{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.77.0.1")}},
	}
	looked := make(chan struct{}, 1000)
	g := &guard{log: slog.New(slog.DiscardHandler), load: func() (Config, error) {
		looked <- struct{}{}
		return Config{Portal: netip.MustParseAddrPort("192.0.2.1:3260"), Lease: lease}, nil
	}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	n.jobs <- func() {
		defer close(done)
		g.run(ctx)
	}
	t.Cleanup(func() {
		cancel()
		<-done
	})
	state := func() map[string]bool {
		return map[string]bool{
			"address": strings.Contains(n.ip("-4 addr show dev root"), "inet 10.77.0.5/24"),
			"route":   strings.Contains(n.ip("route"), "default via 10.77.0.1"),
			"up":      strings.Contains(n.ip("link show dev root"), ",UP"),
		}
	}
	whole := map[string]bool{"address": true, "route": true, "up": true}
	for _, harm := range []string{"link show", "addr flush dev root", "link set root down", "route del default", "link set root down", "addr del 10.77.0.5/24 dev root"} {
		n.ip(harm)
		for !cmp.Equal(whole, state()) { // each change is looked at; the last look finds all whole
			<-looked
		}
	}
}
