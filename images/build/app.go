package build

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os/exec"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/treesum"
)

// An AppSource is what an app's recipe only names.
type AppSource struct {
	Tree fs.FS       // the directory whose name is the recipe's Tree, or what is compiled; nil for a recipe without one
	Base images.Base // of the machine that compiles; the zero Base for a recipe where nothing is compiled
}

// App makes the image of an application: an EROFS image as a base is one, of nothing but the application's files. What went
// wrong in a step is a *StepError.
//
// A directory's files belong to root, have the mode 0644 or 0755 and the time of the epoch. The files of an archive, of packages
// and of an OCI image keep owners, modes and capabilities; none has a time after the epoch. Devices, pipes and sockets are
// refused, and paths that lead out.
func (b *Builder) App(ctx context.Context, r images.AppRecipe, src AppSource, p Progress) (images.App, error) {
	if err := checkContext(ctx); err != nil {
		return images.App{}, err
	}
	scratch, remove, err := b.scratch("app")
	if err != nil {
		return images.App{}, err
	}
	defer remove()
	s := newSteps(p)
	app, err := b.makeApp(ctx, r, src, scratch, s)
	if err != nil {
		return images.App{}, s.fail(ctx, err)
	}
	return app, nil
}

func (b *Builder) makeApp(ctx context.Context, r images.AppRecipe, src AppSource, scratch string, s *steps) (images.App, error) {
	app := images.App{Recipe: r.ID()}
	f, err := newFlattener(scratch)
	if err != nil {
		return app, err
	}
	defer func() { _ = f.close() }() // scratch, which is removed
	switch {
	case r.Tree != "":
		s.begin("directory")
		err = f.addTree(ctx, src.Tree, r.Tree)
	case r.URL != "":
		err = b.addTar(ctx, r, f, s)
	case r.OCI != "":
		s.begin("fetch")
		app.Source, err = f.addOCI(ctx, r, s)
	case len(r.Debian.Packages) > 0:
		s.begin("packages")
		app.Packages, err = f.addPackages(ctx, r.Debian, scratch, s)
	case r.Compile.Output != "":
		err = b.addCompiled(ctx, r.Compile, src, f, s)
	default:
		err = errors.New("the recipe of the app says nothing")
	}
	if err != nil {
		return app, err
	}
	s.begin("image")
	w, err := b.newImage(ctx, scratch)
	if err != nil {
		return app, err
	}
	defer w.abort()
	if err := f.write(ctx, w); err != nil {
		return app, err
	}
	_, _ = fmt.Fprintf(s, "%d entries, %d bytes\n", f.count, f.bytes)
	app.Image, err = w.commit(ctx)
	return app, err
}

// addTree adds a directory of the fleet's repo, which must be the one that is named.
func (f *flattener) addTree(ctx context.Context, tree fs.FS, want digest.Digest) error {
	if tree == nil {
		return errors.New("the commit's files are not there")
	}
	got, err := treesum.Sum(ctx, tree, ".")
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("%w: the directory is %s, and the recipe says %s", digest.ErrMismatch, got, want)
	}
	f.layer++
	return treesum.Walk(ctx, tree, ".", func(e treesum.Entry) error {
		if f.count++; f.count > maxAppFiles {
			return fmt.Errorf("%w: it has more than %d files", errHostile, maxAppFiles)
		}
		n := &node{layer: f.layer, entry: entry{mode: unix.S_IFREG | 0o644, mtime: epoch}}
		switch {
		case e.IsLink:
			n.mode, n.target = unix.S_IFLNK|0o777, e.Target
		case e.Executable:
			n.mode |= 0o111
		}
		if !e.IsLink {
			if err := f.keepFile(n, tree, e.Name); err != nil {
				return fmt.Errorf("reading %q: %w", e.Name, err)
			}
		}
		return f.put(e.Name, n)
	})
}

func (f *flattener) keepFile(n *node, tree fs.FS, name string) error {
	file, err := tree.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	return f.keep(n, file, fi.Size())
}

// addCompiled adds what is compiled for the app.
func (b *Builder) addCompiled(ctx context.Context, r images.CompileRecipe, src AppSource, f *flattener, s *steps) error {
	blob, err := b.compile(ctx, r, src.Base, src.Tree, s)
	if err != nil {
		return err
	}
	out, err := b.Store.Reader(ctx, blob.Digest)
	if err != nil {
		return err
	}
	return errors.Join(f.add(ctx, out), out.Close())
}

// addTar adds an archive that somebody else made.
func (b *Builder) addTar(ctx context.Context, r images.AppRecipe, f *flattener, s *steps) error {
	u, err := url.Parse(r.URL)
	if err != nil {
		return err
	}
	s.begin("fetch")
	disk := images.DiskRecipe{URL: r.URL, SHA256: r.SHA256, Format: "tar"}
	file, err := b.fetch(ctx, disk, u, s)
	if err != nil {
		return err
	}
	defer file.Close()
	s.begin("check")
	if err := checkSum(ctx, file, r.SHA256); err != nil {
		b.forgetPart(disk) // else the next try would end the same way
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	s.begin("unpack")
	h := digest.NewHash() // of what is unpacked: a file on the server may be written to meanwhile
	tee := io.TeeReader(file, h)
	plain, closePlain, err := decompress(tee)
	if err != nil {
		return err
	}
	defer closePlain()
	if err := f.add(ctx, plain); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, tee); err != nil {
		return fmt.Errorf("reading the archive: %w", err)
	}
	if h.Digest().Hex() != r.SHA256 {
		return fmt.Errorf("%w: %s was written to while it was read", digest.ErrMismatch, r.URL)
	}
	b.forgetPart(disk)
	return nil
}

// maxWindow bounds the memory that unpacking takes, in bytes: the window of zstd --long=27, and the dictionary of xz -9.
const maxWindow = 128 << 20

// decompress unpacks what r begins like: gzip, zstd or xz. What begins otherwise is taken as it is. The function that it
// returns must be called when all was read.
func decompress(r io.Reader) (io.Reader, func(), error) {
	br := bufio.NewReader(r)
	head, err := br.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("reading the archive: %w", err)
	}
	nothing := func() {}
	switch {
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, fmt.Errorf("unpacking the archive: %w", err)
		}
		return z, nothing, nil
	case bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")):
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, fmt.Errorf("unpacking the archive: %w", err)
		}
		return z, z.Close, nil
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		z, err := xz.ReaderConfig{DictCap: maxWindow}.NewReader(br)
		if err != nil {
			return nil, nil, fmt.Errorf("unpacking the archive: %w", err)
		}
		return z, nothing, nil
	}
	return br, nothing, nil
}

// packageHook notes which packages were unpacked, while their archives are still there.
const packageHook = `cd "$1/var/cache/apt/archives" && ls >"$1/.troupe-packages"`

// addPackages adds Debian packages with what they depend on, unpacked and not installed: no script of theirs runs.
func (f *flattener) addPackages(ctx context.Context, r images.BaseRecipe, scratch string, s *steps) ([]string, error) {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return nil, fmt.Errorf("unpacking packages (Debian package mmdebstrap): %w", err)
	}
	kernelless := r
	kernelless.Kernel = "none" // which checkBase wants
	if err := checkBase(kernelless); err != nil {
		return nil, err
	}
	f.noDev = true
	f.drop = func(name string, dir bool) bool { return isOfInstallation(name) || isTransient(name, dir) }
	pr, pw := io.Pipe()
	mode := "unshare"
	if isRoot() {
		mode = "root"
	}
	args := append([]string{
		"--mode=" + mode, "--format=tar", "--variant=extract", "--architectures=" + r.Arch, "--include=" + strings.Join(r.Packages, ","),
		"--customize-hook=" + packageHook, `--aptopt=Acquire::Retries "3"`, r.Suite, "-",
	}, sources(r)...)
	cmd := exec.Command("mmdebstrap", args...) //nolint:noctx // steps.run ends it
	cmd.Env, cmd.Dir, cmd.Stdout = environ(scratch), scratch, pw
	done := make(chan error, 1)
	go func() {
		err := f.add(ctx, pr)
		if err == nil { // the padding behind the end of the archive must be read too, or mmdebstrap dies of a broken pipe
			_, err = io.Copy(io.Discard, pr)
		}
		_ = pr.CloseWithError(err) // ends mmdebstrap, should it still write; never an error
		done <- err
	}()
	rerr := s.run(ctx, cmd, 0)
	_ = pw.CloseWithError(rerr) // never an error
	terr := <-done
	if rerr != nil && (terr == nil || errors.Is(terr, rerr)) {
		return nil, rerr
	}
	if terr != nil {
		return nil, terr
	}
	return f.takePackages()
}

// isOfInstallation says whether a file belongs to apt and dpkg, which an app has no use for.
func isOfInstallation(name string) bool {
	for _, dir := range []string{"etc/apt", "var/lib/apt", "var/lib/dpkg", "var/cache/apt"} {
		if name == dir || strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}

// takePackages takes what packageHook left out of the tree: the lock, "name=version", sorted.
func (f *flattener) takePackages() ([]string, error) {
	n := f.root.kids[".troupe-packages"]
	if n == nil {
		return nil, errors.New("mmdebstrap did not say what it unpacked")
	}
	delete(f.root.kids, ".troupe-packages")
	list, err := readEntry(n.entry)
	if err != nil {
		return nil, fmt.Errorf("reading which packages were unpacked: %w", err)
	}
	var lock []string
	for line := range strings.Lines(string(list)) { // NAME_VERSION_ARCH.deb, in order
		if part := strings.Split(strings.TrimSpace(line), "_"); len(part) == 3 && path.Ext(part[2]) == ".deb" {
			lock = append(lock, part[0]+"="+strings.ReplaceAll(part[1], "%3a", ":"))
		}
	}
	return lock, nil
}
