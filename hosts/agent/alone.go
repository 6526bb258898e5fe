package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// alonePatience is how long a boot waits for DHCP and for a word of the server, both together, before it runs what is good in
// its cache. A switch that looks for loops lets nothing through for some 30 s; a node that was too quick loses nothing: it
// comes up in its last good release, and goes on from there once the server is back.
const alonePatience = 30 * time.Second

// errAlone ends the look for the server.
var errAlone = errors.New("no word of the server")

// connect finds the network and the server, and says hello. Where nobody answers in time, it returns a root of what is good in
// the cache, mounted; where there is nothing of that kind, it goes on looking for the server, for as long as it takes. The
// lease is kept until stop is called, as by meet.
func (b *boot) connect(ctx context.Context) (stop func(), m *mounted, err error) {
	limited, cancel := context.WithTimeoutCause(ctx, cmp.Or(b.cmd.Alone, alonePatience), errAlone)
	defer cancel()
	if err = b.identify(limited); err == nil {
		stop, err = b.meet(ctx, limited)
	}
	if err == nil || ctx.Err() != nil || !errors.Is(context.Cause(limited), errAlone) {
		return stop, nil, err
	}
	if m, err = b.alone(ctx); err == nil {
		return b.keepLease(ctx), m, nil
	}
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	b.log.Error("the server is not found, and the machine cannot do without it; looking on", "error", err)
	b.rep.fail(mending{err})
	if b.lease.Load() == nil {
		l, err := b.finder.Find(ctx)
		if err != nil {
			return nil, nil, err
		}
		b.take(l)
	}
	stop, err = b.meet(ctx, ctx)
	return stop, nil, err
}

// alone mounts the root of the release that is to be booted with no server.
func (b *boot) alone(ctx context.Context) (*mounted, error) {
	b.log.Warn("the server is not found: looking for what is good in the cache", "server", b.client.Server(), "waited", cmp.Or(b.cmd.Alone, alonePatience))
	if err := b.openOwnCache(ctx); err != nil {
		return nil, err
	}
	for {
		c, err := b.choose(ctx, nil)
		if err != nil {
			return nil, err
		}
		r, _ := b.cache.Record(c.Key)
		if k := r.Assignment.Release.Kernel; k != "" && k != b.cmd.Kernel {
			b.log.Error("the kernel of a good release cannot be started from here", "release", r.Assignment.Release.ID.Short(), "error", b.jump(r))
			b.jump = nil // so that the next choice is one with the kernel that runs
			continue
		}
		b.assume()
		a := r.Assignment
		detail := fmt.Sprintf("no server at %s: release %s, role %s, from the cache", b.client.Server(), a.Release.ID.Short(), a.Role)
		b.rep.forget(agentapi.StageAlone)
		b.rep.mark(agentapi.Mark{Stage: agentapi.StageAlone, Detail: detail})
		m, err := b.mount(a, b.cache.Path(a.Release.Base.Digest), b.cache.Path(a.Release.Delta.Digest))
		if err == nil {
			return m, nil
		}
		if !errors.Is(err, rootfs.ErrImage) {
			return nil, err
		}
		// What is broken goes, so that the next choice is another release: this one is not whole any more.
		var gone mending
		if err = b.dropBroken(r.Images(), err); !errors.As(err, &gone) {
			return nil, err
		}
	}
}

// openOwnCache opens the cache of this machine. Without the server's word nothing is made on any disk.
func (b *boot) openOwnCache(ctx context.Context) error {
	if b.cache != nil {
		return nil
	}
	select {
	case <-b.fsReady:
	case <-ctx.Done():
		return ctx.Err()
	}
	maker := b.maker()
	found, err := maker.Find()
	if err == nil {
		found, err = maker.Mount(ctx, found, cacheDir)
	}
	if err != nil {
		return err
	}
	return b.useCache(ctx, &found, "")
}

// maker looks for the cache of this machine.
func (b *boot) maker() disk.Maker {
	machine := disk.Machine{Identity: b.id}
	for _, n := range b.inv.NICs {
		machine.MACs = append(machine.MACs, n.MAC)
	}
	return disk.Maker{Machine: machine, Settle: lateDisks, Rescan: b.coldplug, Log: b.log}
}

// assume sets the address that the node had last, where no DHCP server gave it one: its role may be asked for by others on
// its network, whose servers are not away. The service asks DHCP from the beginning.
func (b *boot) assume() {
	if b.lease.Load() != nil {
		return
	}
	l, err := savedLease(b.cache.State())
	if err == nil && l != nil {
		err = l.Assume(b.log)
	}
	switch {
	case err != nil:
		b.log.Error("the machine has no address", "error", err)
	case l != nil:
		b.log.Warn("going on with the last address, which nobody confirmed", "address", l.Address)
		b.take(l)
	}
}

// savedLease is the lease that the cache keeps; nil for none.
func savedLease(st cache.State) (*netup.Lease, error) {
	if len(st.Lease) == 0 {
		return nil, nil
	}
	var l netup.Lease
	if err := json.Unmarshal(st.Lease, &l); err != nil {
		return nil, fmt.Errorf("reading the last lease: %w", err)
	}
	return &l, nil
}

// saveLease keeps a lease for a boot without a DHCP server. It is written only where what it says is new.
func saveLease(c *cache.Cache, l *netup.Lease) error {
	if l == nil {
		return nil
	}
	kept, err := json.Marshal(l.Kept())
	if err != nil {
		return fmt.Errorf("keeping the lease: %w", err)
	}
	return c.SetState(func(s *cache.State) { s.Lease = kept })
}
