package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// acquire gives the caller the blob called d alone, until release. A malformed digest is ErrNotFound: it names nothing,
// and must not become part of a path.
func (s *Store) acquire(ctx context.Context, d digest.Digest) (*entry, error) {
	if _, err := digest.Parse(string(d)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	s.mu.Lock()
	e := s.blobs[d]
	if e == nil {
		e = &entry{busy: make(chan struct{}, 1)}
		s.blobs[d] = e
	}
	e.users++
	s.mu.Unlock()
	select {
	case e.busy <- struct{}{}:
		return e, nil
	case <-ctx.Done():
		s.leave(d, e)
		return nil, fmt.Errorf("waiting for blob %s: %w", d, ctx.Err())
	}
}

func (s *Store) release(d digest.Digest, e *entry) {
	<-e.busy
	s.leave(d, e)
}

// leave forgets an entry that says nothing: digests that were only asked for must not fill the memory.
func (s *Store) leave(d digest.Digest, e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.users--
	if e.users == 0 && e.known == (ident{}) {
		delete(s.blobs, d)
	}
}

// knows says whether the file that id is of was found good.
func (s *Store) knows(e *entry, id ident) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return id != ident{} && e.known == id
}

// learn notes that the file that id is of is good; a zero id, that no file is known to be.
func (s *Store) learn(e *entry, id ident) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.known = id
}

// doubt forgets that d's file was good.
func (s *Store) doubt(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.blobs[d]; e != nil {
		e.known = ident{}
	}
}

func (s *Store) open(ctx context.Context, d digest.Digest) (*os.File, int64, error) {
	e, err := s.acquire(ctx, d)
	if err != nil {
		return nil, 0, err
	}
	defer s.release(d, e)
	return s.openGood(ctx, d, e)
}

// openGood opens a blob whose bytes are right, at its start. The caller has acquired e. Hashing in the one place where
// the blob is held alone means that a hundred machines which ask at once cost one hash.
func (s *Store) openGood(ctx context.Context, d digest.Digest, e *entry) (*os.File, int64, error) {
	f, fi, err := s.openFile(d)
	if err != nil {
		return nil, 0, err
	}
	id := identOf(fi)
	if s.knows(e, id) {
		return f, id.size, nil
	}
	if err := hashFile(ctx, f, d); err != nil {
		err = errors.Join(err, f.Close())
		if errors.Is(err, digest.ErrMismatch) {
			s.tell(Damage{Name: d.String(), Err: err})
			err = errors.Join(err, s.quarantine(d, e))
		}
		return nil, 0, fmt.Errorf("verifying blob %s: %w", d, err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, 0, errors.Join(fmt.Errorf("opening blob %s: %w", d, err), f.Close())
	}
	s.learn(e, id)
	return f, id.size, nil
}

// openFile opens a blob's file, whatever is in it.
func (s *Store) openFile(d digest.Digest) (*os.File, fs.FileInfo, error) {
	if _, err := digest.Parse(string(d)); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	// O_NOFOLLOW and O_NONBLOCK: a link or a FIFO under a blob's name is none of ours.
	f, err := os.OpenFile(s.path(d), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("opening blob %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("opening blob %s: %w", d, err)
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("is a %v, not a file", fi.Mode().Type())
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("opening blob %s: %w", d, err), f.Close())
	}
	return f, fi, nil
}

// quarantine takes a blob whose bytes are wrong out of the store, so that it is built or fetched again.
func (s *Store) quarantine(d digest.Digest, e *entry) error {
	s.learn(e, ident{})
	if err := os.Rename(s.path(d), filepath.Join(s.corruptDir(), d.Hex())); err != nil {
		return fmt.Errorf("setting it aside: %w", err)
	}
	return atomicfile.SyncDir(s.blobDir())
}

func identOf(fi fs.FileInfo) ident {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return ident{} // equals no file's: it will be hashed
	}
	return ident{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// hashFile reads r to its end and reports whether its bytes are those that want names.
func hashFile(ctx context.Context, r io.Reader, want digest.Digest) error {
	got, _, err := hashAll(ctx, r)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("%w: the file's bytes are %s", digest.ErrMismatch, got)
	}
	return nil
}

func hashAll(ctx context.Context, r io.Reader) (digest.Digest, int64, error) {
	h := digest.NewHash()
	n, err := io.CopyBuffer(h, ctxReader{ctx: ctx.Err, r: r}, make([]byte, 1<<20))
	if err != nil {
		return "", n, err
	}
	return h.Digest(), n, nil
}

// A ctxReader reads until its context ends.
type ctxReader struct {
	ctx func() error
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
