package iscsi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/backoff"
)

// A Disk is the block device of a LUN.
type Disk struct {
	Name     string // "sda"
	Path     string // "/dev/sda"
	Size     int64  // bytes
	ReadOnly bool
	Serial   string // of VPD page 80h (SPC-4 section 7.8.18); "" for none
}

// lunLook is how often a disk that the kernel has not made yet is looked for: its driver works beside the scan, and sysfs
// tells nobody.
const lunLook = 20 * time.Millisecond

// FindLUN makes the kernel look for one LUN of a session, and waits for its disk. Other LUNs of the target stay unseen.
func FindLUN(ctx context.Context, sys string, st Status, lun uint16) (Disk, error) {
	scan := filepath.Join(sys, "class/scsi_host", fmt.Sprintf("host%d", st.Host), "scan")
	if err := os.WriteFile(scan, fmt.Appendf(nil, "- - %d", lun), 0); err != nil {
		return Disk{}, fmt.Errorf("looking for LUN %d: %w", lun, err)
	}
	devices, err := filepath.Glob(lunPattern(sys, st, strconv.Itoa(int(lun))))
	if err != nil {
		return Disk{}, err
	}
	if len(devices) != 1 {
		return Disk{}, fmt.Errorf("LUN %d: %w", lun, ErrNoLUN)
	}
	for {
		d, err := diskOf(devices[0])
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return d, err
		}
		if err := backoff.Sleep(ctx, lunLook); err != nil {
			return Disk{}, fmt.Errorf("waiting for the disk of LUN %d: %w", lun, err)
		}
	}
}

// ErrNoLUN says that the target has no LUN of that number for this machine.
var ErrNoLUN = errors.New("the target has none of that number")

// lunPattern matches the SCSI devices of a session: "H:0:0:LUN" below its target.
func lunPattern(sys string, st Status, lun string) string {
	return filepath.Join(sys, "class/iscsi_session", fmt.Sprintf("session%d", st.Session), "device/target*/[0-9]*:0:[0-9]*:"+lun)
}

// commandTime is how long one command may take before SCSI aborts it, in seconds. A server whose disks are busy is slow,
// not broken; one that is away is noticed by its silence, and its commands do not count their time.
const commandTime = "180"

// diskOf is the disk of a SCSI device; fs.ErrNotExist where there is none yet.
func diskOf(device string) (Disk, error) {
	entries, err := os.ReadDir(filepath.Join(device, "block"))
	if err != nil {
		return Disk{}, err
	}
	if len(entries) == 0 {
		return Disk{}, fs.ErrNotExist
	}
	d := Disk{Name: entries[0].Name(), Path: "/dev/" + entries[0].Name()}
	block := filepath.Join(device, "block", d.Name)
	sectors, err := number(block, "size")
	if err != nil {
		return Disk{}, err
	}
	ro, err := number(block, "ro")
	if err != nil {
		return Disk{}, err
	}
	if err := os.WriteFile(filepath.Join(device, "timeout"), []byte(commandTime), 0); err != nil {
		return Disk{}, fmt.Errorf("setting the time of a command of %s: %w", d.Name, err)
	}
	d.Size, d.ReadOnly, d.Serial = sectors<<9, ro != 0, serial(device)
	if _, err := os.Stat(d.Path); err != nil {
		return Disk{}, err
	}
	return d, nil
}

// serial is the unit serial number: after 4 bytes of header, padded with spaces.
func serial(device string) string {
	b, err := os.ReadFile(filepath.Join(device, "vpd_pg80"))
	if err != nil || len(b) < 4 { // a unit without that page
		return ""
	}
	return strings.TrimSpace(string(b[4:min(len(b), 4+int(b[2])<<8+int(b[3]))]))
}

func number(dir, name string) (int64, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// bringOnline lets the kernel use the disks of a session again that it gave up: it does so where a command fails while
// it recovers from another.
func bringOnline(sys *os.Root, st Status) error {
	session := fmt.Sprintf("class/iscsi_session/session%d/device", st.Session)
	devices, err := glob(sys, session, "target*/[0-9]*:0:[0-9]*:[0-9]*")
	if err != nil {
		return fmt.Errorf("looking at the disks of the session: %w", err)
	}
	var errs []error
	for _, d := range devices {
		state, err := sys.ReadFile(path.Join(d, "state"))
		if err == nil && strings.HasSuffix(strings.TrimSpace(string(state)), "offline") {
			err = writeIn(sys, path.Join(d, "state"), "running")
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // it may have just been removed
			errs = append(errs, fmt.Errorf("bringing a disk online: %w", err))
		}
	}
	return errors.Join(errs...)
}

// glob is filepath.Glob below a directory of sysfs that is reached through a link.
func glob(sys *os.Root, dir, pattern string) ([]string, error) {
	sub, err := sys.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer sub.Close()
	names, err := fs.Glob(sub.FS(), pattern)
	for i, n := range names {
		names[i] = path.Join(dir, n)
	}
	return names, err
}

// writeIn writes to a file that is there.
func writeIn(root *os.Root, name, text string) error {
	f, err := root.OpenFile(name, unix.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}
