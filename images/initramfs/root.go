package initramfs

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// maxLinks is how many symbolic links one path may go through, as in path_resolution(7).
const maxLinks = 40

// A rootFS is the root file system of another machine: links in it mean its own files, never this machine's.
type rootFS struct{ fsys fs.FS }

// resolve gives the path of the file that name stands for, without a link in it. It ends in fs.ErrNotExist where
// there is none.
func (r rootFS) resolve(name string) (string, error) {
	cur := "."
	todo := strings.Split(name, "/")
	for links := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			cur = path.Dir(cur) // of "." that is "." again: there is nothing above the root
			continue
		}
		next := path.Join(cur, part)
		fi, err := fs.Lstat(r.fsys, next)
		if err != nil {
			return "", err
		}
		if fi.Mode().Type() != fs.ModeSymlink {
			cur = next
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("%q goes through more than %d links", name, maxLinks)
		}
		target, err := fs.ReadLink(r.fsys, next)
		if err != nil {
			return "", err
		}
		if strings.HasPrefix(target, "/") {
			cur = "."
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return cur, nil
}

// read gives the content of the file that name stands for, of at most maxFile bytes.
func (r rootFS) read(name string) ([]byte, error) {
	p, err := r.resolve(name)
	if err != nil {
		return nil, err
	}
	fi, err := fs.Lstat(r.fsys, p)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is a %v, not a file", name, fi.Mode().Type())
	}
	f, err := r.fsys.Open(p)
	if err != nil {
		return nil, err
	}
	b, err := readAtMost(f, maxFile)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("reading %q: %w", name, err)
	}
	return b, nil
}

// first is the first of names that is there; "" where none is.
func (r rootFS) first(names ...string) (string, error) {
	for _, n := range names {
		_, err := r.resolve(n)
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", nil
}
