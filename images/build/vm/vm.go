// Package vm runs shell commands of a build in a QEMU machine that lives no longer than they do. It boots the kernel of an OS
// base directly, has that base's image for a root file system with a layer over it that can be written, and hands out
// what the commands left. Neither root's rights nor KVM are needed, and there is no network unless somebody asks for it.
//
//	this process                            the machine
//	Init, Modules      ── -initrd ────────▶ /init: this program, too (RunGuest)
//	Base               ── vda, read-only ─▶ lower layer of its root
//	order, Files       ── vdb, read-only ─▶ what to do; what the upper layer begins with
//	a sparse file      ── vdc ────────────▶ upper layer, ext4
//	Result             ◀── vdd ──────────── a tar stream
//	Console            ◀── ttyS0 ────────── what the kernel and the commands say
//	events             ◀── ttyS1 ────────── which command runs, how it ended: a line of JSON each
//
// All machines have the same processor, whatever runs them, and without a network the same time at their start: what
// commands make of either is the same in every build.
package vm

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/qemu"
)

// A Host runs machines, so many at a time. Make one with NewHost.
type Host struct {
	init  string
	slots chan struct{}
	cpus  int
}

// NewHost is a Host for up to limit machines at a time, which share this one's processors; 0 means as many as half of its
// processors and of its memory are good for. init is a static program that calls RunGuest where IsGuest says so: this one.
func NewHost(init string, limit int) *Host {
	if limit < 1 {
		limit = defaultLimit()
	}
	return &Host{init: init, slots: make(chan struct{}, limit), cpus: max(runtime.NumCPU()/limit, 1)}
}

// perMachine is what one machine takes of this one's memory, in bytes, with what QEMU and the page cache want beside it.
const perMachine = 3 << 30

func defaultLimit() int {
	limit := runtime.NumCPU() / 2
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil { // it fails for bad addresses only
		limit = min(limit, int(info.Totalram*uint64(info.Unit)/2/perMachine)) //nolint:gosec // no machine has as much memory
	}
	return max(limit, 1)
}

// A Job is what a machine is for.
type Job struct {
	Kernel  string // file with the kernel of Base
	Modules string // file with the initramfs archive of its modules
	Base    string // file with the EROFS image
	Memory  int    // MiB; 0 means 1024

	// Boot has the base's own init, systemd, start the system up to multi-user.target before the first step, and end it in good order after
	// the last. Otherwise the steps are all that runs.
	Boot bool
	// Steps are shell commands, for "sh -ec", that run one after the other as root, until one fails.
	Steps []string
	Env   []string // of the steps
	Dir   string   // where they start; "" means "/"
	// Limit is how long one step may take, and the system to come up or to end; 0 means DefaultLimit.
	Limit time.Duration
	// Network gives the machine a way out, through this one's own.
	Network bool

	// Files writes what the upper layer begins with, as overlayfs keeps it: whiteouts are devices 0:0, names begin with UpperNames, those that hard
	// links name, too. A directory comes before what is in it. nil writes nothing.
	Files func(*tar.Writer) error
	// Output is the absolute path, in the machine, of the file or directory that Result has; "" means the whole upper layer.
	Output string

	Scratch string    // a directory for the files of this machine, which stay there
	Console io.Writer // takes what the machine says; nil discards it
	Step    func(int) // is called when a step begins, with its index; never at the same time as Console. nil is not called
}

// DefaultLimit is how long one step may take, unless its job says otherwise.
const DefaultLimit = 30 * time.Minute

// Sizes of the sparse files that a machine writes to, in bytes.
const (
	layerSize  = 64 << 30
	resultSize = 16 << 30
)

// An ExitError says that a step ended with another status than 0.
type ExitError struct {
	Step   int // its index
	Status int // exit status; 128 and the number of the signal that ended it
}

func (e *ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Status) }

// ErrEnded says that a machine ended by itself, before its work was done: its kernel gave up, or a step had it reboot.
var ErrEnded = errors.New("the machine ended before its work was done")

// Result is what a machine handed out: a tar stream (PAX, extended attributes as SCHILY.xattr) sorted by name.
type Result struct {
	*io.SectionReader
	file *os.File
}

// Close forgets the result.
func (r *Result) Close() error { return r.file.Close() }

// Run runs the job, as soon as another machine may run. A step that fails is an *ExitError. When it returns nothing of
// the machine runs any more; the result must be closed.
func (h *Host) Run(ctx context.Context, j Job) (*Result, error) {
	if _, err := exec.LookPath(qemu.Binary); err != nil {
		return nil, fmt.Errorf("running a machine for a build (Debian package qemu-system-x86): %w", err)
	}
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := h.writeFiles(ctx, j); err != nil {
		return nil, fmt.Errorf("preparing a machine for a build: %w", err)
	}
	n, err := h.runMachine(ctx, j)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(j.Scratch, resultFile))
	if err != nil {
		return nil, fmt.Errorf("opening what the machine handed out: %w", err)
	}
	return &Result{SectionReader: io.NewSectionReader(f, 0, n), file: f}, nil
}
