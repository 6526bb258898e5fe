// Package apps mounts the apps of a release in a root, each with a data directory and perhaps a writable layer of its own, and
// makes their systemd units.
//
//	<run>/NAME@DIGEST                     the image, read-only
//	<root><mount>                         the same, or an overlay of it and its delta
//	<root>/var/lib/troupe/apps/NAME       the data directory
//	<cache>/apps/HOST/NAME/data           what is behind that
//	<cache>/apps/HOST/NAME/delta-DIGEST   upper and work of the overlay, for one image
package apps

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// DataDir has the data directories of apps, in the root.
const DataDir = "/var/lib/troupe/apps"

// Values of an app's Data and Delta.
const (
	keep  = "keep"
	fresh = "fresh"
)

// A Place is where the apps of one host are mounted.
type Place struct {
	Root  string // of the system
	Run   string // has the images, and is kept over the switch to the root
	Cache string // has what the apps write
	Units string // of systemd
	Host  string
	// Image mounts an app's image on a directory that is there, read-only.
	Image func(image agentapi.Image, dir string) error
}

var name = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// Check says what is wrong with apps, before anything is done with them.
func Check(list []agentapi.App) error {
	for i, a := range list {
		switch {
		case !name.MatchString(a.Name):
			return fmt.Errorf("%q is no name of an app", a.Name)
		case i > 0 && list[i-1].Name >= a.Name:
			return fmt.Errorf("app %s does not come behind app %s", a.Name, list[i-1].Name)
		case !path.IsAbs(a.Mount) || path.Clean(a.Mount) != a.Mount || a.Mount == "/" || strings.ContainsFunc(a.Mount, isControl):
			return fmt.Errorf("app %s: it cannot be mounted on %q", a.Name, a.Mount)
		case a.Image.Digest == "":
			return fmt.Errorf("app %s has no image", a.Name)
		case slices.ContainsFunc(slices.Concat(a.Exec, a.Env, []string{a.User}), func(s string) bool { return strings.ContainsFunc(s, isControl) }):
			return fmt.Errorf("app %s: what it runs has control characters", a.Name)
		}
	}
	return nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// Boot mounts the apps in a root that is about to be switched to: what is to be fresh is emptied. After an error nothing is mounted.
func (p Place) Boot(list []agentapi.App) error { return p.mountAll(list, true) }

// Mount mounts the apps as the system runs: what they wrote in this boot stays. After an error nothing is mounted.
func (p Place) Mount(list []agentapi.App) error { return p.mountAll(list, false) }

func (p Place) mountAll(list []agentapi.App, boot bool) error {
	for i, a := range list {
		if err := p.mount(a, boot); err != nil {
			return errors.Join(fmt.Errorf("mounting app %s: %w", a.Name, err), p.Unmount(list[:i+1]))
		}
	}
	return nil
}

func (p Place) mount(a agentapi.App, boot bool) error {
	if err := p.prepare(a, boot); err != nil {
		return err
	}
	image := p.image(a)
	if err := os.MkdirAll(image, 0o755); err != nil {
		return err
	}
	if err := p.Image(a.Image, image); err != nil {
		return err
	}
	if a.Delta == "" {
		if err := p.on(a.Mount, func(at string) error { return unix.Mount(image, at, "", unix.MS_BIND, "") }); err != nil {
			return err
		}
	} else {
		delta := p.delta(a)
		opts := "lowerdir=" + image + ",upperdir=" + filepath.Join(delta, "upper") + ",workdir=" + filepath.Join(delta, "work")
		if err := p.on(a.Mount, func(at string) error { return unix.Mount("troupe", at, "overlay", 0, opts) }); err != nil {
			return err
		}
	}
	return p.on(path.Join(DataDir, a.Name), func(at string) error { return unix.Mount(p.data(a), at, "", unix.MS_BIND, "") })
}

// on calls f with a path of the directory at dir in the root, which is made where it is not there. No link in the root leads out of it.
func (p Place) on(dir string, f func(at string) error) error {
	d, err := rootfs.OpenDir(p.Root, dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := f(fmt.Sprintf("/proc/self/fd/%d", d.Fd())); err != nil {
		return fmt.Errorf("on %s: %w", dir, err)
	}
	return nil
}

// prepare makes what the app writes to, and empties it where it is to be fresh.
func (p Place) prepare(a agentapi.App, boot bool) error {
	if boot && a.Data == fresh {
		if err := os.RemoveAll(p.data(a)); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(p.data(a), 0o755); err != nil {
		return err
	}
	if boot {
		if err := p.dropDeltas(a); err != nil {
			return err
		}
	}
	if a.Delta == "" {
		return nil
	}
	if a.Delta == fresh {
		if err := os.RemoveAll(p.delta(a)); err != nil {
			return err
		}
	}
	for _, d := range []string{"upper", "work"} {
		if err := os.MkdirAll(filepath.Join(p.delta(a), d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// dropDeltas removes what was written over images that the app had before.
func (p Place) dropDeltas(a agentapi.App) error {
	all, err := filepath.Glob(filepath.Join(p.own(a), "delta-*"))
	if err != nil {
		return err
	}
	for _, d := range all {
		if a.Delta == keep && d == p.delta(a) {
			continue
		}
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	return nil
}

// Unmount takes apps down, in the reverse order, as far as they are mounted. What still has a file open keeps it.
func (p Place) Unmount(list []agentapi.App) error {
	var errs []error
	for _, a := range slices.Backward(list) {
		for _, dir := range []string{path.Join(DataDir, a.Name), a.Mount} {
			errs = append(errs, p.on(dir, detach))
		}
		if err := detach(p.image(a)); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", p.image(a), err))
		}
		_ = os.Remove(p.image(a)) // an empty directory of a tmpfs
	}
	return errors.Join(errs...)
}

func detach(at string) error {
	if err := unix.Unmount(at, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it is no mount point
		return err
	}
	return nil
}

func (p Place) image(a agentapi.App) string {
	return filepath.Join(p.Run, a.Name+"@"+a.Image.Digest.Short())
}
func (p Place) own(a agentapi.App) string  { return filepath.Join(p.Cache, "apps", p.Host, a.Name) }
func (p Place) data(a agentapi.App) string { return filepath.Join(p.own(a), "data") }
func (p Place) delta(a agentapi.App) string {
	return filepath.Join(p.own(a), "delta-"+a.Image.Digest.Short())
}
