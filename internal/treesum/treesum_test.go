package treesum

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

func site() fstest.MapFS {
	return fstest.MapFS{
		"site/index.html": {Data: []byte("hello\n"), Mode: 0o644},
		"site/bin/serve":  {Data: []byte("#!/bin/sh\n"), Mode: 0o755},
		"site/bin-2":      {Data: []byte("x"), Mode: 0o600},
		"site/latest":     {Data: []byte("index.html"), Mode: fs.ModeSymlink | 0o777},
		"other":           {Data: []byte("o")},
	}
}

func sum(t *testing.T, fsys fs.FS, dir string) string {
	t.Helper()
	d, err := Sum(t.Context(), fsys, dir)
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// The name of a directory is in the ids of images: another one builds them anew and changes every host that has them.
func TestGolden(t *testing.T) {
	const want = "sha256:9caab2d038f13b03b09e639f705c258ffde3677c9d23193cd258a7360421cd21"
	if got := sum(t, site(), "site"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWhatCounts(t *testing.T) {
	first := sum(t, site(), "site")
	for name, change := range map[string]func(fstest.MapFS){
		"a file more":    func(m fstest.MapFS) { m["site/a"] = &fstest.MapFile{} },
		"a file gone":    func(m fstest.MapFS) { delete(m, "site/bin-2") },
		"content":        func(m fstest.MapFS) { m["site/bin-2"].Data = []byte("y") },
		"executable":     func(m fstest.MapFS) { m["site/bin-2"].Mode = 0o755 },
		"target":         func(m fstest.MapFS) { m["site/latest"].Data = []byte("bin-2") },
		"file, not link": func(m fstest.MapFS) { m["site/latest"].Mode = 0o644 },
		"name": func(m fstest.MapFS) {
			m["site/bin-3"] = m["site/bin-2"]
			delete(m, "site/bin-2")
		},
		"from one file into the next": func(m fstest.MapFS) {
			m["site/bin-2"].Data, m["site/bin/serve"].Data = []byte("\n"), []byte("#!/bin/shx")
		},
	} {
		m := site()
		if change(m); sum(t, m, "site") == first {
			t.Errorf("%s: the same name", name)
		}
	}
	for name, change := range map[string]func(fstest.MapFS){
		"a file elsewhere":   func(m fstest.MapFS) { m["other"].Data = nil },
		"permissions":        func(m fstest.MapFS) { m["site/bin-2"].Mode = 0o444 },
		"an empty directory": func(m fstest.MapFS) { m["site/empty"] = &fstest.MapFile{Mode: fs.ModeDir | 0o755} },
		"git's own":          func(m fstest.MapFS) { m["site/.git/config"] = &fstest.MapFile{} },
	} {
		m := site()
		if change(m); sum(t, m, "site") != first {
			t.Errorf("%s: another name", name)
		}
	}
}

// A directory on disk has the name that it has in a commit.
func TestOnDisk(t *testing.T) {
	dir := t.TempDir()
	for name, f := range site() {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if f.Mode&fs.ModeSymlink != 0 {
			err = os.Symlink(string(f.Data), p)
		} else {
			err = os.WriteFile(p, f.Data, f.Mode.Perm())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got, want := sum(t, os.DirFS(dir), "site"), sum(t, site(), "site"); got != want {
		t.Errorf("got %s on disk, and %s in memory", got, want)
	}
}

func TestWalk(t *testing.T) {
	var got []Entry
	err := Walk(t.Context(), site(), "site", func(e Entry) error {
		got = append(got, e)
		return nil
	})
	want := []Entry{
		{Name: "bin/serve", Executable: true}, {Name: "bin-2"}, {Name: "index.html"}, {Name: "latest", IsLink: true, Target: "index.html"},
	}
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
}

func TestRefused(t *testing.T) {
	many := fstest.MapFS{}
	for i := range MaxFiles + 1 {
		many[fmt.Sprintf("site/%d", i)] = &fstest.MapFile{}
	}
	deep := "site"
	for range maxDepth + 2 {
		deep += "/d"
	}
	for name, m := range map[string]fstest.MapFS{
		"no directory": {"other/x": {}},
		"a file":       {"site": {Data: []byte("x")}},
		"a pipe":       {"site/p": {Mode: fs.ModeNamedPipe}},
		"many":         many,
		"deep":         {deep: {}},
		"long link":    {"site/l": {Mode: fs.ModeSymlink, Data: make([]byte, maxLink+1)}},
	} {
		if _, err := Sum(t.Context(), m, "site"); !errors.Is(err, ErrContent) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Sum(t.Context(), large{site()}, "site"); !errors.Is(err, ErrContent) {
		t.Errorf("too large: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Sum(ctx, site(), "site"); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// large has files that say that they are too large.
type large struct{ fstest.MapFS }

func (l large) Open(name string) (fs.File, error) {
	f, err := l.MapFS.Open(name)
	return largeFile{f}, err
}

type largeFile struct{ fs.File }

func (f largeFile) Stat() (fs.FileInfo, error) {
	fi, err := f.File.Stat()
	return largeInfo{fi}, err
}

type largeInfo struct{ fs.FileInfo }

func (largeInfo) Size() int64 { return MaxBytes + 1 }
