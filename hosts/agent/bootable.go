package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/hosts/agent/efivar"
	"github.com/troupe-dev/troupe/hosts/agent/esp"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/kmod"
)

// bootName is the name of our entry in the settings of UEFI firmware.
const bootName = "troupe"

// wakeBootable asks for a look at what the machine boots from its own disk.
func (s *service) wakeBootable() {
	select {
	case s.bootable <- struct{}{}:
	default: // it is asked for already
	}
}

// keepBootable makes the machine's own disk boot what runs, each time that it turns out to be healthy, or that the server has
// another agent for it. It ends with ctx.
func (s *service) keepBootable(ctx context.Context) {
	tries := agentapi.Retry()
	var again <-chan struct{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.bootable:
			tries.Reset()
		case <-again:
		}
		again = nil
		err := s.makeBootable(ctx)
		if err == nil || ctx.Err() != nil {
			continue
		}
		s.log.Error("the machine's own disk does not boot what runs", "error", err)
		s.rep.forget(agentapi.StageBootable)
		s.rep.mark(agentapi.Mark{Stage: agentapi.StageBootable, Detail: "not without the server: " + err.Error()})
		if tries.Wait(ctx) != nil {
			return
		}
		now := make(chan struct{})
		close(now)
		again = now
	}
}

// makeBootable fetches what the machine boots by itself, and puts it where firmware finds it.
func (s *service) makeBootable(ctx context.Context) error {
	a := s.state.get().Assignment
	files := bootFiles(a)
	if r, ok := s.cache.Record(deltaID(a)); files == nil || keepsNothing(a) || !ok || !r.IsGood() {
		return nil
	}
	n, err := s.fetchBoot(ctx, a)
	if err != nil {
		return err
	}
	if a.Loaders == nil {
		return errors.New("the server has no boot loader (troupe serve says which packages it lacks)")
	}
	detail, err := inBackgroundText(func() (string, error) { return s.install(a) })
	if err != nil {
		return err
	}
	s.rep.forget(agentapi.StageBootable)
	if n > 0 { // no bytes of images, which is what marks count
		detail += fmt.Sprintf(", fetched: %d KiB", n>>10)
	}
	s.rep.mark(agentapi.Mark{Stage: agentapi.StageBootable, Detail: a.Release.ID.Short() + ", " + detail})
	return nil
}

// fetchBoot brings what starts the kernel of an assignment into the cache, and the boot loaders. It is no part of what is staged: a
// node without it reboots by the network.
func (s *service) fetchBoot(ctx context.Context, a agentapi.Assignment) (int64, error) {
	now := s.state.get().Assignment.Release
	blobs := bootFiles(a)
	if l := a.Loaders; l != nil {
		blobs = append(blobs, l.EFI, l.MBR, l.Core)
	}
	f := cache.Fetch{Source: s.client, Blobs: blobs, Keep: []digest.Digest{now.Base.Digest, now.Delta.Digest}, Deltas: []string{s.state.get().NodeDelta}}
	return inBackground(func() (int64, error) {
		for _, b := range blobs { // what was right when it came may have gone bad since
			if !s.cache.Has(b.Digest, b.Size) {
				continue
			}
			if ok, err := s.cache.Verify(b.Digest); err != nil {
				return 0, err
			} else if !ok {
				if err := s.cache.RemoveImage(b.Digest); err != nil {
					return 0, err
				}
			}
		}
		return s.cache.Fetch(ctx, f)
	})
}

// inBackgroundText is inBackground for who returns a text.
func inBackgroundText(f func() (string, error)) (text string, err error) {
	_, err = inBackground(func() (int64, error) {
		text, err = f()
		return 0, err
	})
	return text, err
}

// install makes the disk boot a, and says for people what it did.
func (s *service) install(a agentapi.Assignment) (string, error) {
	device, err := deviceOf(s.cache.Dir())
	if err != nil {
		return "", err
	}
	place, err := disk.Scanner{}.Bootable(device)
	if err != nil {
		return "", err
	}
	if place.ESP.Size == 0 {
		return "", fmt.Errorf("the cache on %s has no EFI system partition beside it: it was made without, or the disk is too small", device)
	}
	written, err := s.installFiles(a, place)
	if err != nil {
		return "", err
	}
	if wrote, err := ensureEntry(place); err != nil {
		s.log.Warn("the firmware has no entry for the disk, and may find the disk all the same", "error", err)
		written = append(written, "no boot entry: "+err.Error())
	} else if wrote {
		written = append(written, "boot entry")
	}
	if len(written) == 0 {
		return "nothing written", nil
	}
	return "written: " + strings.Join(written, ", "), nil
}

func (s *service) installFiles(a agentapi.Assignment, place disk.Bootable) ([]string, error) {
	var loaders [3][]byte
	for i, b := range []agentapi.Blob{a.Loaders.EFI, a.Loaders.MBR, a.Loaders.Core} {
		var err error
		if loaders[i], err = os.ReadFile(s.cache.Path(b.Digest)); err != nil {
			return nil, fmt.Errorf("reading a boot loader from the cache: %w", err)
		}
	}
	e, err := esp.Open(place.Disk, place.ESP.First, place.ESP.Size, place.Block)
	if err != nil {
		return nil, err
	}
	now, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("reading the kernel's command line: %w", err)
	}
	args := nextArgs(string(now), a.Release.Kernel, a.Release.KernelArgs, "troupe.boot="+ownBoot)
	for i, arg := range args {
		args[i] = strings.ReplaceAll(arg, `"`, "")
	}
	in := func(b agentapi.Blob) esp.File {
		return esp.File{Path: s.cache.Path(b.Digest), Digest: b.Digest, Size: b.Size}
	}
	files := bootFiles(a)
	rep, err := e.Ensure(loaders[0], esp.Boot{Kernel: in(files[0]), Agent: in(files[1]), Modules: in(files[2]), Args: args})
	if err != nil {
		return nil, err
	}
	bios := esp.BIOS{Disk: place.Disk, First: place.BIOS.First, Size: place.BIOS.Size, Sector: place.Block}
	wrote, err := bios.Ensure(loaders[1], loaders[2])
	if wrote {
		rep.Written = append(rep.Written, "boot loader for a BIOS")
	}
	return rep.Written, err
}

// ensureEntry makes UEFI firmware know the disk. A machine that was started by a BIOS has nothing to be told.
func ensureEntry(place disk.Bootable) (bool, error) {
	if _, err := os.Stat("/sys/firmware/efi"); err != nil {
		return false, nil //nolint:nilerr // a BIOS
	}
	if err := mountVars(); err != nil {
		return false, err
	}
	p := efivar.Partition{
		Number: uint32(place.ESP.Number), ID: place.ESP.ID, //nolint:gosec // 2
		FirstBlock: uint64(place.ESP.First / place.Block), Blocks: uint64(place.ESP.Size / place.Block), //nolint:gosec // both lie on the disk
	}
	return efivar.Vars{Dir: efivar.Dir}.Ensure(bootName, p, `\EFI\TROUPE\GRUBX64.EFI`)
}

// mountVars mounts efivarfs, where the system did not.
func mountVars() error {
	list, err := os.ReadDir(efivar.Dir)
	if err != nil {
		return fmt.Errorf("looking at the settings of the firmware: %w", err)
	}
	if len(list) > 0 {
		return nil
	}
	if mods, err := kmod.OpenRunning(); err == nil { // where it is built in, or the system loads it, the mount tells
		_ = mods.Load("efivarfs")
	}
	if err := unix.Mount("efivarfs", efivar.Dir, "efivarfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting the settings of the firmware: %w", err)
	}
	return nil
}

// deviceOf is the device of the file system that dir lies on.
func deviceOf(dir string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", fmt.Errorf("looking for the device of %s: %w", dir, err)
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return "", fmt.Errorf("looking for the device of %s: %w", dir, err)
	}
	return "/dev/" + link[strings.LastIndexByte(link, '/')+1:], nil
}
