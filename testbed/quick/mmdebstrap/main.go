// Command mmdebstrap stands in for Debian's program of that name in labs whose machines are to boot in seconds. It writes
// the directory root beside itself to its standard output as a tar stream, and so makes the base of any recipe that the server
// builds. Of the recipe it reads two things. A package quick-NAME-SIZE, with SIZE in KiB, adds a file /usr/share/quick/NAME of that
// size, whose bytes are as random as they are always the same. A kernel whose name ends with -b is the kernel with zeros behind
// it: another digest, and nothing else.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	w := tar.NewWriter(os.Stdout)
	recipe := parse(args)
	if err := addTree(w, filepath.Join(filepath.Dir(self), "root"), recipe); err != nil {
		return err
	}
	for _, p := range recipe.extra {
		if err := addFile(w, "usr/share/quick/"+p.name, 0o644, p.content()); err != nil {
			return err
		}
	}
	lock := recipe.kernel + "=1\n"
	if err := addFile(w, ".troupe/kernel", 0o644, []byte(lock)); err != nil {
		return err
	}
	return w.Close()
}

// A recipe is what is read of the arguments.
type recipe struct {
	kernel   string
	packages []string
	extra    []extra
}

// An extra is a package that adds one file.
type extra struct {
	name string
	size int // KiB
}

var extraName = regexp.MustCompile(`^quick-([a-z0-9]+)-([0-9]{1,6})$`)

func parse(args []string) recipe {
	r := recipe{kernel: "linux-image-quick"}
	for _, a := range args {
		if list, ok := strings.CutPrefix(a, "--include="); ok {
			r.packages = strings.Split(list, ",")
		}
		if hook, ok := strings.CutPrefix(a, "--customize-hook="); ok {
			words := strings.Fields(hook)
			r.kernel = strings.Trim(words[len(words)-1], `"`)
		}
	}
	for _, p := range r.packages {
		if m := extraName.FindStringSubmatch(p); m != nil {
			n, _ := strconv.Atoi(m[2]) // six digits
			r.extra = append(r.extra, extra{name: m[1], size: n})
		}
	}
	return r
}

func (e extra) content() []byte {
	h := fnv.New64a()
	_, _ = io.WriteString(h, e.name) // never fails
	source := rand.New(rand.NewPCG(h.Sum64(), 1))
	b := make([]byte, 0, e.size<<10)
	for len(b) < e.size<<10 {
		b = append(b, byte(source.Uint32()))
	}
	return b
}

// addTree writes the tree, with what the recipe changes of it.
func addTree(w *tar.Writer, root string, r recipe) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case name == "var/lib/dpkg/status":
			return addFile(w, name, 0o644, status(r.packages))
		case info.Mode().IsRegular():
			return addReal(w, name, path, info, r)
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777})
		case info.IsDir():
			return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: int64(info.Mode().Perm())})
		}
		return errors.New(path + " is of a kind that no base needs")
	})
}

// addReal writes a regular file of the tree.
func addReal(w *tar.Writer, name, path string, info fs.FileInfo, r recipe) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if strings.HasPrefix(name, "boot/vmlinuz-") && strings.HasSuffix(r.kernel, "-b") {
		b = append(b, make([]byte, 512)...)
	}
	return addFile(w, name, int64(info.Mode().Perm()), b)
}

func addFile(w *tar.Writer, name string, mode int64, b []byte) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(b))}); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}

// status is dpkg's database with the packages, all of one version.
func status(packages []string) []byte {
	var b bytes.Buffer
	for _, p := range slices.Sorted(slices.Values(packages)) {
		fmt.Fprintf(&b, "Package: %s\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1\n\n", p)
	}
	return b.Bytes()
}
