package testbed

import (
	"bufio"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/testbed/qmp"
)

// dhcp runs a DHCP and TFTP server in the lab, and returns a way to wait for a line of its log.
func dhcp(t *testing.T, lab *Lab, bootFile string) (await func(*regexp.Regexp)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	cmd := lab.Command(ctx, "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--interface="+Bridge, "--bind-dynamic", "--port=0",
		"--dhcp-range=10.99.0.100,10.99.0.200", "--leasefile-ro", "--log-dhcp", "--dhcp-boot="+bootFile,
		"--enable-tftp", "--tftp-root="+lab.Dir())
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
	lines := bufio.NewScanner(log)
	return func(re *regexp.Regexp) {
		t.Helper()
		var said []string
		for lines.Scan() {
			said = append(said, lines.Text())
			if re.MatchString(lines.Text()) {
				return
			}
		}
		t.Fatalf("dnsmasq never said %q, but (%v):\n%s", re, lines.Err(), strings.Join(said, "\n"))
	}
}

// waitConsole waits for a match, for long enough that a slow machine is no failure.
func waitConsole(t *testing.T, lab *Lab, node string, from int64, re string) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	end, err := lab.WaitConsole(ctx, node, from, regexp.MustCompile(re))
	if err != nil {
		t.Fatal(err)
	}
	return end
}

func TestFirmwareBootsFromNetwork(t *testing.T) {
	nodes := []Node{
		{Name: "old", MAC: "52:54:00:99:00:01", Memory: 256},
		{Name: "new", MAC: "52:54:00:99:00:02", Memory: 256, Firmware: UEFI},
	}
	lab := startLab(t, Config{Nodes: nodes})
	if err := os.WriteFile(filepath.Join(lab.Dir(), "boot"), []byte("#!ipxe\necho it is ${mac} with ${serial} ${uuid}\nreboot\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	await := dhcp(t, lab, "boot")
	for _, n := range nodes {
		if err := lab.Power(t.Context(), n.Name, On); err != nil {
			t.Fatal(err)
		}
	}
	// iPXE, the ROM of the BIOS machine's card, runs the script, which tells what QEMU told the machine of itself.
	end := waitConsole(t, lab, "old", 0, `it is 52:54:00:99:00:01 with lab-old [0-9a-f]{8}-`)
	// The script reboots it: it boots again, and is seen to have done so.
	waitConsole(t, lab, "old", end, `it is 52:54:00:99:00:01`)
	st := node(t, lab, "old")
	if st.Resets == 0 || !st.On || st.Silent {
		t.Errorf("a machine that rebooted: got %+v", st)
	}
	// OVMF has its own PXE, which says what it is and then finds that a script is no program of UEFI.
	await(regexp.MustCompile(`vendor class: PXEClient:Arch:00007`))
	waitConsole(t, lab, "new", 0, `Start PXE over IPv4`)
}

func node(t *testing.T, lab *Lab, name string) NodeStatus {
	t.Helper()
	st, err := lab.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range st.Nodes {
		if n.Name == name {
			return n
		}
	}
	t.Fatalf("the lab has no node %q: %+v", name, st.Nodes)
	return NodeStatus{}
}

// A PC that reboots under BIOS is reset five times within 70 ms.
func TestResetsOfOneRebootAreOne(t *testing.T) {
	var m machine
	start := time.Unix(1_700_000_000, 0)
	reset := func(after time.Duration) {
		m.event(qmp.Event{Name: "RESET", Data: []byte(`{"guest": true}`), Time: start.Add(after)})
	}
	m.log = slog.New(slog.DiscardHandler)
	for i := range 5 {
		reset(time.Duration(i) * 17 * time.Millisecond)
	}
	if m.resets != 1 {
		t.Errorf("one reboot counts as %d", m.resets)
	}
	reset(20 * time.Second)
	reset(20*time.Second + resetBurst)
	reset(30 * time.Second)
	if m.resets != 3 {
		t.Errorf("three reboots count as %d", m.resets)
	}
}

func TestPower(t *testing.T) {
	lab := startLab(t, Config{Nodes: []Node{{Name: "n1", Memory: 128, Disk: 1 << 20}}})
	disk := filepath.Join(lab.Dir(), nodesDir, "n1", diskFile)
	if info, err := os.Stat(disk); err != nil || info.Size() != 1<<20 {
		t.Fatalf("the blank disk: got %v, %v", info, err)
	}
	if err := os.WriteFile(disk, []byte("kept"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := lab.Power(t.Context(), "n1", Reset); err == nil || !strings.Contains(err.Error(), "it is off") {
		t.Errorf("reset of a machine that is off: got %v", err)
	}
	var size int64
	for _, step := range []struct {
		action PowerAction
		on     bool
	}{{On, true}, {On, true}, {Reset, true}, {Cycle, true}, {Off, false}, {Off, false}, {Cycle, true}} {
		if err := lab.Power(t.Context(), "n1", step.action); err != nil {
			t.Fatal(err)
		}
		st := node(t, lab, "n1")
		if st.On != step.on || st.Error != "" {
			t.Errorf("after %s: got %+v, want on %v", step.action, st, step.on)
		}
		if step.action == Cycle && st.Booted < size {
			t.Errorf("after %s its output begins at %d, though %d bytes were there before", step.action, st.Booted, size)
		}
		if step.on {
			size = waitConsole(t, lab, "n1", st.Booted, "SeaBIOS")
		}
	}
	if b, err := os.ReadFile(disk); err != nil || !strings.HasPrefix(string(b), "kept") {
		t.Errorf("the disk after all that: got %q, %v", b, err)
	}
	if err := lab.Power(t.Context(), "n1", "explode"); err == nil {
		t.Error("an unknown action: no error")
	}
	if err := lab.Power(t.Context(), "n2", On); err == nil || !strings.Contains(err.Error(), `no node "n2"`) {
		t.Errorf("an unknown machine: got %v", err)
	}
}

func TestLinkCutsNetwork(t *testing.T) {
	lab := startLab(t, Config{Nodes: []Node{{Name: "n1", Memory: 128, Disk: -1}}})
	if err := lab.Link(t.Context(), "n1", false); err != nil { // while it is off: it stays so
		t.Fatal(err)
	}
	await := dhcp(t, lab, "none")
	if err := lab.Power(t.Context(), "n1", On); err != nil {
		t.Fatal(err)
	}
	// iPXE's driver does not look for a carrier: it asks, and nobody hears it.
	end := waitConsole(t, lab, "n1", 0, `No configuration methods`)
	if st := node(t, lab, "n1"); st.Link {
		t.Errorf("a machine without its cable: got %+v", st)
	}
	if err := lab.Link(t.Context(), "n1", true); err != nil {
		t.Fatal(err)
	}
	await(regexp.MustCompile(`DHCPACK`))
	waitConsole(t, lab, "n1", end, `10\.99\.0\.1\d\d`)
}

func TestMachineThatCannotStart(t *testing.T) {
	lab := startLab(t, Config{Nodes: []Node{{Name: "n1", Memory: 128}}, Accel: "tcg"})
	if err := os.Remove(filepath.Join(lab.Dir(), nodesDir, "n1", diskFile)); err != nil {
		t.Fatal(err)
	}
	err := lab.Power(t.Context(), "n1", On)
	if err == nil || !strings.Contains(err.Error(), diskFile) {
		t.Errorf("a machine without its disk: got %v, want QEMU's own words", err)
	}
	if st := node(t, lab, "n1"); st.On {
		t.Errorf("a machine that did not start is on: %+v", st)
	}
}

func TestMachineWhoseQEMUDies(t *testing.T) {
	lab := startLab(t, Config{Nodes: []Node{{Name: "n1", Memory: 128, Disk: -1}}})
	if err := lab.Power(t.Context(), "n1", On); err != nil {
		t.Fatal(err)
	}
	var killed bool
	for _, pid := range inNetwork(t, lab.rec.Netns) {
		exe, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
		if err == nil && strings.Contains(exe, "qemu") {
			killed = exec.Command("kill", "-9", strconv.Itoa(pid)).Run() == nil
		}
	}
	if !killed {
		t.Fatal("no QEMU was killed")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for node(t, lab, "n1").On && ctx.Err() == nil { // nothing tells when the supervisor has noticed
	}
	if st := node(t, lab, "n1"); st.On || !strings.Contains(st.Error, "killed") {
		t.Errorf("a machine whose QEMU was killed: got %+v", st)
	}
	if err := lab.Power(t.Context(), "n1", On); err != nil {
		t.Fatal(err)
	}
	if st := node(t, lab, "n1"); !st.On || st.Error != "" {
		t.Errorf("the machine, switched on again: got %+v", st)
	}
}
