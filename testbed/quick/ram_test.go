package quick_test

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed/quick"
)

// TestRAM is a host that runs from its memory: no disk is touched, the server may go, and each boot begins anew.
func TestRAM(t *testing.T) {
	roles := strings.Replace(quick.Fleet()["roles.cue"], "roles: a: {}", `roles: a: boot: "ram"`, 1)
	lab := quick.Start(t, quick.Config{Files: map[string]string{"roles.cue": roles}})
	lab.On("n1")
	lab.AwaitHealthy("n1")
	first := lab.Host("n1").Boots[0]
	if first.Bytes == 0 {
		t.Error("the first boot fetched nothing")
	}
	lab.Run(n1, "sh", "-c", "echo x > /var/kept")
	if got := lab.Run(n1, "sh", "-c", "mount | grep -c /dev/vd || true"); got != "0\n" {
		t.Errorf("%s mounts are of a disk", strings.TrimSpace(got))
	}

	lab.StopServer()
	lab.Run(n1, "sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches; cat /usr/sbin/init /sbin/e2fsck > /dev/null && cat /var/kept")
	lab.StartServer()
	lab.AwaitHealthy("n1")

	lab.Cycle("n1")
	lab.AwaitBoot("n1", first.ID)
	if n := lab.Host("n1").Boots[0].Bytes; n != first.Bytes {
		t.Errorf("another boot fetched %d bytes, want %d as the first one did", n, first.Bytes)
	}
	if out, status, err := lab.TryRun(t.Context(), n1, "cat", "/var/kept"); err != nil || status == 0 {
		t.Errorf("what the boot before wrote: status %d, %v: %s", status, err, out)
	}
	if !isHole(t, lab.DiskPath("n1")) {
		t.Error("the machine's disk was written to")
	}

	lab.Role("n1", "b") // which runs from the disk
	lab.AwaitRole("n1", "b")
	lab.Role("n1", "a")
	lab.Await("n1 is back in memory", func(s *api.Snapshot) bool {
		h := quick.Find(s, "n1")
		return h.State == api.HostHealthy && h.RunningRole == "a"
	})
	if n := lab.Host("n1").Boots[0].Bytes; n != first.Bytes {
		t.Errorf("back in memory %d bytes were fetched, want %d", n, first.Bytes)
	}
}

// isHole says whether nothing was ever written to a file.
func isHole(t *testing.T, name string) bool {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at, err := f.Seek(0, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return true
	}
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16)
	_, err = f.ReadAt(b, at)
	t.Logf("at %d: %q, %v", at, b, errors.Is(err, io.EOF))
	return false
}
