package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/command"
	"github.com/troupe-dev/troupe/hosts/agent/kexec"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
)

// bootFiles are what a machine needs to start the kernel of an assignment by itself; none where the server does not say.
func bootFiles(a agentapi.Assignment) []agentapi.Blob {
	if a.Release == nil || a.Release.KernelBlob.Digest == "" || a.Release.Modules.Digest == "" || a.Agent.Digest == "" {
		return nil
	}
	return []agentapi.Blob{a.Release.KernelBlob, a.Agent, a.Release.Modules}
}

// newBootID names a boot that no server named. It begins with its time, as those of the server do; the clock may be wrong.
func newBootID() string {
	b := make([]byte, 3)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return time.Now().UTC().Format("20060102T150405") + "-" + hex.EncodeToString(b)
}

// loadKernel loads the kernel of an assignment from the cache.
func loadKernel(c *cache.Cache, a agentapi.Assignment) error {
	files := bootFiles(a)
	if files == nil {
		return errors.New("the server did not say what its kernel is started with")
	}
	paths := make([]string, len(files))
	for i, f := range files {
		if !c.Has(f.Digest, f.Size) {
			return fmt.Errorf("%s, which its kernel is started with, is not in the cache", f.Digest.Short())
		}
		ok, err := c.Verify(f.Digest)
		if err != nil {
			return err
		}
		if !ok { // fetched again by the next one who wants it
			return errors.Join(fmt.Errorf("%s in the cache is broken", f.Digest.Short()), c.RemoveImage(f.Digest))
		}
		paths[i] = c.Path(f.Digest)
	}
	now, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("reading the kernel's command line: %w", err)
	}
	args := nextArgs(string(now), a.Release.Kernel, a.Release.KernelArgs, "troupe.boot="+newBootID())
	return kexec.Load(kexec.Image{Kernel: paths[0], Initrds: paths[1:], Cmdline: strings.Join(args, " ")})
}

// tryJump starts the kernel of a by kexec, where another one runs and all that it takes is in the cache. That is tried once
// in a row: a machine on which it does not end well goes the way of the firmware next time. It returns where it is left to that.
func (b *boot) tryJump(a agentapi.Assignment) {
	if b.jump == nil || b.wrongKernel(a.Release) == "" || b.cache.State().KernelTries > 0 {
		return
	}
	for _, f := range bootFiles(a) {
		if !b.cache.Has(f.Digest, f.Size) {
			return
		}
	}
	if bootFiles(a) == nil {
		return
	}
	if err := b.cache.SetState(func(s *cache.State) { s.Kernel, s.KernelTries = a.Release.Kernel, 1 }); err != nil {
		return // one that cannot be counted could be the first of many
	}
	err := b.jump(cache.Record{Key: deltaID(a), Assignment: a})
	b.log.Warn("the kernel of the release is not started from here", "error", err)
	if err := b.cache.SetState(func(s *cache.State) { s.Kernel, s.KernelTries = "", 0 }); err != nil {
		b.log.Warn("the cache's state cannot be written", "error", err)
	}
}

// kexecInto starts the kernel of a release that lies in the cache, without the firmware. It returns only with an error.
func (b *boot) kexecInto(r cache.Record) error {
	if err := loadKernel(b.cache, r.Assignment); err != nil {
		return err
	}
	why := "by kexec into kernel " + r.Assignment.Release.Kernel.Short()
	b.log.Warn("rebooting", "why", why)
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageReboot, Detail: why})
	flush(context.Background(), b.rep, 3*time.Second)
	if err := b.closeForJump(); err != nil {
		b.log.Warn("the cache cannot be made read-only", "error", err)
	}
	return kexec.Execute()
}

// closeForJump writes what is cached to the disks, as before a reboot.
func (b *boot) closeForJump() error {
	return errors.Join(syncDisks(), bounded(syncLimit, func() error {
		return unix.Mount("", cacheDir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}))
}

// loadNext loads the kernel of an assignment where its role wants that, and says for people how the node goes there.
func (s *service) loadNext(a agentapi.Assignment) string {
	s.jumps = false
	if a.Activate != agentapi.Kexec || keepsNothing(a) || keepsNothing(s.state.get().Assignment) {
		return ""
	}
	if err := s.load(a); err != nil {
		s.log.Warn("the next kernel is started by the firmware", "error", err)
		return "; not by kexec: " + err.Error()
	}
	s.jumps = true
	return "; by kexec"
}

// leaveSystem goes to what was prepared.
func (s *service) leaveSystem(ctx context.Context) error {
	if s.jumps {
		return s.jump(ctx, s.log)
	}
	return s.reboot(ctx, s.log)
}

// jumpSystem shuts the system down as its init does, which then starts the kernel that is loaded. Where that fails the
// firmware is the way. It returns only with an error.
func jumpSystem(ctx context.Context, log *slog.Logger) error {
	if err := syncDisks(); err != nil {
		log.Error("going on without it", "error", err)
	}
	err := bounded(rebootPatience, func() error {
		out, err := command.New(ctx, "systemctl", "--no-block", "kexec").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
		}
		return nil
	})
	if err != nil {
		log.Error("systemd does not start the next kernel, rebooting", "error", err)
		return rebootSystem(ctx, log)
	}
	if err := backoff.Sleep(ctx, rebootPatience); err != nil {
		return err
	}
	log.Error("the shutdown hangs, forcing the reboot", "after", rebootPatience)
	return forced()
}
