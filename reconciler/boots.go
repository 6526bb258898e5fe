package reconciler

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/state"
)

const (
	// keepBoots is how many boots of one machine are kept.
	keepBoots = 10
	// maxMarks bounds one timeline: a machine that asks for its script for a week fills no disk.
	maxMarks = 200
	// sameBoot is how long firmware may go on asking without it being a new boot: it repeats its DHCP requests, tries
	// its other interfaces, and iPXE asks again.
	sameBoot = 3 * time.Minute
)

// boots keeps the timeline of each machine's boots. Timelines change in memory at once, since netboot's servers may not
// wait, and are written behind by run; what an agent reports is written before the agent hears so.
type boots struct {
	store *state.Store
	log   *slog.Logger
	now   func() time.Time

	// writing is held from taking a copy of a timeline until it is written, so that no older copy overwrites a newer.
	writing sync.Mutex

	mu      sync.Mutex
	current map[string]*state.Boot // by MAC
	dirty   map[string]bool        // MACs whose current boot is not written yet
	wake    chan struct{}
}

func newBoots(store *state.Store, log *slog.Logger) *boots {
	return &boots{
		store: store, log: log, now: time.Now,
		current: map[string]*state.Boot{}, dirty: map[string]bool{}, wake: make(chan struct{}, 1),
	}
}

// load takes up each machine's last boot where an earlier process left it.
func (b *boots) load(ctx context.Context) error {
	all, err := state.Boots.List(ctx, b.store)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, boot := range all {
		if cur := b.current[boot.MAC]; cur == nil || cur.Started.Before(boot.Started) {
			b.current[boot.MAC] = &boot
		}
	}
	return nil
}

// observe adds what netboot's servers saw.
func (b *boots) observe(ev netboot.Event) {
	if len(ev.MAC) == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	mac := ev.MAC.String()
	boot := b.at(mac, string(ev.Stage), ev.Time)
	m := state.Mark{Stage: string(ev.Stage), Time: ev.Time, Detail: ev.Detail}
	if ev.Err != nil {
		m.Error = ev.Err.Error()
		boot.Error = m.Error
	}
	addMark(boot, m)
	b.changed(mac)
}

// id is the boot that mac is in; a new one where its last is over.
func (b *boots) id(mac string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	boot := b.at(mac, string(netboot.StageScript), b.now())
	b.changed(mac)
	return boot.ID
}

// at is the boot to which a stage of mac belongs. The caller holds mu.
func (b *boots) at(mac, stage string, now time.Time) *state.Boot {
	cur := b.current[mac]
	if cur == nil || beginsBoot(cur, stage, now) {
		next := &state.Boot{ID: newBootID(now), MAC: mac, Started: now, Bytes: stagedBytes(cur)}
		b.current[mac], cur = next, next
	}
	return cur
}

// stagedBytes are the image bytes that were fetched in the background during a boot: they are the next one's.
func stagedBytes(cur *state.Boot) int64 {
	var n int64
	if cur != nil {
		for _, m := range cur.Marks {
			if m.Stage == string(agentapi.StageStage) {
				n += m.Bytes
			}
		}
	}
	return n
}

// beginsBoot says whether a stage that netboot saw belongs to a boot after cur.
func beginsBoot(cur *state.Boot, stage string, now time.Time) bool {
	if len(cur.Marks) == 0 {
		return false
	}
	last := cur.Marks[len(cur.Marks)-1]
	switch {
	case isAgentStage(last.Stage):
		return true // the machine had left the firmware: it is back in it
	case stage == string(netboot.StageOffer):
		// A machine that waits for its first image asks for scripts for as long as the build takes; that its DHCP
		// starts anew while its last mark is a script or a kernel means that it was reset.
		return last.Stage == string(netboot.StageKernel) || last.Stage == string(netboot.StageScript) || now.Sub(last.Time) > sameBoot
	case last.Stage == string(netboot.StageKernel):
		return stage == string(netboot.StageScript) && now.Sub(last.Time) > sameBoot
	}
	return false
}

func isAgentStage(stage string) bool {
	switch netboot.Stage(stage) {
	case netboot.StageOffer, netboot.StageTFTP, netboot.StageScript, netboot.StageKernel:
		return false
	}
	return true
}

// addMark appends m, or counts it into the mark before where it only repeats that: a loop of retries is one mark.
func addMark(boot *state.Boot, m state.Mark) {
	if m.Stage != string(agentapi.StageStage) {
		boot.Bytes += m.Bytes
	}
	if n := len(boot.Marks); n > 0 {
		last := &boot.Marks[n-1]
		if last.Stage == m.Stage && last.Detail == m.Detail && last.Error == m.Error && m.Bytes == 0 {
			return
		}
	}
	if len(boot.Marks) >= maxMarks {
		return
	}
	at, _ := slices.BinarySearchFunc(boot.Marks, m, func(a, b state.Mark) int {
		if a.Time.After(b.Time) {
			return 1
		}
		return -1 // marks of one time keep the order in which they came
	})
	boot.Marks = slices.Insert(boot.Marks, at, m)
	if m.Stage == string(agentapi.StageHealthy) && boot.Healthy.IsZero() {
		boot.Healthy, boot.Error = m.Time, ""
	}
}

// report adds an agent's marks to the boot that they belong to and writes it. received is when the report came in,
// by which the node's own clock is not needed.
func (b *boots) report(ctx context.Context, host string, r agentapi.Report, received time.Time) error {
	b.writing.Lock()
	defer b.writing.Unlock()
	boot, err := b.withMarks(ctx, host, r, received)
	if err != nil || boot == nil {
		return err
	}
	return b.put(ctx, *boot)
}

func (b *boots) withMarks(ctx context.Context, host string, r agentapi.Report, received time.Time) (*state.Boot, error) {
	if len(r.Marks) == 0 && r.Error == "" {
		return nil, nil //nolint:nilnil // nothing to write
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	boot := b.current[r.MAC]
	if boot == nil || boot.ID != r.BootID {
		var err error
		if boot, err = b.former(ctx, r, received); err != nil {
			return nil, err
		}
	}
	before := len(boot.Marks)
	for _, m := range r.Marks {
		addReported(boot, m, received.Add(m.At-r.Uptime))
	}
	if before == len(boot.Marks) && boot.Error == r.Error && boot.Host == host {
		return nil, nil //nolint:nilnil // all of it was known
	}
	boot.Host = cmp.Or(host, boot.Host)
	if r.Error != "" {
		boot.Error = r.Error
	}
	delete(b.dirty, r.MAC)
	c := *boot
	c.Marks = slices.Clone(boot.Marks)
	return &c, nil
}

// addReported adds a mark that an agent may tell several times: it repeats what no reply acknowledged.
func addReported(boot *state.Boot, m agentapi.Mark, at time.Time) {
	known := slices.ContainsFunc(boot.Marks, func(k state.Mark) bool {
		return k.Stage == string(m.Stage) && k.Detail == m.Detail && k.Time.Sub(at).Abs() < 2*time.Second
	})
	if !known {
		addMark(boot, state.Mark{Stage: string(m.Stage), Time: at, Detail: m.Detail, Bytes: m.Bytes})
	}
}

// former is the boot of a report that is not the machine's current one: of a machine that was booted by another server,
// or of one whose record is in the store alone. The caller holds mu.
func (b *boots) former(ctx context.Context, r agentapi.Report, received time.Time) (*state.Boot, error) {
	all, err := state.Boots.ListUnder(ctx, b.store, r.MAC+"/")
	if err != nil {
		return nil, err
	}
	id := cmp.Or(r.BootID, newBootID(received))
	boot, ok := all[r.MAC+"/"+id]
	if !ok {
		boot = state.Boot{ID: id, MAC: r.MAC, Started: received.Add(-r.Uptime)}
	}
	if cur := b.current[r.MAC]; cur == nil || !boot.Started.Before(cur.Started) {
		b.current[r.MAC] = &boot
	}
	return &boot, nil
}

// newest are the last boots of all machines.
func (b *boots) newest() []state.Boot {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]state.Boot, 0, len(b.current))
	for _, boot := range b.current {
		c := *boot
		c.Marks = slices.Clone(c.Marks)
		out = append(out, c)
	}
	return out
}

func (b *boots) changed(mac string) {
	b.dirty[mac] = true
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// run writes what netboot's servers saw until ctx ends, and then once more.
func (b *boots) run(ctx context.Context) error {
	for {
		select {
		case <-b.wake:
			b.flush(ctx)
		case <-ctx.Done():
			b.flushLast(ctx)
			return nil
		}
	}
}

// flushLast flushes after ctx has ended.
func (b *boots) flushLast(ctx context.Context) {
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	b.flush(last)
}

func (b *boots) flush(ctx context.Context) {
	b.writing.Lock()
	defer b.writing.Unlock()
	for _, boot := range b.takeDirty() {
		if err := b.put(ctx, boot); err != nil {
			b.log.Warn("a boot's timeline is not written", "mac", boot.MAC, "error", err)
		}
	}
}

func (b *boots) takeDirty() []state.Boot {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []state.Boot
	for mac := range b.dirty {
		c := *b.current[mac]
		c.Marks = slices.Clone(c.Marks)
		out = append(out, c)
	}
	clear(b.dirty)
	return out
}

// put writes one boot, and drops the machine's oldest ones.
func (b *boots) put(ctx context.Context, boot state.Boot) error {
	if err := state.Boots.Put(ctx, b.store, boot.MAC+"/"+boot.ID, boot); err != nil {
		return err
	}
	all, err := state.Boots.ListUnder(ctx, b.store, boot.MAC+"/")
	if err != nil {
		return err
	}
	ids := slices.Sorted(maps.Keys(all)) // a boot's id starts with its time
	for len(ids) > keepBoots {
		if err := state.Boots.Delete(ctx, b.store, ids[0]); err != nil {
			return err
		}
		ids = ids[1:]
	}
	return nil
}

// newBootID starts with the time, so that ids sort by age.
func newBootID(now time.Time) string {
	var r [3]byte
	_, _ = rand.Read(r[:]) // never fails: crypto/rand ends the program instead
	return now.UTC().Format("20060102T150405") + "-" + hex.EncodeToString(r[:])
}
