package disk

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// A cache says whose it is: two machines may see one disk of a storage network, and a file system that both write to is
// lost. The record lies in the first 512 bytes of the file system, which ext4 leaves to boot loaders:
//
//	ownerMark   "troupe cache owner 1\n"
//	identity    agentapi.Identity in JSON, of the machine that made the cache or took it over
//	zeros       up to 512
//
// One block is written whole or not at all. Not the multiple mount protection of ext4 (mmp), which would do the same
// with more certainty: after a power cut a mount takes 44 s with it.
const (
	ownerMark = "troupe cache owner 1\n"
	ownerSize = 512
)

// A Machine is who looks for its cache. Without a MAC it is nobody, and marks no cache as its own.
type Machine struct {
	agentapi.Identity
	MACs []string // of all its interfaces: it does not always boot from the same one
}

// has says whether one of the machine's interfaces has that MAC.
func (m Machine) has(mac string) bool {
	return mac != "" && (mac == m.MAC || slices.Contains(m.MACs, mac))
}

// owns says whether a cache of that owner is the machine's. One without an owner is, too. A UUID alone proves little, as
// vendors give many boards the same.
func (m Machine) owns(o agentapi.Identity) bool {
	return o.MAC == "" || m.has(o.MAC) || o.UUID != "" && o.Serial != "" && o.UUID == m.UUID && o.Serial == m.Serial
}

// readOwner is the owner of the file system that begins with b; none where it has no record.
func readOwner(b []byte) (o agentapi.Identity) {
	text, ok := bytes.CutPrefix(b[:min(len(b), ownerSize)], []byte(ownerMark))
	if !ok || json.Unmarshal(bytes.TrimRight(text, "\x00"), &o) != nil {
		return agentapi.Identity{}
	}
	return o
}

func ownerAt(r io.ReaderAt) (agentapi.Identity, error) {
	b := make([]byte, ownerSize)
	if n, err := r.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return agentapi.Identity{}, fmt.Errorf("reading whose the cache is: %w", err)
	} else if n < ownerSize {
		return agentapi.Identity{}, nil
	}
	return readOwner(b), nil
}

// mark makes the machine the owner of a cache that is not mounted. A boot loader that lies there is left alone.
func (m Maker) mark(path string) error {
	if m.Machine.MAC == "" {
		return nil
	}
	f, err := claim(path)
	if err != nil {
		return fmt.Errorf("marking the cache: %w", err)
	}
	defer f.Close()
	b := make([]byte, ownerSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		return fmt.Errorf("marking the cache %s: %w", path, err)
	}
	if !zero(b) && !bytes.HasPrefix(b, []byte(ownerMark)) {
		m.Log.Warn("the cache cannot be marked as this machine's: something else lies there", "device", path)
		return nil
	}
	if _, err := f.WriteAt(ownerRecord(m.Machine.Identity), 0); err != nil {
		return fmt.Errorf("marking the cache %s: %w", path, err)
	}
	return f.Sync()
}

// unmark takes the owner's record away from what is to become a new file system: a cache is marked only when it is whole.
func unmark(path string) error {
	f, err := claim(path)
	if err != nil {
		return fmt.Errorf("unmarking the cache: %w", err)
	}
	defer f.Close()
	owner, err := ownerAt(f)
	if err != nil || owner == (agentapi.Identity{}) {
		return err
	}
	if _, err := f.WriteAt(make([]byte, ownerSize), 0); err != nil {
		return fmt.Errorf("unmarking the cache %s: %w", path, err)
	}
	return f.Sync()
}

func ownerRecord(id agentapi.Identity) []byte {
	text, err := json.Marshal(id)
	if err != nil || len(ownerMark)+len(text) > ownerSize { // a serial number without end
		text, _ = json.Marshal(agentapi.Identity{MAC: id.MAC}) // a struct of strings is always JSON
	}
	return append([]byte(ownerMark), append(text, make([]byte, ownerSize-len(ownerMark)-len(text))...)...)
}

// errForeign says that a cache has become another machine's.
var errForeign = errors.New("another machine made this cache its own")

// health is what a cache says of itself before it is mounted.
type health struct {
	hasMagic bool // of ext4; without it nothing else of the superblock is right
	// hasErrors is ext4_super_block.s_state, EXT4_VALID_FS and EXT4_ERROR_FS; with a journal the former stays set while it
	// is mounted.
	hasErrors bool
	hasFailed bool // an e2fsck of the try before could not do its work
}

// look reads what a mount depends on: whose the cache is, and how it is.
func (m Maker) look(path string) (health, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return health{}, fmt.Errorf("looking at the cache: %w", err)
	}
	defer f.Close()
	b := make([]byte, 2048)
	if _, err := f.ReadAt(b, 0); err != nil {
		return health{}, fmt.Errorf("looking at the cache %s: %w", path, err)
	}
	// A second machine may have begun on a blank disk of both in the same seconds.
	if o := readOwner(b); !m.Machine.owns(o) {
		return health{}, fmt.Errorf("%s: %w: %s", path, errForeign, ownerText(o))
	}
	const isValid, isError = 1, 2
	sb := b[1024:]
	state := uint16(sb[0x3a]) | uint16(sb[0x3b])<<8
	hasMagic := sb[0x38] == 0x53 && sb[0x39] == 0xef
	return health{
		hasMagic:  hasMagic,
		hasErrors: hasMagic && (state&isValid == 0 || state&isError != 0),
		hasFailed: bytes.HasPrefix(b[failedAt:], []byte(failedMark)),
	}, nil
}

// ownerText says who an owner is. The record came with the disk: what is in it is quoted.
func ownerText(o agentapi.Identity) string {
	return fmt.Sprintf("MAC %q, UUID %q, serial %q", o.MAC, o.UUID, o.Serial)
}
