// Command init is a system of a few hundred lines, for labs whose machines are to boot in seconds: what systemd would be on a node,
// as far as the agent and a role's units ask for it. It is /sbin/init, and as systemctl it asks the init that runs.
//
// It starts what the directories multi-user.target.wants below /run/systemd/system and /etc/systemd/system name, of each the
// first ExecStart, and starts it again where it says Restart=. It answers on port 80:
//
//	GET  /         200 "ok", or 503 while the system is to be unhealthy: what a check of health asks
//	GET  /boot     a word that changes with each boot
//	POST /run      {"args": […], "stdin": "…"}: a command's output, and its status in the header Status
//	POST /behave   ?word=WORD: from now on
//
// The system misbehaves by words in /etc/quick, or as arguments of the kernel with "quick." before them:
//
//	unhealthy   the check of health fails
//	panic       the kernel panics, before anything is started
//	hang        nothing is started, and nothing happens any more
//	noagent     all but the agent is started
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	if filepath.Base(os.Args[0]) == "systemctl" {
		os.Exit(systemctl(os.Args[1:]))
	}
	_ = os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin") // the name is right
	s := newSystem()
	for _, w := range words() {
		s.behave(w)
	}
	say("starts")
	if err := loopback(); err != nil {
		say("lo: " + err.Error())
	}
	s.startWanted()
	if err := s.serve(); err != nil {
		say("fails: " + err.Error())
	}
	select {}
}

// loopback sets lo up; the kernel gives it 127.0.0.1.
func loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// words are how the system is to misbehave from its start.
func words() []string {
	b, _ := os.ReadFile("/etc/quick") // one that is not there has none
	all := strings.Fields(string(b))
	b, _ = os.ReadFile("/proc/cmdline")
	for _, a := range strings.Fields(string(b)) {
		if w, ok := strings.CutPrefix(a, "quick."); ok {
			all = append(all, w)
		}
	}
	return all
}

// behave has the system misbehave from now on, in one of the ways that the package's comment lists; "well" ends what can be ended.
func (s *system) behave(word string) {
	switch word {
	case "unhealthy":
		s.sick.Store(true)
	case "well":
		s.sick.Store(false)
	case "noagent":
		s.noAgent = true
	case "hang":
		say("hangs")
		_ = unix.Kill(-1, unix.SIGSTOP)
		select {}
	case "panic":
		say("panics")
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
}

// say writes a line to the console, by the kernel's log.
func say(what string) {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return // nobody can hear it
	}
	defer f.Close()
	fmt.Fprintf(f, "<6>quick: %s\n", what)
}
