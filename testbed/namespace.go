package testbed

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// idRange is how many identities a user namespace gets beside its root: all that a Debian system uses (policy 9.2.2).
const idRange = 65536

// insideCommand is the inner half, in namespaces of its own.
func insideCommand(binary, dir string, userns bool) *exec.Cmd {
	cmd := exec.Command(binary, "lab", "inside", dir) //nolint:noctx // the lab outlives its start: Close ends it
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		// A terminal's Ctrl-C is for the outer half, which then ends the inner one in order.
		Setsid: true,
	}
	if userns {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
	}
	return cmd
}

// mapIDs gives the user namespace of a process its identities: its root is the user who calls, the others are the
// user's subordinate ones (subuid(5)), without which no package could be unpacked in it.
func mapIDs(ctx context.Context, pid int) error {
	u, err := user.Current()
	if err != nil {
		return err
	}
	for _, m := range []struct{ tool, file, self string }{
		{"newuidmap", "/etc/subuid", u.Uid},
		{"newgidmap", "/etc/subgid", u.Gid},
	} {
		first, err := subordinateIDs(m.file, u.Username, u.Uid)
		if err != nil {
			return err
		}
		out, err := exec.CommandContext(ctx, m.tool, strconv.Itoa(pid),
			"0", m.self, "1", "1", strconv.Itoa(first), strconv.Itoa(idRange-1)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s (Debian package uidmap): %w: %s", m.tool, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// subordinateIDs is the first of idRange identities that file gives to the user.
func subordinateIDs(file, name, uid string) (int, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		owner, rest, _ := strings.Cut(strings.TrimSpace(lines.Text()), ":")
		first, count, _ := strings.Cut(rest, ":")
		start, err1 := strconv.Atoi(first)
		n, err2 := strconv.Atoi(count)
		if (owner == name || owner == uid) && err1 == nil && err2 == nil && n >= idRange-1 {
			return start, nil
		}
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("%s gives user %s no %d identities (root can: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s)",
		file, name, idRange, name)
}

// netnsOf names the network namespace of a process.
func netnsOf(pid int) (string, error) {
	return os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
}

// hostPID is what the host calls the process that has the number pid in the lab's process namespace and was started by the
// supervisor, which the lab's init (inner) started; 0 if there is none. All may read that in /proc (proc(5), status).
func hostPID(inner, pid int) int {
	files, _ := filepath.Glob("/proc/[0-9]*/status") // the pattern is right, and nothing else is an error
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		all := statusNumbers(b, "NSpid:") // the outermost namespace first
		if len(all) < 2 || all[len(all)-1] != pid {
			continue
		}
		for _, parent := range statusNumbers(b, "PPid:") {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", parent))
			if err == nil && slices.Contains(statusNumbers(b, "PPid:"), inner) {
				return all[0]
			}
		}
	}
	return 0
}

// statusNumbers are the numbers in the line of a /proc/PID/status that begins with key.
func statusNumbers(status []byte, key string) []int {
	var numbers []int
	for line := range strings.Lines(string(status)) {
		rest, ok := strings.CutPrefix(line, key)
		if !ok {
			continue
		}
		for field := range strings.FieldsSeq(rest) {
			if n, err := strconv.Atoi(field); err == nil {
				numbers = append(numbers, n)
			}
		}
	}
	return numbers
}

// endStragglers kills the processes that entered the lab's network from outside (Client.Command): they are not in its process
// namespace, and would keep the network alive.
func endStragglers(rec record) error {
	if rec.Netns == "" {
		return nil
	}
	own, err := netnsOf(os.Getpid())
	if err != nil || own == rec.Netns {
		return err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		// A process of somebody else cannot be looked at, and cannot be in our namespace.
		if ns, err := netnsOf(pid); err != nil || ns != rec.Netns {
			continue
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("ending process %d in the lab's network: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// Remove deletes the directory of a lab that does not run, with all that is in it. A directory that no lab was ever in is
// left alone, with an error.
func Remove(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, lockFile)); err != nil {
		if os.IsNotExist(err) {
			return fmt.Errorf("removing %q: no lab was there", dir)
		}
		return err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return fmt.Errorf("removing lab %q: %w", dir, err)
	}
	defer lock.Close()
	err = os.RemoveAll(dir)
	if err == nil || os.Geteuid() == 0 || !errors.Is(err, os.ErrPermission) {
		return err
	}
	// What a build left there can belong to a subordinate identity, which only a user namespace may touch.
	return removeInside(dir)
}

func removeInside(dir string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := exec.Command("sh", "-c", `read -r go && exec rm -rf -- "$1"`, "sh", dir) //nolint:noctx // it ends with what it removes, or with its input
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("making a user namespace to remove %q in: %w", dir, err)
	}
	err = mapIDs(ctx, cmd.Process.Pid)
	if err == nil {
		_, err = in.Write([]byte("\n"))
	}
	in.Close()
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return fmt.Errorf("removing %q in a user namespace: %w: %s", dir, err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}
