package reconciler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// kernelArgs are those of every machine; a role's own come after them.
var kernelArgs = []string{
	// The screen and the first serial port; the last one named is the OS's console, and a port that does not exist is
	// left out by the kernel.
	"console=tty0", "console=ttyS0,115200",
	// A machine that panics boots again, after the time it takes to read why.
	"panic=10",
	// Without this the kernel counts timer interrupts, and stops for good where it finds too few: seen in a virtual
	// machine on a busy host. The boards for which it counts are of about the year 2000.
	"no_timer_check",
}

// A director answers netboot from the newest view.
type director struct {
	views *views
	boots *boots
	// booting is told of hosts whose machines ask what to boot, and what of theirs they boot: see luns.booting.
	booting func(host string, told *state.LUNBoot)
	agent   digest.Digest // the initramfs segment with the agent
}

// Boot says what m shall boot: its role's kernel, or, where it has none, a kernel to be discovered with.
func (d *director) Boot(_ context.Context, m netboot.Machine) (netboot.Boot, error) {
	v, _ := d.views.get()
	mac := m.MAC.String()
	id := agentapi.Identity{MAC: mac, UUID: strings.ToLower(m.UUID), Serial: m.Serial}
	host := v.host(id)
	boot := netboot.Boot{ID: d.boots.id(mac)}
	if v.fleet == nil {
		boot.Title = "no fleet is in force yet"
		return boot, nil
	}
	if a, ok := v.assignments[host]; ok && a.ISCSI != nil && a.ISCSI.Image != nil {
		d.disk(&boot, v, a, mac)
		return boot, nil
	}
	d.booting(host, nil)
	if a, ok := v.assignments[host]; ok {
		r, ok := v.releases[a.Release]
		if !ok {
			return netboot.Boot{}, fmt.Errorf("host %s: its release %s is not in the store", host, a.Release.Short())
		}
		boot.Title = fmt.Sprintf("%s: role %s, generation %d", host, a.Role, a.Generation)
		served, isDead := d.boots.serve(mac, a.Release, func(id digest.Digest) bool { return v.releases[id].Kernel.Digest != "" })
		if served != a.Release {
			r = v.releases[served]
			boot.Title += ", with the kernel of release " + served.Short() + ", since " + a.Release.Short() + " does not work on it"
		}
		if isDead { // only the node's own records say what it does not try again
			boot.Args = append(boot.Args, "troupe.dead="+a.Release.String())
		}
		boot.Local = a.ISCSI == nil && hasBootDisk(v.machines[mac])
		d.kernel(&boot, r.Kernel.Digest, r.Modules.Digest, r.KernelArgs)
		return boot, nil
	}
	boot.Title = cmp.Or(host, mac)
	reason := v.assignment(id).Reason
	boot.Title += ": " + reason
	base, ok := v.discovery(host)
	if !ok {
		return boot, nil
	}
	d.kernel(&boot, base.Kernel.Digest, base.Modules.Digest, nil)
	return boot, nil
}

// hasBootDisk says whether a machine told of a disk that its firmware can start.
func hasBootDisk(m state.Machine) bool {
	return m.Inventory != nil && slices.ContainsFunc(m.Inventory.Disks, func(d agentapi.Disk) bool { return d.Boots })
}

// disk has a machine boot an image as it is, from its own disk on the server, once that is open.
func (d *director) disk(boot *netboot.Boot, v *view, a state.Assignment, mac string) {
	boot.Title = fmt.Sprintf("%s: role %s, generation %d", a.Host, a.Role, a.Generation)
	at, why := v.luns.iscsi(a.Host, a)
	if at == nil {
		boot.Title = a.Host + ": " + why
		return
	}
	d.booting(a.Host, &state.LUNBoot{
		MAC: mac, ID: boot.ID, Role: a.Role, Generation: a.Generation, Release: a.Release, Node: a.Node, Disk: at.Disk, Told: time.Now(),
	})
	boot.Disk = &netboot.Disk{
		Port: at.Port, Target: at.Target, LUN: at.Node, Initiator: at.Initiator,
		User: at.User, Secret: at.Secret, MutualUser: at.MutualUser, MutualSecret: at.MutualSecret,
	}
}

func (d *director) kernel(boot *netboot.Boot, kernel, modules digest.Digest, args []string) {
	boot.Kernel = kernel
	boot.Initrds = []digest.Digest{d.agent, modules}
	boot.Args = append(boot.Args, kernelArgs...)
	boot.Args = append(boot.Args, "troupe.kernel="+kernel.String())
	boot.Args = append(boot.Args, args...)
}

// bootBlobs gives netboot the store's bytes under netboot's own error.
type bootBlobs struct{ store *store.Store }

func (b bootBlobs) Open(ctx context.Context, d digest.Digest) (io.ReadSeekCloser, error) {
	f, err := b.store.Open(ctx, d)
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("%w: %w", netboot.ErrNotFound, err)
	}
	return f, err
}
