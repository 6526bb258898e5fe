package iscsi

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// tree writes files below a directory; a value that begins with "->" is a link.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir, all := t.TempDir(), fstest.MapFS{}
	for name, content := range files {
		all[name] = &fstest.MapFile{Data: []byte(content)}
		if to, isLink := strings.CutPrefix(content, "->"); isLink {
			all[name] = &fstest.MapFile{Data: []byte(to), Mode: fs.ModeSymlink}
		}
	}
	if err := os.CopyFS(dir, all); err != nil {
		t.Fatal(err)
	}
	return dir
}

const device = "devices/platform/host2/session4/target2:0:0/2:0:0:"

// sysfs is one with two disks. They are called as devices that every machine has.
func sysfs(t *testing.T) string {
	t.Helper()
	return tree(t, map[string]string{
		"class/scsi_host/host2/scan":                                    "",
		"class/iscsi_session/session4":                                  "->../../devices/platform/host2/session4/iscsi_session/session4",
		"devices/platform/host2/session4/iscsi_session/session4/device": "->../../../session4",
		device + "0/block/null/size":                                    "4194304\n",
		device + "0/block/null/ro":                                      "0\n",
		device + "0/timeout":                                            "30\n",
		device + "0/state":                                              "transport-offline\n",
		device + "1/block/zero/size":                                    "8\n",
		device + "1/block/zero/ro":                                      "1\n",
		device + "1/timeout":                                            "30\n",
		device + "1/state":                                              "running\n",
		device + "1/vpd_pg80":                                           "\x00\x80\x00\x220123456789abcdef0123456789abcdef  ",
		device + "10/state":                                             "offline\n",
	})
}

func content(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestFindLUN(t *testing.T) {
	sys := sysfs(t)
	st := Status{Session: 4, Host: 2}
	for lun, want := range map[uint16]Disk{
		0: {Name: "null", Path: "/dev/null", Size: 2 << 30},
		1: {Name: "zero", Path: "/dev/zero", Size: 4096, ReadOnly: true, Serial: "0123456789abcdef0123456789abcdef"},
	} {
		got, err := FindLUN(t.Context(), sys, st, lun)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("LUN %d: %v (-want +got):\n%s", lun, err, diff)
		}
	}
	if got := content(t, filepath.Join(sys, device+"1/timeout")); got != commandTime {
		t.Errorf("a command may take %q seconds, want %q", got, commandTime)
	}
	if _, err := FindLUN(t.Context(), sys, st, 2); !errors.Is(err, ErrNoLUN) {
		t.Errorf("LUN 2: %v, want %v", err, ErrNoLUN)
	}
	if got := content(t, filepath.Join(sys, "class/scsi_host/host2/scan")); got != "- - 2" {
		t.Errorf("scanned for %q", got)
	}
}

// The kernel makes the disk some time after its SCSI device.
func TestFindLUNWaitsForTheDisk(t *testing.T) {
	sys := sysfs(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	st := Status{Session: 4, Host: 2}
	if _, err := FindLUN(ctx, sys, st, 10); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a SCSI device without a disk: %v", err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := FindLUN(t.Context(), sys, st, 10)
		done <- err
	}()
	disk := filepath.Join(sys, device+"10")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(disk, "late"), 0o755), os.WriteFile(filepath.Join(disk, "timeout"), nil, 0o644),
		os.WriteFile(filepath.Join(disk, "late/size"), []byte("8"), 0o644), os.WriteFile(filepath.Join(disk, "late/ro"), []byte("0"), 0o644),
		os.MkdirAll(filepath.Join(disk, "block"), 0o755), os.Rename(filepath.Join(disk, "late"), filepath.Join(disk, "block/full")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestBringOnline(t *testing.T) {
	dir := sysfs(t)
	sys, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer sys.Close()
	if err := bringOnline(sys, Status{Session: 4, Host: 2}); err != nil {
		t.Fatal(err)
	}
	for lun, want := range map[string]string{"0": "running", "1": "running\n", "10": "running"} {
		if got := content(t, filepath.Join(dir, device+lun+"/state"))[:len(want)]; got != want {
			t.Errorf("LUN %s is %q, want %q", lun, got, want)
		}
	}
}
