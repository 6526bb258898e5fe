package testbed

import (
	"bufio"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inNetwork lists the processes in a network namespace.
func inNetwork(t *testing.T, netns string) []int {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			t.Fatal(err)
		}
		if ns, err := netnsOf(pid); err == nil && ns == netns {
			pids = append(pids, pid)
		}
	}
	return pids
}

func interfaces(t *testing.T) string {
	t.Helper()
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	return strings.Join(names, " ")
}

func TestLabHasNetworkOfItsOwn(t *testing.T) {
	before := interfaces(t)
	lab := startLab(t, Config{Nodes: []Node{{Name: "n1", Disk: -1}, {Name: "n2", Disk: -1}}})
	if got := interfaces(t); got != before {
		t.Errorf("the host's interfaces: got %q, had %q before the lab", got, before)
	}
	out, err := lab.Run(t.Context(), "ip", "-brief", "address")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"lo ", "br0 ", "10.99.0.1/24", "tap0 ", "tap1 "} {
		if !strings.Contains(out, want) {
			t.Errorf("in the lab, ip address lacks %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "eth0") {
		t.Errorf("the lab sees an interface that leads out:\n%s", out)
	}
	out, err = lab.Run(t.Context(), "sh", "-c", "echo $TROUPE_SERVER; exit 7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || out != "http://10.99.0.1:8080\n" {
		t.Errorf("a command in the lab: got %q, %v; want the server's URL and exit status 7", out, err)
	}
	if _, err := Start(t.Context(), Config{Dir: lab.Dir(), Router: router}); !errors.Is(err, ErrRunning) {
		t.Errorf("a second lab in the directory: got %v, want ErrRunning", err)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "lab")
	lab := startLab(t, Config{Dir: dir, Nodes: []Node{{Name: "n1", Memory: 128}}, Serve: Serve{Args: []string{"serve", ":8080"}}})
	if err := lab.Power(t.Context(), "n1", On); err != nil {
		t.Fatal(err)
	}
	// Somebody who entered the network, and does not leave by himself.
	guest := lab.Command(t.Context(), "sh", "-c", "echo inside; exec sleep 1000000")
	said, err := guest.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := guest.Start(); err != nil {
		t.Fatal(err)
	}
	// Only then has the command entered: Start returns as soon as its door is being opened.
	if line, err := bufio.NewReader(said).ReadString('\n'); line != "inside\n" {
		t.Fatalf("the command in the lab said %q: %v", line, err)
	}
	ns := lab.rec.Netns
	if got := inNetwork(t, ns); len(got) < 5 { // init, supervisor, server, QEMU, guest
		t.Errorf("processes in the lab's network: got %v, want 5 at least", got)
	}
	if err := Remove(dir); !errors.Is(err, ErrRunning) {
		t.Errorf("removing a lab that runs: got %v, want ErrRunning", err)
	}
	if err := lab.Close(); err != nil {
		t.Fatal(err)
	}
	if err := guest.Wait(); err == nil {
		t.Error("the command in the lab ended well, want it killed")
	}
	if got := inNetwork(t, ns); len(got) != 0 {
		t.Errorf("processes in the lab's network after Close: %v", got)
	}
	if _, err := Open(dir); !errors.Is(err, ErrNoLab) {
		t.Errorf("opening a lab that was closed: got %v, want ErrNoLab", err)
	}
	if err := Remove(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the lab's directory is still there: %v", err)
	}
	if err := Remove(dir); err == nil {
		t.Error("removing a directory that is no lab's: no error")
	}
}

func TestKilledLabLeavesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "lab")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	holder := exec.Command(self, "hold", dir)
	if _, err := holder.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Wait() }()
	if said, err := bufio.NewReader(out).ReadString('\n'); said != "<nil>\n" {
		t.Fatalf("starting the lab: %s%v", said, err)
	}
	lab, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	ns := lab.rec.Netns
	var watched []int
	for _, pid := range inNetwork(t, ns) {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		watched = append(watched, fd)
	}
	if len(watched) < 3 { // init, supervisor, QEMU
		t.Fatalf("processes in the lab: got %d, want 3 at least", len(watched))
	}
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, fd := range watched {
		awaitExit(t, fd)
	}
	if got := inNetwork(t, ns); len(got) != 0 {
		t.Errorf("processes in the lab's network after its outer half was killed: %v", got)
	}
	// What the killed one left behind does not keep the next one from starting.
	startLab(t, Config{Dir: dir, Nodes: []Node{{Name: "n1", Memory: 128, Disk: -1}}})
}

// awaitExit waits until the process of a pidfd has ended.
func awaitExit(t *testing.T, fd int) {
	t.Helper()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000)
		switch {
		case err == unix.EINTR:
		case err != nil:
			t.Fatal(err)
		case n == 0:
			t.Fatal("a process of the lab goes on after its outer half was killed")
		default:
			return
		}
	}
}

func TestDownFromElsewhere(t *testing.T) {
	lab := startLab(t, Config{Nodes: []Node{{Name: "n1", Disk: -1}}})
	other, err := Open(lab.Dir())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		<-lab.Ended()
		ended <- lab.Close() // as the supervisor does
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := other.Down(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestStartSaysWhatIsWrong(t *testing.T) {
	good := Config{Dir: t.TempDir(), Router: router, Nodes: []Node{{Name: "n1"}}}
	for _, test := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no directory", func(c *Config) { c.Dir = "" }, "no directory"},
		{"network as router", func(c *Config) { c.Router = c.Router.Masked() }, "want an IPv4 address"},
		{"name with a comma", func(c *Config) { c.Nodes = []Node{{Name: "n,id=1"}} }, "a name has"},
		{"two of a name", func(c *Config) { c.Nodes = []Node{{Name: "a"}, {Name: "a", MAC: "52:54:00:00:00:01"}} }, "there are two"},
		{"two of a MAC", func(c *Config) {
			c.Nodes = []Node{{Name: "a", MAC: "52:54:00:00:00:01"}, {Name: "b", MAC: "52:54:00:00:00:01"}}
		}, `is that of node "a"`},
		{"multicast MAC", func(c *Config) { c.Nodes = []Node{{Name: "a", MAC: "01:00:5e:00:00:01"}} }, "not the Ethernet address"},
		{"unknown firmware", func(c *Config) { c.Nodes = []Node{{Name: "a", Firmware: "coreboot"}} }, "want \"bios\", \"uefi\" or \"direct\""},
		{"serial with a comma", func(c *Config) { c.Nodes = []Node{{Name: "a", Serial: "1,uuid=2"}} }, "serial"},
		{"bad UUID", func(c *Config) { c.Nodes = []Node{{Name: "a", UUID: "12"}} }, "UUID"},
		{"no such program", func(c *Config) { c.Binary = filepath.Join(c.Dir, "none") }, "no such file"},
		{"program that is something else", func(c *Config) { c.Binary = "/bin/true" }, "ended before it was ready"},
		{"page at no address", func(c *Config) { c.Page = "256.0.0.1:0" }, "page"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := good
			test.change(&cfg)
			lab, err := Start(t.Context(), cfg)
			if err == nil {
				lab.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want it to say %q", err, test.want)
			}
		})
	}
}
