package load

import (
	"cmp"
	"fmt"
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
	m.checkRebuilds()
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
	d := m.discovery
	if d == nil || d.Bad || d.Value.OS == "" {
		return
	}
	img, ok := m.images[d.Value.OS]
	if !ok && !m.broken {
		m.add(d.problem("os", "discovery.os: unknown OS image %q%s", d.Value.OS, suggest(d.Value.OS, keys(m.images))))
	}
	if ok && !img.Bad && img.Value.Kind != osKind {
		m.add(d.problem("os", "discovery.os: image %q is of kind %q (%s), and machines that no host declares boot one of kind %q",
			d.Value.OS, img.Value.Kind, img.where(""), osKind))
	}
}

// checkRebuilds complains where nothing could be made anew.
func (m *merged) checkRebuilds() {
	for _, name := range sorted(m.images) {
		img := m.images[name]
		if !img.Bad && img.Value.Kind == diskKind && img.Value.Rebuild != "" {
			m.add(img.problem("rebuild", "images.%s.rebuild: an image of kind %q is the file that its sha256 names, whenever it is fetched", label(name), diskKind))
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
		img, ok := m.images[r.Value.OS]
		if !ok {
			m.add(r.problem("os", "roles.%s.os: unknown OS image %q%s", label(name), r.Value.OS, suggest(r.Value.OS, keys(m.images))))
		}
		if img.Value.Kind == diskKind {
			m.checkDiskRole(name, r, img)
		} else if r.Value.ISCSI != (schema.ISCSI{}) && r.Value.Boot != bootISCSI {
			m.add(r.problem("iscsi", "roles.%s.iscsi: says something only of a role with boot: %q", label(name), bootISCSI))
		}
		m.checkPersist(name, r)
		if ok && !img.Bad && img.Value.Kind == appKind {
			m.add(r.problem("os", "roles.%s.os: image %q is of kind %q (%s): it is run on an OS, and is none", label(name), r.Value.OS, appKind, img.where("")))
			continue
		}
		m.checkApps(name, r)
	}
}

// maxPersist bounds the directories of a role that outlive a release: each is a mount.
const maxPersist = 64

// checkPersist complains about directories that cannot be kept, or not each by itself.
func (m *merged) checkPersist(name string, r found[schema.Role]) {
	if len(r.Value.Persist) == 0 {
		return
	}
	if r.Value.Boot == bootRAM {
		m.add(r.problem("persist", "roles.%s.persist: nothing outlives a boot of a role with boot: %q", label(name), bootRAM))
	}
	if len(r.Value.Persist) > maxPersist {
		m.add(r.problem("persist", "roles.%s.persist: %d directories, want %d at most", label(name), len(r.Value.Persist), maxPersist))
		return
	}
	for i, p := range r.Value.Persist {
		for j, q := range r.Value.Persist {
			if i != j && (p == q && i > j || strings.HasPrefix(p, q+"/")) {
				at := "persist." + strconv.Itoa(i)
				m.add(r.problem("persist", "roles.%s.%s: %q lies in %q, which is kept, too", label(name), at, p, q))
			}
		}
	}
}

const (
	osKind    = "os"    // of an image that is a root file system with a kernel
	bootRAM   = "ram"   // of a role
	diskKind  = "disk"  // of an image that is a whole disk
	bootISCSI = "iscsi" // of a role
)

// notOnDisk are the fields of a role that an agent carries out, or a build over an OS base, beside node.
var notOnDisk = []string{"activate", "apps", "delta", "persist", "files", "packages", "services", "run", "build", "kernel", "healthy", "healthyWithin"}

// checkDiskRole complains about all that nobody could carry out in an image that is booted as it is.
func (m *merged) checkDiskRole(name string, r found[schema.Role], img found[schema.Image]) {
	of := fmt.Sprintf("image %q is of kind %q (%s)", r.Value.OS, diskKind, img.where(""))
	if r.Value.Boot != bootISCSI {
		m.add(r.problem("boot", "roles.%s.boot: %s, which is booted over the network: want boot: %q", label(name), of, bootISCSI))
	}
	for _, field := range append([]string{"node"}, notOnDisk...) {
		if _, has := r.At[field]; has {
			m.add(r.problem(field, "roles.%s.%s: %s and booted as it is: nobody is there to carry this out", label(name), field, of))
		}
	}
}

func (m *merged) checkHosts() {
	seen := map[[2]string]found[schema.Host]{} // by field and value
	for _, h := range m.hostsByPlace() {
		m.checkRoleOf(h)
		m.checkDiskHost(h)
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

// checkDiskHost complains about node files that nobody could write.
func (m *merged) checkDiskHost(h found[schema.Host]) {
	role := m.roles[h.Value.Role]
	img, ok := m.images[role.Value.OS]
	if _, has := h.At["node"]; has && ok && img.Value.Kind == diskKind {
		m.add(h.problem("node", "hosts.%s.node: role %q boots image %q of kind %q (%s) as it is: nobody is there to write files",
			label(h.Value.Name), h.Value.Role, role.Value.OS, diskKind, img.where("")))
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
