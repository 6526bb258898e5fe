package source

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	git "github.com/go-git/go-git/v5"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/storage/filesystem"

	"github.com/troupe-dev/troupe/internal/backoff"
)

// localTries is how often a local repository is read that changes under the reader, with waits between that add up to
// two seconds: a repack moves objects, and a reader that opened the repository before does not find them; a name that is
// being written has a lock file beside it, which go-git takes for an empty name.
const localTries = 10

// A local is a repository on this machine. It is only read.
type local struct{ path string }

func newLocal(path string) (*local, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	return &local{path: abs}, nil
}

func (l *local) open() (*filesystem.Storage, error) {
	dir, err := gitDir(l.path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	s := openStorage(dir)
	if _, err := git.Open(s, nil); err != nil { // knows which formats go-git cannot read
		return nil, fmt.Errorf("%w: opening %q: %w", ErrUnreachable, dir, err)
	}
	return s, nil
}

func (l *local) list(ctx context.Context) (refs, error) {
	var got refs
	err := l.retry(ctx, func() error {
		s, err := l.open()
		if err != nil {
			return err
		}
		got, err = readRefs(s)
		return err
	})
	return onlyMirrored(got), err
}

// onlyMirrored is got without names that we would take for our own: a repository may be another troupe's mirror.
func onlyMirrored(got refs) refs {
	maps.DeleteFunc(got, func(n plumbing.ReferenceName, _ plumbing.Hash) bool { return !mirrored(n) })
	return got
}

func (l *local) fetch(ctx context.Context, m *mirror) (refs, error) {
	var got refs
	err := l.retry(ctx, func() error {
		s, err := l.open()
		if err != nil {
			return err
		}
		if got, err = readRefs(s); err != nil {
			return err
		}
		onlyMirrored(got)
		return copyObjects(ctx, s, m, slices.Collect(maps.Values(got)), false)
	})
	if err == nil || len(got) == 0 || errors.Is(err, errMirror) || ctx.Err() != nil {
		return got, err
	}
	return got, l.salvage(ctx, m, got, err)
}

// salvage copies what each name needs alone: a branch that is damaged must not hold up the others. It is an error if
// nothing could be copied; whether the followed branch could, the mirror knows.
func (l *local) salvage(ctx context.Context, m *mirror, got refs, cause error) error {
	copied := 0
	for _, name := range slices.Sorted(maps.Keys(got)) {
		s, err := l.open()
		if err != nil {
			return err
		}
		if err := copyObjects(ctx, s, m, []plumbing.Hash{got[name]}, false); err != nil {
			m.log.Warn("copying a branch or tag", "repo", l.path, "name", name.String(), "err", err)
			continue
		}
		copied++
	}
	if copied == 0 {
		return fmt.Errorf("%w: %w", ErrUnreachable, cause)
	}
	return ctx.Err()
}

// retry calls f until it succeeds, says that trying again is of no use, or was called often enough.
func (l *local) retry(ctx context.Context, f func() error) error {
	var err error
	for n := range localTries {
		if n > 0 && backoff.Sleep(ctx, backoff.Exponential(10*time.Millisecond, 400*time.Millisecond, n)) != nil {
			return fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
		err = f()
		if err == nil || errors.Is(err, ErrUnreachable) || errors.Is(err, errHuge) || errors.Is(err, errMirror) || ctx.Err() != nil {
			return err
		}
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}
