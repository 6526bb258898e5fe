package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// use notes that somebody gave the store a blob just now, and relies on its being there, also where it was there before.
func (s *Store) use(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used[d] = time.Now()
}

// isYoung says whether a blob was written, or given again, after that.
func (s *Store) isYoung(d digest.Digest, fi fs.FileInfo, after time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used[d].After(after) || fi.ModTime().After(after)
}

// Sweep deletes every blob that keep does not want and that nobody gave the store after that time: a build under way has
// put what nothing names yet. What has a blob open goes on reading it. It returns what it deleted or, in a dry run, what
// it would.
func (s *Store) Sweep(ctx context.Context, keep func(digest.Digest) bool, after time.Time, dry bool) ([]images.Blob, error) {
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	var gone []images.Blob
	for _, b := range all {
		if keep(b.Digest) {
			continue
		}
		swept, err := s.sweep(ctx, b.Digest, after, dry)
		if err != nil {
			return gone, errors.Join(err, atomicfile.SyncDir(s.blobDir()))
		}
		if swept {
			gone = append(gone, b)
		}
	}
	return gone, atomicfile.SyncDir(s.blobDir())
}

// sweep deletes one blob where it is old. It has the blob alone meanwhile: who commits the same bytes comes before, and is
// seen, or after, and finds nothing.
func (s *Store) sweep(ctx context.Context, d digest.Digest, after time.Time, dry bool) (bool, error) {
	e, err := s.acquire(ctx, d)
	if err != nil {
		return false, err
	}
	defer s.release(d, e)
	fi, err := os.Lstat(s.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("sweeping blob %s: %w", d, err)
	}
	if s.isYoung(d, fi, after) || dry {
		return dry && !s.isYoung(d, fi, after), nil
	}
	s.learn(e, ident{})
	if err := os.Remove(s.path(d)); err != nil {
		return false, fmt.Errorf("sweeping blob %s: %w", d, err)
	}
	s.mu.Lock()
	delete(s.used, d)
	s.mu.Unlock()
	return true, nil
}

// SweepCorrupt deletes what was set aside before that time: whoever wanted to know why has had time to.
func (s *Store) SweepCorrupt(after time.Time) (int64, error) {
	entries, err := os.ReadDir(s.corruptDir())
	if err != nil {
		return 0, fmt.Errorf("sweeping what was corrupt: %w", err)
	}
	var freed int64
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || fi.ModTime().After(after) {
			continue // gone meanwhile, or young
		}
		if err := os.Remove(filepath.Join(s.corruptDir(), e.Name())); err != nil {
			return freed, fmt.Errorf("sweeping what was corrupt: %w", err)
		}
		freed += fi.Size()
	}
	return freed, nil
}
