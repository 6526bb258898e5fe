package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// Exit status bits of e2fsck(8).
const (
	fsckCorrected   = 1
	fsckReboot      = 2 // of a file system that is mounted: for us the same as corrected
	fsckUncorrected = 4
	fsckFailed      = 8 // it could not do its work, e.g. as it found no superblock
)

// Where e2fsck could not do its work, for want of memory or since the disk did not answer, that says nothing of the cache,
// and the next try may go better. Where it can do nothing twice in a row, there is nothing left to repair. So that the
// second try knows of the first, also after a reboot, a note lies behind the record of the owner, where ext4 has nothing:
//
//	512 ff   failedMark, then zeros up to 1024
const (
	failedMark = "troupe: e2fsck failed\n"
	failedAt   = ownerSize
	failedSize = 512
)

// Mount mounts a cache that Ensure returned on dir. A file system that says of itself that it has errors is repaired
// before, and one that the kernel finds damaged after that; where nothing repairs it, the cache is made anew: images can
// be fetched again, and a machine that does not boot is of no use to what programs wrote there. That takes an e2fsck which
// ran to its end, or two tries in a row in which it did not. The result says what was done. After a power cut alone
// nothing is to be repaired: the kernel replays the journal.
func (m Maker) Mount(ctx context.Context, found Found, dir string) (Found, error) {
	ctx = context.WithoutCancel(ctx) // a repair that is broken off leaves more to repair
	was, err := m.look(found.Path)
	if err != nil {
		return found, err
	}
	if was.hasFailed {
		if err := noteFailed(found.Path, false); err != nil {
			return found, err
		}
	}
	if was.hasErrors {
		if err := m.preen(ctx, &found); err != nil {
			return found, err
		}
	}
	if err = Mount(found.Path, dir); !isDamage(err) {
		return found, err
	}
	m.Log.Error("the cache does not mount, repairing it", "device", found.Path, "error", err)
	result, fsckErr := m.fsck(ctx, &found, "-y")
	if fsckErr != nil {
		return found, errors.Join(err, fsckErr)
	}
	if err = Mount(found.Path, dir); !m.isBeyondRepair(found.Path, err) {
		return found, err
	}
	if !result.isFinished() && !was.hasFailed {
		err = fmt.Errorf("repairing the cache: e2fsck ended with status %d: %s: %w", result.status, result.said, err)
		return found, errors.Join(err, noteFailed(found.Path, true))
	}
	return m.anew(found, dir, err, func() error { return m.fill(ctx, found.Path) })
}

// anew fills and mounts a cache or a node disk that nothing repairs.
func (m Maker) anew(found Found, dir string, why error, fill func() error) (Found, error) {
	m.Log.Error("it cannot be repaired and is made anew: what programs wrote on this node is lost", "device", found.Path, "error", why)
	if err := fill(); err != nil {
		return found, err
	}
	found = Found{Path: found.Path, Made: true, Note: "anew, since it was damaged beyond repair: what programs wrote on this node is lost"}
	return found, Mount(found.Path, dir)
}

// noteFailed notes that e2fsck failed, or takes that note away. What a boot loader has there is left alone.
func noteFailed(path string, hasFailed bool) error {
	f, err := claim(path)
	if err != nil {
		return fmt.Errorf("noting a repair: %w", err)
	}
	defer f.Close()
	b := make([]byte, failedSize)
	if _, err := f.ReadAt(b, failedAt); err != nil {
		return fmt.Errorf("noting a repair on %s: %w", path, err)
	}
	if !zero(b) && !bytes.HasPrefix(b, []byte(failedMark)) {
		return nil
	}
	clear(b)
	if hasFailed {
		copy(b, failedMark)
	}
	if _, err := f.WriteAt(b, failedAt); err != nil {
		return fmt.Errorf("noting a repair on %s: %w", path, err)
	}
	return f.Sync()
}

// preen repairs a file system that says of itself that it has errors: first what is safe, then all.
func (m Maker) preen(ctx context.Context, found *Found) error {
	m.Log.Warn("the cache has errors, checking it", "device", found.Path)
	result, err := m.fsck(ctx, found, "-p")
	if err != nil || result.status&(fsckUncorrected|fsckFailed) == 0 {
		return err
	}
	_, err = m.fsck(ctx, found, "-y")
	return err
}

// checked is how an e2fsck ended.
type checked struct {
	status int
	said   string // its last line
	unread string // the line about what could not be read; "" for none
}

// isFinished says whether it looked at all of the file system. It may have left errors.
func (c checked) isFinished() bool { return c.status&fsckFailed == 0 || c.status&fsckUncorrected != 0 }

// fsck checks the cache, and notes whether it changed something. An error says that it did not run.
func (m Maker) fsck(ctx context.Context, found *Found, mode ...string) (checked, error) {
	tool := m.E2fsck
	if tool == "" {
		tool = "/sbin/e2fsck"
	}
	cmd := exec.CommandContext(ctx, tool, append(mode, found.Path)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && (!errors.As(err, &exit) || exit.ExitCode() < 0 || exit.ExitCode() >= 2*fsckFailed) {
		return checked{}, fmt.Errorf("checking the cache on %s: %s: %w", found.Path, lastLine(out.String()), err)
	}
	c := checked{status: cmd.ProcessState.ExitCode(), said: lastLine(out.String()), unread: unreadLine(out.String())}
	m.Log.Warn("the cache was checked", "device", found.Path, "how", mode, "status", c.status, "result", c.said)
	if c.status&(fsckCorrected|fsckReboot|fsckUncorrected) != 0 {
		found.Repaired = true
	}
	return c, nil
}

// unreadLine is what an e2fsck says of a block that the disk did not give: its own words (ehandler.c), or an error of a
// system call or of libext2fs. The exit status does not tell.
func unreadLine(out string) string {
	for line := range strings.Lines(out) {
		for _, words := range []string{"Error reading block", "Input/output error", "resulted in short read"} {
			if strings.Contains(line, words) {
				return strings.TrimSpace(line)
			}
		}
	}
	return ""
}

// isDamage says whether a mount failed for what e2fsck may repair: EUCLEAN and EBADMSG are ext4's EFSCORRUPTED and
// EFSBADCRC.
func isDamage(err error) bool { return isBroken(err) || errors.Is(err, unix.EINVAL) }

// isBroken leaves EINVAL out: a kernel says that also of a whole file system with a feature that it does not know.
func isBroken(err error) bool { return errors.Is(err, unix.EUCLEAN) || errors.Is(err, unix.EBADMSG) }

// isBeyondRepair says whether a mount failed after a repair for what no other kernel would mount either.
func (m Maker) isBeyondRepair(path string, err error) bool {
	if errors.Is(err, unix.EINVAL) {
		is, lookErr := m.look(path)
		return lookErr == nil && !is.hasMagic
	}
	return isBroken(err)
}

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
