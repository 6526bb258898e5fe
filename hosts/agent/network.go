package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/hosts/agent/inventory"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/signing"
	"github.com/troupe-dev/troupe/internal/version"
)

// resolvConf is where the initramfs has its name servers.
const resolvConf = "/etc/resolv.conf"

// strangerPatience is how long the server is looked for through an interface other than the one that the machine booted
// from. That one may only have been slow, as behind a switch that looks for loops, while another interface hangs on a
// network that has DHCP, but no way to the server.
const strangerPatience = 90 * time.Second

// identify brings up the network, and finds out what machine this is meanwhile. Where there is no network, the machine is
// known all the same.
func (b *boot) identify(ctx context.Context) error {
	b.finder = netup.Finder{MAC: b.cmd.MAC, Log: b.log, Drivers: b.drivers, Rescan: b.coldplug}
	var wg sync.WaitGroup
	var disks []disk.Disk
	var lease *netup.Lease
	var diskErr, netErr error
	wg.Go(func() {
		<-b.drivers
		disks, diskErr = disk.Scanner{}.Scan()
		b.log.Debug("disks looked at", "number", len(disks), "at", sinceBoot())
	})
	wg.Go(func() {
		lease, netErr = b.finder.Find(ctx)
		b.log.Debug("network found", "at", sinceBoot())
	})
	wg.Wait()
	if len(disks) == 0 && diskErr == nil { // some show late; the network took its time meanwhile
		disks, diskErr = disk.Scanner{}.Scan()
	}
	if diskErr != nil {
		b.log.Warn("the disks cannot be listed", "error", diskErr)
	}
	b.inv = inventory.Reader{}.Read()
	b.inv.Disks = disk.Inventory(disks)
	b.id = agentapi.Identity{MAC: b.cmd.MAC, UUID: b.inv.SMBIOS.UUID, Serial: b.inv.SMBIOS.Serial}
	b.speak()
	if netErr != nil {
		return netErr
	}
	b.take(lease)
	return nil
}

// speak makes what speaks to the server.
func (b *boot) speak() {
	b.rep = newReporter(b.client, b.log, agentapi.Report{BootID: b.cmd.Boot, Agent: version.String()})
	b.fol = newFollower(b.client, b.log, func() agentapi.Hello {
		return agentapi.Hello{Identity: b.id, BootID: b.cmd.Boot, Agent: version.String(), Kernel: b.cmd.Kernel, Inventory: b.inv}
	})
	b.keys = b.trusted()
	b.fol.keys, b.fol.refused = b.keys, b.rep.refuse
	b.rep.onReply = b.fol.reply
	b.rep.session = sessionStatus
}

// releaseKeys is where the initramfs has the keys of the server that it came from, as package signing writes them.
const releaseKeys = "/etc/troupe/release.pub"

// trusted are the keys whose releases are run. Without any, none is.
func (b *boot) trusted() signing.Keys {
	text, err := os.ReadFile(releaseKeys)
	if err != nil {
		b.log.Error("no release is trusted", "error", err)
		return nil
	}
	keys, err := signing.ParseKeys(string(text))
	if err != nil {
		b.log.Error("no release is trusted", "file", releaseKeys, "error", err)
	}
	return keys
}

// take goes on with a lease that was found. Nobody else uses the identity until the server was greeted.
func (b *boot) take(l *netup.Lease) {
	b.lease.Store(l)
	if err := b.writeResolv(l.ResolvConf()); err != nil {
		b.log.Warn("resolv.conf cannot be written", "error", err)
	}
	if b.cmd.MAC == "" {
		b.id.MAC = l.MAC
	}
	b.rep.update(false, func(r *agentapi.Report) { r.Identity = b.id })
	if place := l.Address.Addr().String() + " on " + l.Interface; place != b.place {
		b.place = place
		b.rep.forget(agentapi.StageAgent)
		b.rep.mark(agentapi.Mark{Stage: agentapi.StageAgent, Detail: place})
	}
}

// writeResolv sets the name servers, since troupe.server may be a name; those of a network before do not stay.
func (b *boot) writeResolv(conf string) error {
	if conf == "" {
		if err := os.Remove(b.resolv); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	return errors.Join(os.MkdirAll(filepath.Dir(b.resolv), 0o755), os.WriteFile(b.resolv, []byte(conf), 0o644))
}

// meet says hello to the server, and keeps the lease meanwhile: a server may be away for longer than a lease lasts. A
// network on which it is not found is left for another one, unless the machine booted from it, or has no other interface.
// It looks for as long as limited lasts. The lease is kept on until stop is called, which waits for that, or ctx ends; stop
// may be called more than once.
func (b *boot) meet(ctx, limited context.Context) (stop func(), err error) {
	for {
		stop = b.keepLease(ctx)
		err := b.greet(limited)
		if err == nil {
			return stop, nil
		}
		stop()
		if !errors.Is(err, errStranger) {
			return nil, err
		}
		l := b.lease.Load()
		b.log.Warn("giving up an address, to look for another network", "address", l.Address, "interface", l.Interface, "error", err)
		if err := b.finder.GiveUp(l); err != nil {
			b.log.Warn("the address stays", "error", err)
		}
		if l, err = b.finder.Find(limited); err != nil {
			return nil, err
		}
		b.take(l)
	}
}

// errStranger says that the server is not found through an interface that the machine did not boot from.
var errStranger = errors.New("the server is not found on this network")

// greet says hello until the server answers, or until another network is to be looked for: then its error is errStranger.
func (b *boot) greet(ctx context.Context) error {
	l := b.lease.Load()
	if strings.EqualFold(l.MAC, b.cmd.MAC) {
		return b.fol.greet(ctx, func() {})
	}
	ctx, leave := context.WithCancelCause(ctx)
	heard := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer leave(nil)
	wg.Go(func() { b.doubt(ctx, l, heard, leave) })
	err := b.fol.greet(ctx, sync.OnceFunc(func() { close(heard) }))
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errStranger) {
		return cause
	}
	return err
}

// doubt calls leave once the network of l has had its time, and the machine has another interface, which may be on the
// right one. It ends with ctx, and once a word of the server was heard: also one that is not ready can be reached from
// here.
func (b *boot) doubt(ctx context.Context, l *netup.Lease, heard <-chan struct{}, leave func(error)) {
	tick := time.NewTicker(b.patience) // an interface may show late
	defer tick.Stop()
	for {
		select {
		case <-heard:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if b.hasOther(l) {
			leave(fmt.Errorf("%w: no answer from %s within %v", errStranger, b.client.Server(), b.patience))
			return
		}
	}
}

// hasOther says whether the machine has an interface beside that of l.
func (b *boot) hasOther(l *netup.Lease) bool {
	links, err := netup.Links(b.cmd.MAC)
	if err != nil {
		b.log.Warn("it is not known whether there is another network", "error", err)
	}
	return slices.ContainsFunc(links, func(o netup.Link) bool { return !strings.EqualFold(o.MAC.String(), l.MAC) })
}

// keepLease renews the lease until stop is called, which waits for the end of that.
func (b *boot) keepLease(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	keeper := netup.Keeper{Log: b.log, Save: func(l *netup.Lease) { b.lease.Store(l) }, Moving: moveSession(b.log)}
	var wg sync.WaitGroup
	if l := b.lease.Load(); l != nil {
		wg.Go(func() { _ = keeper.Keep(ctx, l) }) // ends with its context, and with nothing else
	}
	return func() {
		cancel()
		wg.Wait()
	}
}
