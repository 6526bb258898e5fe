package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"
)

const (
	verifySize  = 64 << 20                     // bytes of the disk under test
	verifyKills = 4                            // of the server, while it is written to
	killAfter   = verifySize / verifyKills / 2 // bytes that the delta grows by from kill to kill
)

// TestISCSIServerKilledUnderVerify kills the target again and again while fio writes a copy-on-write disk of it and reads back what it
// wrote, through QEMU's initiator, which logs in again and repeats what it had no answer to. The delta has half of the disk
// after the last kill; what fio wrote before is checked once more by a server that began after all of it.
func TestISCSIServerKilledUnderVerify(t *testing.T) {
	dir := t.TempDir()
	base, delta := filepath.Join(dir, "base"), filepath.Join(dir, "delta")
	if err := os.WriteFile(base, bytes.Repeat([]byte("base "), verifySize/5+1)[:verifySize], 0o600); err != nil {
		t.Fatal(err)
	}
	srv := startISCSI(t, freeAddress(t), "cow:"+base+","+delta)
	socket := startNBD(t, dir, srv.url)

	written := startFio(t, socket)
	for n := 1; n <= verifyKills; n++ {
		awaitAllocated(t, delta, int64(n*killAfter), written)
		srv.kill()
		srv = startISCSI(t, srv.addr, "cow:"+base+","+delta)
	}
	if err := <-written.ended; err != nil {
		t.Fatalf("fio: %v\n%s", err, written.output.String())
	}

	srv.kill()
	startISCSI(t, srv.addr, "cow:"+base+","+delta)
	check := startFio(t, socket, "--verify_only")
	if err := <-check.ended; err != nil {
		t.Fatalf("fio, of all that was written: %v\n%s", err, check.output.String())
	}
}

// An iscsiServer is `troupe iscsi serve` under way.
type iscsiServer struct {
	t    *testing.T
	cmd  *exec.Cmd
	addr string
	url  string // of LUN 0
	gone bool
}

var iqnInLine = regexp.MustCompile(`iqn\.[^\s,"]+`)

// startISCSI returns when the server listens. It ends with the test.
func startISCSI(t *testing.T, addr, lun string) *iscsiServer {
	t.Helper()
	cmd := exec.Command("troupe", "iscsi", "serve", "--listen", addr, "--lun", lun)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &iscsiServer{t: t, cmd: cmd, addr: addr}
	t.Cleanup(s.kill)
	said := bufio.NewReader(stdout)
	for s.url == "" {
		line, err := said.ReadString('\n')
		if err != nil {
			t.Fatalf("waiting for the server to say its name: %v", err)
		}
		if iqn := iqnInLine.FindString(line); iqn != "" {
			s.url = "iscsi://" + addr + "/" + iqn + "/0"
		}
	}
	go func() { _, _ = io.Copy(io.Discard, said) }() // ends with the process
	return s
}

// kill ends the server as a crash does.
func (s *iscsiServer) kill() {
	if s.gone {
		return
	}
	s.gone = true
	if err := s.cmd.Process.Kill(); err != nil {
		s.t.Errorf("killing the server: %v", err)
	}
	_ = s.cmd.Wait() // "signal: killed"
}

// freeAddress finds a loopback address that nobody listens at. The server comes back to it after each kill.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// startNBD has QEMU log in to a unit and export it at a socket, as Debian's fio has no iSCSI of its own.
func startNBD(t *testing.T, dir, url string) string {
	t.Helper()
	socket := filepath.Join(dir, "nbd")
	cmd := exec.Command("qemu-nbd", "--socket="+socket, "--format=raw", "--persistent", "--shared=4", url)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // told to end, it would flush first, and wait for a server that has ended
		err := cmd.Wait()
		if t.Failed() {
			t.Logf("qemu-nbd: %v\n%s", err, output.String())
		}
	})
	awaitTrue(t, time.Minute, "qemu-nbd to listen", func() bool {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
	return socket
}

// A fioRun is fio under way.
type fioRun struct {
	output bytes.Buffer
	ended  chan error // gets one
}

// startFio writes the whole disk in random order, in pieces of 512 bytes to 64 KiB, up to 16 at a time, and reads all of it back.
func startFio(t *testing.T, socket string, args ...string) *fioRun {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	args = append([]string{
		"--name=verify", "--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket, fmt.Sprintf("--size=%d", verifySize),
		"--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=16", "--fsync=64", "--randseed=3",
		"--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
	}, args...)
	r := &fioRun{ended: make(chan error, 1)}
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Dir = t.TempDir() // it leaves files of its own
	cmd.Stdout, cmd.Stderr = &r.output, &r.output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.ended <- cmd.Wait() }()
	return r
}

// awaitAllocated waits until a file takes so many bytes of the disk. It is an error if fio ends before.
func awaitAllocated(t *testing.T, path string, bytes int64, running *fioRun) {
	t.Helper()
	awaitTrue(t, 3*time.Minute, fmt.Sprintf("%s to take %d bytes", path, bytes), func() bool {
		select {
		case err := <-running.ended:
			t.Fatalf("fio ended before it wrote so much: %v\n%s", err, running.output.String())
		default:
		}
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks*512 >= bytes
	})
}

// awaitTrue waits until something is so.
func awaitTrue(t *testing.T, limit time.Duration, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(limit)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-deadline:
			t.Fatalf("waited %v for %s", limit, what)
		case <-tick.C:
		}
	}
}
