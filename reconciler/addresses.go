package reconciler

import (
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/netboot/dhcp"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// addresses tells DHCP what the fleet in force says, from the newest view.
type addresses struct{ views *views }

func (a addresses) Network() (dhcp.Network, bool) {
	v, _ := a.views.get()
	if v.fleet == nil {
		return dhcp.Network{}, false
	}
	n := v.fleet.Network
	return dhcp.Network{
		Subnet: n.Subnet, Router: n.Router, DNS: n.DNS, NTP: n.NTP, Domain: n.Domain,
		First: n.Dynamic.First, Last: n.Dynamic.Last, Lease: time.Duration(n.Lease),
	}, true
}

func (a addresses) Lookup(mac net.HardwareAddr, uuid string) (dhcp.Host, bool) {
	v, _ := a.views.get()
	name := v.host(agentapi.Identity{MAC: mac.String(), UUID: uuid})
	if name == "" {
		return dhcp.Host{}, false
	}
	return dhcp.Host{Name: name, Address: v.fleet.Hosts[name].Address}, true
}

func (a addresses) Declared(addr netip.Addr) bool {
	v, _ := a.views.get()
	return v.addresses[addr] != ""
}

// leases keeps DHCP's leases as records.
type leases struct{ store *state.Store }

func (l leases) Load(ctx context.Context) ([]dhcp.Lease, error) {
	all, err := state.Leases.List(ctx, l.store)
	if err != nil {
		return nil, err
	}
	out := make([]dhcp.Lease, 0, len(all))
	for _, rec := range all {
		out = append(out, dhcp.Lease(rec))
	}
	return out, nil
}

func (l leases) Put(ctx context.Context, lease dhcp.Lease) error {
	return state.Leases.Put(ctx, l.store, lease.MAC, state.Lease(lease))
}

func (l leases) Delete(ctx context.Context, mac string) error {
	return state.Leases.Delete(ctx, l.store, mac)
}

// observer hands what netboot saw to the timelines.
type observer struct{ boots *boots }

func (o observer) Observe(ev netboot.Event) { o.boots.observe(ev) }
