package reconciler

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"maps"
	"reflect"
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
	// keepOfOthers is how many are kept of a machine that no host is.
	keepOfOthers = 3
	// maxMarks and maxDetails, in bytes, bound one timeline: a machine that asks for its script for a week fills no disk.
	maxMarks   = 200
	maxDetails = 16 << 10
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

	// writing is held, for one machine, from taking a copy of its timeline until that is written, so that no older copy
	// overwrites a newer. It is taken before mu, and mu is never held over I/O: DHCP waits for it.
	writing *striped
	// standing tells what each machine is to the fleet in force. It is nil while there is none: then nobody can tell.
	standing func() func(mac string) standing
	most     int // maxStrangers; fewer in tests

	mu      sync.Mutex
	current map[string]*state.Boot // by MAC
	dirty   map[string]bool        // MACs whose current boot is not written yet
	gone    map[string]bool        // MACs whose boots are to be deleted but for the current one
	room    int                    // for so many more strangers, at least
	wake    chan struct{}
}

func newBoots(store *state.Store, log *slog.Logger) *boots {
	return &boots{
		store: store, log: log, now: time.Now, writing: newStriped(), most: maxStrangers,
		standing: func() func(string) standing { return func(string) standing { return stranger } },
		current:  map[string]*state.Boot{}, dirty: map[string]bool{}, gone: map[string]bool{}, wake: make(chan struct{}, 1),
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

// observe adds what netboot's servers saw. That something went wrong belongs to the boot in which it did, and begins none:
// a node that runs asks DHCP, too, and its answer may be that there is no address left.
func (b *boots) observe(ev netboot.Event) {
	if len(ev.MAC) == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	mac := ev.MAC.String()
	if cur := b.current[mac]; ev.Err != nil && (cur == nil || beginsBoot(cur, string(ev.Stage), ev.Time)) {
		return
	}
	boot, ok := b.at(mac, string(ev.Stage), ev.Time)
	if !ok {
		return
	}
	m := state.Mark{Stage: string(ev.Stage), Time: ev.Time, Detail: cut(ev.Detail)}
	if ev.Err != nil {
		m.Error = cut(ev.Err.Error())
		boot.Error = m.Error
	}
	addMark(boot, m)
	if ev.Stage == netboot.StageKernel && ev.Err == nil {
		boot.Loads.Loaded = boot.Loads.Served
	}
	b.changed(mac)
}

// id is the boot that mac is in; a new one where its last is over.
func (b *boots) id(mac string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	boot, ok := b.at(mac, string(netboot.StageScript), b.now())
	if !ok {
		return newBootID(b.now())
	}
	b.changed(mac)
	return boot.ID
}

// at is the boot to which a stage of mac belongs; ok is false where it is a machine whose boots are not kept.
// The caller holds mu.
func (b *boots) at(mac, stage string, now time.Time) (boot *state.Boot, ok bool) {
	cur := b.current[mac]
	if cur == nil && !b.admit(mac) {
		return nil, false
	}
	if cur == nil || beginsBoot(cur, stage, now) {
		next := &state.Boot{ID: newBootID(now), MAC: mac, Started: now, Bytes: stagedBytes(cur)}
		if cur != nil {
			next.Loads = cur.Loads
		}
		b.current[mac], cur = next, next
	}
	return cur, true
}

// admit says whether the boots of a machine are kept that has none yet. For a stranger the one goes that was silent for
// longest: whoever booted a year ago must not keep out what was racked today. While no fleet is in force a stranger
// cannot be told from a host; nothing can be booted then, either. The caller holds mu.
func (b *boots) admit(mac string) bool {
	of := b.standing()
	if of == nil {
		return false
	}
	if of(mac) != stranger {
		return true
	}
	if b.room == 0 {
		b.evict(of)
	}
	b.room--
	return true
}

// evict counts the strangers and lets go of an eighth of them where there are as many as there may be, so that not
// every next one costs a count. The caller holds mu.
func (b *boots) evict(of func(string) standing) {
	var strange []string
	for mac := range b.current {
		if of(mac) == stranger {
			strange = append(strange, mac)
		}
	}
	slices.SortFunc(strange, func(x, y string) int { return lastSign(b.current[x]).Compare(lastSign(b.current[y])) })
	for ; len(strange) > b.most*7/8; strange = strange[1:] {
		b.drop(strange[0])
		b.gone[strange[0]] = true // by run, which may wait
	}
	b.room = b.most - len(strange)
	b.wakeUp()
}

// lastSign is when the last was seen of a boot.
func lastSign(boot *state.Boot) time.Time {
	if n := len(boot.Marks); n > 0 {
		return boot.Marks[n-1].Time
	}
	return boot.Started
}

// drop takes a machine's boot out of memory. The caller holds mu.
func (b *boots) drop(mac string) {
	delete(b.current, mac)
	delete(b.dirty, mac)
}

// forget deletes all boots of a machine.
func (b *boots) forget(ctx context.Context, mac string) error {
	b.mu.Lock()
	b.drop(mac)
	b.mu.Unlock()
	return b.clear(ctx, mac)
}

// clear deletes all boots of a machine but the one that it is in.
func (b *boots) clear(ctx context.Context, mac string) error {
	defer b.writing.lock(mac)()
	b.mu.Lock()
	delete(b.gone, mac)
	current := ""
	if cur := b.current[mac]; cur != nil {
		current = mac + "/" + cur.ID
	}
	b.mu.Unlock()
	all, err := state.Boots.ListUnder(ctx, b.store, mac+"/")
	for id := range all {
		if err == nil && id != current {
			err = state.Boots.Delete(ctx, b.store, id)
		}
	}
	if err != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.gone[mac] = true // deleted with what is written next
	}
	return err
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
	case stage == string(netboot.StageDisk) || stage == string(netboot.StageBooted):
		return false // what it was told in this boot leads there
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
	there := m.Stage == string(agentapi.StageHealthy) || m.Stage == string(netboot.StageBooted)
	if there && boot.Healthy.IsZero() { // though its mark may find no room
		boot.Healthy, boot.Error = m.Time, ""
	}
	details := len(m.Detail) + len(m.Error)
	if n := len(boot.Marks); n > 0 {
		last := &boot.Marks[n-1]
		if last.Stage == m.Stage && last.Detail == m.Detail && last.Error == m.Error && m.Bytes == 0 {
			return
		}
	}
	if len(boot.Marks) >= maxMarks {
		return
	}
	for _, k := range boot.Marks {
		details += len(k.Detail) + len(k.Error)
	}
	if details > maxDetails {
		m.Detail, m.Error = "", ""
	}
	at, _ := slices.BinarySearchFunc(boot.Marks, m, func(a, b state.Mark) int {
		if a.Time.After(b.Time) {
			return 1
		}
		return -1 // marks of one time keep the order in which they came
	})
	boot.Marks = slices.Insert(boot.Marks, at, m)
}

// report adds an agent's marks to the boot that they belong to and writes it. received is when the report came in,
// by which the node's own clock is not needed.
func (b *boots) report(ctx context.Context, host string, r agentapi.Report, received time.Time) error {
	defer b.writing.lock(r.MAC)()
	if len(r.Marks) == 0 && b.upToDate(r) {
		return nil
	}
	if err := b.adopt(ctx, r, received); err != nil {
		return err
	}
	boot, changed := b.withMarks(host, r, received)
	if !changed {
		return nil
	}
	if err := b.put(ctx, boot); err != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.dirty[r.MAC] = true // in memory it is known: it must not be acknowledged for that alone
		return err
	}
	return nil
}

// upToDate says whether a report without marks tells nothing new. A boot that nobody knows gets no timeline by its error
// being away.
func (b *boots) upToDate(r agentapi.Report) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	cur := b.current[r.MAC]
	if cur == nil || cur.ID != r.BootID {
		return r.Error == ""
	}
	return cur.Error == r.Error && !b.dirty[r.MAC] && reflect.DeepEqual(cur.Loads, agentCame(cur.Loads, r))
}

// adopt makes the boot of a report the machine's current one, where it is not: a machine that was booted by another
// server, or whose record is in the store alone.
func (b *boots) adopt(ctx context.Context, r agentapi.Report, received time.Time) error {
	b.mu.Lock()
	cur := b.current[r.MAC]
	b.mu.Unlock()
	if cur != nil && cur.ID == r.BootID {
		return nil
	}
	id := cmp.Or(r.BootID, "unknown")
	boot, err := state.Boots.Get(ctx, b.store, r.MAC+"/"+id)
	if notFound(err) {
		boot, err = state.Boot{ID: id, MAC: r.MAC, Started: received.Add(-r.Uptime)}, nil
		if cur != nil {
			boot.Loads = cur.Loads
		}
	}
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.current[r.MAC] == cur { // else its firmware began another boot meanwhile
		b.current[r.MAC] = &boot
	}
	return nil
}

// withMarks is the machine's current boot with the marks of a report, and whether it has to be written.
func (b *boots) withMarks(host string, r agentapi.Report, received time.Time) (state.Boot, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	boot := b.current[r.MAC]
	before, bytes, healthy, failed := len(boot.Marks), boot.Bytes, boot.Healthy, boot.Error
	kernel, moved := settleClock(boot, received.Add(-r.Uptime))
	for _, m := range r.Marks {
		addReported(boot, m, kernel)
	}
	changed := moved || b.dirty[r.MAC] || before != len(boot.Marks) || bytes != boot.Bytes || host != "" && boot.Host != host ||
		!boot.Healthy.Equal(healthy) || boot.Error != failed
	boot.Host = cmp.Or(host, boot.Host)
	if r.Error != boot.Error { // what the agent does not complain of any more is over, the firmware's troubles, too
		boot.Error, changed = r.Error, true
	}
	if loads := agentCame(boot.Loads, r); !reflect.DeepEqual(loads, boot.Loads) {
		boot.Loads, changed = loads, true
	}
	delete(b.dirty, r.MAC)
	return clone(boot), changed
}

func clone(boot *state.Boot) state.Boot {
	c := *boot
	c.Marks = slices.Clone(boot.Marks)
	return c
}

// lateness is how late a report may be and still be taken at its word: to move a timeline costs a write.
const lateness = 100 * time.Millisecond

// settleClock returns by which start of the node's kernel, on the server's clock, a report's marks are dated, and whether
// it moved the marks that the timeline has. A report that waited for a server that was killed comes late, never early:
// of all that a boot's reports say, the earliest start is the best, and dates those before it, too. Once the boot is
// healthy each report speaks for itself, since the node's clock and the server's drift apart.
func settleClock(boot *state.Boot, reported time.Time) (kernel time.Time, moved bool) {
	switch {
	case boot.Kernel.IsZero():
		boot.Kernel = reported
		return reported, true
	case !boot.Healthy.IsZero():
		return reported, false
	case !reported.Before(boot.Kernel.Add(-lateness)):
		return boot.Kernel, false
	}
	boot.Kernel = reported
	for i := range boot.Marks {
		if m := &boot.Marks[i]; m.At != 0 {
			m.Time = reported.Add(m.At)
		}
	}
	slices.SortStableFunc(boot.Marks, func(a, b state.Mark) int { return a.Time.Compare(b.Time) })
	return reported, true
}

// addReported adds a mark that an agent may tell several times: it repeats what no reply acknowledged.
func addReported(boot *state.Boot, m agentapi.Mark, kernel time.Time) {
	known := slices.ContainsFunc(boot.Marks, func(k state.Mark) bool {
		return k.Stage == string(m.Stage) && k.At == m.At && (k.Detail == m.Detail || k.Detail == "")
	})
	if !known {
		addMark(boot, state.Mark{Stage: string(m.Stage), Time: kernel.Add(m.At), Detail: m.Detail, Bytes: m.Bytes, At: m.At})
	}
}

// wasHost says whether a machine was a host of the fleet in its last boot.
func (b *boots) wasHost(mac string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	cur := b.current[mac]
	return cur != nil && cur.Host != ""
}

// newest are the last boots of all machines.
func (b *boots) newest() []state.Boot {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]state.Boot, 0, len(b.current))
	for _, boot := range b.current {
		out = append(out, clone(boot))
	}
	return out
}

func (b *boots) changed(mac string) {
	b.dirty[mac] = true
	b.wakeUp()
}

func (b *boots) wakeUp() {
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
	b.mu.Lock()
	macs, gone := slices.Collect(maps.Keys(b.dirty)), slices.Collect(maps.Keys(b.gone))
	b.mu.Unlock()
	for _, mac := range macs {
		if err := b.flushOne(ctx, mac); err != nil {
			b.log.Warn("a boot's timeline is not written", "mac", mac, "error", err)
		}
	}
	for _, mac := range gone {
		if err := b.clear(ctx, mac); err != nil {
			b.log.Warn("a stranger's boots are not deleted", "mac", mac, "error", err)
		}
	}
}

func (b *boots) flushOne(ctx context.Context, mac string) error {
	defer b.writing.lock(mac)()
	b.mu.Lock()
	if !b.dirty[mac] {
		b.mu.Unlock()
		return nil
	}
	delete(b.dirty, mac)
	boot := clone(b.current[mac])
	b.mu.Unlock()
	err := b.put(ctx, boot)
	if err != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.dirty[mac] = true // written with the machine's next stage
	}
	return err
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
	keep := keepBoots
	if of := b.standing(); of != nil && of(boot.MAC) != declared {
		keep = keepOfOthers
	}
	ids := slices.Sorted(maps.Keys(all)) // a boot's id starts with its time
	for len(ids) > keep {
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
