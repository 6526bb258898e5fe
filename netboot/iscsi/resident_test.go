package iscsi

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestResidency(t *testing.T) {
	const page = 1 << pageShift
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 300*page), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	m, err := unix.Mmap(int(file.Fd()), 0, 300*page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	if err := populate(m); err != nil {
		t.Fatal(err)
	}
	r := &residency{start: time.Now()}
	for range 2 { // asked, and remembered
		for _, parts := range [][][]byte{
			{m}, {m[:1]}, {m[len(m)-1:]}, {m[page-1:][:2]}, {m[63*page:][:70*page]}, {m[5*page:][:page], m[200*page:][:page]},
		} {
			if !r.holds(parts) {
				t.Errorf("%d bytes of what was just written are not there", len(parts[0]))
			}
		}
	}
	if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}
	if (&residency{start: time.Now()}).holds([][]byte{m[:page]}) {
		t.Error("what is not mapped is there")
	}
}
