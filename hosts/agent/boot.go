package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agent/rescue"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/kmod"
	"github.com/troupe-dev/troupe/internal/signing"
	"github.com/troupe-dev/troupe/internal/version"
)

// fsModules are what the root is mounted with. Which of them are built in, and what the one for SHA-256 is called, differs
// from kernel to kernel; nobody but us loads what dm-verity asks for by the name of an algorithm.
var fsModules = []string{"loop", "dm_verity", "sha256", "sha256_generic", "sha256_ssse3", "sha2_ce", "erofs", "overlay", "ext4"}

// fatalDelay is how long a machine shows what it cannot go on from.
const fatalDelay = time.Minute

// waitWithDisks is how long a machine that is told to wait keeps the LUNs that it has. While the server begins anew, all
// are told to for a moment. A disk that lost writes is opened anew once nobody has it; that is at once where its machine had
// it for a minute after the loss was found, which the server looks for every 30 s, and after ten minutes else.
const waitWithDisks = 2 * time.Minute

// boot is the first life.
type boot struct {
	log       *slog.Logger
	cmd       Cmdline
	mods      *kmod.Loader
	finder    netup.Finder
	lease     atomic.Pointer[netup.Lease] // the newest answer
	id        agentapi.Identity
	inv       agentapi.Inventory
	client    *agentapi.Client
	rep       *reporter
	fol       *follower
	keys      signing.Keys  // whose releases are run
	cache     *cache.Cache  // nil until it was opened
	drivers   chan struct{} // closed once the drivers were loaded
	copied    chan struct{} // closed once the program was copied to agentFile, or copyErr says why not
	copyErr   error
	luns      *luns                      // nil: the images are in a cache on a disk of the machine
	fsReady   chan struct{}              // closed once fsModules were tried
	begun     string                     // key of the release that this boot was counted for
	jump      func(r cache.Record) error // starts the kernel of a release in the cache, and returns only with an error; nil: nobody can
	place     string                     // what the last mark of StageAgent says
	shown     string                     // what the last mark of StageWait says
	fetched   int64                      // image bytes since the last mark of it
	force     func() error               // reboots; replaced in tests
	unmount   func(target string, flags int) error
	resolv    string        // resolvConf; another file in tests
	patience  time.Duration // strangerPatience; another one in tests
	endShells func()        // nobody sits at the console any more
	panics    string        // what the kernel was to do after a panic before we said
}

// Init is the first life: PID 1 of the initramfs. It returns only if the machine cannot even be rebooted.
func Init(ctx context.Context) error {
	mountErr := mountEarly()
	log := KernelLog()
	log.Info("agent starts", "version", version.String())
	if mountErr != nil {
		log.Error("the first mounts are not whole", "error", mountErr)
	}
	b := &boot{
		log: log, drivers: make(chan struct{}), fsReady: make(chan struct{}), copied: make(chan struct{}), force: forceReboot, unmount: unix.Unmount,
		resolv: resolvConf, patience: strangerPatience, panics: setPanic(panicReboot),
	}
	shells, stopShells := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, tty := range consoles() {
		wg.Go(func() { rescue.Offer(shells, tty, log) })
	}
	b.jump = b.kexecInto
	b.endShells = func() {
		stopShells()
		wg.Wait()
	}
	defer b.endShells()
	err := b.run(ctx)
	log.Error("the boot cannot go on", "error", err)
	return awaitReboot(ctx, log, fatalDelay)
}

// run boots; it returns only with an error.
func (b *boot) run(ctx context.Context) error {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("reading the kernel's command line: %w", err)
	}
	if b.cmd, err = ParseCmdline(string(text)); err != nil {
		b.log.Warn("some of the command line is not understood", "error", err)
	}
	if b.cmd.Boot == "" || b.cmd.Boot == ownBoot { // no server named it
		b.cmd.Boot = newBootID()
	}
	if b.client, err = agentapi.NewClient(b.cmd.Server, nil); err != nil {
		return fmt.Errorf("troupe.server of the kernel's command line: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	b.loadDrivers(&wg)
	stopKeeping, ready, err := b.connect(ctx)
	if err != nil {
		return err
	}
	defer stopKeeping()
	if ready == nil {
		ready, err = b.follow(ctx)
	}
	stopKeeping()
	if err != nil {
		return err
	}
	err = b.leave(ctx, ready)
	b.rep.fail(err)
	flush(ctx, b.rep, 3*time.Second)
	return err
}

// follow does what the server says, until there is a root to switch to.
func (b *boot) follow(ctx context.Context) (*mounted, error) {
	workers, stopWorkers := context.WithCancel(ctx)
	defer stopWorkers()
	var work sync.WaitGroup
	work.Go(func() { b.rep.run(workers) })
	work.Go(func() { b.fol.run(workers) })
	ready, err := b.pursue(ctx)
	stopWorkers()
	work.Wait()
	return ready, err
}

// loadDrivers loads the modules for the devices, and then those for file systems, in the background.
func (b *boot) loadDrivers(wg *sync.WaitGroup) {
	var err error
	if b.mods, err = kmod.OpenRunning(); err != nil {
		b.log.Warn("the tables of kernel modules cannot be read", "error", err)
		b.mods = &kmod.Loader{}
	}
	wg.Go(func() {
		b.coldplug()
		close(b.drivers)
		wanted := fsModules
		if _, err := os.Stat("/sys/firmware/efi"); err == nil { // the system may have no such module
			wanted = append(slices.Clone(wanted), "efivarfs")
		}
		for _, m := range wanted {
			// ENODEV: the processor has no instructions for it.
			if err := b.mods.Load(m); err != nil && !errors.Is(err, kmod.ErrNoModule) && !errors.Is(err, unix.ENODEV) {
				b.log.Warn("a file system's module does not load", "error", err)
			}
		}
		close(b.fsReady)
		b.log.Debug("modules of file systems loaded", "at", sinceBoot())
		b.copyErr = copyProgram(agentFile)
		close(b.copied)
	})
}

func (b *boot) coldplug() {
	names, err := b.mods.Coldplug("/sys")
	if err != nil && !errors.Is(err, kmod.ErrNoModule) { // what the initramfs leaves out is not needed to boot
		b.log.Warn("some drivers do not load", "error", err)
	}
	if len(names) > 0 {
		b.log.Debug("drivers loaded", "modules", strings.Join(names, " "), "at", sinceBoot())
	}
}

// pursue acts on the assignment, and on each newer one, until a root is mounted that can be switched to.
func (b *boot) pursue(ctx context.Context) (*mounted, error) {
	tries := backoff.Backoff{First: 2 * time.Second, Limit: time.Minute}
	var leave <-chan time.Time // nil: there is nothing to leave
	for {
		a := b.drain()
		var again <-chan time.Time
		if a.State == agentapi.Assigned {
			leave = nil
			var m *mounted
			err := b.fol.whileCurrent(ctx, a, func(ctx context.Context) (err error) {
				m, err = b.activate(ctx, a)
				return err
			})
			switch {
			case m != nil: // also where there is a newer one: the second life goes there from here
				return m, nil
			case ctx.Err() != nil:
				return nil, ctx.Err()
			case err != nil && !errors.Is(err, errNewer):
				d := tries.Next()
				b.log.Error("the assignment cannot be run, trying again", "host", a.Host, "error", err, "in", d.Round(time.Second))
				b.rep.fail(err)
				again = time.After(d)
			default:
				continue // a newer one is there
			}
		} else {
			b.show(a)
			if b.luns != nil && leave == nil {
				leave = time.After(waitWithDisks)
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-again:
		case <-leave:
			leave = nil
			b.leaveDisks(ctx)
		case <-b.fol.changed:
			b.rep.fail(nil)
			tries.Reset()
		}
	}
}

// leaveDisks ends the session of a machine that has nothing to run from it.
func (b *boot) leaveDisks(ctx context.Context) {
	b.log.Warn("leaving the disks of the server", "after", waitWithDisks)
	err := b.closeStorage(ctx)
	if err != nil {
		b.log.Error("the disks of the server cannot be left, trying again", "error", err, "in", waitWithDisks)
	}
	b.rep.fail(err)
}

// drain is the newest assignment; the wake-up for it is taken with it.
func (b *boot) drain() agentapi.Assignment {
	select {
	case <-b.fol.changed:
	default:
	}
	return b.fol.get()
}

// show tells people at the console what machine this is and what it waits for.
func (b *boot) show(a agentapi.Assignment) {
	why := a.Reason
	if a.State == agentapi.Unclaimed && why == "" {
		why = "no host of the fleet has this MAC, UUID or serial"
	}
	if now := strings.TrimSpace(string(a.State) + " " + a.Reason); now != b.shown {
		b.shown = now
		b.rep.forget(agentapi.StageWait)
		b.rep.mark(agentapi.Mark{Stage: agentapi.StageWait, Detail: now})
	}
	b.log.Info("waiting; no disk is written to", "state", a.State, "why", why)
	b.log.Info("this machine", "mac", b.id.MAC, "address", b.lease.Load().Address.Addr(), "uuid", b.id.UUID, "serial", b.id.Serial,
		"server", b.client.Server(), "host", a.Host)
	b.log.Info("press Enter here for a shell")
}

// reboot boots the machine anew, after the server and the disks have all that they shall.
func (b *boot) reboot(ctx context.Context, why string) error {
	b.log.Warn("rebooting", "why", why)
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageReboot, Detail: why})
	flush(ctx, b.rep, 3*time.Second)
	if b.cache != nil {
		err := bounded(syncLimit, func() error { return unix.Mount("", cacheDir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") })
		if err != nil {
			b.log.Warn("the cache cannot be made read-only", "error", err)
		}
	}
	return b.force()
}

// flush gives the server a last chance to take the marks.
func flush(ctx context.Context, r *reporter, limit time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := r.send(ctx); err != nil {
		r.log.Warn("the last report did not reach the server", "error", err)
	}
}
