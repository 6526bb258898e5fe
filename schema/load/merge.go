package load

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/troupe-dev/troupe/schema"
)

// found is an item and the shard that it was found in.
type found[T any] struct {
	item[T]
	in *shard
}

func (f found[T]) problem(path, format string, args ...any) schema.Problem {
	return f.in.problem(f.place(path), format, args...)
}

func (f found[T]) where(path string) string { return f.in.where(f.place(path)) }

// A merged is what all shards of a fleet declare together.
type merged struct {
	fleet    *schema.Fleet
	problems schema.Problems
	broken   bool // some shard is not known, so that nothing can be said to be missing

	network   *found[schema.Network]
	discovery *found[schema.Discovery]
	images    map[string]found[schema.Image]
	roles     map[string]found[schema.Role]
	hosts     map[string]found[schema.Host]
	first     *shard
}

// merge puts shards together. What several of them see, because it stands in a directory above, must be the same in
// all of them.
func merge(shards []*shard) *merged {
	m := &merged{
		fleet:  &schema.Fleet{Images: map[string]schema.Image{}, Roles: map[string]schema.Role{}, Hosts: map[string]schema.Host{}},
		images: map[string]found[schema.Image]{},
		roles:  map[string]found[schema.Role]{},
		hosts:  map[string]found[schema.Host]{},
	}
	roleProblems := map[schema.Problem]roleProblem{}
	for _, s := range shards {
		if m.first == nil {
			m.first = s
		}
		m.problems = append(m.problems, s.Problems...)
		m.broken = m.broken || s.Broken
		m.fleet.AllowEmpty = m.fleet.AllowEmpty || s.AllowEmpty
		m.network = mergeOne(m, "network", m.network, s.Network, s)
		m.discovery = mergeOne(m, "discovery", m.discovery, s.Discovery, s)
		mergeItems(m, "images", m.images, s.Images, s, true)
		mergeItems(m, "roles", m.roles, s.Roles, s, true)
		mergeItems(m, "hosts", m.hosts, s.Hosts, s, false)
		for _, p := range s.RoleProblems {
			known := roleProblems[p.Problem]
			p.Count += known.Count
			p.Host = cmp.Or(known.Host, p.Host)
			roleProblems[p.Problem] = p
		}
	}
	m.addRoleProblems(roleProblems)
	m.fill()
	return m
}

// addRoleProblems names the hosts that a problem of a role's node was found with.
func (m *merged) addRoleProblems(ps map[schema.Problem]roleProblem) {
	for _, p := range ps {
		text := fmt.Sprintf("%s (for host %s", p.Message, p.Host)
		if p.Count > 1 {
			text += fmt.Sprintf(" and %d more", p.Count-1)
		}
		p.Message = text + ")"
		m.problems = append(m.problems, p.Problem)
	}
}

func mergeOne[T any](m *merged, name string, known *found[T], it *item[T], in *shard) *found[T] {
	if it == nil {
		return known
	}
	f := found[T]{item: *it, in: in}
	if known == nil {
		return &f
	}
	if !known.Bad && !f.Bad && !reflect.DeepEqual(known.Value, f.Value) {
		m.disagree(name, known.where(""), f.where(""), f.problem("", ""))
	}
	return known
}

// mergeItems adds items to known. Equal items may stand in several places where twice says so; one that is seen
// from several shards is the same place.
func mergeItems[T any](m *merged, part string, known map[string]found[T], items map[string]item[T], in *shard, twice bool) {
	for name, it := range items {
		f := found[T]{item: it, in: in}
		old, ok := known[name]
		switch same := old.in != nil && old.where("") == f.where(""); {
		case !ok:
			known[name] = f
		case old.Bad || f.Bad:
			f.Bad = true
			known[name] = f
		case (same || twice) && reflect.DeepEqual(old.Value, f.Value):
		case same || twice:
			m.disagree(part+"."+label(name), old.where(""), f.where(""), f.problem("", ""))
		default:
			m.problems = append(m.problems, f.problem("", "%s.%s: declared already at %s", part, label(name), old.where("")))
		}
	}
}

// disagree adds the problem of one name with different values in two shards.
func (m *merged) disagree(what, first, second string, at schema.Problem) {
	at.Message = fmt.Sprintf("%s: differs from directory to directory: also declared at %s, with another value", what, first)
	if first == second {
		at.Message = what + ": a directory below gives it another value, which its other directories do not see"
	}
	m.problems = append(m.problems, at)
}

// fill fills in the fleet.
func (m *merged) fill() {
	if m.network != nil {
		m.fleet.Network = m.network.Value
	}
	if m.discovery != nil {
		m.fleet.Discovery = m.discovery.Value
	}
	for name, f := range m.images {
		m.fleet.Images[name] = f.Value
	}
	for name, f := range m.roles {
		m.fleet.Roles[name] = f.Value
	}
	for name, f := range m.hosts {
		m.fleet.Hosts[name] = f.Value
	}
	if m.fleet.Discovery.OS == "" {
		m.fleet.Discovery.OS = m.firstOS()
	}
}

// firstOS is the first image by name that machines can boot which no host declares; "" for none.
func (m *merged) firstOS() string {
	for _, name := range slices.Sorted(maps.Keys(m.images)) {
		if img := m.images[name]; img.Bad || img.Value.Kind == osKind {
			return name
		}
	}
	return ""
}
