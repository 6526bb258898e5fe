package kexec

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestArchivesBeginWhereTheKernelLooksForThem(t *testing.T) {
	dir := t.TempDir()
	var paths []string
	for i, content := range []string{"abcde", "", "fg", "hijk"} {
		p := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p)
	}
	f, err := joined(paths)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(f)
	if want := "abcde\x00\x00\x00fg\x00\x00hijk"; err != nil || string(got) != want {
		t.Errorf("joined: %q, %v; want %q", got, err, want)
	}
	if _, err := joined(append(paths, filepath.Join(dir, "missing"))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an archive that is not there: %v", err)
	}
}

func TestLoadRefusesWhatNoKernelTakes(t *testing.T) {
	kernel := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(kernel, []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{strings.Repeat("x", maxCmdline), "a\nb", "a\x00b"} {
		if err := Load(Image{Kernel: kernel, Cmdline: line}); err == nil || errors.Is(err, ErrUnable) || Loaded() {
			t.Errorf("a command line of %d bytes, %.10q: %v", len(line), line, err)
		}
	}
	if err := Load(Image{Kernel: kernel, Cmdline: "quiet"}); err == nil || Loaded() {
		t.Errorf("what is no kernel is loaded: %v", err)
	}
}

func TestWhatStaysSoIsToldApart(t *testing.T) {
	if !isUnable(fmt.Errorf("x: %w", unix.EPERM)) || isUnable(unix.ENOMEM) || isUnable(nil) {
		t.Error("a kernel that is locked down is the same as one that has no memory")
	}
}
