package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/troupe-dev/troupe/images"
)

// maxLog bounds a build's log, in bytes; what comes after is dropped, with a line that says so.
const maxLog = 16 << 20

// logs keeps the output of builds as files by recipe: they are too large for records, and nothing is decided by them.
type logs struct{ dir string }

func (l logs) name(id images.RecipeID) string { return filepath.Join(l.dir, id.Hex()+".log") }

// create starts the log of a recipe afresh; the log of the attempt before is kept beside it.
func (l logs) create(id images.RecipeID) (logFile, error) {
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return logFile{}, fmt.Errorf("making the log directory: %w", err)
	}
	name := l.name(id)
	if err := os.Rename(name, name+".before"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return logFile{}, fmt.Errorf("keeping the log before: %w", err)
	}
	f, err := os.Create(name)
	if err != nil {
		return logFile{}, fmt.Errorf("making a build's log: %w", err)
	}
	return logFile{f: f, left: new(int64(maxLog))}, nil
}

// A logFile is a bounded log. Builds do not fail for want of a log: writes beyond the bound, or to a full disk, are
// dropped.
type logFile struct {
	f    *os.File
	left *int64
}

func (l logFile) Write(b []byte) (int, error) {
	if *l.left <= 0 {
		return len(b), nil
	}
	*l.left -= int64(len(b))
	_, _ = l.f.Write(b)
	if *l.left <= 0 {
		_, _ = fmt.Fprintf(l.f, "\n(the log is cut here, at %d MiB)\n", maxLog>>20)
	}
	return len(b), nil
}

func (l logFile) Close() error { return l.f.Close() }

// follow opens a log and, where it is still being written, goes on to its end: until done says that the build is over.
func (l logs) follow(ctx context.Context, id images.RecipeID, done func(context.Context) (bool, error)) (io.ReadCloser, error) {
	f, err := os.Open(l.name(id))
	if err != nil {
		return nil, fmt.Errorf("opening the log of recipe %s: %w", id.Short(), err)
	}
	if done == nil {
		return f, nil
	}
	r, w := io.Pipe()
	go func() {
		defer f.Close()
		w.CloseWithError(copyUntilDone(ctx, w, f, done))
	}()
	return r, nil
}

// followEvery is how often a log is looked at for more: a file tells nobody that it grew.
const followEvery = 200 * time.Millisecond

func copyUntilDone(ctx context.Context, w io.Writer, r io.Reader, done func(context.Context) (bool, error)) error {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		over, err := done(ctx) // asked before reading: what was written until then is read below
		if err != nil {
			return err
		}
		if _, err := io.Copy(w, r); err != nil || over {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
