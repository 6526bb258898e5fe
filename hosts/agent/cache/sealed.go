package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// sealed is the form of what the cache remembers: JSON, with the digest of its own bytes. ext4 does not notice a byte that
// its disk changed, and a count or a name that is another one must not decide what a machine boots.
//
//	{"sum": "sha256:…", "content": {…}}       sum is of the bytes of content as they stand there
type sealed struct {
	Sum     digest.Digest   `json:"sum"`
	Content json.RawMessage `json:"content"`
}

// maxSealed bounds such a file, in bytes: an assignment has up to 640 KiB of files and 64 KiB of checks.
const maxSealed = 4 << 20

// errBroken says that a sealed file is not what was written.
var errBroken = errors.New("its bytes are not those that were written")

// seal is the file of v.
func seal(v any) ([]byte, error) {
	content, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return json.Marshal(sealed{Sum: digest.Of(content), Content: content})
}

// unseal reads a file that seal made. A file that is not whole is errBroken, whatever is wrong with it.
func unseal(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSealed+1))
	if err != nil {
		return fmt.Errorf("reading %q: %w", path, err)
	}
	var s sealed
	if len(b) > maxSealed || json.Unmarshal(b, &s) != nil || digest.Of(s.Content) != s.Sum {
		return fmt.Errorf("reading %q: %w", path, errBroken)
	}
	if err := json.Unmarshal(s.Content, v); err != nil { // as of a version with another form
		return fmt.Errorf("reading %q: %w: %w", path, errBroken, err)
	}
	return nil
}

// write makes b the content of a file of the cache's own. Node deltas lie on the same file system, and what runs in them
// may fill it to the last block: then the spare file gives way. A node that cannot write what it remembers could not even
// count its boots.
func (c *Cache) write(path string, b []byte) error {
	err := atomicfile.WriteFile(path, b, 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		return err
	}
	if rmErr := os.Remove(c.path("spare")); rmErr != nil {
		return errors.Join(err, rmErr)
	}
	err = atomicfile.WriteFile(path, b, 0o600)
	if spareErr := c.keepSpare(); spareErr != nil {
		c.log.Warn("the cache is full", "error", spareErr)
	}
	return err
}
