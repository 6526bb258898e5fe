package lun

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// KeepFile keeps the persistent reservations of a unit in a file, which is replaced whole at each change. Its directory
// must exist.
func KeepFile(path string) scsi.Keeper { return keepFile{path: path} }

// KeepFileOf is KeepFile for a unit whose medium has that making (see Delta.Making): what was kept of another, which was
// there before under the same name, is not loaded. ignored is then called, with path. A file that does not say whole what it
// is of is an error.
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
	switch {
	case !ok && !otherBegin.Match(b):
		return nil, k.Damaged(errors.New("it does not begin with what it is of"))
	case !ok:
		k.ignored(k.path)
		return nil, nil
	case len(kept) == 0:
		return nil, k.Damaged(io.ErrUnexpectedEOF)
	}
	return kept, nil
}

// otherBegin is how files begin that are of a medium (Disk.Making, Delta.Making), of any.
var otherBegin = regexp.MustCompile(`^of (file [0-9]+ of -?[0-9]+\.[0-9]{9}|delta [0-9a-f]{32})\n`)

// Damaged is the error of a file that is not what was saved, and says what to do.
func (k keepFile) Damaged(cause error) error {
	return fmt.Errorf("the reservations in %s are damaged (%w): bring that file back, or remove it to begin without them, so that they keep nobody out any more",
		k.path, cause)
}

// Save implements scsi.Keeper.
func (k keepFile) Save(b []byte) error {
	if err := atomicfile.WriteFile(k.path, append([]byte(k.begin), b...), 0o600); err != nil {
		return fmt.Errorf("keeping reservations: %w", err)
	}
	return nil
}
