package build

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/troupe-dev/troupe/images"
)

// Delta makes the role delta of r over base, whose image must be in the store. Packages and run steps need root's
// rights. What went wrong in a step is a *StepError. After an error nothing new is in the store.
func (b *Builder) Delta(ctx context.Context, r images.DeltaRecipe, base images.Base, p Progress) (images.Delta, error) {
	if err := checkDelta(r, base); err != nil {
		return images.Delta{}, fmt.Errorf("building a role delta: %w", err)
	}
	if err := checkContext(ctx); err != nil {
		return images.Delta{}, err
	}
	scratch, remove, err := b.scratch("delta")
	if err != nil {
		return images.Delta{}, err
	}
	defer remove()
	root, closeRoot, err := b.openImage(ctx, base.Image.Digest)
	if err != nil {
		return images.Delta{}, fmt.Errorf("building a role delta: %w", err)
	}
	defer closeRoot()
	s := newSteps(p)
	v, err := newView(root)
	if err != nil {
		return images.Delta{}, fmt.Errorf("building a role delta: %w", err)
	}
	d := &deltaBuild{r: r, view: v, s: s, chroot: chroot{dir: scratch, base: root, image: b.Store.Path(base.Image.Digest), s: s}}
	delta, err := d.make(ctx, b, base, scratch)
	if err != nil {
		return images.Delta{}, s.fail(ctx, err)
	}
	return delta, nil
}

// A deltaBuild is one delta on its way.
type deltaBuild struct {
	r      images.DeltaRecipe
	view   *view
	s      *steps
	chroot chroot
}

func (d *deltaBuild) make(ctx context.Context, b *Builder, base images.Base, scratch string) (images.Delta, error) {
	keep, err := d.fill(ctx)
	if err != nil {
		return images.Delta{}, err
	}
	if len(d.r.Boot) == 0 {
		return d.image(ctx, b, base, scratch)
	}
	done, err := d.boot(ctx, b, base, keep)
	if err != nil {
		return images.Delta{}, err
	}
	defer done()
	return d.image(ctx, b, base, scratch)
}

// image makes the image of the layer.
func (d *deltaBuild) image(ctx context.Context, b *Builder, base images.Base, scratch string) (images.Delta, error) {
	d.s.begin("image")
	lock, err := d.lock(base)
	if err != nil {
		return images.Delta{}, err
	}
	if err := d.view.prune(); err != nil {
		return images.Delta{}, err
	}
	w, err := b.newImage(ctx, scratch)
	if err != nil {
		return images.Delta{}, err
	}
	defer w.abort()
	if err := addAll(d.view.top, w); err != nil {
		return images.Delta{}, err
	}
	if err := ctx.Err(); err != nil {
		return images.Delta{}, err
	}
	image, err := w.commit(ctx)
	return images.Delta{Recipe: d.r.ID(), Base: base.Image.Blob, Image: image, Packages: lock}, err
}

// fill makes the layer. The chroot is there only for those who need it: a delta of files and units costs no copy of
// the base. It gives the names of what the recipe's files brought into the layer.
func (d *deltaBuild) fill(ctx context.Context) ([]string, error) {
	if len(d.r.Packages) > 0 {
		d.s.begin("packages")
		if err := d.packages(ctx); err != nil {
			return nil, err
		}
	}
	d.s.begin("files")
	put, err := d.files()
	if err != nil {
		return nil, err
	}
	if len(d.r.Run) > 0 {
		if err := d.run(ctx, put); err != nil {
			return nil, err
		}
	}
	if len(d.r.Enable) == 0 {
		return put, nil
	}
	d.s.begin("services")
	return put, d.view.enable(d.r.Enable)
}

// packages has apt install the recipe's packages, and takes what that did into the layer.
func (d *deltaBuild) packages(ctx context.Context) error {
	if err := d.chroot.prepare(ctx); err != nil {
		return err
	}
	done, err := d.chroot.online()
	if err != nil {
		return err
	}
	// Without the option a mirror that cannot be reached is a warning, and the error is that a package is not known.
	script := `apt-get -q -o APT::Update::Error-Mode=any update
apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confdef \
	-o Dpkg::Options::=--force-confold install ` + strings.Join(d.r.Packages, " ")
	if err := errors.Join(d.chroot.sh(ctx, script, true), done()); err != nil {
		return err
	}
	return d.scan(nil)
}

// run runs the recipe's run steps over the layer, of which the entries in put are not in the chroot yet.
func (d *deltaBuild) run(ctx context.Context, put []string) error {
	if err := d.chroot.prepare(ctx); err != nil {
		return err
	}
	if err := d.chroot.write(d.view.top, put); err != nil {
		return err
	}
	for i, command := range d.r.Run {
		d.s.begin(runStep(i, len(d.r.Run), command))
		if err := d.chroot.sh(ctx, command, false); err != nil {
			return err
		}
	}
	return d.scan(put)
}

// runStep names a run step by its first line: `run 2/3: echo hello`.
func runStep(i, n int, command string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(command), "\n")
	if r := []rune(line); len(r) > 60 {
		line = string(r[:59]) + "…"
	}
	return fmt.Sprintf("run %d/%d: %s", i+1, n, line)
}

// scan makes the layer anew of what is in the chroot. The role's own files, those in keep, stay wherever they are.
func (d *deltaBuild) scan(keep []string) error {
	v, err := newView(d.view.base)
	if err != nil {
		return err
	}
	hadKeys, err := d.chroot.scan(v, keep)
	if err != nil {
		return err
	}
	d.view = v
	if !hadKeys {
		return nil
	}
	for name, e := range sshKeyDropIn() {
		if e.isDir() {
			continue // put makes it
		}
		if _, _, err := v.put(name, e); err != nil {
			return err
		}
	}
	return nil
}

// files lays the recipe's files over the base and gives the names of what that brought into the layer.
func (d *deltaBuild) files() ([]string, error) {
	var all []string
	from := make(map[string]string)
	for _, name := range sortedKeys(d.r.Files) {
		f := d.r.Files[name]
		e := regular(f.Content, f.Mode&0o7777)
		e.uid, e.gid = f.UID, f.GID
		resolved, put, err := d.view.put(strings.TrimPrefix(name, "/"), e)
		if err != nil {
			return nil, fmt.Errorf("putting file %q: %w", name, err)
		}
		if other, ok := from[resolved]; ok {
			return nil, fmt.Errorf("putting file %q: it is the same file as %q, over symbolic links", name, other)
		}
		from[resolved] = name
		all = append(all, put...)
	}
	return all, nil
}

// lock is what the delta adds to the base's packages, or has in another version.
func (d *deltaBuild) lock(base images.Base) ([]string, error) {
	e, ok := d.view.top["var/lib/dpkg/status"]
	if !ok || e.isWhite() {
		return nil, nil
	}
	status, err := readEntry(e)
	if err != nil {
		return nil, fmt.Errorf("reading the package database: %w", err)
	}
	return added(base.Packages, installed(status)), nil
}

// checkDelta refuses what does not belong together, and what would mean something else to apt or a shell than a name.
// A recipe from the schema passes.
func checkDelta(r images.DeltaRecipe, base images.Base) error {
	if r.Base != base.Recipe {
		return fmt.Errorf("it is for the base of recipe %s, not for that of %s", r.Base, base.Recipe)
	}
	if i := slices.IndexFunc(r.Packages, func(p string) bool { return !isName(p) }); i >= 0 {
		return fmt.Errorf("%q is no name of a package", r.Packages[i])
	}
	for _, name := range sortedKeys(r.Files) {
		if !path.IsAbs(name) || path.Clean(name) != name || name == "/" || strings.ContainsRune(name, 0) {
			return fmt.Errorf("file %q is no absolute path of a file", name)
		}
	}
	if len(r.Packages)+len(r.Run) > 0 && !isRoot() { // boot steps do not
		return errors.New("packages and run steps need root's rights: run the server as root")
	}
	return nil
}
