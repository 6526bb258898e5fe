package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/verity"
)

// mounted is a root that waits to be switched to.
type mounted struct {
	assignment agentapi.Assignment
	delta      *cache.Delta
}

// activate brings an assignment up to a mounted root. It may be broken off and begun again at any point.
func (b *boot) activate(ctx context.Context, a agentapi.Assignment) (*mounted, error) {
	m, err := b.tryActivate(ctx, a)
	b.closeDamaged(ctx, err)
	return m, err
}

func (b *boot) tryActivate(ctx context.Context, a agentapi.Assignment) (*mounted, error) {
	if err := check(a); err != nil {
		return nil, err
	}
	if isWhole(a) {
		return nil, b.makeWay(ctx)
	}
	if err := b.openStorage(ctx, a); err != nil {
		return nil, err
	}
	if a.ISCSI != nil { // what was good before is not on the target any more: there is no choice
		if err := b.rightKernel(ctx, a.Release); err != nil {
			return nil, err
		}
		return b.activateLUNs(ctx, a)
	}
	if a.RAM { // and nothing else is in memory
		return b.activateCached(ctx, a)
	}
	c, err := b.choose(ctx, &a)
	if err != nil {
		return nil, err
	}
	m, err := b.activateCached(ctx, c.Assignment)
	if errors.Is(err, errNoInit) {
		err = errors.Join(err, b.giveUp(c.Key, err))
	}
	return m, err
}

// activateCached fetches what is missing of a, and mounts it.
func (b *boot) activateCached(ctx context.Context, a agentapi.Assignment) (*mounted, error) {
	b.tryJump(a)
	if err := b.rightKernel(ctx, a.Release); err != nil {
		return nil, err
	}
	n, err := b.cache.Fetch(ctx, cache.Fetch{
		Source: b.client, Images: a.Release.Images(), Deltas: []string{cache.NodeDeltaOf(a)}, Report: b.progress(a.Release.ID), Retry: b.retrying,
	})
	b.fetched += n
	b.rep.update(false, func(r *agentapi.Report) {
		r.Fetch = nil
		r.Cached = cached(b.cache)
	})
	if err != nil {
		return nil, err
	}
	if b.fetched > 0 { // again: for a newer assignment, or because an image was broken
		b.rep.forget(agentapi.StageFetch)
	}
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageFetch, Bytes: b.fetched})
	b.fetched = 0
	m, err := b.mount(a, b.cache.Path(a.Release.Base.Digest), b.cache.Path(a.Release.Delta.Digest))
	if errors.Is(err, rootfs.ErrImage) {
		if b.mend(ctx, a.Release, err) {
			return nil, mending{err}
		}
		return nil, b.dropBroken(a.Release.Blobs(), err)
	}
	if err == nil {
		b.rep.fail(nil) // not before: a mount that fails each time is one failure, not another with each try
	}
	return m, err
}

// openCache finds, makes and mounts the cache, once.
func (b *boot) openCache(ctx context.Context, spec agentapi.Disks) error {
	if b.cache != nil {
		return nil
	}
	select {
	case <-b.fsReady:
	case <-ctx.Done():
		return ctx.Err()
	}
	maker := b.maker()
	found, err := maker.Ensure(ctx, spec)
	if err != nil {
		return err
	}
	if found, err = maker.Mount(ctx, found, cacheDir); err != nil {
		return err
	}
	return b.useCache(ctx, &found, "")
}

// useCache opens a cache that is mounted on cacheDir.
func (b *boot) useCache(ctx context.Context, found *disk.Found, where string) error {
	c, err := openMounted(cacheDir, found, b.log)
	if err != nil {
		return errors.Join(err, b.endOrReboot(ctx, syncLimit, "its disk does not answer", func() error { return b.unmount(cacheDir, 0) }))
	}
	b.cache = c
	b.rep.update(false, func(r *agentapi.Report) { r.Cached = cached(c) })
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageCache, Detail: cacheDetail(*found) + where})
	return nil
}

// openMounted opens the cache in dir. Where its file system was repaired, now or in a boot that did not come as far as
// this, it looks through what is left of the cache before, and adds to found what became of it.
func openMounted(dir string, found *disk.Found, log *slog.Logger) (*cache.Cache, error) {
	if found.Repaired {
		if err := cache.Distrust(dir); err != nil {
			log.Error("the cache is looked through only if this boot comes to it", "error", err)
		}
	}
	c, err := cache.Open(dir, log)
	if err != nil {
		return nil, err
	}
	if !found.Repaired && !c.IsDistrusted() {
		return c, nil
	}
	log.Warn("the cache was repaired, hashing all its images", "device", found.Path)
	got, err := c.Recover()
	if err != nil {
		return nil, err
	}
	found.Repaired = true
	for _, n := range []struct {
		count int
		what  string
	}{{got.Images, "broken images removed"}, {got.Lost, "files without a name removed from lost+found"}} {
		if n.count > 0 {
			found.Note = strings.TrimPrefix(fmt.Sprintf("%s, %s: %d", found.Note, n.what, n.count), ", ")
		}
	}
	return c, nil
}

// cacheDetail tells people where the cache is, and what became of it.
func cacheDetail(f disk.Found) string {
	detail := "found on " + f.Path
	if f.Made {
		detail = "made on " + f.Path
	}
	if f.Repaired {
		detail += ", repaired"
	}
	if f.Note != "" {
		detail += ", " + f.Note
	}
	return detail
}

// closeDamaged lets go of a cache whose file system turned out to be damaged: the kernel makes it read-only then. The next
// try opens it again, and so repairs it. An image that does not mount says nothing about the file system that it lies on.
func (b *boot) closeDamaged(ctx context.Context, err error) {
	if b.cache == nil || !isDamage(err) || errors.Is(err, rootfs.ErrImage) {
		return
	}
	b.log.Error("the cache is damaged", "error", err)
	if err := b.closeCache(ctx); err != nil {
		b.log.Error("the cache cannot be unmounted to be repaired", "error", err)
	}
}

// lateDisks is how long a disk may take to show after its driver was loaded, before another one is written to, or its
// lack is an error. A boot that finds its cache does not wait.
const lateDisks = 6 * time.Second

// cached lists the cache for a report; what cannot be listed is not there.
func cached(c *cache.Cache) []digest.Digest {
	if c.InMemory {
		return nil // the next boot does not find it
	}
	list, err := c.List()
	if err != nil {
		return nil
	}
	return list
}

// wrongKernel says why the kernel that runs, or what it was started with, does not fit a release; "" where it does.
func (b *boot) wrongKernel(r *agentapi.Release) string {
	if r.Kernel != "" && b.cmd.Kernel != "" && r.Kernel != b.cmd.Kernel {
		return fmt.Sprintf("the release has kernel %s, %s was booted", r.Kernel.Short(), b.cmd.Kernel.Short())
	}
	if missing := b.cmd.lacks(r.KernelArgs); len(missing) > 0 {
		return "the kernel was started without " + strings.Join(missing, " ")
	}
	return ""
}

// rightKernel reboots where another kernel, or other arguments, belong to the release: the server hands them out. A
// server that does not must not make the machine boot for ever: each reboot in a row waits longer.
func (b *boot) rightKernel(ctx context.Context, r *agentapi.Release) error {
	why := b.wrongKernel(r)
	if why == "" {
		return b.cache.SetState(func(s *cache.State) { s.Kernel, s.KernelTries = "", 0 })
	}
	st := b.cache.State()
	tries := 0
	if st.Kernel == r.Kernel {
		tries = st.KernelTries
	}
	if tries > 0 {
		wait := backoff.Exponential(time.Minute, 15*time.Minute, tries)
		b.rep.fail(fmt.Errorf("%s, also after %d reboots for it; rebooting again in %v", why, tries, wait))
		if err := backoff.Sleep(ctx, wait); err != nil {
			return err
		}
	}
	err := b.cache.SetState(func(s *cache.State) { s.Kernel, s.KernelTries = r.Kernel, tries+1 })
	if err != nil {
		return err // a reboot that cannot be counted could be the first of many
	}
	return b.reboot(ctx, why)
}

func (b *boot) progress(id digest.Digest) func(done, total int64) {
	return func(done, total int64) {
		b.rep.update(false, func(r *agentapi.Report) { r.Fetch = &agentapi.Progress{Release: id, Done: done, Total: total} })
		b.rep.fail(nil)
	}
}

func (b *boot) retrying(err error, _ time.Duration) { b.rep.fail(mending{err}) }

// mend fetches the damaged blocks of images that did not mount, and says whether that helps: all of one need not come
// again for a bit that flipped.
func (b *boot) mend(ctx context.Context, r *agentapi.Release, why error) bool {
	b.log.Error("an image does not mount, looking for damaged blocks", "error", why)
	mended := 0
	for _, img := range []agentapi.Image{r.Base, r.Delta} {
		n, err := b.cache.Scrub(ctx, img, b.client)
		if err != nil {
			b.log.Error("an image cannot be mended", "error", err)
			return false
		}
		mended += n
	}
	b.rep.update(true, func(r *agentapi.Report) { r.Warnings = b.cache.Warnings() })
	return mended > 0
}

// dropBroken hashes images that did not mount, and takes those out of the cache that are not what they were. It returns
// why they did not mount: where one was broken, the next try fetches it and gets further. An error of the cache itself
// comes without ErrImage: it may be damaged.
func (b *boot) dropBroken(blobs []agentapi.Blob, why error) error {
	dropped := false
	for _, blob := range blobs {
		ok, err := b.cache.Verify(blob.Digest)
		if err == nil && !ok {
			b.log.Error("an image in the cache is broken and is fetched again", "digest", blob.Digest.Short())
			err = b.cache.RemoveImage(blob.Digest)
			dropped = true
		}
		if err != nil {
			return fmt.Errorf("after an error (%s): %w", why.Error(), err)
		}
	}
	if dropped {
		return mending{why}
	}
	return why
}

// deltaID is the key of an assignment's record.
func deltaID(a agentapi.Assignment) string { return cache.KeyOf(a) }

// mount counts the boot and joins the images, files or block devices, and the node delta, and seeds the latter where it is new.
func (b *boot) mount(a agentapi.Assignment, base, delta string) (*mounted, error) {
	if err := b.begin(a); err != nil {
		return nil, err
	}
	d, dropped, err := openDelta(b.cache, a)
	if err != nil {
		return nil, err
	}
	baseImage, err := imageIn(base, a.Release.Base)
	if err != nil {
		return nil, err
	}
	deltaImage, err := imageIn(delta, a.Release.Delta)
	if err != nil {
		return nil, err
	}
	spec := rootfs.Spec{
		Base: baseImage, Delta: deltaImage,
		BaseDir: baseDir, DeltaDir: deltaDir, Upper: d.Upper, Work: d.Work, Root: newRoot,
	}
	if err := rootfs.Mount(spec); err != nil {
		return nil, err
	}
	// What is kept is mounted last: what a role puts there as its own files is what it begins with.
	kind := map[bool]string{true: "new node delta", false: "kept node delta"}[d.Fresh] + dropped
	if err := b.seed(a, d); err != nil {
		return nil, errors.Join(err, rootfs.Unmount(spec))
	}
	if err := b.persist(a); err != nil {
		return nil, errors.Join(err, unmountKept(a), rootfs.Unmount(spec))
	}
	if _, err := initOf(newRoot); err != nil {
		if errors.Is(err, unix.EIO) { // what was read is not what the root hash says
			err = fmt.Errorf("%w: %w", rootfs.ErrImage, err)
		}
		return nil, errors.Join(err, rootfs.Unmount(spec))
	}
	if err := b.mountApps(a); err != nil {
		return nil, errors.Join(err, unmountKept(a), rootfs.Unmount(spec))
	}
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageMount, Detail: kind})
	return &mounted{assignment: a, delta: d}, nil
}

// imageIn is an image in a file or on a block device, as it is mounted: by the root hash of its release and no other.
func imageIn(file string, img agentapi.Image) (rootfs.Image, error) {
	root, err := verity.ParseRoot(img.Root)
	if err != nil {
		return rootfs.Image{}, fmt.Errorf("image %s: %w", img.Digest.Short(), err)
	}
	return rootfs.Image{File: file, Data: img.Data, Root: &root}, nil
}

func (b *boot) seed(a agentapi.Assignment, d *cache.Delta) error {
	if !d.Fresh {
		if err := b.obey(a, d); err != nil {
			return err
		}
		l := b.lease.Load()
		if l == nil { // a boot with no DHCP server, that never had one
			return nil
		}
		if err := refreshResolv(newRoot, l.ResolvConf()); err != nil {
			b.log.Warn("resolv.conf stays as it was", "error", err) // on a full disk, too, the role runs on
		}
		return nil
	}
	if err := rootfs.Seed(newRoot, seedFiles(a, b.id, b.lease.Load())); err != nil {
		return err
	}
	fresh := *d
	fresh.Order = orderID(a)
	return fresh.Seeded()
}

// refreshResolv writes resolv.conf again where it is ours: the name servers may be others than at the last boot.
func refreshResolv(root, conf string) error {
	old, err := os.ReadFile(filepath.Join(root, "etc/resolv.conf"))
	if err != nil || conf == "" || string(old) == conf || !strings.HasPrefix(string(old), netup.ResolvConfMark) {
		return nil //nolint:nilerr // a file that is not there, or a link to one, is somebody else's
	}
	return rootfs.Seed(root, []rootfs.File{{Path: "/etc/resolv.conf", Content: conf, Mode: 0o644, KeepLink: true}})
}

// seedFiles are what a node delta starts with. What the fleet declares comes last: it has the last word.
func seedFiles(a agentapi.Assignment, id agentapi.Identity, lease *netup.Lease) []rootfs.File {
	names := a.Node.Hostname
	domain := a.Node.Domain
	if domain == "" && lease != nil {
		domain = lease.Domain
	}
	if domain != "" {
		names = a.Node.Hostname + "." + domain + " " + a.Node.Hostname
	}
	files := []rootfs.File{
		{Path: "/etc/hostname", Content: a.Node.Hostname + "\n", Mode: 0o644},
		{Path: "/etc/hosts", Content: "127.0.0.1\tlocalhost\n127.0.1.1\t" + names + "\n::1\tlocalhost ip6-localhost ip6-loopback\n", Mode: 0o644},
		{Path: "/etc/machine-id", Content: machineID(id, a.Host) + "\n", Mode: 0o444},
	}
	if lease != nil && lease.ResolvConf() != "" {
		files = append(files, rootfs.File{Path: "/etc/resolv.conf", Content: lease.ResolvConf(), Mode: 0o644, KeepLink: true})
	}
	for _, path := range sortedKeys(a.Node.Files) {
		f := a.Node.Files[path]
		files = append(files, rootfs.File{Path: path, Content: f.Content, Mode: f.Mode, UID: f.UID, GID: f.GID})
	}
	return files
}
