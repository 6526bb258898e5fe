package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// readyWord is what the inner half says when its network is there.
	readyWord = "ok"
	// uplinkAddr is where the inner half's programs find the proxy.
	uplinkAddr = "127.0.0.1:3128"

	// Descriptors of init, and of the supervisor.
	lifeFD, readyFD   = 3, 4
	supervisorReadyFD = 3
)

// IsInside says whether a command line, program name included, asks for the inner half of a lab: then the program shall do
// nothing but exit with what RunInside returns. A test program that starts labs does so in TestMain.
func IsInside(args []string) bool {
	return (len(args) == 4 || len(args) == 5 && args[4] == "supervise") && args[1] == "lab" && args[2] == "inside"
}

// RunInside is the inner half of a lab and returns its exit status. It is two processes. The first is init (PID 1) of the
// process namespace: it collects what others leave behind, and when it ends the kernel ends all the rest. The second one
// does the work, with the privileges of the namespaces' root: the first started before that identity was there.
func RunInside(args []string) int {
	var err error
	if len(args) == 5 {
		err = supervise(args[3], os.NewFile(supervisorReadyFD, "ready"))
	} else {
		err = runInit(args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	return 0
}

// runInit waits for the outer half's word, starts the second process and ends with it, or when the outer half is gone.
func runInit(args []string) error {
	if os.Getpid() != 1 {
		return errors.New("this is a part of troupe lab up, not to be run by hand")
	}
	// What comes by descriptor is for this process: neither the supervisor nor what that starts may keep it open.
	unix.CloseOnExec(lifeFD)
	unix.CloseOnExec(readyFD)
	life := os.NewFile(lifeFD, "life")
	if _, err := io.ReadFull(life, make([]byte, 1)); err != nil {
		return fmt.Errorf("waiting for the outer half: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	pid, err := syscall.ForkExec(self, append(args, "supervise"), &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2, readyFD},
	})
	if err != nil {
		return fmt.Errorf("starting the lab's supervisor: %w", err)
	}
	syscall.Close(readyFD)
	go func() {
		// The outer half never writes again: this ends with it.
		_, _ = io.Copy(io.Discard, life)
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}()
	for {
		var status syscall.WaitStatus
		switch done, err := syscall.Wait4(-1, &status, 0, nil); {
		case err == syscall.EINTR:
		case err != nil:
			return fmt.Errorf("waiting for the lab's supervisor: %w", err)
		case done == pid && status.ExitStatus() != 0:
			return fmt.Errorf("the lab's supervisor ended with status %d, signal %d", status.ExitStatus(), status.Signal())
		case done == pid:
			return nil
		}
	}
}

// supervise builds the network, answers on the control socket and holds the machines and the server until it is told to
// end. What keeps it from starting is said to ready.
func supervise(dir string, ready *os.File) error {
	defer ready.Close()
	unix.CloseOnExec(int(ready.Fd()))
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	// Of what happens to the lab there is a line each; it is read when something went wrong.
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	s, err := newSupervisor(dir, log)
	if err == nil {
		err = s.open(ctx)
	}
	if err != nil {
		_, _ = fmt.Fprintln(ready, err)
		return err
	}
	if len(s.rec.Serve.Args) > 0 {
		if err := s.server.start(s.rec.Serve.Args); err != nil {
			_, _ = fmt.Fprintln(ready, err)
			return errors.Join(err, s.close())
		}
	}
	if _, err := fmt.Fprintln(ready, readyWord); err != nil {
		return errors.Join(err, s.close())
	}
	ready.Close()
	select {
	case <-ctx.Done():
	case <-s.down:
	}
	return s.close()
}

// mountOwn gives the mount namespace what belongs to this process and network namespace instead of the host's.
func mountOwn() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	return nil
}

// open makes all of the inner half but the machines' power and the server.
func (s *supervisor) open(ctx context.Context) error {
	if err := mountOwn(); err != nil {
		return err
	}
	if err := makeNetwork(s.rec.Router, s.taps()); err != nil {
		return err
	}
	var lc net.ListenConfig
	proxy, err := lc.Listen(ctx, "tcp", uplinkAddr)
	if err != nil {
		return fmt.Errorf("uplink: %w", err)
	}
	s.uplink = &relay{listener: proxy, log: s.log, dial: func(ctx context.Context) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		return dialUnix(ctx, filepath.Join(s.dir, uplinkSock))
	}}
	s.serving.Go(s.uplink.serve)
	control, err := listenUnix(ctx, filepath.Join(s.dir, controlSock))
	if err != nil {
		return errors.Join(err, s.close())
	}
	s.control.Handler = s.handler()
	s.serving.Go(func() {
		if err := s.control.Serve(control); err != nil {
			s.log.Info("control socket closed", "why", err)
		}
	})
	return nil
}

// close ends machines, server and sockets, in this order.
func (s *supervisor) close() error {
	s.log.Info("going down")
	var errs []error
	for _, m := range s.machines {
		errs = append(errs, m.power(context.Background(), Off))
	}
	errs = append(errs, s.server.stop(unix.SIGTERM, serveGrace))
	// Whoever asked for the end is to hear that it was understood.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.control.Shutdown(ctx); err != nil {
		errs = append(errs, err, s.control.Close())
	}
	errs = append(errs, s.uplink.Close())
	s.tunnels.close()
	s.serving.Wait()
	return errors.Join(errs...)
}
