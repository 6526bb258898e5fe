package dhcp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

const (
	offerHold   = time.Minute      // how long an offered address waits for its REQUEST
	declineHold = 10 * time.Minute // how long an address rests that a machine found in use
	expiredKeep = 24 * time.Hour   // how long a machine that comes back finds the address that it had
	maxProbes   = 1 << 16          // a bound on the work for one packet in a huge, full range
)

var (
	errExhausted = errors.New("the dynamic range is exhausted")
	errNoRange   = errors.New("the network has no dynamic range")
	errHeld      = errors.New("another machine has the address")
)

// A pool gives out the addresses of the dynamic range. mu guards the maps; the store is written without it, so that one
// slow write holds up one machine. Packets of one machine are handled one after the other, so a MAC is never in two
// commits at once.
type pool struct {
	store LeaseStore
	log   *slog.Logger

	mu       sync.Mutex
	leases   map[string]Lease // by MAC; expired ones too, until the address is wanted or expiredKeep is over
	offers   map[string]offer // by MAC
	owner    map[netip.Addr]string
	declined map[netip.Addr]time.Time // until when
}

type offer struct {
	addr  netip.Addr
	until time.Time
	// before is the MAC whose lease of addr had run out when the offer was made; it is deleted from the store once the
	// offer was taken up.
	before string
}

func loadPool(ctx context.Context, store LeaseStore, log *slog.Logger) (*pool, error) {
	p := &pool{
		store: store, log: log,
		leases: map[string]Lease{}, offers: map[string]offer{},
		owner: map[netip.Addr]string{}, declined: map[netip.Addr]time.Time{},
	}
	ls, err := store.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("loading the leases: %w", err)
	}
	for _, l := range ls {
		// A crash between writing a lease and deleting the expired one before it leaves two for one address.
		if mac, twice := p.owner[l.Address]; twice {
			if p.leases[mac].Expires.After(l.Expires) {
				continue
			}
			delete(p.leases, mac)
		}
		p.leases[l.MAC] = l
		p.owner[l.Address] = l.MAC
	}
	return p, nil
}

// propose finds an address for mac and holds it for offerHold: the one that it has or had, else the one that it was
// offered, else the one that it wants, else the first free one from a start that depends on the MAC alone, so that a
// machine tends to get the same address even after its lease was forgotten. taken says which addresses are not ours to give.
func (p *pool) propose(mac string, want netip.Addr, n Network, taken func(netip.Addr) bool) (netip.Addr, error) {
	if !n.hasRange() {
		return netip.Addr{}, errNoRange
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	usable := func(a netip.Addr) bool { return n.dynamic(a) && !taken(a) && p.free(a, mac, now) }
	for _, a := range []netip.Addr{p.leases[mac].Address, p.offers[mac].addr, want} {
		if a.IsValid() && usable(a) {
			p.hold(mac, a, now)
			return a, nil
		}
	}
	size := rangeSize(n)
	at := startOf(mac, size)
	for range min(size, maxProbes) {
		if a := nth(n.First, at); usable(a) {
			p.hold(mac, a, now)
			return a, nil
		}
		at = (at + 1) % size
	}
	return netip.Addr{}, errExhausted
}

// free says whether a may be mac's: nobody else has a valid lease or offer of it, and nobody declined it lately.
func (p *pool) free(a netip.Addr, mac string, now time.Time) bool {
	if now.Before(p.declined[a]) {
		return false
	}
	other, owned := p.owner[a]
	if !owned || other == mac {
		return true
	}
	l, o := p.leases[other], p.offers[other]
	leased, offered := l.Address == a && now.Before(l.Expires), o.addr == a && now.Before(o.until)
	return !leased && !offered
}

// hold makes a mac's for offerHold. Whoever had it before loses it; free said that nobody has it now.
func (p *pool) hold(mac string, a netip.Addr, now time.Time) {
	o := offer{addr: a, until: now.Add(offerHold)}
	old, ok := p.offers[mac]
	switch {
	case ok && old.addr == a:
		o.before = old.before
	case ok && p.leases[mac].Address != old.addr:
		p.disown(old.addr, mac)
	}
	if other := p.owner[a]; other != "" && other != mac && p.leases[other].Address == a {
		delete(p.leases, other)
		o.before = other
	}
	p.offers[mac] = o
	p.owner[a] = mac
}

func (p *pool) disown(a netip.Addr, mac string) {
	if p.owner[a] == mac {
		delete(p.owner, a)
	}
}

// record is the lease that mac has or had; ok is false where there is none.
func (p *pool) record(mac string) (Lease, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l, ok := p.leases[mac]
	return l, ok
}

// claim makes a the leased address of mac for ttl, and returns once that is stored. It returns errHeld where a is not
// mac's to have.
func (p *pool) claim(ctx context.Context, mac string, a netip.Addr, hostname string, ttl time.Duration) error {
	now := time.Now()
	p.mu.Lock()
	if !p.free(a, mac, now) {
		p.mu.Unlock()
		return errHeld
	}
	p.hold(mac, a, now) // nobody else gets it while it is being stored
	before := p.offers[mac].before
	p.mu.Unlock()

	l := Lease{MAC: mac, Address: a, Hostname: hostname, Expires: now.Add(ttl)}
	if err := p.store.Put(ctx, l); err != nil {
		return fmt.Errorf("storing the lease of %s for %s: %w", a, mac, err)
	}
	p.mu.Lock()
	if old, ok := p.leases[mac]; ok && old.Address != a {
		p.disown(old.Address, mac)
	}
	p.leases[mac] = l
	delete(p.offers, mac)
	p.owner[a] = mac
	_, leased := p.leases[before]
	_, offered := p.offers[before]
	p.mu.Unlock()
	if before != "" && !leased && !offered { // else it came back, and its record in the store is a newer one, or will be
		p.deleteStored(ctx, before)
	}
	return nil
}

// forgetLease drops the lease of mac, if it is of a or a is the zero Addr.
func (p *pool) forgetLease(ctx context.Context, mac string, a netip.Addr) {
	p.mu.Lock()
	l, ok := p.leases[mac]
	if !ok || a.IsValid() && l.Address != a {
		p.mu.Unlock()
		return
	}
	delete(p.leases, mac)
	p.disown(l.Address, mac)
	p.mu.Unlock()
	p.deleteStored(ctx, mac)
}

// deleteStored does not fail its caller: what stays in the store is an old lease, which is swept after the next start.
func (p *pool) deleteStored(ctx context.Context, mac string) {
	if err := p.store.Delete(ctx, mac); err != nil {
		p.log.Warn("deleting a lease", "mac", mac, "err", err)
	}
}

// forgetOffer lets go of what mac was offered: it chose another server.
func (p *pool) forgetOffer(mac string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	o, ok := p.offers[mac]
	delete(p.offers, mac)
	if ok && p.leases[mac].Address != o.addr {
		p.disown(o.addr, mac)
	}
}

// decline rests an address that mac found in use by somebody else. An address that mac was not given stays as it is, or
// one machine could take every address away from all others.
func (p *pool) decline(ctx context.Context, mac string, a netip.Addr) bool {
	p.mu.Lock()
	ours := p.owner[a] == mac
	if ours {
		p.declined[a] = time.Now().Add(declineHold)
		delete(p.offers, mac)
	}
	p.mu.Unlock()
	if ours {
		p.forgetLease(ctx, mac, a)
	}
	return ours
}

// sweep forgets what ran out. Leases are kept for expiredKeep longer than they last.
func (p *pool) sweep(ctx context.Context) {
	now := time.Now()
	var old []string
	p.mu.Lock()
	for mac, o := range p.offers {
		if now.After(o.until) {
			delete(p.offers, mac)
			if p.leases[mac].Address != o.addr {
				p.disown(o.addr, mac)
			}
		}
	}
	for a, until := range p.declined {
		if now.After(until) {
			delete(p.declined, a)
		}
	}
	for mac, l := range p.leases {
		if now.After(l.Expires.Add(expiredKeep)) {
			old = append(old, mac)
		}
	}
	p.mu.Unlock()
	for _, mac := range old {
		p.forgetLease(ctx, mac, netip.Addr{})
	}
}

func rangeSize(n Network) uint32 {
	return number(n.Last) - number(n.First) + 1
}

// startOf spreads machines over the range.
func startOf(mac string, size uint32) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(mac)) // a hash.Hash never returns an error
	return h.Sum32() % size
}

func nth(first netip.Addr, i uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], number(first)+i)
	return netip.AddrFrom4(b)
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}
