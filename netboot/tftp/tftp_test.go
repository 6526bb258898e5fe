package tftp_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	client "github.com/pin/tftp/v3"
	"go.uber.org/goleak"

	"github.com/troupe-dev/troupe/netboot/internal/nettest"
	"github.com/troupe-dev/troupe/netboot/tftp"
)

// TestMain: curl and tftp ask on port 69, which is free in a namespace of our own.
func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// loader is a file of several blocks whose last one is not full.
var loader = bytes.Repeat([]byte("0123456789abcde\n"), 6000)[:95_999]

type file struct{ *bytes.Reader }

func (file) Close() error { return nil }

func open(name string) (io.ReadSeekCloser, error) {
	switch name {
	case "undionly.kpxe":
		return file{bytes.NewReader(loader)}, nil
	case "broken":
		return nil, errors.New("the disk is on fire")
	}
	return nil, fs.ErrNotExist
}

// serve runs s on port 69 of the loopback and returns what it tells.
func serve(t *testing.T, s *tftp.Server) <-chan tftp.Transfer {
	t.Helper()
	nettest.Here(t)
	conn, err := net.ListenPacket("udp4", "127.0.0.1:69")
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan tftp.Transfer, 1000)
	if s.Open == nil {
		s.Open = open
	}
	s.Observe = func(tr tftp.Transfer) { told <- tr }
	leaks := goleak.IgnoreCurrent()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, conn) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		goleak.VerifyNone(t, leaks)
	})
	return told
}

func wantSent(t *testing.T, told <-chan tftp.Transfer) {
	t.Helper()
	tr := <-told
	if tr.Err != nil || tr.Name != "undionly.kpxe" || tr.Bytes != int64(len(loader)) || tr.Peer.String() != "127.0.0.1" {
		t.Errorf("told %+v", tr)
	}
}

func TestTFTPHPA(t *testing.T) {
	told := serve(t, &tftp.Server{})
	out := filepath.Join(t.TempDir(), "out")
	if b, err := exec.Command("tftp", "-m", "binary", "127.0.0.1", "-c", "get", "undionly.kpxe", out).CombinedOutput(); err != nil {
		t.Fatalf("tftp: %v\n%s", err, b)
	}
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, loader) {
		t.Errorf("got %d bytes, %v; want the file", len(got), err)
	}
	wantSent(t, told)
}

func TestCurl(t *testing.T) {
	told := serve(t, &tftp.Server{})
	for _, size := range []int{512, 1428, 8192} {
		got, err := exec.Command("curl", "-s", "-S", "--tftp-blksize", strconv.Itoa(size), "tftp://127.0.0.1/undionly.kpxe").Output()
		if err != nil || !bytes.Equal(got, loader) {
			t.Errorf("blocks of %d: got %d bytes, %v; want the file", size, len(got), err)
		}
		wantSent(t, told)
	}
}

func TestSizeIsTold(t *testing.T) {
	serve(t, &tftp.Server{})
	c, err := client.NewClient("127.0.0.1:69")
	if err != nil {
		t.Fatal(err)
	}
	c.RequestTSize(true)
	wt, err := c.Receive("undionly.kpxe", "octet")
	if err != nil {
		t.Fatal(err)
	}
	if n, ok := wt.(client.IncomingTransfer).Size(); !ok || n != int64(len(loader)) {
		t.Errorf("tsize %d, %t, want %d", n, ok, len(loader))
	}
	if _, err := wt.WriteTo(io.Discard); err != nil {
		t.Error(err)
	}
}

// TestNamesAsFirmwareSendsThem: with slashes of both kinds, with bytes after the end, and with the mode in any case (RFC 1350
// section 5).
func TestNamesAsFirmwareSendsThem(t *testing.T) {
	serve(t, &tftp.Server{})
	for _, name := range []string{"undionly.kpxe", "/undionly.kpxe", `\undionly.kpxe`, "//boot/undionly.kpxe", "undionly.kpxe\xff", "../../undionly.kpxe"} {
		for _, mode := range []string{"octet", "OCTET"} {
			if op, msg := ask(t, rrq(name, mode)); op != opData {
				t.Errorf("%q in mode %s: got %d %q, want data", name, mode, op, msg)
			}
		}
	}
}

const (
	opRead, opWrite, opData, opError, opOptions = 1, 2, 3, 5, 6
)

func rrq(name, mode string, options ...string) []byte {
	return []byte("\x00\x01" + strings.Join(append([]string{name, mode}, options...), "\x00") + "\x00")
}

// dial is a socket that a machine asks from.
func dial(t *testing.T) net.PacketConn {
	t.Helper()
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pc.Close() })
	if err := pc.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return pc
}

// ask sends one request and returns the first answer. Then it refuses the rest, as firmware does that wanted to know the size.
func ask(t *testing.T, req []byte) (op int, msg string) {
	t.Helper()
	pc := dial(t)
	if _, err := pc.WriteTo(req, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 69}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2048)
	n, from, err := pc.ReadFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	if b[1] != opError {
		if _, err := pc.WriteTo([]byte("\x00\x05\x00\x00User aborted\x00"), from); err != nil {
			t.Fatal(err)
		}
	}
	return int(b[1]), string(b[4:n])
}

func TestOtherNamesAreRefused(t *testing.T) {
	told := serve(t, &tftp.Server{})
	for name, want := range map[string]string{
		"pxelinux.cfg/default":   "no file",
		"/etc/passwd":            "no file",
		"../../etc/passwd":       "no file",
		"undionly.kpxe/":         "no file",
		"":                       "no file",
		"broken":                 "the disk is on fire",
		strings.Repeat("x", 400): "no file",
	} {
		if op, msg := ask(t, rrq(name, "octet")); op != opError || !strings.Contains(msg, want) {
			t.Errorf("%q: got %d %q, want an error with %q", name, op, msg, want)
		}
		if tr := <-told; tr.Err == nil {
			t.Errorf("%q: told %+v, want a failure", name, tr)
		}
	}
}

func TestWritesAreRefused(t *testing.T) {
	serve(t, &tftp.Server{})
	if op, msg := ask(t, []byte("\x00\x02undionly.kpxe\x00octet\x00")); op != opError {
		t.Errorf("got %d %q, want an error", op, msg)
	}
}

// TestProbeIsNoFailure: EDK2 and BIOS ROMs ask for the size, refuse the answer, and ask again.
func TestProbeIsNoFailure(t *testing.T) {
	told := serve(t, &tftp.Server{})
	if op, msg := ask(t, rrq("undionly.kpxe", "octet", "tsize", "0", "blksize", "1468")); op != opOptions || !strings.Contains(msg, strconv.Itoa(len(loader))) {
		t.Fatalf("got %d %q, want the size", op, msg)
	}
	if got, err := exec.Command("curl", "-s", "-S", "tftp://127.0.0.1/undionly.kpxe").Output(); err != nil || !bytes.Equal(got, loader) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	wantSent(t, told) // and nothing of the probe before it
}

func TestJunk(t *testing.T) {
	told := serve(t, &tftp.Server{})
	pc := dial(t)
	for i := range 256 {
		if _, err := pc.WriteTo(bytes.Repeat([]byte{0, byte(i)}, i), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 69}); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := exec.Command("curl", "-s", "-S", "tftp://127.0.0.1/undionly.kpxe").Output(); err != nil || !bytes.Equal(got, loader) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	for tr := range told {
		if tr.Name == "undionly.kpxe" {
			break
		}
	}
}

// TestTransfersAreBounded: the one slot is taken by a machine that stays silent after its request.
func TestTransfersAreBounded(t *testing.T) {
	told := serve(t, &tftp.Server{Transfers: 1})
	pc := dial(t)
	if _, err := pc.WriteTo(rrq("undionly.kpxe", "octet"), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 69}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := pc.ReadFrom(make([]byte, 2048)); err != nil {
		t.Fatal(err)
	}
	if op, msg := ask(t, rrq("undionly.kpxe", "octet")); op != opError || !strings.Contains(msg, "too many") {
		t.Errorf("got %d %q, want an error", op, msg)
	}
	if tr := <-told; tr.Err == nil {
		t.Errorf("told %+v, want a failure", tr)
	}
}

// TestLossyClient acknowledges each block only when it comes for the second time.
func TestLossyClient(t *testing.T) {
	small := bytes.Repeat([]byte("x"), 1200)
	told := serve(t, &tftp.Server{Open: func(string) (io.ReadSeekCloser, error) { return file{bytes.NewReader(small)}, nil }})
	pc := dial(t)
	if _, err := pc.WriteTo(rrq("f", "octet"), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 69}); err != nil {
		t.Fatal(err)
	}
	var got []byte
	seen := map[byte]bool{}
	for b := make([]byte, 2048); ; {
		n, from, err := pc.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		if block := b[3]; !seen[block] {
			seen[block] = true
			continue
		}
		got = append(got, b[4:n]...)
		if _, err := pc.WriteTo([]byte{0, 4, b[2], b[3]}, from); err != nil {
			t.Fatal(err)
		}
		if n < 516 {
			break
		}
	}
	if !bytes.Equal(got, small) {
		t.Errorf("got %d bytes, want %d", len(got), len(small))
	}
	if tr := <-told; tr.Err != nil || tr.Bytes != int64(len(small)) {
		t.Errorf("told %+v", tr)
	}
}

// TestMany: a rack that is switched on.
func TestMany(t *testing.T) {
	serve(t, &tftp.Server{})
	const machines = 100
	errs := make(chan error)
	for range machines {
		go func() {
			c, err := client.NewClient("127.0.0.1:69")
			if err != nil {
				errs <- err
				return
			}
			c.SetBlockSize(1428)
			wt, err := c.Receive("undionly.kpxe", "octet")
			if err != nil {
				errs <- err
				return
			}
			var b bytes.Buffer
			_, err = wt.WriteTo(&b)
			if err == nil && !bytes.Equal(b.Bytes(), loader) {
				err = fmt.Errorf("got %d bytes", b.Len())
			}
			errs <- err
		}()
	}
	for range machines {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
