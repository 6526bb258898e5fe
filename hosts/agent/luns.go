package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/hosts/agent/iscsi"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/kmod"
)

// iscsiModules are what LUNs are reached and used with. The initiator asks the kernel for crc32c by itself, but here nobody
// would load it then.
var iscsiModules = []string{"sd_mod", "crc32c_generic", "iscsi_tcp"}

// luns are the images and the node disk of a machine that runs from the server's.
type luns struct {
	session *iscsi.Session
	spec    agentapi.ISCSI
	status  iscsi.Status // of the login
}

// isFor says whether the session that is there is the one for spec; other secrets or another port can be told to it.
func (l *luns) isFor(spec *agentapi.ISCSI) bool {
	return spec != nil && l.spec.Target == spec.Target && l.spec.Initiator == spec.Initiator && l.spec.Node == spec.Node && l.spec.Disk == spec.Disk
}

// openStorage opens where the assignment's images and node delta are. What is open for another assignment is closed first.
func (b *boot) openStorage(ctx context.Context, a agentapi.Assignment) error {
	elsewhere := b.cache != nil && b.cache.InMemory != a.RAM
	if elsewhere || b.luns != nil && !b.luns.isFor(a.ISCSI) || b.luns == nil && a.ISCSI != nil {
		if err := b.closeStorage(ctx); err != nil {
			return err
		}
	}
	if a.RAM {
		return b.openMemory(ctx, a)
	}
	if a.ISCSI == nil {
		return b.openCache(ctx, a.Disk)
	}
	if err := b.logIn(ctx, a.ISCSI); err != nil {
		return err
	}
	return b.openNodeDisk(ctx, a.ISCSI)
}

// closeLimit is how long a session may take to end: the kernel first fails what its disks were asked for.
const closeLimit = 30 * time.Second

// closeStorage lets go of the cache and of the session.
func (b *boot) closeStorage(ctx context.Context) error {
	if err := b.closeCache(ctx); err != nil {
		return fmt.Errorf("leaving the node's disk: %w", err)
	}
	if b.luns == nil {
		return nil
	}
	s := b.luns.session
	b.luns = nil
	err := b.endOrReboot(ctx, closeLimit, "its iSCSI session does not end", s.Close)
	return errors.Join(err, s.Forget())
}

// closeCache unmounts the cache. A node disk that was reset does not answer any more, and its unmount would wait for ever.
func (b *boot) closeCache(ctx context.Context) error {
	if b.cache == nil {
		return nil
	}
	dir := b.cache.Dir()
	if err := b.endOrReboot(ctx, syncLimit, "its disk does not answer", func() error { return b.unmount(dir, 0) }); err != nil {
		return err
	}
	b.cache = nil
	b.rep.forget(agentapi.StageCache)
	return nil
}

// endOrReboot calls f, and reboots where that has no end within limit: what it is to let go of is in use then, and the
// machine cannot go on without it nor with it.
func (b *boot) endOrReboot(ctx context.Context, limit time.Duration, why string, f func() error) error {
	err := bounded(limit, f)
	if errors.Is(err, errPatience) {
		return errors.Join(err, b.reboot(ctx, why))
	}
	return err
}

// logIn starts the session, or tells one that is there what is new.
func (b *boot) logIn(ctx context.Context, spec *agentapi.ISCSI) error {
	for _, ready := range []<-chan struct{}{b.fsReady, b.copied} {
		select {
		case <-ready:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if b.copyErr != nil {
		return b.copyErr
	}
	for _, m := range iscsiModules {
		if err := b.mods.Load(m); err != nil && !errors.Is(err, kmod.ErrNoModule) { // or built in, without a table that says so
			return fmt.Errorf("loading the iSCSI initiator: %w", err)
		}
	}
	portal, err := portal(ctx, b.client.Server(), spec.Port)
	if err != nil {
		return mending{err}
	}
	cfg := iscsiConfig(portal, spec, b.lease.Load())
	if b.luns == nil {
		s, err := iscsi.Start(agentFile, runDir, cfg)
		if err != nil {
			return err
		}
		b.luns = &luns{session: s}
	} else if err := b.luns.session.Configure(cfg); err != nil {
		return err
	}
	b.luns.spec = *spec
	b.luns.status, err = b.luns.session.Await(ctx, func(st iscsi.Status) { b.rep.fail(loginError(spec, portal, st)) })
	switch {
	case errors.Is(err, iscsi.ErrEnded):
		return errors.Join(err, b.closeStorage(ctx))
	case err == nil:
		b.rep.fail(nil)
	}
	return err
}

func iscsiConfig(portal netip.AddrPort, spec *agentapi.ISCSI, lease *netup.Lease) iscsi.Config {
	return iscsi.Config{
		Portal: portal, Target: spec.Target, Initiator: spec.Initiator, User: spec.User, Secret: spec.Secret,
		MutualUser: spec.MutualUser, MutualSecret: spec.MutualSecret, Lease: lease,
	}
}

// loginError says why there is no session yet. The keeper goes on trying, whatever it was.
func loginError(spec *agentapi.ISCSI, portal netip.AddrPort, st iscsi.Status) error {
	if st.Error == "" {
		return nil
	}
	err := fmt.Errorf("logging in to %s at %s: %s", spec.Target, portal, st.Error)
	if st.Refused {
		return err
	}
	return mending{err}
}

// KeepSession is the keeper of a session, in a process of its own.
func KeepSession(ctx context.Context) error {
	log := KernelLog()
	err := iscsi.Main(ctx, runDir, log)
	if err != nil && !errors.Is(err, context.Canceled) {
		log.Error("the keeper of the iSCSI session ends", "error", err)
	}
	return err
}

// keeperLook is how often the second life looks whether the session has its keeper.
const keeperLook = 5 * time.Second

// initGroup is where systemd has what was there before it: no unit of its own ends that.
const initGroup = "/sys/fs/cgroup/init.scope"

// watchKeeper gives the session a new keeper where its own was killed, until ctx is done.
func (s *service) watchKeeper(ctx context.Context) {
	for backoff.Sleep(ctx, keeperLook) == nil {
		kept, err := iscsi.IsKept(runDir)
		if err == nil && !kept {
			s.log.Error("the keeper of the iSCSI session is gone, starting another")
			err = iscsi.Resume(agentFile, runDir, initGroup)
		}
		if err != nil {
			s.log.Error("the keeper of the iSCSI session cannot be looked after", "error", err)
		}
	}
}

// sessionStatus is what is reported of a session.
func sessionStatus() *agentapi.Session {
	st, err := iscsi.ReadStatus(runDir)
	if err != nil { // there is none
		return nil
	}
	return &agentapi.Session{Up: st.Up, Logins: st.Logins, Error: st.Error}
}

// adoptSession tells the keeper what else than the disk is new.
func adoptSession(spec *agentapi.ISCSI) error {
	return iscsi.ChangeConfig(runDir, func(c *iscsi.Config) {
		*c = iscsiConfig(netip.AddrPortFrom(c.Portal.Addr(), spec.Port), spec, c.Lease)
	})
}

// moveSession tells the keeper of a session, where there is one, that the address changes.
func moveSession(log *slog.Logger) func(*netup.Lease) {
	return func(l *netup.Lease) {
		err := iscsi.ChangeConfig(runDir, func(c *iscsi.Config) { c.Lease = l })
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			log.Error("the iSCSI session is not told of the new address", "error", err)
		}
	}
}

// portal is the target's address: the server's own.
func portal(ctx context.Context, server string, port uint16) (netip.AddrPort, error) {
	u, err := url.Parse(server)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("finding the iSCSI portal: %w", err)
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
		return netip.AddrPortFrom(ip, port), nil
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", u.Hostname())
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("finding the iSCSI portal: %w", err)
	}
	if len(ips) == 0 {
		return netip.AddrPort{}, fmt.Errorf("finding the iSCSI portal: %q has no address", u.Hostname())
	}
	return netip.AddrPortFrom(ips[0].Unmap(), port), nil
}

// openNodeDisk mounts the disk of the node delta in the place of a cache: it has the same form, but no images.
func (b *boot) openNodeDisk(ctx context.Context, spec *agentapi.ISCSI) error {
	if b.cache != nil {
		return nil
	}
	d, err := iscsi.FindLUN(ctx, "/sys", b.luns.status, spec.Node)
	if err != nil {
		return mending{err}
	}
	if d.ReadOnly {
		return fmt.Errorf("LUN %d is to be the node's disk, and is read-only", spec.Node)
	}
	maker := disk.Maker{Log: b.log} // nobody's: the server says whose it is
	found, err := maker.EnsureLUN(ctx, d.Path, d.Size)
	if err == nil {
		found, err = maker.MountLUN(ctx, found, d.Size, cacheDir)
	}
	if errors.Is(err, disk.ErrHolds) {
		return fmt.Errorf("%w; troupe reset makes it blank", err)
	}
	if err != nil {
		return err
	}
	return b.useCache(ctx, &found, fmt.Sprintf(", LUN %d of %s", spec.Node, spec.Target))
}

// activateLUNs mounts the root from the LUNs: nothing is to be fetched.
func (b *boot) activateLUNs(ctx context.Context, a agentapi.Assignment) (*mounted, error) {
	base, err := b.findImage(ctx, a.ISCSI.Base, a.Release.Base.Blob)
	if err != nil {
		return nil, err
	}
	delta, err := b.findImage(ctx, a.ISCSI.Delta, a.Release.Delta.Blob)
	if err != nil {
		return nil, err
	}
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageFetch, Detail: fmt.Sprintf("from LUNs %d and %d", a.ISCSI.Base, a.ISCSI.Delta)})
	m, err := b.mount(a, base, delta)
	if errors.Is(err, rootfs.ErrImage) {
		return nil, errors.Join(err, hashImage(base, a.Release.Base.Blob), hashImage(delta, a.Release.Delta.Blob))
	}
	if err == nil {
		b.rep.fail(nil)
	}
	return m, err
}

// sizeSlack is by how many bytes a LUN may be larger than its image: blocks are whole.
const sizeSlack = 4096

// serialDigits is how much of an image's digest the server makes the serial number of its LUN.
const serialDigits = 32

// findImage is the block device of an image. The LUN must say that it is that image: all of it is not read, since a boot
// over the network is to read little. What is read comes with a CRC32C over each part.
func (b *boot) findImage(ctx context.Context, lun uint16, blob agentapi.Blob) (string, error) {
	d, err := iscsi.FindLUN(ctx, "/sys", b.luns.status, lun)
	if err != nil {
		return "", mending{err}
	}
	if d.Size < blob.Size || d.Size >= blob.Size+sizeSlack {
		return "", fmt.Errorf("LUN %d has %d bytes, image %s has %d", lun, d.Size, blob.Digest.Short(), blob.Size)
	}
	if isSerialOfImage(d.Serial) && !strings.HasPrefix(blob.Digest.Hex(), strings.ToLower(d.Serial)) {
		return "", fmt.Errorf("LUN %d is image %s, want %s", lun, d.Serial, blob.Digest.Short())
	}
	return d.Path, nil
}

// isSerialOfImage says whether a serial number is the beginning of a digest.
func isSerialOfImage(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil && len(s) == serialDigits
}

// hashImage reads an image that does not mount through, to say whether its bytes are the right ones.
func hashImage(path string, blob agentapi.Blob) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyN(h, f, blob.Size); err != nil {
		return fmt.Errorf("reading image %s from %s: %w", blob.Digest.Short(), path, err)
	}
	if got, err := digest.FromHex(hex.EncodeToString(h.Sum(nil))); err != nil || got != blob.Digest {
		return fmt.Errorf("%s holds %s, want image %s: the server's copy is damaged", path, got.Short(), blob.Digest.Short())
	}
	return nil
}

// wayTime is how long a machine runs at least that is to boot a disk image: a server that goes on sending it an agent must
// not make it boot without a pause.
const wayTime = time.Minute

// makeWay reboots for a disk image, which firmware boots.
func (b *boot) makeWay(ctx context.Context) error {
	if err := b.closeStorage(ctx); err != nil {
		return err
	}
	if err := backoff.Sleep(ctx, wayTime-sinceBoot()); err != nil {
		return err
	}
	return b.reboot(ctx, "its image has a boot loader of its own")
}
