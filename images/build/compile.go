package build

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/build/vm"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/treesum"
)

// sourceDir is where a machine has what it compiles, without the first slash.
const sourceDir = "src"

// compileMemory is what a machine that compiles has, in MiB.
const compileMemory = 2048

// Bounds of an archive that is compiled.
const (
	maxSourceBytes = 8 << 30
	maxSourceFiles = 500_000
)

// Compile has a machine with base make files of a source, and gives a tar stream of them, as a blob of the store: what is in the output
// directory by its path from there, or the one file by its name. Of a recipe without a URL, source is the directory's content. What comes of a
// recipe is kept: it is not compiled again on the same base, also by another Builder with the same Compiled, and one that asks while
// it is being compiled waits. What went wrong in a step is a *StepError.
func (b *Builder) Compile(ctx context.Context, r images.CompileRecipe, base images.Base, source fs.FS, p Progress) (images.Blob, error) {
	s := newSteps(p)
	blob, err := b.compile(ctx, r, base, source, s)
	return blob, s.fail(ctx, err)
}

// compile is Compile for a build with steps of its own.
func (b *Builder) compile(ctx context.Context, r images.CompileRecipe, base images.Base, source fs.FS, s *steps) (images.Blob, error) {
	s.begin("compile")
	if r.Base != base.Recipe {
		return images.Blob{}, fmt.Errorf("it is for the base of recipe %s, not for that of %s", r.Base, base.Recipe)
	}
	key := r.Result(base.Image.Digest)
	leave, err := b.compiling.enter(ctx, key)
	if err != nil {
		return images.Blob{}, err
	}
	defer leave()
	if blob, ok := b.compiled(ctx, key); ok {
		_, _ = fmt.Fprintf(s, "compiled before: %s\n", blob.Digest)
		return blob, nil
	}
	scratch, remove, err := b.scratch("compile")
	if err != nil {
		return images.Blob{}, err
	}
	defer remove()
	blob, err := b.compileIn(ctx, r, base, source, scratch, s)
	if err != nil {
		return images.Blob{}, err
	}
	return blob, b.keepCompiled(key, blob)
}

func (b *Builder) compileIn(ctx context.Context, r images.CompileRecipe, base images.Base, source fs.FS, scratch string, s *steps) (images.Blob, error) {
	j, err := b.machine(base, filepath.Join(scratch, "machine"), s)
	if err != nil {
		return images.Blob{}, err
	}
	j.Steps, j.Env, j.Dir, j.Network, j.Output, j.Memory = r.Run, guestEnviron(), "/"+sourceDir, r.Network, r.Output, compileMemory
	j.Step = func(i int) { s.begin("compile" + strings.TrimPrefix(runStep(i, len(r.Run), r.Run[i]), "run")) }
	if r.URL == "" {
		j.Files = func(w *tar.Writer) error { return writeTree(ctx, w, source, r.Source) }
	} else {
		s.begin("source")
		f, forget, err := b.fetchSource(ctx, r, s)
		if err != nil {
			return images.Blob{}, err
		}
		defer forget()
		j.Files = func(w *tar.Writer) error { return writeArchive(ctx, w, f) }
	}
	res, err := b.VMs.Run(ctx, j)
	if err != nil {
		return images.Blob{}, err
	}
	defer func() { _ = res.Close() }() // it is only read
	s.begin("output")
	return b.putOutput(ctx, res)
}

// putOutput puts what a machine made into the store, with nothing in it that depends on the day.
func (b *Builder) putOutput(ctx context.Context, res *vm.Result) (images.Blob, error) {
	out, err := b.Store.Create(ctx)
	if err != nil {
		return images.Blob{}, err
	}
	defer func() { _ = out.Abort() }() // does nothing after Commit
	buf := bufio.NewWriterSize(out, 1<<20)
	w := tar.NewWriter(buf)
	// The reader must not be moved between two entries: contents are read through its ReadAt.
	if err := eachEntry(ctx, res, func(name string, e entry) error { return writeTarEntry(w, name, e) }); err != nil {
		return images.Blob{}, fmt.Errorf("taking what was compiled: %w", err)
	}
	if err := errors.Join(w.Close(), buf.Flush()); err != nil {
		return images.Blob{}, fmt.Errorf("taking what was compiled: %w", err)
	}
	return out.Commit()
}

// compiled is what came of a recipe before, where the store still has it.
func (b *Builder) compiled(ctx context.Context, key digest.Digest) (images.Blob, bool) {
	if b.Compiled == "" {
		return images.Blob{}, false
	}
	var blob images.Blob
	text, err := os.ReadFile(filepath.Join(b.Compiled, key.Hex()))
	if err == nil {
		err = json.Unmarshal(text, &blob)
	}
	if err == nil {
		err = b.Store.Verify(ctx, blob.Digest)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.log().Info("compiling again", "because", err)
	}
	return blob, err == nil
}

func (b *Builder) keepCompiled(key digest.Digest, blob images.Blob) error {
	if b.Compiled == "" {
		return nil
	}
	text, err := json.Marshal(blob)
	if err == nil {
		err = os.MkdirAll(b.Compiled, 0o755)
	}
	if err == nil {
		err = atomicfile.WriteFile(filepath.Join(b.Compiled, key.Hex()), text, 0o644)
	}
	if err != nil {
		return fmt.Errorf("keeping what was compiled: %w", err)
	}
	return nil
}

// writeTree gives a machine a directory to compile, once it is seen that it is the right one.
func writeTree(ctx context.Context, w *tar.Writer, tree fs.FS, want digest.Digest) error {
	got, err := treesum.Sum(ctx, tree, ".")
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("the source is another one: %s, and the recipe says %s", got, want)
	}
	dirs := map[string]bool{}
	if err := writeDirs(w, dirs, sourceDir); err != nil {
		return err
	}
	return treesum.Walk(ctx, tree, ".", func(t treesum.Entry) error {
		e := entry{mode: unix.S_IFREG | 0o644, mtime: epoch, open: func() (io.ReadCloser, error) { return tree.Open(t.Name) }}
		switch {
		case t.IsLink:
			e = entry{mode: unix.S_IFLNK | 0o777, mtime: epoch, target: t.Target}
		case t.Executable:
			e.mode |= 0o111
		}
		if err := writeDirs(w, dirs, path.Join(sourceDir, path.Dir(t.Name))); err != nil {
			return err
		}
		return writeTarEntry(w, upper+path.Join(sourceDir, t.Name), e)
	})
}

// writeDirs writes the directory and those above it that are not in done.
func writeDirs(w *tar.Writer, done map[string]bool, dir string) error {
	if dir == "." || done[dir] {
		return nil
	}
	if err := writeDirs(w, done, path.Dir(dir)); err != nil {
		return err
	}
	done[dir] = true
	return writeTarEntry(w, upper+dir, entry{mode: unix.S_IFDIR | 0o755, mtime: epoch})
}

// fetchSource gives the archive of a recipe, checked.
func (b *Builder) fetchSource(ctx context.Context, r images.CompileRecipe, s *steps) (f *os.File, forget func(), err error) {
	u, err := url.Parse(r.URL)
	if err != nil {
		return nil, nil, err
	}
	as := images.DiskRecipe{URL: r.URL, SHA256: r.Source.Hex(), Format: "source"}
	if f, err = b.fetch(ctx, as, u, s); err != nil {
		return nil, nil, err
	}
	forget = func() {
		_ = f.Close() // it was only read
		b.forgetPart(as)
	}
	if err := checkSum(ctx, f, as.SHA256); err != nil {
		forget() // else the next try would end the same way
		return nil, nil, err
	}
	return f, forget, nil
}

// writeArchive gives a machine what is in a tar archive to compile.
func writeArchive(ctx context.Context, w *tar.Writer, f io.ReadSeeker) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	r, closeArchive, err := decompress(contextReader{ctx, f})
	if err != nil {
		return fmt.Errorf("reading the source: %w", err)
	}
	defer closeArchive()
	t := tar.NewReader(io.LimitReader(r, maxSourceBytes))
	u := unpacker{w: w, dirs: map[string]bool{}, others: map[string]bool{}}
	if err := writeDirs(w, u.dirs, sourceDir); err != nil {
		return err
	}
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil && n == maxSourceFiles {
			err = fmt.Errorf("it has more than %d files", n)
		}
		if err == nil {
			err = u.add(h, t)
		}
		if err != nil {
			return fmt.Errorf("reading the source, a tar archive: %w", err)
		}
	}
}

// An unpacker passes the entries of an archive on to a machine.
type unpacker struct {
	w      *tar.Writer
	dirs   map[string]bool // that were written
	others map[string]bool // all else
}

func (u *unpacker) add(h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil // git archive's: it names the commit
	}
	name, err := u.place(h.Name)
	if err != nil || u.dirs[name] || u.others[name] { // of a file that comes twice the first counts
		return err
	}
	if err := writeDirs(u.w, u.dirs, path.Dir(name)); err != nil {
		return err
	}
	out := &tar.Header{
		Typeflag: h.Typeflag, Name: upper + name, Linkname: h.Linkname, Mode: h.Mode & 0o7777, Size: h.Size,
		ModTime: h.ModTime, Format: tar.FormatPAX,
	}
	switch h.Typeflag {
	case tar.TypeDir:
		u.dirs[name] = true
		out.Name += "/"
	case tar.TypeReg, tar.TypeSymlink:
		u.others[name] = true
	case tar.TypeLink:
		to, err := u.place(h.Linkname)
		if err != nil || !u.others[to] {
			return errors.Join(err, fmt.Errorf("%.200q is a link to what is not there", h.Name))
		}
		u.others[name], out.Linkname = true, upper+to
	default:
		return fmt.Errorf("%.200q is no file, directory or link", h.Name)
	}
	if err := u.w.WriteHeader(out); err != nil {
		return err
	}
	_, err = io.Copy(u.w, r)
	return err
}

// place is where a file of the archive lies in the machine. It lies in no link.
func (u *unpacker) place(name string) (string, error) {
	clean := path.Clean(strings.TrimPrefix(name, "/"))
	if !fs.ValidPath(clean) {
		return "", fmt.Errorf("%.200q leads out of it", name)
	}
	clean = path.Join(sourceDir, clean)
	for d := path.Dir(clean); d != "."; d = path.Dir(d) {
		if u.others[d] {
			return "", fmt.Errorf("%.200q lies in what is no directory", name)
		}
	}
	return clean, nil
}
