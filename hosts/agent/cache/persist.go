package cache

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// A Kept is a directory of a host that outlives its releases.
type Kept struct {
	Path string // in the root
	Data string // directory
	// Fresh says that it is empty, and waits for what the root has there: what a boot left that did not come to Seeded is thrown away.
	Fresh bool
	Order string // as in Delta

	dir string
}

// Keep returns what a host keeps at a path of its root, made where there is nothing, and made anew where it was never seeded.
func (c *Cache) Keep(host, path string) (*Kept, error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return nil, fmt.Errorf("keeping %q: want an absolute path below /", path)
	}
	id := digest.Of([]byte("troupe kept directory 1\n" + hex.EncodeToString([]byte(host)) + "\n" + path + "\n")).Hex()[:32]
	dir := c.path("kept", id)
	k := &Kept{Path: path, Data: filepath.Join(dir, "data"), dir: dir}
	order, err := readOrder(dir)
	if err == nil {
		k.Order = order
		return k, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("keeping %q: %w", path, err)
	}
	k.Fresh = true
	if err := removeAll(dir); err != nil {
		return nil, fmt.Errorf("keeping %q: clearing what a boot left: %w", path, err)
	}
	if err := os.MkdirAll(k.Data, 0o755); err != nil {
		return nil, fmt.Errorf("keeping %q: %w", path, err)
	}
	return k, nil
}

// Drop removes what is at paths of the root from what is kept; fresh says that all of it goes, and that it is to be kept anew.
func (k *Kept) Drop(paths []string) (fresh bool, err error) {
	for _, p := range paths {
		rel, below := strings.CutPrefix(p, k.Path+"/")
		switch {
		case p == k.Path || strings.HasPrefix(k.Path, p+"/"):
			return true, nil
		case !below:
			continue
		}
		d := Delta{Upper: k.Data}
		if err := d.Drop([]string{"/" + rel}); err != nil {
			return false, err
		}
	}
	return false, nil
}

// Unseed has it made anew when it is asked for next.
func (k *Kept) Unseed() error {
	err := os.Remove(filepath.Join(k.dir, "seeded"))
	if err == nil {
		err = atomicfile.SyncDir(k.dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("dropping what is kept at %q: %w", k.Path, err)
	}
	return nil
}

// Seeded says that it has what it shall start with, and which order it followed. All that was written to it is on the disk before the mark is.
func (k *Kept) Seeded() error {
	dir, err := os.Open(k.dir)
	if err != nil {
		return fmt.Errorf("keeping %q: %w", k.Path, err)
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("keeping %q: syncing it: %w", k.Path, err)
	}
	if err := atomicfile.WriteFile(filepath.Join(k.dir, "seeded"), []byte(k.Order), 0o600); err != nil {
		return fmt.Errorf("keeping %q: %w", k.Path, err)
	}
	k.Fresh = false
	return errors.Join(atomicfile.SyncDir(filepath.Dir(k.dir)), atomicfile.SyncDir(filepath.Dir(filepath.Dir(k.dir))))
}
