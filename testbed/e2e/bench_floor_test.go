package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/initramfs"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/testbed"
)

// A floor is a machine like the lab's that is handed the kernel and the images by QEMU itself: no network, no server, no
// cache, nothing to decide. What a boot with troupe takes beyond that is troupe's price.
type floor struct {
	b      *testing.B
	accel  string
	dir    string
	blobs  string // directory of the server's blobs
	kernel string
	initrd string
}

// newFloor puts the initramfs together: an init of a few calls, and the modules of the same base.
func newFloor(b *testing.B, accel, data string, base images.Base) *floor {
	b.Helper()
	f := &floor{b: b, accel: accel, dir: b.TempDir(), blobs: filepath.Join(data, "store", "blobs", "sha256")}
	f.kernel, f.initrd = f.blob(base.Kernel.Digest), filepath.Join(f.dir, "initrd")
	program := filepath.Join(f.dir, "init")
	buildProgram(b, program, "./floorinit", small...)
	prog, err := os.Open(program)
	if err != nil {
		b.Fatal(err)
	}
	defer prog.Close()
	mods, err := os.Open(f.blob(base.Modules.Digest))
	if err != nil {
		b.Fatal(err)
	}
	defer mods.Close()
	out, err := os.Create(f.initrd)
	if err != nil {
		b.Fatal(err)
	}
	defer out.Close()
	if err := initramfs.Agent(out, prog, ""); err != nil {
		b.Fatal(err)
	}
	if _, err := io.Copy(out, mods); err != nil {
		b.Fatal(err)
	}
	return f
}

func (f *floor) blob(d digest.Digest) string { return filepath.Join(f.blobs, d.Hex()) }

// boot boots a release up to multi-user and switches the machine off.
func (f *floor) boot(base, delta digest.Digest, web bool) journey {
	f.b.Helper()
	ctx, cancel := context.WithTimeout(f.b.Context(), patience)
	defer cancel()
	console := newClock()
	start := time.Now()
	stop := f.start(ctx, console, f.args(base, delta))
	defer stop()
	j := journey{title: "floor"}
	j.add("QEMU starts", nobody, start)
	see := func(name string, whose owner, c func() (time.Time, error)) {
		f.b.Helper()
		at, err := c()
		if err != nil {
			f.b.Fatal(err)
		}
		j.add(name, whose, at)
	}
	see(bootFirmware, byFirmware, func() (time.Time, error) { return console.after(ctx, start, kernelSpeak) })
	see(bootKernel, byKernel, func() (time.Time, error) { return console.after(ctx, start, floorStarts) })
	see("init: load modules, mount the root", byFloor, func() (time.Time, error) { return console.after(ctx, start, floorLeaves) })
	see(bootSystemd, bySystemd, func() (time.Time, error) { return console.after(ctx, start, systemdIs) })
	if web {
		see("web.service", bySystemd, func() (time.Time, error) { return console.after(ctx, start, webStarted) })
	}
	see(bootMultiUser, bySystemd, func() (time.Time, error) { return console.after(ctx, start, multiUser) })
	return j
}

// args are those of a BIOS machine of the lab (testbed's qemu.go), but for the network and what is booted.
func (f *floor) args(base, delta digest.Digest) []string {
	args := []string{
		"-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-machine", "q35,graphics=off,vmport=off,usb=off,smbus=off,sata=off",
		"-smp", "1", "-m", fmt.Sprint(testbed.DefaultMemory),
		"-chardev", "file,id=console,path=/dev/fd/3", "-serial", "chardev:console",
		"-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng",
		"-netdev", "hubport,id=net0,hubid=0", "-device", "virtio-net-pci,netdev=net0,romfile=", // a cable that leads nowhere
		"-kernel", f.kernel, "-initrd", f.initrd, "-append", "console=tty0 console=ttyS0,115200 panic=-1",
	}
	for i, d := range []digest.Digest{base, delta} {
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=disk%d,format=raw,cache=unsafe,readonly=on,file=%s", i, f.blob(d)),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d", i))
	}
	if f.accel == "kvm" {
		return append(args, "-accel", "kvm", "-cpu", "host")
	}
	return append(args, "-accel", "tcg,thread=multi", "-cpu", "qemu64")
}

// start starts QEMU, whose console goes to w. stop ends it and waits for that.
func (f *floor) start(ctx context.Context, console *clock, args []string) (stop func()) {
	f.b.Helper()
	ours, theirs, err := os.Pipe()
	if err != nil {
		f.b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var said bytes.Buffer
	started := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		// The signal comes when the thread ends that started the process: keep it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
		cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = []*os.File{theirs}, &said, &said
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		err := cmd.Start()
		theirs.Close()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed
		}
	})
	wg.Go(func() {
		defer console.end()
		_, _ = io.Copy(console, ours) // ends with QEMU
	})
	stop = func() {
		cancel()
		wg.Wait()
		ours.Close()
		if f.b.Failed() {
			f.b.Logf("QEMU said: %s", said.String())
		}
	}
	if err := <-started; err != nil {
		stop()
		f.b.Fatal(errors.Join(errors.New("starting QEMU"), err))
	}
	return stop
}
