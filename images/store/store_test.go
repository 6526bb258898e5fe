package store_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
)

// childDir, where it is set, makes of the test binary another process that opens a store: see TestKilled, TestInUse.
const childDir = "STORE_CHILD_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		putForEver(dir)
	}
	os.Exit(m.Run())
}

// putForEver puts blobs and says so, until it is killed.
func putForEver(dir string) {
	s, err := store.Open(dir)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for i := range uint64(1 << 40) {
		b, err := s.Put(context.Background(), bytes.NewReader(content(i, 300_000)))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(b.Digest)
	}
}

// content is n bytes that depend on seed.
func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	_, _ = rand.NewChaCha8(key).Read(b) // never fails
	return b
}

func open(t *testing.T, dir string) *store.Store {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return s
}

func put(t *testing.T, s *store.Store, b []byte) images.Blob {
	t.Helper()
	blob, err := s.Put(t.Context(), bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if want := (images.Blob{Digest: digest.Of(b), Size: int64(len(b))}); blob != want {
		t.Fatalf("put %v, want %v", blob, want)
	}
	return blob
}

func get(t *testing.T, s *store.Store, d digest.Digest) ([]byte, error) {
	t.Helper()
	r, err := s.Open(t.Context(), d)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	return b, errors.Join(err, r.Close())
}

// wantFiles holds the files below dir, but for the lock, against names in order.
func wantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	var got []string
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != "lock" {
			rel, _ := filepath.Rel(dir, p)
			got = append(got, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, "index.json", "oci-layout")
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("files of the store (-want +got):\n%s", d)
	}
}

func blobFile(b []byte) string { return "blobs/sha256/" + digest.Of(b).Hex() }

func TestPutOpenListDelete(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	one, empty := content(1, 5000), []byte{}
	put(t, s, one)
	put(t, s, empty)
	put(t, s, one)
	for _, b := range [][]byte{one, empty} {
		if got, err := get(t, s, digest.Of(b)); err != nil || !bytes.Equal(got, b) {
			t.Errorf("read back %d bytes of %d, %v", len(got), len(b), err)
		}
	}
	fi, err := os.Stat(s.Path(digest.Of(one)))
	if err != nil || fi.Mode() != 0o444 {
		t.Errorf("the file of a blob: %v, %v; want mode 0444", fi, err)
	}
	want := []images.Blob{{Digest: digest.Of(one), Size: 5000}, {Digest: digest.Of(empty)}}
	slices.SortFunc(want, func(a, b images.Blob) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	if got, err := s.List(t.Context()); err != nil || !slices.Equal(got, want) {
		t.Errorf("listed %v, %v; want %v", got, err, want)
	}
	r, err := s.Open(t.Context(), digest.Of(one))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, ok := r.(io.ReaderAt); !ok {
		t.Errorf("%T is no io.ReaderAt", r)
	}
	if err := s.Delete(t.Context(), digest.Of(one)); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, one) {
		t.Errorf("reading on after the deletion: %d bytes, %v", len(got), err)
	}
	wantFiles(t, dir, blobFile(empty))
}

// Whoever asks for what is not there is told so, in whatever way he asks, and cannot leave the store's directory.
func TestNotFound(t *testing.T) {
	s := open(t, t.TempDir())
	for _, d := range []digest.Digest{digest.Of([]byte("x")), "", "sha256:", "sha256:../../lock", "sha512:00", digest.Digest("sha256:" + strings.Repeat("A", 64))} {
		_, openErr := s.Open(t.Context(), d)
		_, readErr := s.Reader(t.Context(), d)
		_, statErr := s.Stat(t.Context(), d)
		for name, err := range map[string]error{
			"Open": openErr, "Reader": readErr, "Stat": statErr, "Delete": s.Delete(t.Context(), d), "Verify": s.Verify(t.Context(), d),
		} {
			if !errors.Is(err, store.ErrNotFound) {
				t.Errorf("%s(%q): %v", name, d, err)
			}
		}
	}
}

// An image is written in no order and read while it is.
func TestWriterInAnyOrder(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	w, err := s.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var _ interface {
		io.Writer
		io.WriterAt
		io.Seeker
		io.ReaderAt
	} = w
	if _, err := w.WriteAt([]byte("tail"), 10); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Seek(2, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "head"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := w.ReadAt(got, 2); err != nil || string(got) != "head" {
		t.Errorf("reading back: %q, %v", got, err)
	}
	if err := w.Truncate(16); err != nil {
		t.Fatal(err)
	}
	b, err := w.Commit()
	want := []byte("\x00\x00head\x00\x00\x00\x00tail\x00\x00")
	if err != nil || b.Digest != digest.Of(want) || b.Size != 16 {
		t.Errorf("committed %v, %v; want the digest of %q", b, err, want)
	}
	if err := w.Abort(); err != nil {
		t.Errorf("Abort after Commit: %v", err)
	}
	wantFiles(t, dir, blobFile(want))
}

func TestAbortLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	w, err := s.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content(1, 1000)); err != nil {
		t.Fatal(err)
	}
	if err := w.Abort(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(); err == nil {
		t.Error("an aborted blob was committed")
	}
	torn := io.MultiReader(bytes.NewReader(content(2, 1000)), iotest.ErrReader(io.ErrUnexpectedEOF))
	if _, err := s.Put(t.Context(), torn); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("putting what ends in an error: %v", err)
	}
	other := digest.VerifyReader(bytes.NewReader(content(3, 1000)), digest.Of(content(4, 1000)), 1000)
	if _, err := s.Put(t.Context(), other); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("putting bytes of another digest: %v", err)
	}
	wantFiles(t, dir)
}

// A file under a blob's name may be anything: a write torn by a crash of another program, a flipped bit, a restored
// backup. It is never served, and putting the blob again heals it.
func TestBadFilesAreNeverServed(t *testing.T) {
	good := content(1, 100_000)
	flipped := slices.Clone(good)
	flipped[77_777] ^= 0x10
	for name, bad := range map[string][]byte{"truncated": good[:300], "empty": {}, "longer": append(slices.Clone(good), 0), "flipped": flipped} {
		for _, when := range []string{"before the start", "after a read"} {
			t.Run(name+" "+when, func(t *testing.T) {
				dir := t.TempDir()
				s := open(t, dir)
				put(t, s, good)
				if when == "before the start" {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					overwrite(t, filepath.Join(dir, blobFile(good)), bad)
					s = open(t, dir)
				} else {
					overwrite(t, filepath.Join(dir, blobFile(good)), bad)
				}
				checkBad(t, s, digest.Of(good))
				wantFiles(t, dir, "corrupt/"+digest.Of(good).Hex())
				put(t, s, good)
				if got, err := get(t, s, digest.Of(good)); err != nil || !bytes.Equal(got, good) {
					t.Errorf("after it was put again: %d bytes, %v", len(got), err)
				}
			})
		}
	}
}

// checkBad wants wrong bytes to be noticed by a whole read at its end, then by Open, and then to be gone.
func checkBad(t *testing.T, s *store.Store, d digest.Digest) {
	t.Helper()
	r, err := s.Reader(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("reading all of it: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, err := get(t, s, d); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("opening it: %v", err)
	}
	if _, err := s.Stat(t.Context(), d); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("asking for it later: %v", err)
	}
}

// overwrite changes a blob's file in place, with its old modification time, as only somebody with bad luck or bad
// intent does.
func overwrite(t *testing.T, name string, b []byte) {
	t.Helper()
	fi, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(name, fi.ModTime(), fi.ModTime()); err != nil {
		t.Fatal(err)
	}
}

// A write that finds a bad file under its name replaces it, instead of believing that its work is done.
func TestPutHealsWithoutARead(t *testing.T) {
	good := content(5, 1000)
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, blobFile(good)), good[:300], 0o444); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	put(t, s, good)
	if got, err := get(t, s, digest.Of(good)); err != nil || !bytes.Equal(got, good) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
}

func TestVerify(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	d := put(t, s, content(1, 1000)).Digest
	if err := s.Verify(t.Context(), d); err != nil {
		t.Error(err)
	}
	overwrite(t, filepath.Join(dir, blobFile(content(1, 1000))), content(2, 1000))
	if err := s.Verify(t.Context(), d); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("verifying wrong bytes: %v", err)
	}
}

// Files that are none of the store's are neither listed nor served.
func TestForeignFiles(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	d := digest.Of([]byte("fifo"))
	if err := syscall.Mkfifo(s.Path(d), 0o644); err != nil {
		t.Fatal(err)
	}
	l := digest.Of([]byte("link"))
	if err := os.WriteFile(filepath.Join(dir, "link"), []byte("link"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../link", s.Path(l)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "blobs", "sha256", "README"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{d, l} {
		if _, err := s.Open(t.Context(), d); err == nil {
			t.Errorf("%s was opened", s.Path(d))
		}
	}
	if got, err := s.List(t.Context()); len(got) != 0 || err != nil {
		t.Errorf("listed %v, %v", got, err)
	}
}

func TestInUse(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if _, err := store.Open(dir); !errors.Is(err, store.ErrInUse) {
		t.Errorf("opening it twice: %v", err)
	}
	out, err := child(t, dir).Output()
	if err == nil || !strings.Contains(string(out), dir) || !strings.Contains(string(out), store.ErrInUse.Error()) {
		t.Errorf("opening it from another process: %v, %q", err, out)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
}

func child(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	return cmd
}

// A server that was killed while it wrote: what it said was stored is stored, what it had begun is gone.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	for round := range 10 {
		cmd := child(t, dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var stored []digest.Digest
		for range 3 * (round + 1) {
			if !lines.Scan() {
				t.Fatal("the writer ended by itself")
			}
			stored = append(stored, digest.Digest(lines.Text()))
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed: that is its error
		checkKilled(t, dir, stored)
	}
}

func checkKilled(t *testing.T, dir string, stored []digest.Digest) {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range stored {
		if _, err := s.Stat(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
	blobs, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, b := range blobs {
		if err := s.Verify(t.Context(), b.Digest); err != nil {
			t.Error(err)
		}
		files = append(files, "blobs/sha256/"+b.Digest.Hex())
	}
	wantFiles(t, dir, files...) // and nothing in tmp or corrupt
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// What a killed process left in tmp is gone when the store is opened.
func TestOpenSweeps(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	w, err := s.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content(1, 1000)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	wantFiles(t, dir)
	if _, err := w.Commit(); err == nil {
		t.Error("a blob was committed whose file is gone")
	}
}

// Many build, fetch and delete the same at once.
func TestConcurrently(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	same := content(1, 200_000)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 10 {
				if _, err := s.Put(t.Context(), bytes.NewReader(same)); err != nil {
					t.Error(err)
				}
				b, err := get(t, s, digest.Of(same))
				if err != nil && !errors.Is(err, store.ErrNotFound) {
					t.Error(err)
				}
				if err == nil && !bytes.Equal(b, same) {
					t.Errorf("read %d wrong bytes", len(b))
				}
				if i == 0 && j%3 == 0 {
					if err := s.Delete(t.Context(), digest.Of(same)); err != nil && !errors.Is(err, store.ErrNotFound) {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	put(t, s, same)
	wantFiles(t, dir, blobFile(same))
}

func TestContext(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	d := put(t, s, content(1, 1000)).Digest
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir) // which has not hashed d
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Open(ctx, d); !errors.Is(err, context.Canceled) {
		t.Errorf("Open: %v", err)
	}
	if _, err := s.Put(ctx, bytes.NewReader(content(2, 1000))); !errors.Is(err, context.Canceled) {
		t.Errorf("Put: %v", err)
	}
	if _, err := s.List(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("List: %v", err)
	}
	// He who gives up does not harm the next one.
	if _, err := s.Stat(t.Context(), d); err != nil {
		t.Errorf("Stat: %v", err)
	}
	wantFiles(t, dir, blobFile(content(1, 1000)))
}

func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("a small file system needs root: %v", err)
	}
	defer func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	small := content(1, 10_000)
	put(t, s, small)
	if _, err := s.Put(t.Context(), bytes.NewReader(content(2, 1<<20))); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got error %v, want that there is no space, and where", err)
	}
	wantFiles(t, dir, blobFile(small))
	put(t, s, content(3, 10_000))
}
