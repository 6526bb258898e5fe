package netup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"

	"github.com/troupe-dev/troupe/internal/backoff"
)

// lookAfter is how often a Keeper looks whether the address is still there.
const lookAfter = 15 * time.Second

// A Keeper renews a lease. The booted OS may have a network manager of its own, which owns what it set: so nothing is
// changed while the address is on its interface, and no route is touched then.
type Keeper struct {
	Log  *slog.Logger
	Save func(*Lease) // is told of each new answer; nil for nobody
	// Moving is told of a lease with another address before it is set, and the old one goes; nil for nobody.
	Moving func(*Lease)
}

// Keep renews l until ctx is done, and then returns ctx's error: first with the server that gave it, later with any, and
// once it has run out it asks for an address as if it had none, but for the same one (RFC 2131 section 4.4.5). A lease
// that runs out without an answer keeps its address: a server that is away for a day must not take its machines down.
func (k *Keeper) Keep(ctx context.Context, l *Lease) error {
	retry := backoff.Backoff{First: 2 * time.Second, Limit: time.Minute}
	next := time.Now().Add(l.renewAfter() - l.age())
	lost := false // the interface is not to be found
	for {
		if err := backoff.Sleep(ctx, min(lookAfter, max(time.Until(next), 0))); err != nil {
			return err
		}
		lost = k.repair(l, lost)
		if time.Now().Before(next) {
			continue
		}
		n, err := k.renew(ctx, l)
		if err != nil {
			k.Log.Warn("the lease was not renewed, trying again", "address", l.Address, "error", err)
			next = time.Now().Add(retry.Next())
			continue
		}
		retry.Reset()
		l = n
		next = time.Now().Add(l.renewAfter() - l.age())
		if k.Save != nil {
			k.Save(l)
		}
	}
}

// repair sets the address again where it is gone. It returns whether the interface is not to be found, of which it tells
// only where that is new.
func (k *Keeper) repair(l *Lease, lost bool) bool {
	gone, err := l.Missing()
	switch {
	case err != nil && !lost:
		k.Log.Warn("the leased address cannot be looked after", "address", l.Address, "error", err)
	case err == nil && gone:
		k.Log.Warn("the address is gone, setting it again", "address", l.Address, "interface", l.Interface)
		if err := l.Apply(k.Log); err != nil {
			k.Log.Warn("the address cannot be set", "error", err)
		}
	}
	return err != nil
}

// renew asks once more for what is leased, in the way that the lease's age asks for.
func (k *Keeper) renew(ctx context.Context, l *Lease) (*Lease, error) {
	mac, err := net.ParseMAC(l.MAC)
	if err != nil {
		return nil, fmt.Errorf("reading the kept lease: %w", err)
	}
	now, err := l.link()
	if err != nil {
		return nil, err
	}
	link := Link{Name: now.Attrs().Name, MAC: mac, Index: now.Attrs().Index}
	if l.expired() {
		return k.replace(ctx, l, link)
	}
	n, err := extend(ctx, link, l)
	if errors.Is(err, errRefused) {
		k.Log.Warn("the server took the address back, asking for another", "address", l.Address)
		return k.replace(ctx, l, link)
	}
	if err != nil {
		return nil, fmt.Errorf("renewing %s on %s: %w", l.Address, link.Name, err)
	}
	return k.swap(l, n)
}

// errRefused is a server's DHCPNAK.
var errRefused = errors.New("the server refuses it")

// extend sends the DHCPREQUEST of the states RENEWING and REBINDING. It is the same one but for whose answer counts;
// both are broadcast, since the interface's address may be gone.
func extend(ctx context.Context, link Link, l *Lease) (*Lease, error) {
	old, err := dhcpv4.FromBytes(l.ACK)
	if err != nil {
		return nil, fmt.Errorf("reading the kept DHCP answer: %w", err)
	}
	req, err := dhcpv4.NewRenewFromAck(old, append(modifiers(), dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(nclient4.MaxMessageSize)))...)
	if err != nil {
		return nil, fmt.Errorf("making a DHCPREQUEST: %w", err)
	}
	c, err := client(link.Name)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	counts := nclient4.IsMessageType(dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak)
	if !l.rebinding() {
		counts = nclient4.IsAll(counts, nclient4.IsCorrectServer(old.ServerIdentifier()))
	}
	asked := bootClock()
	ack, err := c.SendAndRead(ctx, c.RemoteAddr(), req, counts)
	if err != nil {
		return nil, err
	}
	if ack.MessageType() == dhcpv4.MessageTypeNak {
		return nil, errRefused
	}
	return newLease(link, ack, asked)
}

// replace gets an address anew, the same one if the server has no other idea.
func (k *Keeper) replace(ctx context.Context, l *Lease, link Link) (*Lease, error) {
	n, err := ask(ctx, link, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(l.Address.Addr().AsSlice())))
	if err != nil {
		return nil, err
	}
	return k.swap(l, n)
}

// swap goes from one lease to the next. Nothing is changed on the interface while the address is the same. Else the new
// one is set before the old one goes.
func (k *Keeper) swap(l, n *Lease) (*Lease, error) {
	if n.Address.Addr() == l.Address.Addr() {
		return n, nil
	}
	k.Log.Warn("the address changes", "from", l.Address, "to", n.Address, "interface", n.Interface)
	if k.Moving != nil {
		k.Moving(n)
	}
	if err := n.Apply(k.Log); err != nil {
		return nil, err
	}
	if err := l.remove(); err != nil {
		k.Log.Warn("the old address stays", "error", err)
	}
	if err := n.Apply(k.Log); err != nil { // for the routes that went with the old address
		k.Log.Warn("the new address is not whole", "error", err)
	}
	return n, nil
}
