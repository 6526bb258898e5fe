// Package kexec starts a kernel from the one that runs, without the firmware: kexec_file_load(2) and reboot(2).
package kexec

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// An Image is a kernel with all that it is started with.
type Image struct {
	Kernel  string   // path of a bzImage
	Initrds []string // paths of initramfs archives, in the order in which the kernel unpacks them
	Cmdline string
}

// maxCmdline is COMMAND_LINE_SIZE of x86, in bytes: what is more the kernel refuses (arm64 and others have less or the same).
const maxCmdline = 2048

// maxInitrd bounds what all archives of an image have together, in bytes. It is held in memory twice for a moment.
const maxInitrd = 1 << 30

// ErrUnable says that this kernel starts no other one: it was built or locked down so, or it takes only signed ones.
// Whoever gets it reboots by the firmware.
var ErrUnable = errors.New("the running kernel cannot start another one")

// Load makes an image what Execute starts, in place of one that was loaded before. It copies all of it to memory: the
// files may go afterwards.
func Load(i Image) error {
	if len(i.Cmdline) >= maxCmdline || strings.ContainsAny(i.Cmdline, "\x00\n") {
		return fmt.Errorf("loading a kernel: a command line of %d bytes, at most %d and no line breaks are taken", len(i.Cmdline), maxCmdline-1)
	}
	kernel, err := os.Open(i.Kernel)
	if err != nil {
		return fmt.Errorf("loading a kernel: %w", err)
	}
	defer kernel.Close()
	initrd, err := joined(i.Initrds)
	if err != nil {
		return fmt.Errorf("loading the initramfs of a kernel: %w", err)
	}
	defer initrd.Close()
	err = unix.KexecFileLoad(int(kernel.Fd()), int(initrd.Fd()), i.Cmdline, 0)
	if isUnable(err) {
		err = fmt.Errorf("%w: %w", ErrUnable, err)
	}
	if err != nil {
		return fmt.Errorf("loading a kernel: %w", err)
	}
	return nil
}

// isUnable says whether kexec_file_load(2) failed for what stays so: ENOSYS of a kernel without it, EPERM of one that is
// locked down or whose kexec_load_disabled is set, and what the check of signatures answers.
func isUnable(err error) bool {
	for _, e := range []unix.Errno{unix.ENOSYS, unix.EPERM, unix.EKEYREJECTED, unix.ENOKEY, unix.ENODATA, unix.EOPNOTSUPP} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// joined is a file in memory with all archives, each beginning at a multiple of four bytes, as the kernel wants it
// (Documentation/driver-api/early-userspace/buffer-format.rst). The caller closes it.
func joined(paths []string) (*os.File, error) {
	fd, err := unix.MemfdCreate("initrd", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making a file in memory: %w", err)
	}
	out := os.NewFile(uintptr(fd), "initrd")
	var size int64
	for _, p := range paths {
		n, err := appendFile(out, p, maxInitrd-size)
		if err == nil {
			size += n
			pad := -size & 3
			_, err = out.Write(make([]byte, pad))
			size += pad
		}
		if err != nil {
			out.Close()
			return nil, err
		}
	}
	return out, nil
}

func appendFile(out io.Writer, path string, limit int64) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, err := io.Copy(out, io.LimitReader(f, limit+1))
	if err != nil {
		return n, fmt.Errorf("copying %s: %w", path, err)
	}
	if n > limit {
		return n, fmt.Errorf("%s and those before it have more than %d bytes", path, maxInitrd)
	}
	return n, nil
}

// Loaded says whether an image is loaded.
func Loaded() bool {
	b, err := os.ReadFile("/sys/kernel/kexec_loaded")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// Execute starts the loaded image at once: nothing is stopped or written before. It returns only with an error.
func Execute() error {
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC); err != nil {
		return fmt.Errorf("starting the loaded kernel: %w", err)
	}
	return errors.New("starting the loaded kernel: the call returned")
}
