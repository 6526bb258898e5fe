package cache

import (
	"context"
	"io"
	"time"

	"github.com/troupe-dev/troupe/internal/backoff"
)

// burst is how much of a second a transfer may be ahead of its rate: what came while it did something else.
const burst = 200 * time.Millisecond

// A pace holds a transfer to a rate.
type pace struct {
	rate int64     // bytes a second; 0 for no limit
	free time.Time // when all that came so far may have come
}

// wait waits until n more bytes may have come.
func (p *pace) wait(ctx context.Context, n int) error {
	if p.rate <= 0 {
		return nil
	}
	now := time.Now()
	if earliest := now.Add(-burst); p.free.Before(earliest) {
		p.free = earliest
	}
	p.free = p.free.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	if d := p.free.Sub(now); d > 0 {
		return backoff.Sleep(ctx, d)
	}
	return nil
}

// A meter counts what a transfer gets from the network, and holds it to its pace. While a read lasts, and not while the
// transfer does something else, the network may stand still for so long only.
type meter struct {
	ctx   context.Context //nolint:containedctx // a Reader is given none
	r     io.Reader
	t     *transfer
	watch *time.Timer
}

func (m *meter) Read(p []byte) (int, error) {
	m.watch.Reset(m.t.c.stall)
	n, err := m.r.Read(p[:min(len(p), 64<<10)])
	m.watch.Stop()
	m.t.net += int64(n)
	if werr := m.t.pace.wait(m.ctx, n); err == nil {
		err = werr
	}
	return n, err
}
