package build

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/erofs/go-erofs"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/initramfs"
	"github.com/troupe-dev/troupe/internal/digest"
)

// kernelHook unpacks the kernel while mmdebstrap still has apt's lists.
//
//go:embed kernel.sh
var kernelHook []byte

// basePackages are in every base: the agent makes its cache's file system with e2fsprogs' mke2fs, and kmod makes the
// list of module dependencies.
var basePackages = []string{"e2fsprogs", "kmod"}

// Base makes the OS base of r. What went wrong in a step is a *StepError. The blobs that it made before an error may be
// in the store, whole, and are those that another try makes again.
func (b *Builder) Base(ctx context.Context, r images.BaseRecipe, p Progress) (images.Base, error) {
	if err := checkBase(r); err != nil {
		return images.Base{}, fmt.Errorf("building an OS base: %w", err)
	}
	if err := checkContext(ctx); err != nil {
		return images.Base{}, err
	}
	scratch, remove, err := b.scratch("base")
	if err != nil {
		return images.Base{}, err
	}
	defer remove()
	s := newSteps(p)
	base, err := b.makeBase(ctx, r, scratch, s)
	if err != nil {
		return images.Base{}, s.fail(ctx, err)
	}
	return base, nil
}

func (b *Builder) makeBase(ctx context.Context, r images.BaseRecipe, scratch string, s *steps) (images.Base, error) {
	s.begin("packages")
	t, err := b.bootstrap(ctx, r, scratch, s)
	if err != nil {
		return images.Base{}, err
	}
	base := images.Base{Recipe: r.ID(), Arch: r.Arch, Image: t.image, Kernel: t.kernel, Version: t.version}
	base.Packages = slices.Sorted(slices.Values(slices.Concat(installed(t.status), trimmedLines(t.kernelLock))))
	s.begin("modules")
	base.Modules, err = b.modules(ctx, base, s)
	return base, err
}

// bootstrap runs mmdebstrap and makes the image of what it writes, as it writes it.
func (b *Builder) bootstrap(ctx context.Context, r images.BaseRecipe, scratch string, s *steps) (*baseTree, error) {
	program, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return nil, fmt.Errorf("making a root file system (Debian package mmdebstrap): %w", err)
	}
	hook := filepath.Join(scratch, "kernel.sh")
	if err := os.WriteFile(hook, kernelHook, 0o644); err != nil {
		return nil, fmt.Errorf("writing the kernel hook: %w", err)
	}
	w, err := b.newImage(ctx, scratch)
	if err != nil {
		return nil, err
	}
	defer w.abort()
	pr, pw := io.Pipe()
	cmd := mmdebstrap(program, r, hook)
	cmd.Env, cmd.Dir, cmd.Stdout = environ(scratch), scratch, pw

	t := &baseTree{store: b.Store, w: w, s: s}
	done := make(chan error, 1)
	go func() {
		err := t.read(ctx, pr)
		_ = pr.CloseWithError(err) // ends mmdebstrap, should it still write; never an error
		done <- err
	}()
	rerr := s.run(ctx, cmd, syscall.CLONE_NEWUTS)
	_ = pw.CloseWithError(rerr) // never an error
	// The reader's complaint is the cause when it closed the pipe, and nothing but the echo of the program's otherwise.
	terr := <-done
	if rerr != nil && (terr == nil || errors.Is(terr, rerr)) {
		return nil, rerr
	}
	if terr != nil {
		return nil, terr
	}
	t.image, err = w.commit(ctx)
	return t, err
}

// mmdebstrap is the command, of that program, that writes r's root file system as a tar stream. As root it runs under another name than
// the machine's, which packages would write into their files; otherwise it makes the namespaces that it needs itself.
func mmdebstrap(program string, r images.BaseRecipe, hook string) *exec.Cmd {
	if !isRoot() {
		return exec.Command(program, mmdebstrapArgs(r, hook, "unshare")...) //nolint:noctx // steps.run ends it
	}
	const script = `hostname localhost; exec "$0" "$@"`
	return exec.Command("/bin/sh", append([]string{"-ec", script, program}, mmdebstrapArgs(r, hook, "root")...)...) //nolint:noctx // steps.run ends it
}

func mmdebstrapArgs(r images.BaseRecipe, hook, mode string) []string {
	packages := slices.Concat(basePackages, r.Packages)
	packages = slices.DeleteFunc(packages, func(p string) bool { return p == r.Kernel })
	args := []string{
		"--mode=" + mode, "--format=tar", "--variant=minbase", "--architectures=" + r.Arch,
		"--include=" + strings.Join(packages, ","),
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-include=/usr/share/locale/locale.alias",
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/info/*",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
		`--essential-hook=echo localhost >"$1/etc/hostname"`, // instead of the machine's
		`--customize-hook=sh "` + hook + `" "$1" "` + r.Kernel + `"`,
		`--aptopt=Acquire::Retries "3"`,
		r.Suite, "-",
	}
	return append(args, sources(r)...)
}

// sources are the lines of /etc/apt/sources.list; the package comment says which.
func sources(r images.BaseRecipe) []string {
	components := " " + strings.Join(r.Components, " ")
	lines := []string{"deb " + r.Mirror + " " + r.Suite + components}
	u, err := url.Parse(r.Mirror)
	if err != nil || u.Hostname() != "deb.debian.org" {
		return lines
	}
	switch r.Suite {
	case "sid", "unstable", "experimental":
		return lines
	}
	return append(lines,
		"deb "+r.Mirror+" "+r.Suite+"-updates"+components,
		"deb "+u.Scheme+"://"+u.Host+"/debian-security "+r.Suite+"-security"+components)
}

// modules makes the blob of what the agent needs of the base before it has a root file system.
func (b *Builder) modules(ctx context.Context, base images.Base, s *steps) (images.Blob, error) {
	root, closeRoot, err := b.openImage(ctx, base.Image.Digest)
	if err != nil {
		return images.Blob{}, err
	}
	defer closeRoot()
	w, err := b.Store.Create(ctx)
	if err != nil {
		return images.Blob{}, err
	}
	defer func() { _ = w.Abort() }() // does nothing after Commit
	sum, err := initramfs.Modules(w, root, base.Version)
	if err != nil {
		return images.Blob{}, err
	}
	_, _ = fmt.Fprintf(s, "%d modules, %d bytes unpacked\n", len(sum.Modules), sum.Unpacked)
	return w.Commit()
}

// openImage reads an image of the store. Its file system must not be used after its close.
func (b *Builder) openImage(ctx context.Context, d digest.Digest) (fs.FS, func(), error) {
	f, err := b.Store.Open(ctx, d)
	if err != nil {
		return nil, nil, err
	}
	closeFile := func() { _ = f.Close() } // it was only read
	at, ok := f.(io.ReaderAt)
	if !ok {
		closeFile()
		return nil, nil, fmt.Errorf("opening image %s: the store cannot read at an offset", d)
	}
	root, err := erofs.Open(at)
	if err != nil {
		closeFile()
		return nil, nil, fmt.Errorf("opening image %s: %w", d, err)
	}
	return root, closeFile, nil
}

// checkBase refuses what would mean something else to mmdebstrap, apt or a shell than a name. A recipe from the schema
// passes.
func checkBase(r images.BaseRecipe) error {
	for _, n := range slices.Concat([]string{r.Suite, r.Arch, r.Kernel}, r.Components, r.Packages) {
		if !isName(n) {
			return fmt.Errorf("%q is no name of a suite, component, architecture or package", n)
		}
	}
	if len(r.Components) == 0 {
		return errors.New("no component of the archive is named")
	}
	u, err := url.Parse(r.Mirror)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || strings.ContainsAny(r.Mirror, " \t\n[]\"'`$\\") {
		return fmt.Errorf("mirror %q is no http or https URL", r.Mirror)
	}
	return nil
}

// isName says whether s is a Debian package's name or something alike: it starts with a letter or a digit, and does not
// end in the "-" with which apt removes a package.
func isName(s string) bool {
	if s == "" || strings.HasSuffix(s, "-") || strings.Trim(s[:1], "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-.:_/~=") == ""
}
