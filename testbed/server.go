package testbed

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// A server is the lab's troupe serve: one process at a time, whose output goes to one log.
type server struct {
	binary  string
	env     []string
	logPath string
	log     *slog.Logger

	mu    sync.Mutex
	args  []string
	cmd   *exec.Cmd     // nil: none was started
	ended chan struct{} // closed when cmd has; how and since are set before
	how   string
	since time.Time
}

func newServer(logPath string, rec record, log *slog.Logger) *server {
	proxy := "http://" + uplinkAddr
	// Programs disagree on the case of these names: curl and apt take lower case, others upper case.
	env := append(os.Environ(), "http_proxy="+proxy, "https_proxy="+proxy, "HTTP_PROXY="+proxy, "HTTPS_PROXY="+proxy)
	local := "127.0.0.0/8,localhost," + rec.Router.Masked().String()
	env = append(append(env, "no_proxy="+local, "NO_PROXY="+local), rec.Serve.Env...)
	return &server{binary: rec.Binary, env: env, logPath: logPath, log: log, args: rec.Serve.Args}
}

// start does nothing if the server runs. args, if there are some, replace those that it had.
func (s *server) start(args []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running() {
		return nil
	}
	if len(args) > 0 {
		s.args = args
	}
	if len(s.args) == 0 {
		return errors.New("starting the server: nobody said with which arguments")
	}
	out, err := os.OpenFile(s.logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(s.binary, s.args...) //nolint:noctx // it outlives the request: stop ends it
	cmd.Stdout, cmd.Stderr, cmd.Env = out, out, s.env
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the server: %w", err)
	}
	s.log.Info("server started", "args", s.args)
	s.cmd, s.ended, s.how, s.since = cmd, make(chan struct{}), "", time.Now()
	go s.wait(cmd, s.ended)
	return nil
}

// wait ends with the process, and that ends with the lab: stop waits for both.
func (s *server) wait(cmd *exec.Cmd, ended chan<- struct{}) {
	_ = cmd.Wait() // ProcessState says the same
	s.mu.Lock()
	s.how, s.since = cmd.ProcessState.String(), time.Now()
	s.mu.Unlock()
	s.log.Info("server ended", "how", cmd.ProcessState)
	close(ended)
}

// running wants mu to be held.
func (s *server) running() bool { return s.cmd != nil && s.how == "" }

// stop signals the server, if it runs, and waits until it has ended; after grace it is killed.
func (s *server) stop(sig syscall.Signal, grace time.Duration) error {
	s.mu.Lock()
	cmd, ended, running := s.cmd, s.ended, s.running()
	s.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if !running {
		<-ended
		return nil
	}
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("ending the server: %w", err)
	}
	late := time.NewTimer(grace)
	defer late.Stop()
	select {
	case <-ended:
		return nil
	case <-late.C:
	}
	err := cmd.Process.Kill()
	<-ended
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return errors.Join(fmt.Errorf("the server did not end within %v and was killed", grace), err)
}

func (s *server) status() ServeStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := ServeStatus{Running: s.running(), Since: s.since, Ended: s.how}
	if st.Running {
		st.PID = s.cmd.Process.Pid // of the lab's own process namespace; the Client knows the host's
	}
	return st
}
