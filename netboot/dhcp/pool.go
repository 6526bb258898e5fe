package dhcp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"slices"
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
// slow write holds up one machine, or a few. What is in leases is what is in the store: an offer takes nothing away from anybody,
// and who loses an address to another machine that takes it up loses its record as well.
type pool struct {
	store LeaseStore
	log   *slog.Logger

	// writing is held, for one machine, while its record is written or deleted, so that the deletion of its old lease does
	// not come after the writing of a new one. It is taken before mu, and no two of it at a time.
	writing [64]sync.Mutex

	mu       sync.Mutex
	leases   map[string]Lease         // by MAC; expired ones too, until the address is taken up or expiredKeep is over
	leased   map[netip.Addr]string    // whose lease of an address is
	offers   map[string]offer         // by MAC
	offered  map[netip.Addr]string    // whose offer of an address is
	declined map[netip.Addr]time.Time // until when
}

type offer struct {
	addr  netip.Addr
	until time.Time
}

func loadPool(ctx context.Context, store LeaseStore, log *slog.Logger) (*pool, error) {
	p := &pool{
		store: store, log: log,
		leases: map[string]Lease{}, leased: map[netip.Addr]string{},
		offers: map[string]offer{}, offered: map[netip.Addr]string{}, declined: map[netip.Addr]time.Time{},
	}
	ls, err := store.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("loading the leases: %w", err)
	}
	// A crash between writing a lease and deleting the expired one before it leaves two for one address.
	slices.SortFunc(ls, func(a, b Lease) int { return b.Expires.Compare(a.Expires) })
	for _, l := range ls {
		if _, twice := p.leased[l.Address]; twice {
			p.deleteStored(ctx, l.MAC)
			continue
		}
		p.leases[l.MAC] = l
		p.leased[l.Address] = l.MAC
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
	holder, bidder := p.leased[a], p.offered[a]
	leased := holder != mac && now.Before(p.leases[holder].Expires)
	offered := bidder != mac && now.Before(p.offers[bidder].until)
	return !leased && !offered
}

// hold makes a mac's for offerHold. free said that nobody else has it now: an offer to another machine has run out.
func (p *pool) hold(mac string, a netip.Addr, now time.Time) {
	p.dropOffer(mac)
	p.dropOffer(p.offered[a])
	p.offers[mac] = offer{addr: a, until: now.Add(offerHold)}
	p.offered[a] = mac
}

func (p *pool) dropOffer(mac string) {
	if o, ok := p.offers[mac]; ok {
		delete(p.offers, mac)
		delete(p.offered, o.addr)
	}
}

// dropLease leaves alone who else has the address by now.
func (p *pool) dropLease(mac string) {
	l := p.leases[mac]
	delete(p.leases, mac)
	if p.leased[l.Address] == mac {
		delete(p.leased, l.Address)
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
	before, err := p.put(ctx, Lease{MAC: mac, Address: a, Hostname: hostname}, ttl)
	if err == nil && before != mac {
		p.forgetLease(ctx, before, func(l Lease) bool { return l.Address == a })
	}
	return err
}

// put stores l, and returns the MAC that had its address before.
func (p *pool) put(ctx context.Context, l Lease, ttl time.Duration) (before string, err error) {
	defer p.write(l.MAC)()
	now := time.Now()
	l.Expires = now.Add(ttl)
	p.mu.Lock()
	if !p.free(l.Address, l.MAC, now) {
		p.mu.Unlock()
		return "", errHeld
	}
	p.hold(l.MAC, l.Address, now) // nobody else gets it while it is being stored
	p.mu.Unlock()

	if err := p.store.Put(ctx, l); err != nil {
		return "", fmt.Errorf("storing the lease of %s for %s: %w", l.Address, l.MAC, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dropOffer(l.MAC)
	before, ok := p.leased[l.Address]
	if !ok {
		before = l.MAC
	}
	p.dropLease(l.MAC)
	p.leases[l.MAC] = l
	p.leased[l.Address] = l.MAC
	return before, nil
}

// write takes the lock of writing for mac, and returns what gives it back.
func (p *pool) write(mac string) (unlock func()) {
	m := &p.writing[startOf(mac, uint32(len(p.writing)))]
	m.Lock()
	return m.Unlock
}

// forgetLease drops the lease of mac, if it is one that is meant.
func (p *pool) forgetLease(ctx context.Context, mac string, meant func(Lease) bool) {
	defer p.write(mac)()
	p.mu.Lock()
	l, ok := p.leases[mac]
	if ok = ok && meant(l); ok {
		p.dropLease(mac)
	}
	p.mu.Unlock()
	if ok {
		p.deleteStored(ctx, mac)
	}
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
	p.dropOffer(mac)
}

// decline rests an address that mac found in use by somebody else. An address that mac was not given stays as it is, or
// one machine could take every address away from all others.
func (p *pool) decline(ctx context.Context, mac string, a netip.Addr) bool {
	p.mu.Lock()
	now := time.Now()
	ours := (p.leased[a] == mac || p.offered[a] == mac) && p.free(a, mac, now)
	if ours {
		p.declined[a] = now.Add(declineHold)
		p.dropOffer(mac)
	}
	p.mu.Unlock()
	if ours {
		p.forgetLease(ctx, mac, func(l Lease) bool { return l.Address == a })
	}
	return ours
}

// sweep forgets what ran out. Leases are kept for expiredKeep longer than they last.
func (p *pool) sweep(ctx context.Context) {
	now := time.Now()
	expired := func(l Lease) bool { return now.After(l.Expires.Add(expiredKeep)) }
	var old []string
	p.mu.Lock()
	for mac, o := range p.offers {
		if now.After(o.until) {
			p.dropOffer(mac)
		}
	}
	for a, until := range p.declined {
		if now.After(until) {
			delete(p.declined, a)
		}
	}
	for mac, l := range p.leases {
		if expired(l) {
			old = append(old, mac)
		}
	}
	p.mu.Unlock()
	for _, mac := range old {
		p.forgetLease(ctx, mac, expired)
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
