package conformance

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// A directory is the targets of a test. Every initiator may use each that it can prove itself to.
type directory struct {
	mu      sync.Mutex
	targets map[string]offer
}

type offer struct {
	target *iscsi.Target
	chap   *iscsi.CHAP
}

func (d *directory) Discover(string) (*iscsi.CHAP, []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var names []string
	for name := range d.targets {
		names = append(names, name)
	}
	slices.Sort(names)
	return nil, names
}

func (d *directory) Open(_, target string) (*iscsi.Target, *iscsi.CHAP, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, ok := d.targets[target]
	if !ok {
		return nil, nil, iscsi.ErrNoTarget
	}
	return o.target, o.chap, nil
}

// A portal is a server on a loopback port.
type portal struct {
	addr string
	dir  *directory
	logs *logTail
}

// startPortal starts a server that ends with the test.
func startPortal(t testing.TB) *portal {
	t.Helper()
	p := &portal{dir: &directory{targets: make(map[string]offer)}, logs: &logTail{}}
	srv, err := iscsi.NewServer(iscsi.Config{Directory: p.dir, Log: slog.New(slog.NewTextHandler(p.logs, nil))})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serving: %v", err)
		}
		if t.Failed() {
			t.Logf("the server's last words:\n%s", p.logs)
		}
	})
	return p
}

// A unit is what a test's target has as LUN 0.
type unit struct {
	medium   scsi.Medium
	physical int // bytes of a physical block; 0: as scsi has it
	chap     *iscsi.CHAP
}

// add makes a target for a unit, and gives the unit's URL.
func (p *portal) add(t testing.TB, u unit) string {
	t.Helper()
	p.dir.mu.Lock()
	defer p.dir.mu.Unlock()
	name := fmt.Sprintf("iqn.2026-11.dev.troupe:conformance-%d", len(p.dir.targets))
	lu, err := scsi.NewUnit(u.medium, scsi.Config{Serial: name[len(name)-12:], PhysicalBlock: u.physical})
	if err != nil {
		t.Fatal(err)
	}
	target := iscsi.NewTarget(name)
	if err := target.Add(0, lu); err != nil {
		t.Fatal(err)
	}
	p.dir.targets[name] = offer{target, u.chap}
	return "iscsi://" + p.addr + "/" + name + "/0"
}

// openImage makes a file of so many bytes of a pattern, and opens it to be read.
func openImage(t testing.TB, path string, size int64) *lun.Image {
	t.Helper()
	writePattern(t, path, size)
	m, err := lun.OpenImage(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMedium(t, m) })
	return m
}

// writePattern fills a file with bytes that differ from block to block.
func writePattern(t testing.TB, path string, size int64) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off := int64(0); off < size; off += int64(len(buf)) {
		for i := range buf {
			buf[i] = byte(i ^ i>>9 ^ int(off>>20))
		}
		if _, err := f.Write(buf[:min(int64(len(buf)), size-off)]); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func closeMedium(t testing.TB, m io.Closer) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// A logTail keeps the end of a log.
type logTail struct {
	mu  sync.Mutex
	end []byte
}

const logTailSize = 16 << 10 // bytes

func (l *logTail) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end = append(l.end, p...)
	if over := len(l.end) - logTailSize; over > 0 {
		l.end = append(l.end[:0], l.end[over:]...)
	}
	return len(p), nil
}

func (l *logTail) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.end)
}
