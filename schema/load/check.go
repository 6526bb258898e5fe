package load

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/troupe-dev/troupe/schema"
)

// check finds what is wrong between the parts of a fleet. It says nothing about parts that have problems themselves.
func (m *merged) check() {
	m.checkNetwork()
	m.checkDiscovery()
	m.checkRoles()
	m.checkHosts()
}

func (m *merged) add(p schema.Problem) { m.problems = append(m.problems, p) }

func (m *merged) checkNetwork() {
	if m.network == nil && !m.broken {
		var p schema.Problem
		if len(m.first.Files) > 0 {
			p = schema.Problem{File: m.first.Files[0], Line: 1, Column: 1}
		}
		p.Message = `network: missing; say at least network: subnet: "10.77.0.0/24"`
		m.add(p)
	}
}

func (m *merged) checkDiscovery() {
	if d := m.discovery; d != nil && !d.Bad && d.Value.OS != "" {
		if _, ok := m.images[d.Value.OS]; !ok && !m.broken {
			m.add(d.problem("os", "discovery.os: unknown OS image %q%s", d.Value.OS, suggest(d.Value.OS, keys(m.images))))
		}
	}
}

func (m *merged) checkRoles() {
	if m.broken {
		return
	}
	for _, name := range sorted(m.roles) {
		r := m.roles[name]
		if r.Bad {
			continue
		}
		if _, ok := m.images[r.Value.OS]; !ok {
			m.add(r.problem("os", "roles.%s.os: unknown OS image %q%s", label(name), r.Value.OS, suggest(r.Value.OS, keys(m.images))))
		}
		for i, app := range r.Value.Apps {
			at := "apps." + strconv.Itoa(i)
			m.add(r.problem(at, "roles.%s.%s: unknown app image %q", label(name), at, app))
		}
	}
}

func (m *merged) checkHosts() {
	seen := map[[2]string]found[schema.Host]{} // by field and value
	for _, h := range m.hostsByPlace() {
		m.checkRoleOf(h)
		m.checkAddress(h)
		m.checkNode(h)
		v := h.Value
		for _, id := range [...][2]string{{"mac", v.MAC}, {"uuid", v.UUID}, {"serial", v.Serial}, {"address", text(v.Address)}} {
			field, value := id[0], id[1]
			if value == "" {
				continue
			}
			if other, ok := seen[id]; ok {
				m.add(h.problem(field, "hosts.%s.%s: %s is that of host %s already (%s)", label(v.Name), field, value, other.Value.Name, other.where(field)))
				continue
			}
			seen[id] = h
		}
	}
}

// hostsByPlace are the hosts without problems of their own, in the order of the files: of two that exclude each other
// the second is to blame.
func (m *merged) hostsByPlace() []found[schema.Host] {
	out := make([]found[schema.Host], 0, len(m.hosts))
	for _, h := range m.hosts {
		if !h.Bad {
			out = append(out, h)
		}
	}
	slices.SortFunc(out, func(a, b found[schema.Host]) int {
		p, q := a.place(""), b.place("")
		return cmp.Or(
			strings.Compare(a.in.file(p), b.in.file(q)), p[1]-q[1], p[2]-q[2],
			strings.Compare(a.Value.Name, b.Value.Name),
		)
	})
	return out
}

func text(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func (m *merged) checkRoleOf(h found[schema.Host]) {
	role, ok := m.roles[h.Value.Role]
	at := "hosts." + label(h.Value.Name) + ".role"
	switch {
	case !ok && !m.broken:
		m.add(h.problem("role", "%s: unknown role %q%s", at, h.Value.Role, suggest(h.Value.Role, keys(m.roles))))
	case !ok:
	case role.PerHost && !m.sees(h.in, h.Value.Role):
		m.add(h.problem("role", "%s: role %q has a node, and stands in %s, which this directory does not see; declare the role in a directory above both",
			at, h.Value.Role, role.in.Dir))
	}
}

// sees says whether a role stands where a shard can see it.
func (m *merged) sees(s *shard, role string) bool {
	_, ok := s.Roles[role]
	return ok
}

func (m *merged) checkAddress(h found[schema.Host]) {
	a := h.Value.Address
	if !a.IsValid() || m.network == nil || m.network.Bad {
		return
	}
	n := m.network.Value
	why := notAHost(n.Subnet, a)
	switch {
	case why != "":
		why += " (" + m.network.where("subnet") + ")"
	case a == n.Router:
		why = "is the router's (" + m.network.where("router") + ")"
	case n.Dynamic.Contains(a):
		d, _ := n.Dynamic.MarshalText()
		why = "lies inside the dynamic range " + string(d) + " (" + m.network.where("dynamic") + ")"
	default:
		return
	}
	m.add(h.problem("address", "hosts.%s.address: %v %s", label(h.Value.Name), a, why))
}

// checkNode bounds the node files of one host: they are part of its assignment, which is one record, and which its agent
// asks for again and again.
func (m *merged) checkNode(h found[schema.Host]) {
	if size := nodeSize(h.Value.Node.Files); size > maxNode {
		m.add(h.problem("", "hosts.%s: its node files, with those of role %q, have %d bytes as JSON, more than the %d that a host may have; what all hosts of a role share belongs into the role's files",
			label(h.Value.Name), h.Value.Role, size, maxNode))
	}
}

func keys[T any](m map[string]T) []string   { return slices.Collect(maps.Keys(m)) }
func sorted[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }
