package e2e

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/troupe-dev/troupe/internal/qemu"
)

// TestVirtualMachine attaches a LUN to a machine by QEMU's own initiator: the machine sees a disk like any other, and the
// same image boots in it that machines without QEMU boot by iPXE. CHAP is asked for.
func TestVirtualMachine(t *testing.T) {
	troupe, _ := programs(t)
	dir := t.TempDir()
	base := copyStock(t, dir, "raw")
	before := sum(t, base)
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("a secret of 23 letters."), 0o600); err != nil {
		t.Fatal(err)
	}
	s := serveLUN(t, troupe, "cow:"+base+","+filepath.Join(dir, "delta"), secret)

	if out, err := s.img(t, secret, "compare", base); err != nil {
		t.Errorf("the LUN differs from the image that it is based on: %v\n%s", err, out)
	}
	wrong := filepath.Join(dir, "wrong")
	if err := os.WriteFile(wrong, []byte("some other 23 letters.."), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := s.img(t, wrong, "compare", base); err == nil {
		t.Errorf("the LUN can be read with a wrong secret:\n%s", out)
	}

	for number := range 2 {
		got := s.boot(t, secret)
		if want := (stockBoot{Number: number + 1, Firmware: "bios", Root: "/dev/vda2", Target: "none"}); got != want {
			t.Errorf("boot %d of the virtual machine: it says %+v, want %+v", number+1, got, want)
		}
	}
	if sum(t, base) != before {
		t.Error("the image was written to: that belongs into the delta")
	}
}

// A lunServer is `troupe iscsi serve` with one LUN.
type lunServer struct {
	portal string
	target string
}

const chapUser = "tester"

var (
	portalText = regexp.MustCompile(`127\.0\.0\.1:[1-9]\d*`)
	targetText = regexp.MustCompile(`iqn\.[a-z0-9.:-]+`)
)

// serveLUN starts the server, and ends it with the test as systemd would.
func serveLUN(t *testing.T, troupe, lun, secret string) lunServer {
	t.Helper()
	cmd := exec.Command(troupe, "iscsi", "serve", "--listen", "127.0.0.1:0", "--lun", lun, "--chap-user", chapUser, "--chap-secret-file", secret)
	said := &strings.Builder{}
	cmd.Stderr = said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	rest := make(chan struct{})
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // an error says that it has ended
		<-rest
		if err := cmd.Wait(); err != nil {
			t.Errorf("troupe iscsi serve: %v", err)
		}
		if t.Failed() {
			t.Log(said)
		}
	})
	var s lunServer
	lines := bufio.NewReader(out)
	for err == nil && (s.portal == "" || s.target == "") {
		var line string
		line, err = lines.ReadString('\n')
		if p := portalText.FindString(line); p != "" {
			s.portal = p
		}
		if iqn := targetText.FindString(line); iqn != "" {
			s.target = iqn
		}
	}
	go func() {
		_, _ = io.Copy(io.Discard, lines) // what is not read would stop the server
		close(rest)
	}()
	if err != nil {
		t.Fatalf("waiting for troupe iscsi serve to say where it listens, and its name: %v", err)
	}
	return s
}

// options are QEMU's for the LUN, with its secret in an object of its own.
func (s lunServer) options(secret string) (object, drive string) {
	return "secret,id=chap,file=" + secret,
		"driver=iscsi,transport=tcp,portal=" + s.portal + ",target=" + s.target + ",lun=0,user=" + chapUser + ",password-secret=chap" +
			",initiator-name=iqn.2026-11.dev.troupe:tester"
}

// img runs a verb of qemu-img on a file and the LUN.
func (s lunServer) img(t *testing.T, secret, verb, file string) (string, error) {
	t.Helper()
	object, drive := s.options(secret)
	out, err := exec.CommandContext(t.Context(), "qemu-img", verb, "--object", object, "--image-opts", "driver=raw,file.driver=file,file.filename="+file, drive).CombinedOutput()
	return string(out), err
}

// boot runs a machine from the LUN until its OS says that it booted, and then pulls the plug.
func (s lunServer) boot(t *testing.T, secret string) stockBoot {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	accel, _ := qemu.ProbeAccel(ctx)
	cpu := map[string]string{"kvm": "host", "tcg": "qemu64"}[accel]
	object, drive := s.options(secret)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-accel", accel, "-cpu", cpu,
		"-m", "512", "-machine", "q35,graphics=off", "-serial", "stdio", "-object", object,
		"-blockdev", drive+",node-name=disk,read-only=off", "-device", "virtio-blk-pci,drive=disk",
		// An initramfs that would use iSCSI waits for a network card, three minutes long.
		"-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile=")
	said := &strings.Builder{}
	cmd.Stderr = said
	console, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(console)
	for {
		line, err := lines.ReadString('\n')
		said.WriteString(line)
		if boot, ok := parseStock(line); ok || err != nil {
			kill := cmd.Process.Kill()
			_ = cmd.Wait() // "signal: killed"
			if !ok {
				t.Fatalf("the virtual machine does not boot: %v; it said last:\n%s", errors.Join(err, kill, context.Cause(ctx)), last(said.String(), 2000))
			}
			return boot
		}
	}
}

// last is the end of a text, for an error.
func last(text string, most int) string { return text[max(0, len(text)-most):] }
