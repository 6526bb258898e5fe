package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed"
)

// disklessNodes have no disk at all. The memory is that of a small virtual machine.
var disklessNodes = []testbed.Node{
	{Name: "n1", MAC: "52:54:00:77:01:01", Memory: 512, Disk: -1},
	{Name: "n2", MAC: "52:54:00:77:01:02", Memory: 512, Disk: -1},
	{Name: "n3", MAC: "52:54:00:77:01:03", Memory: 512, Disk: -1, Firmware: testbed.UEFI},
	{Name: "d1", MAC: "52:54:00:77:01:04", Memory: 512, Disk: -1},
	{Name: "d2", MAC: "52:54:00:77:01:05", Memory: 512, Disk: -1, Firmware: testbed.UEFI},
}

// The addresses of the machines that run ledgers.
var ledgers = map[string]string{"n1": "10.77.0.11", "n2": "10.77.0.12", "n3": "10.77.0.13"}

// TestDiskless is the life of machines without disks: three run two roles from one base, two run a disk image that knows
// nothing of troupe. It is one test as TestFirstFleet is.
func TestDiskless(t *testing.T) {
	f := newFleet(t, disklessFleet(t), disklessNodes)
	f.await("all images are there", func(s *api.Snapshot) bool {
		return !slices.ContainsFunc(slices.Collect(maps.Keys(ledgers)), func(n string) bool {
			h := find(s, n)
			return h == nil || h.Target == ""
		})
	})
	for n := range ledgers {
		f.power(n, testbed.On)
	}
	f.await("three machines without disks are healthy", healthy("n1", "n2", "n3"))

	t.Run("SessionsAreShown", f.sessionsShown)
	t.Run("ServerIsKilledUnderThem", f.serverKilled)
	red := f.writes(ledgers["n2"], 0)
	t.Run("PowerCutAndRoleSwitch", func(t *testing.T) { f.within(t).cutAndSwitch(red) })
	t.Run("ResetAndRevert", func(t *testing.T) { f.within(t).resetAndRevert(red) })
	for n := range ledgers {
		f.power(n, testbed.Off)
	}
	t.Run("StockDisks", f.stockDisks)
}

// disklessFleet is a fleet with stock disks in both formats.
func disklessFleet(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("testdata/diskless")); err != nil {
		t.Fatal(err)
	}
	disks := t.TempDir()
	text := "package fleet\n\n"
	for _, i := range []struct{ image, format string }{{"stock", "qcow2"}, {"rawstock", "raw"}} {
		file := copyStock(t, disks, i.format)
		if i.format == "raw" {
			// What is in both is the same disk, whatever the format: a host that changes between them would keep its own.
			if err := os.Truncate(file, 600<<20); err != nil {
				t.Fatal(err)
			}
		}
		text += fmt.Sprintf("images: %s: {kind: \"disk\", from: disk: {url: \"file://%s\", sha256: %q}}\n", i.image, file, sum(t, file).Hex())
	}
	if err := os.WriteFile(filepath.Join(dir, "disks.cue"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sessionsShown looks at what the server says of LUNs and sessions: one base for all, and a disk for each that it writes to.
func (f *fleet) sessionsShown(t *testing.T) {
	f = f.within(t)
	table, status := f.troupe("get", "luns")
	if status != 0 {
		t.Errorf("get luns: exit status %d\n%s", status, table)
	}
	bases := map[digest.Digest]int{}
	for n := range ledgers {
		target := f.host(n).ISCSI
		if target == nil || len(target.LUNs) != 3 || len(target.Sessions) != 1 {
			t.Fatalf("%s: got target %+v, want one with three LUNs and one session", n, target)
		}
		if l := target.LUNs[0]; l.LUN != 0 || l.Kind != api.LUNDisk || l.Delta == 0 {
			t.Errorf("%s: the disk that it writes to: got %+v", n, l)
		}
		for _, l := range target.LUNs[1:] {
			if l.Kind != api.LUNImage || l.Delta != 0 {
				t.Errorf("%s: an image: got %+v", n, l)
			}
			bases[l.Image]++
		}
		if s := target.Sessions[0]; s.BytesIn == 0 || s.BytesOut == 0 || !strings.HasPrefix(s.Peer, ledgers[n]+":") {
			t.Errorf("%s: its session: got %+v", n, s)
		}
		wantMatch(t, "get luns", table, `(?m)^`+n+` +0 +rw +- .* 1$`)
		described, status := f.troupe("describe", "host", n)
		if status != 0 {
			t.Errorf("describe host %s: exit status %d\n%s", n, status, described)
		}
		wantMatch(t, "describe host "+n, described, `iqn\.2026-11\.dev\.troupe:`+n+`\n`)
		wantMatch(t, "describe host "+n, described, `Sessions: +`+regexp.QuoteMeta(ledgers[n])+`:\d+ since .* read, .* written`)
	}
	// The base, the delta of two hosts that are red and that of the one that is blue.
	if got := slices.Sorted(maps.Values(bases)); !slices.Equal(got, []int{1, 2, 3}) {
		t.Errorf("by how many hosts each image is had: got %v, want one by all three, one by two and one by one", got)
	}
}

// connLost is what a kernel says when the target is gone.
var connLost = regexp.MustCompile(`detected conn error`)

// serverKilled kills the server while the machines write. Their I/O waits until it is back, and nothing else happens.
func (f *fleet) serverKilled(t *testing.T) {
	f = f.within(t)
	before, from := map[string]ledger{}, map[string]int64{}
	for n, address := range ledgers {
		from[n] = f.nodeStatus(n).Console
		before[n] = f.writes(address, 0)
	}
	if err := f.lab.ServeKill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := range ledgers {
		f.awaitConsole(n, from[n], connLost)
	}
	if err := f.lab.ServeStart(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n, address := range ledgers {
		// One record may be under way as the server dies, and one be acknowledged before that is seen.
		after := f.writes(address, before[n].Acked+5)
		f.wantWhole(address, after.Acked)
		if after.Boot != before[n].Boot || after.Born != before[n].Born {
			t.Errorf("%s: %+v before the server was killed, %+v after: it shall only have waited", n, before[n], after)
		}
	}
	f.await("all are healthy with the new server", healthy("n1", "n2", "n3"))
}

// cutAndSwitch cuts n1's power while it writes, and gives n2, which was red, another role at the same time.
func (f *fleet) cutAndSwitch(red ledger) {
	f.edit("hosts.cue", `address: "10.77.0.12", role: "red"`, `address: "10.77.0.12", role: "blue"`)
	f.push("n2: blue")
	cut := f.writes(ledgers["n1"], 0)
	f.power("n1", testbed.Cycle)
	back := f.awaitLedger(ledgers["n1"], "another boot", func(l ledger) bool { return l.Boot != cut.Boot })
	if back.Born != cut.Born {
		f.t.Errorf("n1 has another disk after a power cut: %+v, before %+v", back, cut)
	}
	f.wantWhole(ledgers["n1"], cut.Acked)
	f.await("n2 is healthy as blue", inRole("n2", "blue"))
	blue := f.awaitLedger(ledgers["n2"], "blue", func(l ledger) bool { return l.Color == "blue" })
	if blue.Boot == red.Boot || blue.Born == red.Born {
		f.t.Errorf("n2 is blue, with the boot or the files of red: %+v, before %+v", blue, red)
	}
	f.await("n1 is healthy", healthy("n1"))
	if n := f.host("n2").Boots[0].Bytes; n != 0 {
		f.t.Errorf("n2 fetched %d image bytes for its new role, want 0: its images are LUNs", n)
	}
}

// resetAndRevert takes n1's disk away, and gives n2 its former role back, with what it wrote in it.
func (f *fleet) resetAndRevert(red ledger) {
	before := f.writes(ledgers["n1"], 0)
	f.sh(f.work, "git", "revert", "--no-edit", "HEAD")
	f.pushHead()
	if out, status := f.troupe("reset", "n1"); status != 0 {
		f.t.Fatalf("reset n1: exit status %d\n%s", status, out)
	}
	clean := f.awaitLedger(ledgers["n1"], "another disk", func(l ledger) bool { return l.Born != before.Born })
	if clean.Boot == before.Boot {
		f.t.Errorf("n1 has another disk without a boot: %+v, before %+v", clean, before)
	}
	f.await("n1 is healthy on a new disk, and n2 as red", func(s *api.Snapshot) bool {
		return inRole("n1", "red")(s) && inRole("n2", "red")(s)
	})
	again := f.awaitLedger(ledgers["n2"], "red", func(l ledger) bool { return l.Color == "red" })
	if again.Born != red.Born || again.Acked < red.Acked {
		f.t.Errorf("n2 is red again without what it wrote: %+v, before %+v", again, red)
	}
}

// stockDisks boots machines of both firmwares from one image, each with a disk of its own over it.
func (f *fleet) stockDisks(t *testing.T) {
	f = f.within(t)
	f.await("the disk images are there", func(s *api.Snapshot) bool {
		return find(s, "d1").Target != "" && find(s, "d2").Target != ""
	})
	boots := f.bootStock(testbed.On, "d1", "d2")
	f.wantStock(boots["d1"], stockBoot{Number: 1, Firmware: "bios", Root: "/dev/sda2", Target: "iqn.2026-11.dev.troupe:d1"})
	f.wantStock(boots["d2"], stockBoot{Number: 1, Firmware: "uefi", Root: "/dev/sda2", Target: "iqn.2026-11.dev.troupe:d2"})

	t.Log("--- the server is killed under them, then their power is cut")
	from := map[string]int64{"d1": f.nodeStatus("d1").Console, "d2": f.nodeStatus("d2").Console}
	if err := f.lab.ServeKill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := range from {
		from[n] = f.awaitConsole(n, from[n], connLost)
	}
	if err := f.lab.ServeStart(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := range from {
		// Of two writes at least one was begun after the server was gone.
		f.awaitConsole(n, f.awaitConsole(n, from[n], stockWrite), stockWrite)
	}
	boots = f.bootStock(testbed.Reset, "d1", "d2")
	f.wantStock(boots["d1"], stockBoot{Number: 2, Firmware: "bios", Root: "/dev/sda2", Target: "iqn.2026-11.dev.troupe:d1"})
	f.wantStock(boots["d2"], stockBoot{Number: 2, Firmware: "uefi", Root: "/dev/sda2", Target: "iqn.2026-11.dev.troupe:d2"})

	t.Log("--- d1's disk is reset, d2's is not")
	f.power("d1", testbed.Off) // which nobody tells the server
	if out, status := f.troupe("reset", "d1", "--force", "--wait"); status != 0 {
		t.Fatalf("reset d1: exit status %d\n%s", status, out)
	}
	boots = f.bootStock(testbed.Cycle, "d1", "d2")
	f.wantStock(boots["d1"], stockBoot{Number: 1, Firmware: "bios", Root: "/dev/sda2", Target: "iqn.2026-11.dev.troupe:d1"})
	f.wantStock(boots["d2"], stockBoot{Number: 3, Firmware: "uefi", Root: "/dev/sda2", Target: "iqn.2026-11.dev.troupe:d2"})
	f.power("d2", testbed.Off)

	t.Log("--- d1 gets the raw image")
	before := f.host("d1").Generation
	f.edit("hosts.cue", `address: "10.77.0.14", role: "stock"`, `address: "10.77.0.14", role: "rawstock"`)
	f.push("d1: the raw image")
	f.await("d1 shall boot the raw image", func(s *api.Snapshot) bool { return find(s, "d1").Generation > before })
	boots = f.bootStock(testbed.Cycle, "d1")
	f.wantStock(boots["d1"], stockBoot{Number: 1, Firmware: "bios", Root: "/dev/sda2", Target: "iqn.2026-11.dev.troupe:d1"})
}

func (f *fleet) wantStock(got, want stockBoot) {
	f.t.Helper()
	if got != want {
		f.t.Errorf("a stock disk says %+v, want %+v", got, want)
	}
}

// bootStock presses a button of machines with stock disks, and returns what each says when it has booted.
func (f *fleet) bootStock(action testbed.PowerAction, nodes ...string) map[string]stockBoot {
	f.t.Helper()
	from := map[string]int64{}
	for _, n := range nodes {
		from[n] = f.nodeStatus(n).Console
		f.power(n, action)
	}
	boots := map[string]stockBoot{}
	for _, n := range nodes {
		end := f.awaitConsole(n, from[n], stockLine)
		said, err := f.lab.Console(n)
		if err != nil {
			f.t.Fatal(err)
		}
		boot, ok := parseStock(said[from[n]:end])
		if !ok {
			f.t.Fatalf("%s: cannot read the line of its boot", n)
		}
		f.t.Logf("%s after power %s: %+v", n, action, boot)
		boots[n] = boot
	}
	return boots
}

// awaitConsole waits for what a machine's console says after an offset, and returns the offset behind that.
func (f *fleet) awaitConsole(node string, from int64, re *regexp.Regexp) int64 {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), patience)
	defer cancel()
	end, err := f.lab.WaitConsole(ctx, node, from, re)
	if err != nil {
		f.t.Fatal(err)
	}
	return end
}

func (f *fleet) nodeStatus(name string) testbed.NodeStatus {
	f.t.Helper()
	st, err := f.lab.Status(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	i := slices.IndexFunc(st.Nodes, func(n testbed.NodeStatus) bool { return n.Name == name })
	if i < 0 {
		f.t.Fatalf("the lab has no machine %q", name)
	}
	return st.Nodes[i]
}
