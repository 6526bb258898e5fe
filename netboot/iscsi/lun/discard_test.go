package lun

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// What is discarded is closed: it may be opened again, and has all that was written where this computer runs on.
func TestDiscard(t *testing.T) {
	type discards interface {
		scsi.Medium
		Close() error
		Discard() error
	}
	for name, open := range map[string]func(path string) (discards, error){
		"disk":  func(path string) (discards, error) { return OpenDisk(path, 1<<20) },
		"delta": func(path string) (discards, error) { return OpenDelta(nil, path, 1<<20, "") },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), name)
			want := bytes.Repeat([]byte("kept"), BlockSize/4)
			m, err := open(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := m.WriteAt(want, BlockSize); err != nil {
				t.Error(err)
			}
			if err := m.Discard(); err != nil {
				t.Error(err)
			}
			if m, err = open(path); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if _, err := m.ReadAt(got, BlockSize); err != nil || !bytes.Equal(got, want) {
				t.Errorf("after it was discarded it has %q (%v)", got[:8], err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A medium whose storage failed takes no write, and says why, until it is discarded and opened anew.
func TestLost(t *testing.T) {
	disk, err := OpenDisk(filepath.Join(t.TempDir(), "disk"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	delta, err := OpenDelta(nil, filepath.Join(t.TempDir(), "delta"), 1<<20, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		m interface {
			scsi.Medium
			Lost() error
			Discard() error
		}
		lost *lostWrites
	}{"disk": {disk, &disk.lost}, "delta": {delta, &delta.lost}} {
		if _, err := tt.m.WriteAt(make([]byte, BlockSize), 0); err != nil || tt.m.Lost() != nil {
			t.Errorf("%s: while nothing is wrong: %v, lost %v", name, err, tt.m.Lost())
		}
		_ = tt.lost.note(errors.New("input/output error"))
		if _, err := tt.m.WriteAt(make([]byte, BlockSize), 0); err == nil || tt.m.Lost() == nil {
			t.Errorf("%s: after a sync failed: %v, lost %v", name, err, tt.m.Lost())
		}
		if err := tt.m.Discard(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if disk, err = OpenDisk(disk.path, 1<<20); err != nil {
		t.Fatal(err)
	}
	if delta, err = OpenDelta(nil, delta.path, 1<<20, ""); err != nil {
		t.Fatal(err)
	}
	if disk.Lost() != nil || delta.Lost() != nil {
		t.Errorf("opened anew: the disk has lost %v, the delta %v", disk.Lost(), delta.Lost())
	}
	if err := errors.Join(disk.Close(), delta.Close()); err != nil {
		t.Error(err)
	}
}

// What a disk that has lost something leaves in the page cache is not what storage has: no end of it leaves that there.
func TestLostPagesAreForgotten(t *testing.T) {
	for name, end := range map[string]func(*Disk) error{"discarded": (*Disk).Discard, "closed": (*Disk).Close} {
		t.Run(name, func(t *testing.T) {
			d, err := OpenDisk(filepath.Join(t.TempDir(), "disk"), 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			stays := d.f.onTmpfs() // there is nothing but the page cache
			if _, err := d.WriteAt(make([]byte, 4096), 0); err != nil {
				t.Fatal(err)
			}
			if err := d.Sync(); err != nil {
				t.Fatal(err)
			}
			_ = d.lost.note(errors.New("input/output error"))
			_ = end(d) // whether it says what was lost is not the matter here
			f, err := os.Open(d.path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got := cached(t, f, 0); got != stays {
				t.Errorf("what was lost is in the page cache: %v, want %v", got, stays)
			}
		})
	}
}
