package netup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

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
}

// Keep renews l until ctx is done, and then returns ctx's error. A lease that runs out without an answer keeps its
// address: a server that is away for a day must not take its machines down.
func (k *Keeper) Keep(ctx context.Context, l *Lease) error {
	retry := backoff.Backoff{First: 2 * time.Second, Limit: time.Minute}
	next := time.Now().Add(l.renewAfter())
	for {
		if err := backoff.Sleep(ctx, min(lookAfter, max(time.Until(next), 0))); err != nil {
			return err
		}
		if gone, err := l.Missing(); err == nil && gone {
			k.Log.Warn("the address is gone, setting it again", "address", l.Address, "interface", l.Interface)
			if err := l.Apply(); err != nil {
				k.Log.Warn("the address cannot be set", "error", err)
			}
		}
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
		next = time.Now().Add(l.renewAfter())
		if k.Save != nil {
			k.Save(l)
		}
	}
}

func (k *Keeper) renew(ctx context.Context, l *Lease) (*Lease, error) {
	old, err := l.nclient()
	if err != nil {
		return nil, err
	}
	mac, err := net.ParseMAC(l.MAC)
	if err != nil {
		return nil, err
	}
	c, err := client(l.Interface)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	got, err := c.Renew(ctx, old, modifiers()...)
	var nak *nclient4.ErrNak
	switch {
	case errors.As(err, &nak):
		k.Log.Warn("the server took the address back, asking for another", "address", l.Address)
		return k.replace(ctx, l, mac)
	case err != nil:
		return nil, fmt.Errorf("renewing %s on %s: %w", l.Address, l.Interface, err)
	}
	return newLease(l.Interface, mac, got.ACK)
}

// replace gets a new address where the server refused the old one. The new one is set before the old one goes.
func (k *Keeper) replace(ctx context.Context, l *Lease, mac net.HardwareAddr) (*Lease, error) {
	n, err := Ask(ctx, Link{Name: l.Interface, MAC: mac})
	if err != nil {
		return nil, err
	}
	if n.Address == l.Address {
		return n, nil
	}
	if err := n.Apply(); err != nil {
		return nil, err
	}
	if err := l.remove(); err != nil {
		k.Log.Warn("the old address stays", "error", err)
	}
	// Routes that went with the old address come back with this.
	return n, n.Apply()
}
