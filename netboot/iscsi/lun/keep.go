package lun

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// KeepFile keeps the persistent reservations of a unit in a file, which is replaced whole at each change. Its directory
// must exist.
func KeepFile(path string) scsi.Keeper { return keepFile(path) }

type keepFile string

// Load implements scsi.Keeper.
func (k keepFile) Load() ([]byte, error) {
	b, err := os.ReadFile(string(k))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading reservations: %w", err)
	}
	return b, nil
}

// Save implements scsi.Keeper.
func (k keepFile) Save(b []byte) error {
	if err := atomicfile.WriteFile(string(k), b, 0o600); err != nil {
		return fmt.Errorf("keeping reservations: %w", err)
	}
	return nil
}
