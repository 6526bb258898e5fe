package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// This program is three in the machine, one after the other:
//
//	/init GUEST                 process 1 of the initramfs: disks, layers, then the steps, or the system
//	/run/troupe/guest GUEST     a service of that system: the steps
//	/shutdown                   process 1 again, when systemd has ended all else (systemd-shutdown(8), /run/initramfs/shutdown)
const (
	guestArg    = "troupe-vm-guest"
	shutdownArg = "/shutdown"
)

// Places in the machine.
const (
	runDir      = "/run/troupe"
	programFile = runDir + "/guest"
	orderPath   = runDir + "/order.json"
	baseDir     = runDir + "/base"
	layerDir    = runDir + "/layer"
	rootDir     = "/newroot"
	exitDir     = "/run/initramfs"
)

// Disks of the machine, in the order of QEMU's arguments.
const (
	baseDisk   = "/dev/vda"
	orderDisk  = "/dev/vdb"
	layerDisk  = "/dev/vdc"
	resultDisk = "/dev/vdd"
)

// IsGuest says whether this process, with these arguments (os.Args), is one that runs in such a machine. Then all that it may do is to
// call RunGuest.
func IsGuest(args []string) bool {
	if os.Getpid() == 1 && args[0] == shutdownArg {
		return true
	}
	return len(args) == 2 && args[1] == guestArg
}

// RunGuest does the part of a process in the machine. Its result is the exit status of a process that is not the
// machine's first; that one does not return.
func RunGuest(args []string) int {
	switch {
	case os.Getpid() != 1:
		return runService()
	case args[0] == shutdownArg:
		end(collectLayer())
	default:
		end(runInit())
	}
	return 1
}

// end tells how it went, and ends the machine.
func end(err error) {
	if err != nil {
		fail(err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // QEMU ends with it; should it not, the kernel gives up when process 1 ends
	os.Exit(1)                                     //nolint:forbidigo // process 1 of a machine may not return to its caller
}

// fail tells of an error, whichever step or part it is of.
func fail(err error) {
	var exit *ExitError
	if errors.As(err, &exit) {
		tell(event{Ended: &ended{Step: exit.Step, Status: exit.Status}})
		return
	}
	tell(event{Failed: err.Error()})
}

// tell writes an event, after all that was said on the console before it has left the machine.
func tell(e event) {
	drainTerminal("/dev/ttyS0")
	text, err := json.Marshal(e)
	if err != nil {
		return // these types have no values that cannot be written
	}
	f, err := os.OpenFile("/dev/ttyS1", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		say("telling of an event: %v", err)
		return
	}
	// On a line of its own, should somebody else have written here. Whoever listens takes it or misses it: nobody is there to be told.
	_, _ = f.Write(append(append([]byte("\n"), text...), '\n'))
	_ = f.Close()
	drainTerminal("/dev/ttyS1")
}

// drainTerminal waits until what was written to a terminal is out: tcdrain(3).
func drainTerminal(name string) {
	f, err := os.OpenFile(name, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return
	}
	_ = unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1)
	_ = f.Close()
}

// say writes a line to the console.
func say(format string, args ...any) {
	f, err := os.OpenFile("/dev/ttyS0", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return // nobody can hear it
	}
	_, _ = fmt.Fprintf(f, format+"\n", args...)
	_ = f.Close()
}

// readOrder reads what this machine is told to do.
func readOrder() (order, error) {
	var o order
	text, err := os.ReadFile(orderPath)
	if err == nil {
		err = json.Unmarshal(text, &o)
	}
	if err != nil {
		return o, fmt.Errorf("reading what is to be done: %w", err)
	}
	return o, nil
}

// awaitDevice waits for a device, which shows soon after its driver was loaded.
func awaitDevice(name string) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); ; <-tick.C {
		_, err := os.Stat(name)
		if err == nil || time.Since(began) > 30*time.Second {
			return err
		}
	}
}
