// Package store keeps immutable blobs in a directory that is an OCI image layout (OCI image specification 1.1,
// image-layout.md), each named by the SHA-256 of its bytes. It is a Target of oras, which copies between it and registries.
//
//	oci-layout         the version of the layout
//	index.json         the manifests that have a name, or are about another one; replaced whole
//	blobs/sha256/HEX   whole blobs, mode 0444; nothing is ever written under a name here, only renamed to it. Beside what
//	                   manifests name there are images as machines are given them: working copies of layers
//	tmp/               what is being written; emptied by Open
//	corrupt/HEX        blobs whose bytes were found to be wrong: out of the way, kept for whoever wants to know why
//	lock               held (flock(2)) while a Store is open
//
// A file is never trusted because it exists. The bytes of a blob are hashed when it is written, read back from the file;
// and again the first time that a process opens or stats a blob which it did not write itself. What was hashed is
// remembered together with the file's inode, size, mtime and ctime, so that a Range request costs one fstat, not the
// hash of the whole, and so that a file which anybody changed is hashed anew. Rot below the file system that comes later
// than the first hash is found by Verify, and by whole reads through Reader.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// Errors that callers tell apart.
var (
	// ErrNotFound is in the chain of errors about blobs that the store does not have.
	ErrNotFound = errors.New("no such blob")
	// ErrInUse is in the chain of Open's error where another process has the store open.
	ErrInUse = errors.New("in use by another process")
)

// A Store is an open directory of blobs. It may be used by several goroutines at once.
type Store struct {
	dir  string
	lock *os.File

	mu     sync.Mutex
	blobs  map[digest.Digest]*entry    // those that are known to be good, or in use
	used   map[digest.Digest]time.Time // when this process was last given a blob's bytes
	damage []Damage                    // that nobody took yet

	damaged chan struct{} // has room for one

	indexMu sync.RWMutex
	index   index
}

// Damage is something that was found not to be what its name says, and was set aside.
type Damage struct {
	Name string // the digest of a blob, or "index.json"
	Err  error
}

// maxDamage bounds what is kept for TakeDamage.
const maxDamage = 1000

// tell notes damage for whoever takes care of it.
func (s *Store) tell(d Damage) {
	s.mu.Lock()
	if len(s.damage) < maxDamage {
		s.damage = append(s.damage, d)
	}
	s.mu.Unlock()
	select {
	case s.damaged <- struct{}{}:
	default:
	}
}

// Damaged wakes who takes care of damage, one at a time.
func (s *Store) Damaged() <-chan struct{} { return s.damaged }

// TakeDamage is what was found since the last call, the first thousand.
func (s *Store) TakeDamage() []Damage {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.damage
	s.damage = nil
	return all
}

// An entry is what is known of one blob. Whoever holds busy may change the blob's file.
type entry struct {
	busy  chan struct{} // of capacity 1: a mutex that a context can give up on
	users int           // that hold busy or wait for it; guarded by Store.mu
	known ident         // of the file whose bytes were right; zero where none was; guarded by Store.mu
}

// An ident changes when a file's bytes or its inode do: ctime cannot be set back from user space.
type ident struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

// Open opens the store in dir, makes it where there is none, and removes what a killed process left half written. One
// process at a time may have it open: for others the error is ErrInUse. Close it after the last use.
func Open(dir string) (*Store, error) {
	s := &Store{
		dir: dir, blobs: make(map[digest.Digest]*entry), used: make(map[digest.Digest]time.Time), damaged: make(chan struct{}, 1),
	}
	for _, d := range []string{s.blobDir(), s.tempDir(), s.corruptDir()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, fmt.Errorf("opening store %q: %w", dir, err)
		}
	}
	lock, err := lockFile(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("opening store %q: %w", dir, err)
	}
	s.lock = lock
	if _, err := atomicfile.Sweep(s.tempDir()); err != nil {
		return nil, errors.Join(fmt.Errorf("opening store %q: %w", dir, err), lock.Close())
	}
	if err := errors.Join(s.openLayout(), s.syncDirs()); err != nil {
		return nil, errors.Join(fmt.Errorf("opening store %q: %w", dir, err), lock.Close())
	}
	return s, nil
}

// lockFile takes the lock for as long as the file is open: it goes with the process, however that ends.
func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrInUse
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// syncDirs makes the directories' own names durable: a blob is lost with the directory that it is in.
func (s *Store) syncDirs() error {
	for _, d := range []string{filepath.Dir(s.blobDir()), s.dir, filepath.Dir(s.dir)} {
		if err := atomicfile.SyncDir(d); err != nil {
			return err
		}
	}
	return nil
}

// Close lets other processes open the store. Readers that are open stay good; Writers must have ended.
func (s *Store) Close() error {
	if err := s.lock.Close(); err != nil {
		return fmt.Errorf("closing store %q: %w", s.dir, err)
	}
	return nil
}

func (s *Store) blobDir() string    { return filepath.Join(s.dir, "blobs", "sha256") }
func (s *Store) tempDir() string    { return filepath.Join(s.dir, "tmp") }
func (s *Store) corruptDir() string { return filepath.Join(s.dir, "corrupt") }

func (s *Store) path(d digest.Digest) string { return filepath.Join(s.blobDir(), d.Hex()) }

// Dir is the store's directory.
func (s *Store) Dir() string { return s.dir }

// Path is the name of the file of a blob that Open or Stat found good, for programs that take names (mount, mkfs).
// It must not be written to.
func (s *Store) Path(d digest.Digest) string { return s.path(d) }

// Open opens a blob for reads anywhere in it, after making sure that its bytes are right; what this costs is told in the
// package comment. The error wraps ErrNotFound where there is no such blob, and digest.ErrMismatch where its bytes are
// wrong: it is then no longer in the store, and may be put again. The blob stays readable if it is deleted meanwhile.
// What is returned is an io.ReaderAt too.
func (s *Store) Open(ctx context.Context, d digest.Digest) (io.ReadSeekCloser, error) {
	f, _, err := s.open(ctx, d)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Reader opens a blob for one read from its start to its end, which hashes as it goes: where the bytes are wrong, an
// error that wraps digest.ErrMismatch comes in place of io.EOF. Unlike Open it does not look at the bytes before.
func (s *Store) Reader(ctx context.Context, d digest.Digest) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("opening blob %s: %w", d, err)
	}
	f, fi, err := s.openFile(d)
	if err != nil {
		return nil, err
	}
	return &wholeReader{r: digest.VerifyReader(f, d, fi.Size()), f: f, d: d, s: s}, nil
}

type wholeReader struct {
	r io.Reader // over f
	f *os.File
	d digest.Digest
	s *Store
}

func (r *wholeReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if errors.Is(err, digest.ErrMismatch) {
		r.s.doubt(r.d) // the next Open hashes it again, and sets it aside
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("reading blob %s: %w", r.d, err)
	}
	return n, err
}

func (r *wholeReader) Close() error { return r.f.Close() }

// Stat describes a blob whose bytes are right. Its errors and its cost are those of Open.
func (s *Store) Stat(ctx context.Context, d digest.Digest) (images.Blob, error) {
	f, size, err := s.open(ctx, d)
	if err != nil {
		return images.Blob{}, err
	}
	return images.Blob{Digest: d, Size: size}, f.Close()
}

// List names every blob there is, by digest. It does not look at their bytes: Stat and Verify do.
func (s *Store) List(ctx context.Context) ([]images.Blob, error) {
	entries, err := os.ReadDir(s.blobDir())
	if err != nil {
		return nil, fmt.Errorf("listing blobs: %w", err)
	}
	var blobs []images.Blob
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("listing blobs: %w", err)
		}
		d, err := digest.FromHex(e.Name())
		if err != nil || !e.Type().IsRegular() {
			continue // not ours: a blob's name says what it is
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted since
		}
		if err != nil {
			return nil, fmt.Errorf("listing blobs: %w", err)
		}
		blobs = append(blobs, images.Blob{Digest: d, Size: fi.Size()})
	}
	slices.SortFunc(blobs, func(a, b images.Blob) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return blobs, nil
}

// Delete removes a blob. What has it open goes on reading it. The error wraps ErrNotFound where there is none.
func (s *Store) Delete(ctx context.Context, d digest.Digest) error {
	e, err := s.acquire(ctx, d)
	if err != nil {
		return err
	}
	defer s.release(d, e)
	s.learn(e, ident{})
	err = os.Remove(s.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("deleting blob %s: %w", d, err)
	}
	return atomicfile.SyncDir(s.blobDir())
}

// Verify hashes a blob again, whatever is remembered of it. Its errors are those of Open.
func (s *Store) Verify(ctx context.Context, d digest.Digest) error {
	e, err := s.acquire(ctx, d)
	if err != nil {
		return err
	}
	defer s.release(d, e)
	s.learn(e, ident{})
	f, _, err := s.openGood(ctx, d, e)
	if err != nil {
		return err
	}
	return f.Close()
}
