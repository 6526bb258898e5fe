package iscsi

import (
	"errors"
	"net"
	"net/netip"
	"slices"
)

// errCrowded is why a connection of a stranger is closed.
var errCrowded = errors.New("there are too many like it, and others wait")

// Strangers are connections of those whom nobody knows, in the order in which they came: who is in login, or in a discovery
// session. There is room for so many of them, and none that known hosts need: where it is full, the oldest of the network
// that has most of it makes place. So who fills it from one place drops out itself.
type strangers struct {
	room  int
	conns []*conn
}

// add takes a connection in, and returns the one to be closed for that; nil: none.
func (s *strangers) add(c *conn) (victim *conn) {
	if len(s.conns) >= s.room {
		victim = s.evict(c)
	}
	s.conns = append(s.conns, c)
	return victim
}

func (s *strangers) remove(c *conn) {
	if i := slices.Index(s.conns, c); i >= 0 {
		s.conns = slices.Delete(s.conns, i, i+1)
	}
}

// evict takes out the one that makes place for c; nil where there is none. Who has proven who it is goes last.
func (s *strangers) evict(c *conn) *conn {
	unproven := func(o *conn) bool { return !o.proven }
	all := !slices.ContainsFunc(s.conns, unproven)
	most := map[netip.Prefix]int{c.from: 1}
	for _, o := range s.conns {
		if all || unproven(o) {
			most[o.from]++
		}
	}
	var victim *conn
	for _, o := range s.conns {
		if (all || unproven(o)) && (victim == nil || most[o.from] > most[victim.from]) {
			victim = o
		}
	}
	s.remove(victim)
	return victim
}

// networkOf is the part of an address that one machine has for itself: all of it with IPv4, 64 bits with IPv6.
func networkOf(a net.Addr) netip.Prefix {
	p, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Prefix{} // no network
	}
	addr := p.Addr().Unmap()
	network, _ := addr.Prefix(min(addr.BitLen(), 64)) // fails for more than BitLen
	return network
}
