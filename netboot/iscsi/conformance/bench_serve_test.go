package conformance

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"

	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// serveVerb is the first argument of a test program that is to be a server.
const serveVerb = "serve"

// profileVariable names a file that the server writes a profile of its processor time to.
const profileVariable = "ISCSI_BENCH_PROFILE"

// iqn is the name of the target that is called so on the server's command line.
func iqn(name string) string { return "iqn.2026-11.dev.troupe:" + name }

// serve has one target for each argument NAME=ro:FILE, NAME=cow:BASE,DELTA or NAME=rw:FILE, each with its unit as LUN 0. It
// says which address it listens at, and ends with SIGTERM.
func serve(args []string, out io.Writer) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if file := os.Getenv(profileVariable); file != "" {
		f, err := os.Create(file)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	dir := &directory{targets: make(map[string]offer)}
	var open []io.Closer
	defer func() {
		for _, c := range open {
			_ = c.Close() // the process ends, and what was acknowledged is safe without
		}
	}()
	for _, arg := range args {
		name, spec, _ := strings.Cut(arg, "=")
		target, closer, err := openTarget(name, spec)
		if err != nil {
			return fmt.Errorf("opening %s: %w", arg, err)
		}
		open = append(open, closer)
		dir.targets[iqn(name)] = offer{target: target}
	}
	srv, err := iscsi.NewServer(iscsi.Config{Directory: dir})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Fprintln(out, l.Addr())
	return srv.Serve(ctx, l)
}

func openTarget(name, spec string) (*iscsi.Target, io.Closer, error) {
	medium, err := openSpec(spec)
	if err != nil {
		return nil, nil, err
	}
	lu, err := scsi.NewUnit(medium, scsi.Config{Serial: name})
	if err != nil {
		return nil, nil, err
	}
	target := iscsi.NewTarget(iqn(name))
	return target, medium, target.Add(0, lu)
}

type mediumCloser interface {
	scsi.Medium
	io.Closer
}

func openSpec(spec string) (mediumCloser, error) {
	kind, file, _ := strings.Cut(spec, ":")
	switch kind {
	case "ro":
		return lun.OpenImage(file)
	case "rw":
		return lun.OpenDisk(file, 0)
	case "cow":
		base, delta, _ := strings.Cut(file, ",")
		image, err := lun.OpenImage(base)
		if err != nil {
			return nil, err
		}
		return lun.OpenDelta(image, delta, 0, "base")
	}
	return nil, fmt.Errorf("%q is no kind of unit", kind)
}

// A server is a process that has targets, ours or tgtd.
type server struct {
	name string
	addr string // "IP:PORT"
	pid  int
	// url gives the unit that is called so on the command line.
	url func(unit string) string
}

// startOurs starts our server, which ends with the benchmark.
func startOurs(b *testing.B, args ...string) *server {
	b.Helper()
	cmd := exec.Command(os.Args[0], append([]string{serveVerb}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	endWith(b, cmd, syscall.SIGTERM, &stderr)
	addr, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		b.Fatalf("starting the server: %v", errors.Join(err, errors.New(stderr.String())))
	}
	s := &server{name: "ours", addr: strings.TrimSpace(addr), pid: cmd.Process.Pid}
	s.url = func(unit string) string { return "iscsi://" + s.addr + "/" + iqn(unit) + "/0" }
	return s
}

// endWith ends a process with the benchmark, by a signal.
func endWith(b *testing.B, cmd *exec.Cmd, by syscall.Signal, stderr *bytes.Buffer) {
	b.Helper()
	b.Cleanup(func() {
		_ = cmd.Process.Signal(by) // it may have ended already, and Wait says so
		if err := cmd.Wait(); err != nil && !endedBySignal(err) {
			b.Errorf("%s: %v\n%s", cmd.Path, err, stderr)
		}
	})
}

func endedBySignal(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled()
}
