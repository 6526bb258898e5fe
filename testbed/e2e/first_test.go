package e2e

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/testbed"
)

// first is the fleet that the demo shows, too.
const first = "../demo/first"

var firstNodes = []testbed.Node{
	{Name: "n1", MAC: "52:54:00:77:00:01"},
	{Name: "n2", MAC: "52:54:00:77:00:02"},
	{Name: "n3", MAC: "52:54:00:77:00:03", Firmware: testbed.UEFI},
	{Name: "x1", MAC: "52:54:00:77:00:04", Disk: 2 << 30}, // no host declares it
	{Name: "d1", MAC: "52:54:00:77:00:05", Disk: 2 << 30}, // has something on its disk
}

// TestFirstFleet is the life of a small fleet, from blank machines on, with the server killed where it hurts. It is one
// test since a boot without KVM takes a minute: each part goes on with the machines as the part before left them.
func TestFirstFleet(t *testing.T) {
	f := newFleet(t, first, firstNodes)

	f.await("the base is being built", func(s *api.Snapshot) bool {
		return slices.ContainsFunc(s.Images, func(i api.Image) bool { return i.Kind == "base" && i.Phase == state.BuildRunning })
	})
	f.killServer() // mid-build
	f.await("all images are built after the server was killed during a build", func(s *api.Snapshot) bool {
		h := find(s, "n3")
		return h != nil && h.Target != ""
	})
	for _, n := range []string{"n1", "n2", "n3"} {
		f.power(n, testbed.On)
	}
	f.await("some machine is past its DHCP", func(s *api.Snapshot) bool {
		h := find(s, "n1")
		return h != nil && h.Stage != "" && h.Stage != "dhcp-offer"
	})
	f.killServer() // mid-boot
	f.await("a node fetches", func(s *api.Snapshot) bool {
		for _, h := range s.Hosts {
			if h.Fetch != nil && h.Fetch.Done > 0 {
				return true
			}
		}
		return false
	})
	f.killServer() // mid-fetch
	f.await("three nodes are healthy", healthy("n1", "n2", "n3"))
	f.wantPage("n1", "10.77.0.11")
	f.wantPage("n3", "10.77.0.13")
	// What agents say is repeated until a server acknowledged it. What a killed server saw of the firmware in its last
	// moment may be lost with it: a kernel that it had just sent.
	for _, n := range []string{"n1", "n2", "n3"} {
		f.wantTimeline(n, "agent-up", "cache", "fetch", "mount", "switch-root", "service", "healthy")
	}

	t.Log("--- a push changes n2's role, a revert changes it back")
	before := f.host("n1").Generation
	f.edit("hosts.cue", `address: "10.77.0.12", role: "idle"`, `address: "10.77.0.12", role: "web"`)
	out, status := f.troupe("plan", f.work)
	if status != 1 {
		t.Errorf("plan of a change: exit status %d, want 1\n%s", status, out)
	}
	wantMatch(t, "plan", out, `n2.*\n?.*idle.*web`)
	f.push("n2: web")
	f.await("n2 is healthy as web", inRole("n2", "web"))
	f.wantPage("n2", "10.77.0.12")
	f.sh(f.work, "git", "revert", "--no-edit", "HEAD")
	f.pushHead()
	f.await("n2 is healthy as idle again", inRole("n2", "idle"))
	if n := f.host("n2").Boots[0].Bytes; n != 0 {
		t.Errorf("the revert fetched %d image bytes, want 0: all of it was in the cache", n)
	}
	if g := f.host("n1").Generation; g != before {
		t.Errorf("n1's generation went from %d to %d by changes of n2", before, g)
	}

	t.Run("BrokenCommitChangesNothing", f.brokenCommit)
	t.Run("EmptiedHostsAreRefused", f.emptiedHosts)
	t.Run("UnknownMachineIsClaimed", f.unknownMachine)
	t.Run("ForeignDiskIsLeftAlone", f.foreignDisk)
	t.Run("UnpluggedDuringBoot", f.unplugged)
	t.Run("RemovedHostGoesBackToDiscovery", f.removedHost)
}

// within makes f report to a subtest.
func (f *fleet) within(t *testing.T) *fleet {
	t.Helper()
	g := *f
	g.t = t
	return &g
}

// wantPage checks that the node's web server says whose it is.
func (f *fleet) wantPage(name, address string) {
	f.t.Helper()
	want := "web on " + name + " at " + address + "\n"
	if got := f.get("http://" + address + "/"); got != want {
		f.t.Errorf("%s serves %q, want %q", name, got, want)
	}
}

// wantTimeline checks that the host's last boot passed these stages in this order.
func (f *fleet) wantTimeline(name string, want ...string) {
	f.t.Helper()
	boot := f.host(name).Boots[0]
	var got []string
	for _, m := range boot.Marks {
		got = append(got, m.Stage)
		if len(want) > 0 && m.Stage == want[0] {
			want = want[1:]
		}
	}
	if len(want) > 0 {
		f.t.Errorf("%s: the timeline lacks %s: it has %v", name, want[0], got)
	}
}

func (f *fleet) brokenCommit(t *testing.T) {
	f = f.within(t)
	boots := map[string]string{}
	for _, n := range []string{"n1", "n2", "n3"} {
		boots[n] = f.host(n).BootID
	}
	f.edit("hosts.cue", `n1: {mac:`, `n1: {rolle: "web", mac:`)
	bad := f.push("a typo")
	s := f.await("the broken commit is shown", func(s *api.Snapshot) bool {
		return s.Status.Attempted != nil && s.Status.Attempted.Hash == bad && len(s.Status.Problems) > 0
	})
	p := s.Status.Problems[0]
	if p.File != "hosts.cue" || p.Line == 0 || !strings.Contains(p.Message, "rolle") {
		t.Errorf("problem: got %s, want the place of rolle in hosts.cue", p)
	}
	out, _ := f.troupe("status")
	wantMatch(t, "status", out, `hosts\.cue:\d+:\d+: .*rolle`)
	for _, n := range []string{"n1", "n2", "n3"} {
		if h := find(s, n); h.State != api.HostHealthy {
			t.Errorf("%s is %s after a broken commit: it must not touch any machine", n, h.State)
		}
	}
	f.sh(f.work, "git", "reset", "-q", "--hard", "HEAD~1")
	f.sh(f.work, "git", "push", "-q", "--force", "origin", "HEAD:main")
	good := f.sh(f.work, "git", "rev-parse", "HEAD")
	f.await("the force-push back to the good commit is in force", func(s *api.Snapshot) bool {
		return s.Status.Applied.Hash == good && s.Status.Attempted == nil && !s.Status.Rewritten.IsZero()
	})
	for n, boot := range boots {
		if got := f.host(n).BootID; got != boot {
			t.Errorf("%s booted again (%s, %s before) for a commit that was refused", n, got, boot)
		}
	}
}

func (f *fleet) emptiedHosts(t *testing.T) {
	f = f.within(t)
	if err := os.WriteFile(filepath.Join(f.work, "hosts.cue"), []byte("package fleet\n\nhosts: {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	bad := f.push("no hosts at all")
	s := f.await("the emptied fleet is refused", func(s *api.Snapshot) bool {
		return s.Status.Attempted != nil && s.Status.Attempted.Hash == bad && len(s.Status.Problems) > 0
	})
	if !strings.Contains(s.Status.Problems[0].Message, "allowEmpty") {
		t.Errorf("problem: %s does not say how to mean it", s.Status.Problems[0])
	}
	f.sh(f.work, "git", "revert", "--no-edit", "HEAD")
	f.pushHead()
	f.await("all is well again", healthy("n1", "n2", "n3"))
}

func (f *fleet) unknownMachine(t *testing.T) {
	f = f.within(t)
	const mac = "52:54:00:77:00:04"
	f.power("x1", testbed.On)
	s := f.await("x1 shows up unclaimed, with its inventory", func(s *api.Snapshot) bool {
		h := find(s, mac)
		return h != nil && h.State == api.HostUnclaimed && h.Inventory != nil
	})
	inv := find(s, mac).Inventory
	if inv.CPU.Threads != 1 || inv.Memory < 512<<20 || len(inv.Disks) != 1 || inv.Disks[0].Holds != "blank" || len(inv.NICs) == 0 {
		t.Errorf("inventory: %+v", inv)
	}
	if !allZero(t, f.lab.DiskPath("x1")) {
		t.Error("an unclaimed machine's disk was written to")
	}
	out, status := f.troupe("get", "hosts", "--unclaimed", "-o", "cue")
	if status != 0 || !strings.Contains(out, mac) {
		t.Errorf("get hosts --unclaimed -o cue: exit status %d\n%s", status, out)
	}
	f.edit("hosts.cue", "hosts: {\n", "hosts: {\n\tx1: {mac: \""+mac+"\", address: \"10.77.0.14\", role: \"idle\"}\n")
	f.push("x1 is idle")
	f.await("x1 is healthy in its role, with no hand on it", inRole("x1", "idle"))
	f.wantTimeline("x1", "dhcp-offer", "script", "kernel", "agent-up", "wait", "cache", "fetch", "mount", "switch-root", "service", "healthy")
	f.power("x1", testbed.Off)
}

func (f *fleet) foreignDisk(t *testing.T) {
	f = f.within(t)
	disk := f.lab.DiskPath("d1")
	f.sh("", "mkfs.ext4", "-q", "-F", "-L", "precious", disk)
	before := sum(t, disk)
	f.edit("hosts.cue", "hosts: {\n", "hosts: {\n\td1: {mac: \"52:54:00:77:00:05\", address: \"10.77.0.15\", role: \"idle\"}\n")
	f.push("d1 is idle")
	f.power("d1", testbed.On)
	s := f.await("d1 says that its disk is not blank", func(s *api.Snapshot) bool {
		h := find(s, "d1")
		return h != nil && strings.Contains(h.Error, "ext4")
	})
	t.Logf("d1: %s", find(s, "d1").Error)
	if sum(t, disk) != before {
		t.Error("a disk that nobody allowed to take was written to")
	}
	f.edit("hosts.cue", `address: "10.77.0.15", role: "idle"`, `address: "10.77.0.15", role: "idle", disk: take: true`)
	f.push("d1 may take its disk")
	f.await("d1 is healthy", inRole("d1", "idle"))
	f.power("d1", testbed.Off)
}

func (f *fleet) unplugged(t *testing.T) {
	f = f.within(t)
	f.edit("hosts.cue", `address: "10.77.0.12", role: "idle"`, `address: "10.77.0.12", role: "web"`)
	f.edit("roles.cue", `"/etc/motd": "web\n"`, `"/etc/motd": "web, second edition\n"`)
	before := f.host("n1").Target
	hash := f.push("n2: web, in a new edition")
	f.await("the new edition is in force", func(s *api.Snapshot) bool { return s.Status.Applied != nil && s.Status.Applied.Hash == hash })
	f.killServer() // between a commit's coming into force and what follows from it
	f.await("n2 boots into it", func(s *api.Snapshot) bool {
		h := find(s, "n2")
		return h.State == api.HostBooting && (h.Stage == string(agentapi.StageAgent) || h.Stage == string(agentapi.StageCache))
	})
	f.power("n2", testbed.Off)
	f.power("n2", testbed.On)
	f.await("n2 is healthy as web after its plug was pulled", inRole("n2", "web"))
	f.wantPage("n2", "10.77.0.12")
	s := f.await("n1 and n3 run the new edition", healthy("n1", "n3"))
	f.wantTimeline("n1", "dhcp-offer", "script", "kernel", "agent-up", "cache", "fetch", "mount", "switch-root", "service", "healthy")
	f.wantTimeline("n3", "dhcp-offer", "tftp", "script", "kernel", "agent-up", "cache", "fetch", "mount", "switch-root", "service", "healthy")
	for _, name := range []string{"n1", "n3"} {
		if h := find(s, name); h.Running == before || h.Running != h.Target {
			t.Errorf("%s runs %s, which is not the new edition (%s before, %s wanted)", name, h.Running.Short(), before.Short(), h.Target.Short())
		}
	}
}

func (f *fleet) removedHost(t *testing.T) {
	f = f.within(t)
	f.edit("hosts.cue", `	n2: {mac: "52:54:00:77:00:02", address: "10.77.0.12", role: "web"}`+"\n", "")
	f.push("n2 leaves")
	f.await("n2's machine is unclaimed, in discovery", func(s *api.Snapshot) bool {
		h := find(s, "52:54:00:77:00:02")
		return h != nil && h.State == api.HostUnclaimed && h.Running == ""
	})
}

// sum is a digest of a whole file.
func sum(t *testing.T, name string) digest.Digest {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, _, err := digest.FromReader(f)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// allZero says whether a file has no byte but zeroes.
func allZero(t *testing.T, name string) bool {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf, zero := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, err := f.Read(buf)
		if !bytes.Equal(buf[:n], zero[:n]) {
			return false
		}
		if errors.Is(err, io.EOF) {
			return true
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
