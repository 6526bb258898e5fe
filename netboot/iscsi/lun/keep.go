package lun

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// KeepFile keeps the persistent reservations of a unit in a file, which is replaced whole at each change. Its directory
// must exist.
func KeepFile(path string) scsi.Keeper { return keepFile{path: path} }

// KeepFileOf is KeepFile for a unit whose medium has that making (see Delta.Making): what was kept of another, which was
// there before under the same name, is not loaded. ignored is then called, with path.
func KeepFileOf(path, making string, ignored func(path string)) scsi.Keeper {
	return keepFile{path, "of " + making + "\n", ignored}
}

type keepFile struct {
	path    string
	begin   string // of the file
	ignored func(path string)
}

// Load implements scsi.Keeper.
func (k keepFile) Load() ([]byte, error) {
	b, err := os.ReadFile(k.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading reservations: %w", err)
	}
	kept, ok := bytes.CutPrefix(b, []byte(k.begin))
	if !ok {
		k.ignored(k.path)
		return nil, nil
	}
	return kept, nil
}

// Save implements scsi.Keeper.
func (k keepFile) Save(b []byte) error {
	if err := atomicfile.WriteFile(k.path, append([]byte(k.begin), b...), 0o600); err != nil {
		return fmt.Errorf("keeping reservations: %w", err)
	}
	return nil
}
