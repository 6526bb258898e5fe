package netboot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/quiet"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/netboot/dhcp"
	"github.com/troupe-dev/troupe/netboot/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const mac = "52:54:00:09:00:01"

// fleet declares one machine.
type fleet struct{}

var declared = netip.MustParseAddr("10.9.0.11")

func (fleet) Network() (dhcp.Network, bool) {
	return dhcp.Network{Subnet: netip.MustParsePrefix("10.9.0.0/24")}, true
}

func (fleet) Lookup(hw net.HardwareAddr, _ string) (dhcp.Host, bool) {
	return dhcp.Host{Name: "n1", Address: declared}, hw.String() == mac
}

func (fleet) Declared(a netip.Addr) bool { return a == declared }

// director has one answer.
type director struct {
	boot netboot.Boot
	err  error
}

func (d director) Boot(context.Context, netboot.Machine) (netboot.Boot, error) { return d.boot, d.err }

// blobs is bytes by digest.
type blobs map[digest.Digest][]byte

func (b blobs) add(data []byte) digest.Digest {
	d := digest.Of(data)
	b[d] = data
	return d
}

func (b blobs) Open(_ context.Context, d digest.Digest) (io.ReadSeekCloser, error) {
	data, ok := b[d]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", d, netboot.ErrNotFound)
	}
	return file{bytes.NewReader(data)}, nil
}

type file struct{ *bytes.Reader }

func (file) Close() error { return nil }

type observer chan netboot.Event

func (o observer) Observe(e netboot.Event) { o <- e }

// await returns the events up to the first one that says stop, or fails after a while.
func (o observer) await(t *testing.T, stop func(netboot.Event) bool) []string {
	t.Helper()
	var got []string
	deadline := time.After(time.Minute)
	for {
		select {
		case e := <-o:
			got = append(got, fmt.Sprintf("%s %s", e.MAC, e.Stage))
			if e.Err != nil {
				t.Errorf("%s: %v", got[len(got)-1], e.Err)
			}
			if stop(e) {
				return got
			}
		case <-deadline:
			t.Fatalf("events so far: %q", got)
		}
	}
}

// start serves on iface of the test's own namespace, with HTTP on port 8080, until the test ends.
func start(t *testing.T, s *netboot.Server, iface string) {
	t.Helper()
	s.Addresses, s.HTTPPort = fleet{}, 8080
	socks, err := netboot.Listen(t.Context(), iface, s.Mode)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	leaks := goleak.IgnoreCurrent()
	web := &http.Server{Handler: s.Handler()}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- s.Serve(ctx, socks) }()
	go func() { done <- web.Serve(l) }()
	t.Cleanup(func() {
		cancel()
		_ = web.Close()
		for range 2 {
			if err := <-done; err != nil && !errors.Is(err, http.ErrServerClosed) {
				t.Error(err)
			}
		}
		goleak.VerifyNone(t, leaks)
	})
}

// TestBootFromROM boots a virtual machine with a BIOS from its network card: the iPXE in QEMU's ROM asks for an address and
// its script, and loads a kernel and an initramfs. The kernel is the iPXE that comes as one (ipxe.lkrn): it takes its
// command line for a command, and complains.
func TestBootFromROM(t *testing.T) {
	kernel, err := os.ReadFile("/usr/lib/ipxe/ipxe.lkrn")
	if err != nil {
		t.Fatalf("the package ipxe is not installed: %v", err)
	}
	here := nettest.Here(t)
	here.Tap(t, "tap0")
	here.Addr(t, "tap0", "10.9.0.1/24")

	b, events := blobs{}, make(observer, 100)
	start(t, &netboot.Server{
		Blobs: b, Observer: events,
		Director: director{boot: netboot.Boot{ID: "b1", Title: "n1: web", Kernel: b.add(kernel), Initrds: []digest.Digest{b.add([]byte("initramfs"))}}},
	}, "tap0")
	console, screen, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	defer screen.Close() // QEMU has its own
	cmd := exec.Command("qemu-system-x86_64", "-m", "128", "-nographic", "-no-reboot", "-boot", "n",
		"-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n,mac="+mac)
	cmd.Stdout, cmd.Stderr = screen, screen
	here.Start(t, cmd)

	got := events.await(t, func(e netboot.Event) bool { return e.Stage == netboot.StageKernel })
	if want := mac + " dhcp-offer," + mac + " script," + mac + " kernel"; strings.Join(got, ",") != want {
		t.Errorf("events:\n got %s\nwant %s", strings.Join(got, ","), want)
	}
	wantText(t, console, "troupe.server=http://10.9.0.1:8080: command not found")
}

// wantText reads until want has come.
func wantText(t *testing.T, r *os.File, want string) {
	t.Helper()
	if err := r.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for b := make([]byte, 4096); !strings.Contains(got.String(), want); {
		n, err := r.Read(b)
		got.Write(b[:n])
		if err != nil {
			t.Fatalf("waiting for %q: %v; the console says:\n%s", want, err, got.String())
		}
	}
}

func TestScript(t *testing.T) {
	here := nettest.Here(t)
	here.Up(t, "lo")
	b := blobs{}
	kernel, first, second := b.add([]byte("k")), b.add([]byte("1")), b.add([]byte("2"))
	const url = "http://127.0.0.1:8080/blobs/sha256/"
	ready := netboot.Boot{ID: "b1", Title: "n1: web", Kernel: kernel, Initrds: []digest.Digest{first, second}, Args: []string{"quiet"}}
	bare := netboot.Boot{ID: "b1", Title: "n1: web", Kernel: kernel}
	unsafe := ready
	unsafe.Args = []string{"a\nreboot"}
	tests := []struct {
		name     string
		director director
		want     []string
		fails    bool
	}{
		{"ready", director{boot: ready}, []string{
			"kernel --name kernel " + url + kernel.Hex() + "?mac=" + mac + "&boot=b1 initrd=initrd0 initrd=initrd1 " +
				"troupe.server=http://127.0.0.1:8080 troupe.mac=" + mac + " troupe.boot=b1 quiet || goto failed\n",
			"initrd --name initrd0 " + url + first.Hex() + "?mac=" + mac + "&boot=b1 || goto failed\n",
			"initrd --name initrd1 " + url + second.Hex() + "?mac=" + mac + "&boot=b1&last=1 || goto failed\n",
		}, false},
		{"no initrd", director{boot: bare}, []string{url + kernel.Hex() + "?mac=" + mac + "&boot=b1&last=1 troupe.server="}, false},
		{"a disk", director{boot: netboot.Boot{ID: "b1", Title: "n1: vm", Disk: &netboot.Disk{
			Port: 3260, Target: "iqn.2026-11.dev.troupe:n1", Initiator: "iqn.2026-11.dev.troupe:n1:initiator", User: "n1", Secret: "s1", MutualUser: "troupe", MutualSecret: "s2",
		}}}, []string{"set password s1\n", "set reverse-password s2\n", "sanboot iscsi:127.0.0.1::3260:0:iqn.2026-11.dev.troupe:n1 || goto failed\n"}, false},
		{"nothing yet", director{boot: netboot.Boot{Title: "n1: building"}}, []string{"echo troupe: n1: building\n", "chain --replace"}, false},
		{"no answer", director{err: errors.New("no fleet")}, []string{"no fleet", "chain --replace"}, true},
		{"an argument that no script can hold", director{boot: unsafe}, []string{"kernel argument", "chain --replace"}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			events := make(observer, 10)
			start(t, &netboot.Server{Director: tt.director, Blobs: b, Observer: events}, "lo")
			text := fetch(t, "/boot/ipxe?mac="+mac+"&arch=0")
			for _, want := range tt.want {
				if !strings.Contains(text, want) {
					t.Errorf("the script lacks %q:\n%s", want, text)
				}
			}
			if strings.Contains(text, "\nreboot\nquiet") {
				t.Errorf("an argument became a command:\n%s", text)
			}
			e := <-events
			if e.MAC.String() != mac || e.Stage != netboot.StageScript || (e.Err != nil) != tt.fails {
				t.Errorf("event %+v", e)
			}
		})
	}
}

// TestScriptErrorsAreRateLimited: anybody may ask for a script that there is none of.
func TestScriptErrorsAreRateLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := &netboot.Server{Director: director{err: errors.New("no fleet")}, Blobs: blobs{}, Log: slog.New(slog.NewTextHandler(&log, nil))}
		h := s.Handler()
		for range 1000 {
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/boot/ipxe?mac="+mac, nil))
		}
		if n := strings.Count(log.String(), "\n"); n != quiet.LinesPerSecond {
			t.Errorf("%d log lines for 1000 requests, want %d", n, quiet.LinesPerSecond)
		}
	})
}

func fetch(t *testing.T, path string) string {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get("http://127.0.0.1:8080" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestStagesOfFiles: the kernel is there once the last file is, and a boot loader is one by TFTP and by HTTP.
func TestStagesOfFiles(t *testing.T) {
	nettest.Here(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "snponly.efi"), []byte("MZ"), 0o600); err != nil {
		t.Fatal(err)
	}
	b, events := blobs{}, make(observer, 10)
	d := b.add([]byte("bytes"))
	start(t, &netboot.Server{Director: director{}, Blobs: b, Observer: events, LoaderDirs: []string{dir}}, "lo")
	fetch(t, "/boot/ipxe?mac="+mac) // from now on the address is known to be the machine's
	fetch(t, "/blobs/sha256/"+d.Hex()+"?mac="+mac+"&boot=b1")
	fetch(t, "/blobs/sha256/"+d.Hex())
	fetch(t, "/boot/files/snponly.efi")
	if out, err := exec.Command("curl", "-s", "-S", "tftp://127.0.0.1/snponly.efi").CombinedOutput(); err != nil || string(out) != "MZ" {
		t.Errorf("TFTP: %q, %v", out, err)
	}
	loaders := 0
	got := events.await(t, func(e netboot.Event) bool { // TFTP's is told only after the last block was acknowledged
		if e.Stage == netboot.StageTFTP {
			loaders++
		}
		return loaders == 2
	})
	fetch(t, "/blobs/sha256/"+d.Hex()+"?mac="+mac+"&boot=b1&last=1")
	got = append(got, events.await(t, func(e netboot.Event) bool { return e.Stage == netboot.StageKernel })...)
	if want := mac + " script," + mac + " tftp," + mac + " tftp," + mac + " kernel"; strings.Join(got, ",") != want {
		t.Errorf("events:\n got %s\nwant %s", strings.Join(got, ","), want)
	}
}

func TestListenOnAnUnknownInterface(t *testing.T) {
	if _, err := netboot.Listen(t.Context(), "nosuch0", dhcp.ModeProxy); err == nil || !strings.Contains(err.Error(), "nosuch0") {
		t.Errorf("got %v", err)
	}
}
