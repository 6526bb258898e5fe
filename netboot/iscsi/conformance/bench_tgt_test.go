package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// unpacked is where .ci/packages unpacks tgt: installed as a package it would be started.
const unpacked = "../../../bin/tgt/usr/sbin"

// tgtProgram finds a program of tgt.
func tgtProgram(b *testing.B, name string) string {
	b.Helper()
	if path, err := filepath.Abs(filepath.Join(unpacked, name)); err == nil {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		b.Fatalf("%v: `.ci/packages bench` gets it", err)
	}
	return path
}

// A tgt is a tgtd under way, with a control port of its own.
type tgt struct {
	b       *testing.B
	admin   string
	control string // its control port: the name of a socket in the directory of TGT_IPC_SOCKET
	env     []string
}

// startTgt starts a tgtd in the foreground, with one target for each NAME=FILE. A unit is LUN 1: LUN 0 is its controller.
func startTgt(b *testing.B, args ...string) *server {
	b.Helper()
	dir := b.TempDir()
	port := freePort(b)
	g := &tgt{
		b: b, admin: tgtProgram(b, "tgtadm"), control: strconv.Itoa(os.Getpid() % 30000),
		env: append(os.Environ(), "TGT_IPC_SOCKET="+filepath.Join(dir, "control")),
	}
	cmd := exec.Command(tgtProgram(b, "tgtd"), "--foreground", "--control-port", g.control, "--iscsi", "portal=127.0.0.1:"+port)
	cmd.Env = g.env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	endWith(b, cmd, syscall.SIGKILL, &stderr) // it does not end by SIGTERM for as long as it has targets
	g.awaitReady()
	for i, arg := range args {
		name, file, _ := strings.Cut(arg, "=")
		g.add(i+1, name, file)
	}
	s := &server{name: "tgt", addr: "127.0.0.1:" + port, pid: cmd.Process.Pid}
	s.url = func(unit string) string { return "iscsi://" + s.addr + "/" + iqn(unit) + "/1" }
	return s
}

// awaitReady returns when tgtd answers its control port.
func (g *tgt) awaitReady() {
	ctx, cancel := context.WithTimeout(g.b.Context(), 10*time.Second)
	defer cancel()
	if err := await(ctx, func() bool { return g.run("target", "show") == nil }); err != nil {
		g.b.Fatalf("waiting for tgtd: %v", errors.Join(err, g.run("target", "show")))
	}
}

func (g *tgt) add(tid int, name, file string) {
	g.b.Helper()
	id := strconv.Itoa(tid)
	err := errors.Join(
		g.run("target", "new", "--tid", id, "--targetname", iqn(name)),
		g.run("logicalunit", "new", "--tid", id, "--lun", "1", "--backing-store", file),
		g.run("logicalunit", "update", "--tid", id, "--lun", "1", "--params", "thin_provisioning=1"),
		g.run("target", "bind", "--tid", id, "--initiator-address", "ALL"),
	)
	if err != nil {
		g.b.Fatal(err)
	}
}

func (g *tgt) run(mode, op string, args ...string) error {
	args = append([]string{"--control-port", g.control, "--lld", "iscsi", "--mode", mode, "--op", op}, args...)
	cmd := exec.Command(g.admin, args...)
	cmd.Env = g.env
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("tgtadm %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// freePort finds a TCP port that nobody listens at, for programs that cannot say which one they took.
func freePort(b *testing.B) string {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	return port
}

// await returns when a condition holds.
func await(ctx context.Context, holds func() bool) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}
