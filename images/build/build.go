// Package build makes OS bases, role deltas and disk images of their recipes. The first two are EROFS images: of a root
// file system made of Debian packages, and of overlayfs layers over one (kernel documentation, filesystems/erofs.rst and
// filesystems/overlayfs.rst). The same recipe and the same package archive give the same bytes, on every machine and on every
// day. A disk image is the bytes of a disk that somebody else made, unpacked.
//
// # A base
//
// mmdebstrap (1) makes the root file system in a scratch directory and writes it as a tar stream, which becomes an EROFS
// image in the store as it comes. The base has the essential packages and apt (mmdebstrap's variant "minbase"), kmod and
// e2fsprogs, and the recipe's packages without what they merely recommend; translations, manual pages and documentation
// other than copyright files are left out, as they are later in deltas (dpkg's path-exclude).
//
// From deb.debian.org the suite comes with its updates and its security updates. Any other mirror is taken as it is, and
// alone: so a mirror on snapshot.debian.org stands for one point in time, and a mirror of one's own needs no more than
// the suite.
//
// The kernel is unpacked and not installed: no initramfs-tools, nothing in /boot. Its image becomes a blob of its own
// and its modules lie complete in the base.
//
// Units of apt, dpkg and e2fsprogs that would only cost a node time are not enabled.
//
// What differs from machine to machine, or from build to build, is not in an image: logs, caches, apt's lists, seeds,
// host keys of SSH (sshd's unit makes them at its first start), /etc/hostname, /etc/resolv.conf, device nodes. An image's
// /etc/machine-id is an empty file and its /etc/fstab too, so systemd neither takes a boot for the first one nor mounts
// or checks anything of its own accord. Directories under /var/log stay, and with them Debian's choice of a persistent
// journal: it lies in the node delta. Root has no password that lets anybody in.
//
// # A delta
//
// Files and enabled units are laid over the base without running anything. Packages and run steps work in a chroot of
// base and delta: packages first, then files, so that the role's files win, then run steps, then units are enabled.
// Packages come over the network; run steps have none, since what they would fetch is in no recipe. Nothing starts a
// service in there. Run steps get "sh -ec" and see /proc, /sys, an own /dev, and an empty /tmp and /run. Everything
// that happened becomes part of the layer, deletions too (as whiteouts).
//
// Boot steps come last: a machine (package vm) boots base and layer, with the base's kernel and its own systemd, and they
// run when that is up. It has no network. The layer is read when the system has ended in good order. So what differs from boot to boot
// by nature is left out as above, and nothing of it is in the layer while somebody writes it. It is not the first boot
// to systemd, nor one after an update: what is due only then, nodes do for themselves.
//
// # What is compiled
//
// In such a machine, too, but one that runs nothing else: its kernel, an init of ours, one shell after the other. It has
// the source in /src, no network unless the recipe wants one, and all that is kept of it is the output.
//
// # Layout
//
// go-erofs puts the data of all files first, by path and each at a block of 4 KiB, and all metadata last, with the whole
// content of files that fit into the rest of a metadata block (nothing else of a file lies there: no tails). So versions of
// an image share their data wherever files are the same; what one more file changes is in the metadata, 1.7 MB of the 284 MB of
// Debian 12 with a cloud kernel, and in directories of more than a block: nearly all numbers of blocks and inodes in
// them. Package internal/chunk compares images without that, and says what an update costs.
//
// What is left is where a small file lies: in the metadata if it fits into the rest of a block there, else among the data. One
// more inode makes some of the files after it change places, which is most of the 98 KB of chunks that adding the package
// "hello" costs.
package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/images/build/vm"
	"github.com/troupe-dev/troupe/images/store"
)

// A Builder makes images. It may make several at a time, though each takes a core and a few hundred MB of Dir.
type Builder struct {
	Store *store.Store // takes what is made
	// Dir holds what is needed during a build, and belongs to the Builder alone. Deltas with packages or run steps need
	// a file system there that can hold the upper layer of an overlayfs. Where the Builder does not run as root, other
	// users must be able to reach Dir: mmdebstrap works under the subordinate user ids of subuid(5).
	Dir string
	Log *slog.Logger // nil: discard

	// VMs runs machines for boot steps and for what is compiled. Without it, recipes with either fail.
	VMs *vm.Host
	// Compiled is a directory that remembers which blob came of what was compiled; "" is none.
	Compiled string

	compiling oneByOne
}

// Clean removes what builds left behind that were killed, but for what they had fetched of disk images. Call it before the first build, and not during one. What cannot
// be removed is logged, and takes room, but is in no build's way: each has a directory with a name of its own.
func (b *Builder) Clean() error {
	entries, err := os.ReadDir(b.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cleaning the scratch directory: %w", err)
	}
	for _, e := range entries {
		if isFreshPart(e, time.Now()) {
			continue
		}
		name := filepath.Join(b.Dir, e.Name())
		b.log().Info("removing the scratch of a build that was killed", "dir", name)
		b.remove(name)
	}
	return nil
}

// remove removes the scratch of a build, or says why it stays.
func (b *Builder) remove(dir string) {
	if err := removeAll(dir); err != nil {
		b.log().Error("removing the scratch of a build", "dir", dir, "err", err)
	}
}

// removeAll is os.RemoveAll also for what belongs to the subordinate users of this one (subuid(5)), as what mmdebstrap
// makes where it does not run as root: that only root can remove, or who is root of a user namespace with all of them.
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil || isRoot() {
		return err
	}
	// Alone first: where it gets no namespace, unshare (util-linux 2.38) leaves a process behind that was to fill in the maps and
	// waits for that for ever, with the output open.
	for _, args := range [][]string{{"--user", "true"}, {"--user", "--map-root-user", "--map-auto", "rm", "-rf", "--", dir}} {
		out, uerr := exec.Command("unshare", args...).CombinedOutput() //nolint:noctx // its work is finite
		if uerr != nil {
			return fmt.Errorf("%w; in a user namespace: %w: %s", err, uerr, bytes.TrimSpace(out))
		}
	}
	return nil
}

// scratch makes a directory for one build; remove must be called when it is done.
func (b *Builder) scratch(kind string) (dir string, remove func(), err error) {
	if err := os.MkdirAll(b.Dir, 0o755); err != nil {
		return "", nil, fmt.Errorf("making the scratch directory: %w", err)
	}
	if dir, err = os.MkdirTemp(b.Dir, kind+"-"); err != nil {
		return "", nil, fmt.Errorf("making a scratch directory: %w", err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", nil, fmt.Errorf("making a scratch directory: %w", err)
	}
	// Others must be able to enter: apt and mmdebstrap do part of their work as other users.
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	return dir, func() { b.remove(dir) }, nil
}

func (b *Builder) log() *slog.Logger {
	if b.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return b.Log
}

// environ is what programs get: no locale, no settings of the user's, but the proxies that lead to the archive.
func environ(scratch string) []string {
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/", "LC_ALL=C.UTF-8", "TZ=UTC", "DEBIAN_FRONTEND=noninteractive", "SYSTEMD_OFFLINE=1",
		fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch.Unix()),
	}
	if scratch != "" {
		env = append(env, "TMPDIR="+scratch)
	}
	for _, e := range os.Environ() {
		switch name, _, _ := strings.Cut(e, "="); strings.ToLower(name) {
		case "http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy":
			env = append(env, e)
		}
	}
	return env
}

// isRoot says whether this process may make namespaces and devices without a user namespace.
func isRoot() bool { return os.Geteuid() == 0 }

// checkContext is the context's error, told as that of a build which did not begin.
func checkContext(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("building: %w", err)
	}
	return nil
}
