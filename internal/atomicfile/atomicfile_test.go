package atomicfile_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/troupe-dev/troupe/internal/atomicfile"
)

// crashDir, where it is set, makes of the test binary a process that replaces a file for ever: see TestKilled.
const crashDir = "ATOMICFILE_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		replaceForEver(filepath.Join(dir, "file"))
	}
	os.Exit(m.Run())
}

// replaceForEver says when the file is there for the first time, and never returns.
func replaceForEver(name string) {
	for i := 0; ; i++ {
		if err := atomicfile.WriteFile(name, bytes.Repeat([]byte{'a' + byte(i%26)}, crashSize), 0o600); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		if i < 20 {
			fmt.Println("written")
		}
	}
}

const crashSize = 1 << 20

// However a process ends, the file is one whole version, and what it left is swept.
func TestKilled(t *testing.T) {
	swept := 0
	for round := range 20 {
		dir := t.TempDir()
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), crashDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for range round + 1 { // each round ends it at another place
			if !lines.Scan() || lines.Text() != "written" {
				t.Fatalf("the writer said %q", lines.Text())
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed: that is its error
		b, err := os.ReadFile(filepath.Join(dir, "file"))
		if err != nil {
			t.Fatal(err)
		}
		if len(b) != crashSize || bytes.Count(b, b[:1]) != crashSize {
			t.Fatalf("the file is no whole version: %d bytes, %d of them %q", len(b), bytes.Count(b, b[:1]), b[:1])
		}
		n, err := atomicfile.Sweep(dir)
		if err != nil {
			t.Fatal(err)
		}
		swept += n
		wantFiles(t, dir, "file")
	}
	t.Logf("swept %d temporary files of 20 processes", swept)
}

func wantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the directory has %q, want %q", got, want)
	}
}

func wantContent(t *testing.T, name, want string, perm fs.FileMode) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != want || fi.Mode() != perm {
		t.Errorf("%s has %q and mode %v, want %q and %v", filepath.Base(name), b, fi.Mode(), want, perm)
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	for _, v := range []struct {
		content string
		perm    fs.FileMode
	}{{"one", 0o644}, {"a longer one", 0o600}, {"", 0o444}, {"after read-only", 0o755}} {
		if err := atomicfile.WriteFile(name, []byte(v.content), v.perm); err != nil {
			t.Fatal(err)
		}
		wantContent(t, name, v.content, v.perm)
	}
	wantFiles(t, dir, "file")
}

func TestAbort(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	if err := atomicfile.WriteFile(name, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := atomicfile.Create(name, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(f, "new"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.Abort(); err != nil {
			t.Error(err)
		}
	}
	if _, err := f.Write([]byte("x")); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("writing after Abort: %v", err)
	}
	if err := f.Commit(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("committing after Abort: %v", err)
	}
	wantContent(t, name, "old", 0o600)
	wantFiles(t, dir, "file")
}

// Writers of images write in no order, and read back.
func TestRandomAccess(t *testing.T) {
	dir := t.TempDir()
	f, err := atomicfile.Create(filepath.Join(dir, "x"), 0o640)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Abort()
	if _, err := f.WriteAt([]byte("end"), 5); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(f, "be"); err != nil {
		t.Fatal(err)
	}
	if off, err := f.Seek(1, io.SeekCurrent); off != 3 || err != nil {
		t.Fatalf("seeking: %d, %v", off, err)
	}
	if _, err := io.WriteString(f, "g"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8)
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != "be\x00g\x00end" {
		t.Errorf("reading back: %q, %v", b, err)
	}
	if err := f.Truncate(6); err != nil {
		t.Fatal(err)
	}
	if err := f.CommitTo(filepath.Join(dir, "y")); err != nil {
		t.Fatal(err)
	}
	wantContent(t, filepath.Join(dir, "y"), "be\x00g\x00e", 0o640)
	wantFiles(t, dir, "y")
}

// Bytes that got lost on the way to the file must not be committed.
func TestCommitChecksTheSize(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "file")
	f, err := atomicfile.Create(name, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(f, "all of it"); err != nil {
		t.Fatal(err)
	}
	temps, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(temps) != 1 {
		t.Fatalf("temporary files: %q, %v", temps, err)
	}
	if err := os.Truncate(temps[0], 3); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(); err == nil || !strings.Contains(err.Error(), "has 3 bytes, 9 were written") {
		t.Errorf("got error %v", err)
	}
	wantFiles(t, dir)
}

func TestErrorsLeaveNothing(t *testing.T) {
	dir := t.TempDir()
	if err := atomicfile.WriteFile(filepath.Join(dir, "none", "file"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a directory: %v", err)
	}
	// A directory cannot be replaced by a file.
	if err := os.MkdirAll(filepath.Join(dir, "taken", "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.WriteFile(filepath.Join(dir, "taken"), []byte("x"), 0o600); err == nil {
		t.Error("a directory was replaced")
	}
	wantFiles(t, dir, "taken")
}

func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("a small file system needs root: %v", err)
	}
	defer func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	name := filepath.Join(dir, "file")
	if err := atomicfile.WriteFile(name, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.WriteFile(name, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got error %v, want that there is no space", err)
	}
	wantContent(t, name, "old", 0o600)
	wantFiles(t, dir, "file")
}

func TestSweepTakesOnlyItsOwn(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"file", ".hidden", ".troupe-tmp-1", ".troupe-tmp-2"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, ".troupe-tmp-dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	if n, err := atomicfile.Sweep(dir); n != 2 || err != nil {
		t.Errorf("swept %d, %v; want 2", n, err)
	}
	wantFiles(t, dir, ".hidden", ".troupe-tmp-dir", "file")
	if n, err := atomicfile.Sweep(filepath.Join(dir, "none")); n != 0 || err != nil {
		t.Errorf("sweeping what is not there: %d, %v", n, err)
	}
}
