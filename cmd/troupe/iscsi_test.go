package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestReadingProgress(t *testing.T) {
	var said strings.Builder
	now := time.Unix(1e9, 0)
	p := &readingProgress{w: &said, now: func() time.Time { return now }}
	for i := range int64(12) {
		p.report("a.img", i<<30, 40<<30)
		now = now.Add(time.Second)
	}
	p.report("b.img", 1<<30, 2<<30)
	want := "reading a.img once, to know it again: 5 GiB of 40 GiB\nreading a.img once, to know it again: 10 GiB of 40 GiB\n"
	if diff := cmp.Diff(want, said.String()); diff != "" {
		t.Error(diff)
	}
}

// TestEndsWhileABaseIsRead has the command be told to end while it makes a delta: as at any other time, that is no error.
func TestEndsWhileABaseIsRead(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop() // no reading of a base gets further than to ask whether it is to end
	var out, errOut strings.Builder
	args := []string{"iscsi", "serve", "--listen", "127.0.0.1:0", "--lun", "cow:" + base + "," + filepath.Join(dir, "delta")}
	status := run(ctx, args, streams{in: strings.NewReader(""), out: &out, err: &errOut})
	if status != exitOK || out.String() != "" || errOut.String() != "" {
		t.Errorf("status %d, said %q and %q, want 0 and nothing", status, out.String(), errOut.String())
	}
}

// TestReservationsEndWithTheirDisk removes the file of a disk and has it made anew: what was reserved of the first is not
// reserved of the second.
func TestReservationsEndWithTheirDisk(t *testing.T) {
	dir := t.TempDir()
	base, state := filepath.Join(dir, "base"), filepath.Join(dir, "state")
	if err := errors.Join(os.WriteFile(base, make([]byte, 1<<20), 0o600), os.Mkdir(state, 0o700)); err != nil {
		t.Fatal(err)
	}
	for kind, text := range map[string]string{"cow": "cow:" + base + ",", "rw": "rw:"} {
		for _, state := range []string{"", state} {
			t.Run(kind+", state "+filepath.Base(state), func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "disk")
				spec, err := parseDisk(text + file + ",size=1M")
				if err != nil {
					t.Fatal(err)
				}
				start := func(save string, want string) (said string) {
					t.Helper()
					var out strings.Builder
					s := &diskShelf{errOut: &out}
					m, err := s.medium(t.Context(), spec)
					if err != nil {
						t.Fatal(err)
					}
					k, err := s.keeper(disk{File: file, Serial: "1" + kind}, m, state)
					if err != nil {
						t.Fatal(err)
					}
					if got, err := k.Load(); string(got) != want || err != nil {
						t.Errorf("kept %q, %v, want %q", got, err, want)
					}
					if err := errors.Join(k.Save([]byte(save)), s.close()); err != nil {
						t.Fatal(err)
					}
					return out.String()
				}
				if said := start("{1}", "") + start("{1}", "{1}"); said != "" {
					t.Errorf("said %q", said)
				}
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
				if said := start("{2}", ""); !strings.Contains(said, ".reservations are not of this "+file) {
					t.Errorf("said %q", said)
				}
				start("", "{2}")
			})
		}
	}
}

// TestSecretOfAnyEditor reads a secret whose line ends as Unix, Windows or nobody ends it; no other byte is taken from it.
func TestSecretOfAnyEditor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	for text, want := range map[string]string{
		"thesecretofn1":         "thesecretofn1",
		"thesecretofn1\n":       "thesecretofn1",
		"thesecretofn1\r\n":     "thesecretofn1",
		" thesecretofn1 \r\n":   " thesecretofn1 ",
		"thesecretofn1\r\r\n":   "",
		"thesecretofn1\r\n\r\n": "",
		"thesecret\rofn1\n":     "",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readSecret(path)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v, want %q", text, got, err, want)
		}
	}
}
