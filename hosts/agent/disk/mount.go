package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// Exit status bits of e2fsck(8).
const (
	fsckCorrected   = 1
	fsckReboot      = 2 // of a file system that is mounted: for us the same as corrected
	fsckUncorrected = 4
	fsckFailed      = 8 // it could not do its work, e.g. as it found no superblock
)

// Mount mounts a cache that Ensure returned on dir. A file system that says of itself that it has errors is repaired
// before, and one that the kernel finds damaged after that; where nothing repairs it, the cache is made anew: images can
// be fetched again, and a machine that does not boot is of no use to what programs wrote there. The result says what was
// done. After a power cut alone nothing is to be repaired: the kernel replays the journal.
func (m Maker) Mount(ctx context.Context, found Found, dir string) (Found, error) {
	ctx = context.WithoutCancel(ctx) // a repair that is broken off leaves more to repair
	err := m.preen(ctx, &found)
	if err != nil {
		return found, err
	}
	if err = Mount(found.Path, dir); !isDamage(err) {
		return found, err
	}
	m.Log.Error("the cache does not mount, repairing it", "device", found.Path, "error", err)
	if _, fsckErr := m.fsck(ctx, &found, "-y"); fsckErr != nil {
		return found, errors.Join(err, fsckErr)
	}
	if err = Mount(found.Path, dir); !isBroken(err) {
		return found, err
	}
	m.Log.Error("the cache cannot be repaired and is made anew: what programs wrote on this node is lost", "device", found.Path, "error", err)
	if err := m.fill(ctx, found.Path); err != nil {
		return found, err
	}
	found = Found{Path: found.Path, Made: true, Note: "anew, since it was damaged beyond repair: what programs wrote on this node is lost"}
	return found, Mount(found.Path, dir)
}

// preen repairs a file system that says of itself that it has errors: first what is safe, then all.
func (m Maker) preen(ctx context.Context, found *Found) error {
	hasErrors, err := m.look(found.Path)
	if err != nil || !hasErrors {
		return err
	}
	m.Log.Warn("the cache has errors, checking it", "device", found.Path)
	status, err := m.fsck(ctx, found, "-p")
	if err != nil || status&(fsckUncorrected|fsckFailed) == 0 {
		return err
	}
	_, err = m.fsck(ctx, found, "-y")
	return err
}

// fsck checks the cache, and notes whether it changed something. An error says that it did not run.
func (m Maker) fsck(ctx context.Context, found *Found, mode string) (status int, err error) {
	tool := m.E2fsck
	if tool == "" {
		tool = "/sbin/e2fsck"
	}
	cmd := exec.CommandContext(ctx, tool, mode, found.Path)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	var exit *exec.ExitError
	if err = cmd.Run(); err != nil && (!errors.As(err, &exit) || exit.ExitCode() < 0 || exit.ExitCode() >= 2*fsckFailed) {
		return 0, fmt.Errorf("checking the cache on %s: %s: %w", found.Path, lastLine(out.String()), err)
	}
	status = cmd.ProcessState.ExitCode()
	m.Log.Warn("the cache was checked", "device", found.Path, "how", mode, "status", status, "result", lastLine(out.String()))
	if status&(fsckCorrected|fsckReboot|fsckUncorrected) != 0 {
		found.Repaired = true
	}
	return status, nil
}

// isDamage says whether a mount failed for what e2fsck may repair: EUCLEAN and EBADMSG are ext4's EFSCORRUPTED and
// EFSBADCRC.
func isDamage(err error) bool { return isBroken(err) || errors.Is(err, unix.EINVAL) }

// isBroken leaves EINVAL out: a kernel says that also of a whole file system with a feature that it does not know.
func isBroken(err error) bool { return errors.Is(err, unix.EUCLEAN) || errors.Is(err, unix.EBADMSG) }

// Mount mounts the cache's file system on dir, which is made where it is not there.
func Mount(path, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	err := unix.Mount(path, dir, "ext4", unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID, "errors=remount-ro")
	if err != nil {
		return fmt.Errorf("mounting the cache %s on %s: %w", path, dir, err)
	}
	return nil
}
