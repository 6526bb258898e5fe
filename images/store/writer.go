package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// A Writer makes one blob. It may be written in any order (io.Writer, io.WriterAt, io.Seeker) and read back
// (io.ReaderAt). It must be ended by Commit or Abort; it is for one goroutine.
type Writer struct {
	f *atomicfile.File
	s *Store
}

// Write implements io.Writer.
func (w *Writer) Write(p []byte) (int, error) { return w.f.Write(p) }

// WriteAt implements io.WriterAt.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) { return w.f.WriteAt(p, off) }

// ReadAt implements io.ReaderAt.
func (w *Writer) ReadAt(p []byte, off int64) (int, error) { return w.f.ReadAt(p, off) }

// Seek implements io.Seeker.
func (w *Writer) Seek(off int64, whence int) (int64, error) { return w.f.Seek(off, whence) }

// Truncate sets the size in bytes; where it grows the blob, the new part reads as zeros.
func (w *Writer) Truncate(size int64) error { return w.f.Truncate(size) }

// Abort ends w and leaves nothing of it. After Commit, or a second time, it does nothing, so it can be deferred.
func (w *Writer) Abort() error { return w.f.Abort() }

// Create starts a blob. The context is for the start alone.
func (s *Store) Create(ctx context.Context) (*Writer, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("creating a blob: %w", err)
	}
	f, err := atomicfile.Create(filepath.Join(s.tempDir(), "blob"), 0o444)
	if err != nil {
		return nil, fmt.Errorf("creating a blob: %w", err)
	}
	return &Writer{f: f, s: s}, nil
}

// Commit names the blob by its bytes, as they are read back from the file, and ends w. When it returns, the blob is on
// stable storage. A good blob of the same bytes stays as it is; a bad one under their name is replaced. After an error
// nothing is left of w, and the store is as before or, where only the last fsync went wrong, has the blob.
func (w *Writer) Commit() (images.Blob, error) {
	b, err := w.commit()
	if err != nil {
		return images.Blob{}, errors.Join(fmt.Errorf("committing a blob: %w", err), w.Abort())
	}
	return b, nil
}

func (w *Writer) commit() (images.Blob, error) {
	ctx := context.Background() // there is no half commit that could be given up
	size, err := w.Seek(0, io.SeekEnd)
	if err != nil {
		return images.Blob{}, err
	}
	d, _, err := digest.FromReader(io.NewSectionReader(w, 0, size))
	if err != nil {
		return images.Blob{}, err
	}
	e, err := w.s.acquire(ctx, d)
	if err != nil {
		return images.Blob{}, err
	}
	defer w.s.release(d, e)
	w.s.use(d)
	old, _, err := w.s.openGood(ctx, d, e)
	if err == nil {
		return images.Blob{Digest: d, Size: size}, errors.Join(old.Close(), w.Abort())
	}
	// Not there, or bad and set aside, or unreadable: in each case the new file is what the name shall hold.
	if err := w.f.CommitTo(w.s.path(d)); err != nil {
		return images.Blob{}, err
	}
	return images.Blob{Digest: d, Size: size}, w.s.remember(d, e)
}

// remember notes that the file of d was hashed just now.
func (s *Store) remember(d digest.Digest, e *entry) error {
	fi, err := os.Lstat(s.path(d))
	if err != nil {
		return err
	}
	s.learn(e, identOf(fi))
	return nil
}

// Put makes a blob of all that r has. To take only bytes of a known digest, wrap r in digest.VerifyReader. After an error
// nothing is left.
func (s *Store) Put(ctx context.Context, r io.Reader) (images.Blob, error) {
	w, err := s.Create(ctx)
	if err != nil {
		return images.Blob{}, err
	}
	if _, err := io.Copy(w, ctxReader{ctx: ctx.Err, r: r}); err != nil {
		return images.Blob{}, errors.Join(fmt.Errorf("putting a blob: %w", err), w.Abort())
	}
	return w.Commit()
}
