package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// unitDirs are where units are, the first one first.
var unitDirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system"}

const agentUnit = "troupe-agent.service"

// control is where systemctl reaches the init.
const control = "/run/quick.sock"

// A system is what runs.
type system struct {
	sick    atomic.Bool
	noAgent bool

	mu    sync.Mutex
	units map[string]*unit
}

// A unit is a service that was started once.
type unit struct {
	name   string
	cmd    *exec.Cmd     // nil: it does not run
	ended  chan struct{} // of cmd
	wanted bool
	failed bool
}

func newSystem() *system { return &system{units: map[string]*unit{}} }

// startWanted starts what multi-user.target wants.
func (s *system) startWanted() {
	for _, dir := range unitDirs {
		entries, _ := os.ReadDir(filepath.Join(dir, "multi-user.target.wants")) // one that is not there wants nothing
		for _, e := range entries {
			if e.Name() == agentUnit && s.noAgent {
				continue
			}
			if err := s.start(e.Name()); err != nil {
				say("unit " + e.Name() + ": " + err.Error())
			}
		}
	}
}

// A service is what is read of a unit's file.
type service struct {
	exec, env []string
	dir       string
	restart   bool
	oneshot   bool
}

// readService reads the first file of that name, and those that are dropped in beside it.
func readService(name string) (service, error) {
	var v service
	found := false
	for _, dir := range unitDirs {
		for _, pattern := range []string{name, name + ".d/*.conf"} {
			files, _ := filepath.Glob(filepath.Join(dir, pattern)) // the pattern is right
			for _, f := range files {
				if f == filepath.Join(dir, name) && found {
					continue
				}
				b, err := os.ReadFile(f)
				if err != nil {
					return v, err
				}
				found = true
				v.parse(b)
			}
		}
	}
	if len(v.exec) == 0 {
		return v, fmt.Errorf("no unit %s that starts anything is there", name)
	}
	return v, nil
}

func (v *service) parse(b []byte) {
	for line := range bytes.Lines(b) {
		key, value, _ := strings.Cut(strings.TrimSpace(string(line)), "=")
		switch key {
		case "ExecStart":
			if len(v.exec) == 0 {
				v.exec = strings.Fields(strings.ReplaceAll(strings.TrimLeft(value, "-@+!"), `"`, ""))
			}
		case "Environment":
			for _, e := range strings.Fields(value) {
				v.env = append(v.env, strings.Trim(e, `"'`))
			}
		case "WorkingDirectory":
			v.dir = value
		case "Restart":
			v.restart = value == "always" || value == "on-failure"
		case "Type":
			v.oneshot = value == "oneshot"
		}
	}
}

// start starts a unit that does not run.
func (s *system) start(name string) error {
	v, err := readService(name)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.units[name]
	if u == nil {
		u = &unit{name: name}
		s.units[name] = u
	}
	u.wanted = true
	if u.cmd != nil {
		return nil
	}
	return s.run(u, v)
}

// run is called with mu held.
func (s *system) run(u *unit, v service) error {
	cmd := exec.Command(v.exec[0], v.exec[1:]...) //nolint:noctx // it runs as long as the system
	cmd.Env = append(os.Environ(), v.env...)
	cmd.Dir = v.dir
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		cmd.Stdout, cmd.Stderr = console, console
		defer console.Close()
	}
	if err := cmd.Start(); err != nil {
		u.failed = true
		return err
	}
	u.cmd, u.failed, u.ended = cmd, false, make(chan struct{})
	go s.wait(u, v, cmd, u.ended)
	return nil
}

func (s *system) wait(u *unit, v service, cmd *exec.Cmd, ended chan<- struct{}) {
	err := cmd.Wait()
	s.mu.Lock()
	u.cmd, u.failed = nil, err != nil
	again := u.wanted && v.restart
	s.mu.Unlock()
	close(ended)
	if !again {
		return
	}
	say(fmt.Sprintf("unit %s ended (%v) and is started again", u.name, err))
	time.Sleep(time.Second) // as RestartSec= of a unit would
	if err := s.start(u.name); err != nil {
		say("unit " + u.name + ": " + err.Error())
	}
}

// stop ends a unit.
func (s *system) stop(name string) {
	s.mu.Lock()
	u := s.units[name]
	if u == nil || u.cmd == nil {
		s.mu.Unlock()
		return
	}
	u.wanted = false
	ended := u.ended
	_ = u.cmd.Process.Signal(unix.SIGTERM) // it may have ended
	s.mu.Unlock()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		_ = u.cmd.Process.Kill()
		<-ended
	}
}

func (s *system) isActive(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.units[name]
	switch {
	case strings.HasSuffix(name, ".target"):
		return "active"
	case u == nil:
		return "inactive"
	case u.cmd != nil:
		return "active"
	case u.failed:
		return "failed"
	case u.wanted:
		if v, err := readService(name); err == nil && v.oneshot {
			return "active"
		}
	}
	return "inactive"
}

// serve answers HTTP and systemctl until one of them cannot be answered.
func (s *system) serve() error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) {
		if s.sick.Load() {
			http.Error(w, "unhealthy", http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("GET /boot", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(boot) })
	mux.HandleFunc("POST /run", runCommand)
	mux.HandleFunc("POST /behave", func(_ http.ResponseWriter, r *http.Request) { s.behave(r.FormValue("word")) })
	own, err := net.Listen("unix", control) //nolint:noctx // it listens as long as the system runs
	if err != nil {
		return err
	}
	go s.answer(own)
	return http.ListenAndServe(":80", mux) //nolint:gosec // a lab's machine has no foes
}

func runCommand(w http.ResponseWriter, r *http.Request) {
	var ask struct {
		Args  []string
		Stdin string
	}
	if err := json.NewDecoder(r.Body).Decode(&ask); err != nil || len(ask.Args) == 0 {
		http.Error(w, fmt.Sprint("no command: ", err), http.StatusBadRequest)
		return
	}
	cmd := exec.CommandContext(r.Context(), ask.Args[0], ask.Args[1:]...)
	cmd.Stdin = strings.NewReader(ask.Stdin)
	out, err := cmd.CombinedOutput()
	status := 0
	if err != nil {
		status = 255
		out = append(out, []byte(err.Error()+"\n")...)
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		status = exit.ExitCode()
	}
	w.Header().Set("Status", fmt.Sprint(status))
	_, _ = w.Write(out)
}

// answer does what systemctl asks for: a line of words, answered by a status and what to print.
func (s *system) answer(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			say("control: " + err.Error())
			return
		}
		go func() {
			defer conn.Close()
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err != nil {
				return
			}
			status, text := s.do(strings.Fields(line))
			_, _ = fmt.Fprintf(conn, "%d\n%s", status, text)
		}()
	}
}

func (s *system) do(args []string) (status int, text string) {
	args = slices.DeleteFunc(args, func(a string) bool { return strings.HasPrefix(a, "-") })
	if len(args) == 0 {
		return 1, "systemctl: no verb\n"
	}
	verb, names := args[0], args[1:]
	switch verb {
	case "reboot", "poweroff", "kexec":
		go s.shutDown(verb)
		return 0, ""
	case "daemon-reload", "enable", "disable", "reset-failed":
		return 0, ""
	case "is-system-running":
		return 0, "running\n"
	case "is-active":
		status = 3 // systemctl(1)
		for _, n := range names {
			state := s.isActive(n)
			text += state + "\n"
			if state == "active" {
				status = 0
			}
		}
		return status, text
	case "start", "stop", "restart":
		for _, n := range names {
			if verb != "start" {
				s.stop(n)
			}
			if verb == "stop" {
				continue
			}
			if err := s.start(n); err != nil {
				return 1, err.Error() + "\n"
			}
		}
		return 0, ""
	}
	return 1, "systemctl: no such verb here: " + verb + "\n"
}

// stopTime is how long what runs may take to end by itself.
const stopTime = 2 * time.Second

// shutDown ends all processes and the system.
func (s *system) shutDown(verb string) {
	say("goes down: " + verb)
	late := time.After(stopTime)
	for _, ended := range s.unwant() {
		select {
		case <-ended:
		case <-late:
		}
	}
	_ = unix.Kill(-1, unix.SIGKILL)
	unix.Sync()
	how := unix.LINUX_REBOOT_CMD_RESTART
	switch verb {
	case "poweroff":
		how = unix.LINUX_REBOOT_CMD_POWER_OFF
	case "kexec":
		how = unix.LINUX_REBOOT_CMD_KEXEC
	}
	if err := unix.Reboot(how); err != nil {
		say("reboot: " + err.Error())
	}
}

// unwant asks all units to end, and returns what is closed when they have.
func (s *system) unwant() []chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []chan struct{}
	for _, u := range s.units {
		u.wanted = false
		if u.cmd != nil {
			_ = u.cmd.Process.Signal(unix.SIGTERM) // it may have ended
			all = append(all, u.ended)
		}
	}
	return all
}

// systemctl asks the init that runs.
func systemctl(args []string) int {
	conn, err := net.Dial("unix", control) //nolint:noctx // it answers at once
	if err != nil {
		fmt.Fprintln(os.Stderr, "System has not been booted:", err)
		return 1
	}
	defer conn.Close()
	quiet := slices.Contains(args, "--quiet") || slices.Contains(args, "-q")
	if _, err := fmt.Fprintln(conn, strings.Join(args, " ")); err != nil {
		return 1
	}
	r := bufio.NewReader(conn)
	var status int
	if _, err := fmt.Fscanln(r, &status); err != nil {
		return 1
	}
	if !quiet {
		_, _ = io.Copy(os.Stdout, r)
	}
	return status
}
