package lun

import (
	"bytes"
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
