package cache

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// DeltaID names the node delta of a host with a release and its own files. The parts are separated so that no two
// different triples give one name.
func DeltaID(host string, release, node digest.Digest) string {
	sum := digest.Of([]byte("troupe node delta 1\n" + hex.EncodeToString([]byte(host)) + "\n" + string(release) + "\n" + string(node) + "\n"))
	return sum.Hex()[:32]
}

// A Delta is a node delta: the writable directories of an overlay.
type Delta struct {
	ID          string
	Upper, Work string // directories
	// Fresh says that it is empty and waits for its seed: what a boot left that did not come to Seeded is thrown away.
	Fresh bool
	// Order is the ID of the order to drop something that it was brought up to; Seeded writes it.
	Order string

	dir string
}

// Delta returns the node delta with that ID, made where there is none, and made anew where it was never seeded.
func (c *Cache) Delta(id string) (*Delta, error) {
	if _, err := hex.DecodeString(id); err != nil || id == "" {
		return nil, fmt.Errorf("node delta %q: not a name for one", id)
	}
	dir := c.path("deltas", id)
	d := &Delta{ID: id, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"), dir: dir}
	order, err := readOrder(dir)
	if err == nil {
		d.Order = order
		return d, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("node delta %s: %w", id, err)
	}
	d.Fresh = true
	if err := removeAll(dir); err != nil {
		return nil, fmt.Errorf("clearing node delta %s: %w", id, err)
	}
	for _, p := range []string{d.Upper, d.Work} {
		if err := os.MkdirAll(p, 0o755); err != nil {
			return nil, fmt.Errorf("making node delta %s: %w", id, err)
		}
	}
	// The upper directory lends its mode to the root directory of the system.
	return d, os.Chmod(d.Upper, 0o755)
}

// maxOrder bounds the ID of an order, in bytes.
const maxOrder = 128

// readOrder reads the mark of a node delta, which has the order that this was brought up to.
func readOrder(dir string) (string, error) {
	f, err := os.Open(filepath.Join(dir, "seeded"))
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxOrder))
	return string(b), err
}

// Unseed has the node delta with that ID made anew when it is asked for next: what is in it is lost.
func (c *Cache) Unseed(id string) error {
	dir := c.path("deltas", id)
	err := os.Remove(filepath.Join(dir, "seeded"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = atomicfile.SyncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("dropping node delta %s: %w", id, err)
	}
	return nil
}

// Drop removes paths of the root, with all that is below them, from the delta, so that what the release has there shows again. It must
// not be mounted. A path that leads over a link, or that the delta does not have, is left out.
func (d *Delta) Drop(paths []string) error {
	for _, p := range paths {
		rel := strings.TrimPrefix(p, "/")
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || rel == "" {
			return fmt.Errorf("dropping %q: want an absolute path below /", p)
		}
		if !d.hasDirs(filepath.Dir(rel)) {
			continue
		}
		if err := removeAll(filepath.Join(d.Upper, rel)); err != nil {
			return fmt.Errorf("dropping %q: %w", p, err)
		}
	}
	return nil
}

// hasDirs says whether all of rel are directories of the delta, and no links.
func (d *Delta) hasDirs(rel string) bool {
	dir := d.Upper
	for name := range strings.SplitSeq(rel, "/") {
		dir = filepath.Join(dir, name)
		if fi, err := os.Lstat(dir); err != nil || !fi.IsDir() {
			return false
		}
	}
	return true
}

// isSeeded says whether the node delta with that ID is there, and has what it shall start with.
func (c *Cache) isSeeded(id string) bool {
	_, err := os.Stat(c.path("deltas", id, "seeded"))
	return err == nil
}

// Seeded says that the delta has what it shall start with. All that was written to it is on the disk before the mark
// is.
func (d *Delta) Seeded() error {
	dir, err := os.Open(d.dir)
	if err != nil {
		return fmt.Errorf("node delta %s: %w", d.ID, err)
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("syncing node delta %s: %w", d.ID, err)
	}
	if err := atomicfile.WriteFile(filepath.Join(d.dir, "seeded"), []byte(d.Order), 0o600); err != nil {
		return fmt.Errorf("node delta %s: %w", d.ID, err)
	}
	d.Fresh = false
	return atomicfile.SyncDir(filepath.Dir(d.dir))
}
