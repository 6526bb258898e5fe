package quick_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/troupe-dev/troupe/testbed/quick"
)

// n1 is the address of the default fleet's host.
const n1 = "10.77.0.11"

// TestLab is of the lab itself: a blank machine comes up, has its power cut, and comes up again from what it has.
func TestLab(t *testing.T) {
	lab := quick.Start(t, quick.Config{})
	lab.On("n1")
	lab.AwaitHealthy("n1")
	first := lab.Host("n1").Boots[0]
	if first.Bytes == 0 {
		t.Error("the first boot fetched nothing")
	}
	if got := lab.Run(n1, "cat", "/etc/role"); got != "a\n" {
		t.Errorf("/etc/role: got %q, want a", got)
	}
	lab.Run(n1, "sh", "-c", "echo kept > /var/kept && sync")
	lab.Cycle("n1")
	lab.AwaitBoot("n1", first.ID)
	if n := lab.Host("n1").Boots[0].Bytes; n != 0 {
		t.Errorf("after a power cut %d bytes were fetched, want 0", n)
	}
	if got := lab.Run(n1, "cat", "/var/kept"); got != "kept\n" {
		t.Errorf("what the node wrote: got %q after a power cut", got)
	}
	lab.Role("n1", "b")
	lab.AwaitRole("n1", "b")

	lab.Off("n1")
	base := lab.Running("n1").Content.Base.Digest
	lab.Flip("n1", base, 4096*100)
	lab.WithCache("n1", func(dir string) {
		wantFlipped(t, filepath.Join(dir, "images/sha256", base.Hex()), lab.BlobPath(base), 4096*100)
	})
}

// wantFlipped checks that two files differ in one bit, that at the offset.
func wantFlipped(t *testing.T, flipped, whole string, at int) {
	t.Helper()
	got, err := os.ReadFile(flipped)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	want[at] ^= 1
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not %s with one bit changed at %d", flipped, whole, at)
	}
}
