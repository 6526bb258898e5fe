package plan

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// A Matching says which machine is which declared host. It is the only place that does: a machine that is told that it
// is a host formats its blank disk, so that a plan, an answer to a machine and what people are shown must not differ.
//
// A host is known by the strongest identity that it declares: by its MAC, else its UUID, else its serial number. One
// that declares a MAC is that machine and no other, whatever UUIDs say: boards share them, where their vendor left the
// firmware's default. Of several machines that could be a host which declares no MAC, one is: the one that was seen
// first of all, else the one with the lower MAC. The others are nobody, but for the other interfaces of that machine.
//
// Nothing that changes while machines run comes into it: were it the one that runs as the host now, or was seen last,
// a board that waits in discovery would take the host over from one that is just rebooting.
//
// A Matching does not change, and answers each question in constant time.
type Matching struct {
	declared, uuids, serials map[string]string // host by the identity that it is known by
	macs                     map[string]string // by host; of those with a declared MAC, also where it was never seen
	hosts                    map[string]string // by MAC, of the machines that have a record
}

// Match matches the hosts of a fleet with the machines. Any of the maps may be nil. Nodes say only which interface of one
// machine is the one that MAC gives.
func Match(hosts map[string]schema.Host, machines map[string]state.Machine, nodes map[string]state.Node) *Matching {
	m := &Matching{
		declared: make(map[string]string, len(hosts)), uuids: map[string]string{}, serials: map[string]string{},
		macs: make(map[string]string, len(hosts)), hosts: make(map[string]string, len(machines)),
	}
	for name, h := range hosts {
		switch {
		case h.MAC != "":
			mac := strings.ToLower(h.MAC)
			m.declared[mac], m.macs[name] = name, mac
		case h.UUID != "":
			m.uuids[strings.ToLower(h.UUID)] = name
		case h.Serial != "":
			m.serials[h.Serial] = name
		}
	}
	candidates := map[string][]string{} // MACs by host, of hosts without a declared MAC
	for mac, machine := range machines {
		m.hosts[mac] = m.declared[mac]
		if name := m.could(mac, machine.UUID, machine.Serial); name != m.declared[mac] {
			candidates[name] = append(candidates[name], mac)
		}
	}
	for name, macs := range candidates {
		m.choose(name, macs, machines, nodes)
	}
	return m
}

// choose finds which of several machines is a host.
func (m *Matching) choose(host string, macs []string, machines map[string]state.Machine, nodes map[string]state.Node) {
	first := slices.MinFunc(macs, func(a, b string) int {
		return cmp.Or(machines[a].FirstSeen.Compare(machines[b].FirstSeen), cmp.Compare(a, b))
	})
	for _, mac := range macs {
		if mac != first && !sameBoard(machines[first], machines[mac]) {
			continue
		}
		m.hosts[mac] = host
		if old := m.macs[host]; old == "" || newer(nodes, mac, old) {
			m.macs[host] = mac
		}
	}
}

// sameBoard says whether two machines are one that booted from two of its interfaces: each reported the other's.
func sameBoard(a, b state.Machine) bool { return hasNIC(a, b.MAC) && hasNIC(b, a.MAC) }

func hasNIC(m state.Machine, mac string) bool {
	return m.Inventory != nil && slices.ContainsFunc(m.Inventory.NICs, func(n agentapi.NIC) bool { return strings.EqualFold(n.MAC, mac) })
}

// could is the host that a machine is, if no other machine is.
func (m *Matching) could(mac, uuid, serial string) string {
	return cmp.Or(m.declared[mac], m.uuids[strings.ToLower(uuid)], m.serials[serial])
}

// newer says whether the node at mac was seen after that at old; the lower MAC where it cannot be told.
func newer(nodes map[string]state.Node, mac, old string) bool {
	c := nodes[mac].LastSeen.Compare(nodes[old].LastSeen)
	return c > 0 || c == 0 && mac < old
}

// MAC is that of a host's machine; of a host that declares one, also where that machine was never seen. "" for none.
func (m *Matching) MAC(host string) string { return m.macs[host] }

// Host is the host that a machine is, which says id of itself; "" for none. What is on record of the machine goes
// before what it says, which may be less: DHCP carries no serial number. Of a machine without a record, a UUID or a
// serial number counts only while no machine with a record is that host, and Settled says whether it did.
func (m *Matching) Host(id agentapi.Identity) string {
	mac := strings.ToLower(id.MAC)
	if name, ok := m.declared[mac]; ok {
		return name
	}
	if name, recorded := m.hosts[mac]; recorded {
		return name
	}
	name := m.could("", id.UUID, id.Serial)
	if m.macs[name] != "" {
		return ""
	}
	return name
}

// Declares says whether a host declares a MAC.
func (m *Matching) Declares(mac string) bool { return m.declared[strings.ToLower(mac)] != "" }

// Settled says whether Host's answer for a machine stays what it is when other machines come up: another that says the
// same of itself may take the host from a machine that has no record yet.
func (m *Matching) Settled(id agentapi.Identity) bool {
	mac := strings.ToLower(id.MAC)
	_, recorded := m.hosts[mac]
	return recorded || m.Declares(mac)
}

// Unclaimed are the MACs of the machines on record that are no host, sorted.
func (m *Matching) Unclaimed() []string {
	var out []string
	for _, mac := range slices.Sorted(maps.Keys(m.hosts)) {
		if m.hosts[mac] == "" {
			out = append(out, mac)
		}
	}
	return out
}
