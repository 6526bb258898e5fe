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

// A Sweep says what is deleted: no blob that Keep wants, and none that was written, or given to the store again, after After,
// since a build under way has put what nothing names yet. Of the others all that Gone says nobody names any more, and all that this
// process was never given: what a server puts into its store when it starts has no name either.
type Sweep struct {
	Keep, Gone func(digest.Digest) bool
	After      time.Time
	Dry        bool // delete nothing
}

// wants says whether a blob stays.
func (s *Store) wants(d digest.Digest, fi fs.FileInfo, by Sweep) bool {
	s.mu.Lock()
	used, given := s.used[d]
	s.mu.Unlock()
	return used.After(by.After) || fi.ModTime().After(by.After) || given && !by.Gone(d)
}

// Sweep deletes what nobody wants. What has a blob open goes on reading it. It returns what it deleted or, in a dry run, what
// it would.
func (s *Store) Sweep(ctx context.Context, by Sweep) ([]images.Blob, error) {
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	var gone []images.Blob
	for _, b := range all {
		if by.Keep(b.Digest) {
			continue
		}
		swept, err := s.sweep(ctx, b.Digest, by)
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
func (s *Store) sweep(ctx context.Context, d digest.Digest, by Sweep) (bool, error) {
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
	if s.wants(d, fi, by) || by.Dry {
		return !s.wants(d, fi, by), nil
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
