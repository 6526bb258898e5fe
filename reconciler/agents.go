package reconciler

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/signing"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// seenEvery is how old a node's record may grow while nothing changes on it but the time: every write is an fsync,
// and a thousand idle nodes should not cost one every few milliseconds.
const seenEvery = 10 * time.Second

// agents listens to what agents say, and writes it down: machines, nodes and the agents' part of each boot.
type agents struct {
	store  *state.Store
	views  *views
	boots  *boots
	events *recorder
	now    func() time.Time
	each   *striped // one report or hello of a machine at a time: both write its records

	key       *signing.Key // of releases; nil in tests
	strangers *strangers
	deltas    *nodeDeltas
	booting   func(host string) // is told of hosts whose machines begin to boot
}

// Hello takes up a machine and answers with its assignment. While no fleet is in force nothing is written, since nobody
// can tell yet who belongs to it.
func (a *agents) Hello(ctx context.Context, peer netip.Addr, h agentapi.Hello) (agentapi.Assignment, error) {
	id, err := cleanIdentity(h.Identity)
	if err != nil {
		return agentapi.Assignment{}, err
	}
	h.BootID = bootID(h.BootID)
	v, _, err := a.fleetView()
	if err != nil {
		return agentapi.Assignment{}, err
	}
	defer a.each.lock(id.MAC)()
	now := a.now()
	m, err := state.Machines.Get(ctx, a.store, id.MAC)
	if err != nil && !notFound(err) {
		return agentapi.Assignment{}, err
	}
	if notFound(err) {
		m.FirstSeen = now
		// A UUID or a serial number anybody can claim: such a machine is counted, but never turned away, since it makes
		// one host's machine at most.
		if !v.declares(id.MAC) && !a.strangers.enter() && v.host(id) == "" {
			return agentapi.Assignment{}, &UnavailableError{Reason: "too many machines are known that no host declares"}
		}
		if v.host(id) == "" {
			a.events.note(ctx, state.Event{Kind: "machine", Subject: id.MAC, Message: "an unknown machine reported: " + describe(h.Inventory)})
		}
	}
	if err := a.putMachine(ctx, m, h, id, peer); err != nil {
		return agentapi.Assignment{}, err
	}
	n, err := state.Nodes.Get(ctx, a.store, id.MAC)
	if err != nil && !notFound(err) {
		return agentapi.Assignment{}, err
	}
	if n.BootID != h.BootID {
		a.booting(v.host(id))
		n = state.Node{MAC: id.MAC, BootID: h.BootID, Cached: n.Cached, Stage: string(agentapi.StageAgent), Bad: n.Bad, Good: n.Good}
	}
	n.Kernel, n.LastSeen = h.Kernel, now
	if err := state.Nodes.Put(ctx, a.store, id.MAC, n); err != nil {
		return agentapi.Assignment{}, err
	}
	if v, _, err = a.fleetView(); err != nil {
		return agentapi.Assignment{}, err
	}
	return a.signed(v.assignment(id))
}

// signed is an assignment as it is handed out. Without a key it stays as it is, and is refused by each agent.
func (a *agents) signed(got agentapi.Assignment) (agentapi.Assignment, error) {
	if a.key == nil {
		return got, nil
	}
	return agentapi.Sign(got, a.key)
}

// putMachine writes a machine where something about it is new. Each such write is a new view for all.
func (a *agents) putMachine(ctx context.Context, before state.Machine, h agentapi.Hello, id agentapi.Identity, peer netip.Addr) error {
	m := before
	inv := cleanInventory(h.Inventory)
	m.Identity, m.Inventory, m.Address, m.Agent = id, &inv, peer, cut(h.Agent)
	if reflect.DeepEqual(m, before) {
		return nil
	}
	return state.Machines.Put(ctx, a.store, id.MAC, m)
}

// Assignment waits until the assignment of mac is another than after, or until wait is over.
func (a *agents) Assignment(ctx context.Context, mac, after string, wait time.Duration) (agentapi.Assignment, error) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		v, newer, err := a.fleetView()
		if err != nil {
			return agentapi.Assignment{}, err
		}
		got := v.assignment(agentapi.Identity{MAC: mac})
		if got.Version != after {
			return a.signed(got)
		}
		select {
		case <-newer:
		case <-timer.C:
			return a.signed(got)
		case <-ctx.Done():
			return agentapi.Assignment{}, ctx.Err()
		}
	}
}

// Report writes down how a node is. What it acknowledges is on disk. Of a machine without a record that no host declares
// by its MAC nothing is written: that one is asked to say hello first, by a reply that acknowledges nothing.
func (a *agents) Report(ctx context.Context, _ netip.Addr, r agentapi.Report) (agentapi.ReportReply, error) {
	id, err := cleanIdentity(r.Identity)
	if err != nil {
		return agentapi.ReportReply{}, err
	}
	r = clean(r)
	r.Identity = id
	defer a.each.lock(id.MAC)()
	now := a.now()
	v, _, err := a.fleetView()
	if err != nil {
		return agentapi.ReportReply{}, err
	}
	_, err = state.Machines.Get(ctx, a.store, id.MAC)
	if err != nil && !notFound(err) {
		return agentapi.ReportReply{}, err
	}
	reply := agentapi.ReportReply{Version: v.assignment(id).Version, Hello: notFound(err), Diff: a.deltas.asked(id.MAC)}
	if reply.Hello && !v.declares(id.MAC) {
		return reply, nil
	}
	host := v.host(id)
	if err := a.boots.report(ctx, host, r, now); err != nil {
		return agentapi.ReportReply{}, err
	}
	before, err := state.Nodes.Get(ctx, a.store, id.MAC)
	if err != nil && !notFound(err) {
		return agentapi.ReportReply{}, err
	}
	if err := a.putNode(ctx, before, nodeOf(before, r, now)); err != nil {
		return agentapi.ReportReply{}, err
	}
	a.tell(ctx, host, before, r)
	return reply, nil
}

// nodeOf is the record that a report makes of the one before.
func nodeOf(before state.Node, r agentapi.Report, now time.Time) state.Node {
	n := state.Node{
		MAC: r.MAC, BootID: r.BootID, LastSeen: now, Booted: now.Add(-r.Uptime),
		Stage: string(agentapi.StageAgent), Running: r.Running, Staged: r.Staged, Fetch: r.Fetch, Cached: r.Cached, Error: r.Error, Session: r.Session,
		Bad: r.Bad, Good: r.Good, Warnings: r.Warnings, Changes: r.Changes,
	}
	if before.BootID == r.BootID {
		n.Stage, n.Kernel = before.Stage, before.Kernel
		if before.Booted.Sub(n.Booted).Abs() < 2*time.Second {
			n.Booted = before.Booted // the same start, measured with another delay on the wire
		}
	}
	if r.Cached == nil {
		n.Cached = before.Cached
	}
	if r.Running == nil && r.Good == "" && r.Bad == nil { // its cache is not open yet
		n.Bad, n.Good = before.Bad, before.Good
	}
	for _, m := range r.Marks {
		if m.Stage != agentapi.StageBootable { // what is done to its disk beside is not how far it came
			n.Stage = string(m.Stage)
		}
	}
	if r.Running != nil && n.Stage == string(agentapi.StageAgent) { // its earlier marks went to a server that is no more
		n.Stage = string(agentapi.StageService)
		if r.Running.Health.Healthy {
			n.Stage = string(agentapi.StageHealthy)
		}
	}
	return n
}

func (a *agents) putNode(ctx context.Context, before, n state.Node) error {
	quiet := before
	quiet.LastSeen = n.LastSeen
	if reflect.DeepEqual(quiet, n) && n.LastSeen.Sub(before.LastSeen) < seenEvery {
		return nil
	}
	return state.Nodes.Put(ctx, a.store, n.MAC, n)
}

// tell notes what an operator wants to hear of a report: that a node became healthy, stopped being so, or is stuck.
func (a *agents) tell(ctx context.Context, host string, before state.Node, r agentapi.Report) {
	subject := host
	if subject == "" {
		subject = r.MAC
	}
	if r.Error != "" && r.Error != before.Error {
		a.events.note(ctx, state.Event{Kind: "node", Subject: subject, Message: r.Error, Warning: true})
	}
	for _, b := range r.Bad {
		if !slices.Contains(before.Bad, b) {
			a.events.note(ctx, state.Event{Kind: "node", Subject: subject, Warning: true, Message: badMessage(b)})
		}
	}
	for _, w := range r.Warnings {
		if !slices.Contains(before.Warnings, w) {
			a.events.note(ctx, state.Event{Kind: "node", Subject: subject, Warning: true, Message: w})
		}
	}
	if r.Running == nil {
		return
	}
	was := before.Running != nil && before.BootID == r.BootID && before.Running.Health.Healthy
	is := r.Running.Health.Healthy
	switch {
	case is && !was:
		a.events.note(ctx, state.Event{Kind: "node", Subject: subject, Message: fmt.Sprintf("healthy in role %s, generation %d", r.Running.Role, r.Running.Generation)})
	case was && !is:
		a.events.note(ctx, state.Event{
			Kind: "node", Subject: subject, Warning: true,
			Message: "no longer healthy: " + strings.Join(r.Running.Health.Failing, "; "),
		})
	}
}

// badMessage tells people of a release that does not work on a node.
func badMessage(b agentapi.BadRelease) string {
	if b.Again {
		return fmt.Sprintf("release %s of role %s was good here and is left for a while: %s", b.Release.Short(), b.Role, b.Why)
	}
	return fmt.Sprintf("release %s of role %s does not work here and is not tried again: %s", b.Release.Short(), b.Role, b.Why)
}

// An UnavailableError says that the server cannot answer yet: the same request will do later.
type UnavailableError struct{ Reason string }

func (e *UnavailableError) Error() string { return e.Reason }

// Unavailable marks the error for package api, which answers it with 503.
func (e *UnavailableError) Unavailable() bool { return true }

// fleetView is the newest view, once a fleet is in force. Before that nobody may be told that he is unclaimed: a server
// that has just started would send its whole fleet away.
func (a *agents) fleetView() (*view, <-chan struct{}, error) {
	v, newer := a.views.get()
	if v.fleet == nil {
		return nil, newer, &UnavailableError{Reason: "no fleet is in force yet"}
	}
	return v, newer, nil
}

// cleanIdentity checks and normalises what a stranger says of itself: it becomes a key.
func cleanIdentity(id agentapi.Identity) (agentapi.Identity, error) {
	mac, err := net.ParseMAC(id.MAC)
	if err != nil || len(mac) != 6 {
		return id, &InvalidError{Reason: fmt.Sprintf("identity: %q is no Ethernet address", id.MAC)}
	}
	if len(id.UUID) > 64 || len(id.Serial) > 256 {
		return id, &InvalidError{Reason: "identity: UUID or serial number is too long"}
	}
	return agentapi.Identity{MAC: mac.String(), UUID: strings.ToLower(id.UUID), Serial: id.Serial}, nil
}

// An InvalidError says that a request is wrong, not the server.
type InvalidError struct{ Reason string }

func (e *InvalidError) Error() string { return e.Reason }

// Invalid marks the error for package api, which answers it with 400.
func (e *InvalidError) Invalid() bool { return true }

// Bounds of what a machine's words may take in records.
const (
	maxText      = 1024
	maxItems     = 256
	maxStage     = 64
	maxBad       = 8
	maxWarnings  = 20
	maxFailing   = 8 << 10  // bytes of all checks that do not pass
	maxInventory = 48 << 10 // bytes of JSON: what 256 disks take
)

// cut bounds a text, in bytes.
func cut(s string) string { return cutTo(s, maxText) }

// cutTo bounds a text to most bytes, and its JSON to twice as many: for a control character or a broken one that would
// be six.
func cutTo(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// clean bounds a report.
func clean(r agentapi.Report) agentapi.Report {
	r.Error, r.Agent, r.BootID = cut(r.Error), cut(r.Agent), bootID(r.BootID)
	r.Marks = slices.Clone(r.Marks[:min(len(r.Marks), maxItems)])
	for i := range r.Marks {
		r.Marks[i].Detail, r.Marks[i].Stage = cut(r.Marks[i].Detail), agentapi.Stage(cutTo(string(r.Marks[i].Stage), maxStage))
	}
	r.Cached = r.Cached[:min(len(r.Cached), maxItems)]
	r.Bad = slices.Clone(r.Bad[:min(len(r.Bad), maxBad)])
	for i := range r.Bad {
		b := &r.Bad[i]
		b.Host, b.Role, b.Why, b.When = cut(b.Host), cut(b.Role), cut(b.Why), b.When.UTC()
	}
	r.Warnings = slices.Clone(r.Warnings[:min(len(r.Warnings), maxWarnings)])
	for i := range r.Warnings {
		r.Warnings[i] = cut(r.Warnings[i])
	}
	if r.Session != nil {
		s := *r.Session
		s.Error = cut(s.Error)
		r.Session = &s
	}
	if r.Running != nil {
		run := *r.Running
		run.Host, run.Role, run.Order = cut(run.Host), cut(run.Role), cutTo(run.Order, maxStage)
		run.Health.Failing = cleanFailing(run.Health.Failing)
		r.Running = &run
	}
	return r
}

// cleanFailing bounds what is said of checks.
func cleanFailing(all []string) []string {
	var out []string
	size := 0
	for i, line := range all {
		line = cut(line)
		if size += len(line); size > maxFailing || i == maxItems {
			return append(out, fmt.Sprintf("and %d more", len(all)-i))
		}
		out = append(out, line)
	}
	return out
}

// bootID is an id that a machine told, as far as it may be part of a key: ours have digits, letters and dashes.
func bootID(id string) string {
	if len(id) > 64 || strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-") != "" {
		return ""
	}
	return id
}

// cleanInventory bounds an inventory.
func cleanInventory(inv agentapi.Inventory) agentapi.Inventory {
	inv.Disks = slices.Clone(inv.Disks[:min(len(inv.Disks), maxItems)])
	for i := range inv.Disks {
		d := &inv.Disks[i]
		d.Name, d.Model, d.Serial, d.WWN, d.Holds = cut(d.Name), cut(d.Model), cut(d.Serial), cut(d.WWN), cut(d.Holds)
	}
	inv.NICs = slices.Clone(inv.NICs[:min(len(inv.NICs), maxItems)])
	for i := range inv.NICs {
		n := &inv.NICs[i]
		n.Name, n.MAC, n.Driver = cut(n.Name), cut(n.MAC), cut(n.Driver)
	}
	b := &inv.SMBIOS
	b.Vendor, b.Product, b.Serial, b.UUID, b.Board, b.BIOS = cut(b.Vendor), cut(b.Product), cut(b.Serial), cut(b.UUID), cut(b.Board), cut(b.BIOS)
	inv.CPU.Model, inv.CPU.Arch, inv.Firmware = cut(inv.CPU.Model), cut(inv.CPU.Arch), cut(inv.Firmware)
	for len(inv.Disks)+len(inv.NICs) > 0 && jsonSize(inv) > maxInventory {
		if len(inv.Disks) >= len(inv.NICs) {
			inv.Disks = inv.Disks[:len(inv.Disks)*7/8]
		} else {
			inv.NICs = inv.NICs[:len(inv.NICs)*7/8]
		}
	}
	return inv
}

func jsonSize(inv agentapi.Inventory) int {
	b, _ := json.Marshal(inv) // of strings and numbers alone, which always have a form
	return len(b)
}

// describe is an inventory in a few words.
func describe(inv agentapi.Inventory) string {
	var disks []string
	for _, d := range inv.Disks {
		disks = append(disks, fmt.Sprintf("%s %d GB (%s)", d.Name, d.Size/1e9, d.Holds))
	}
	parts := []string{fmt.Sprintf("%d CPUs", inv.CPU.Threads), fmt.Sprintf("%d MiB", inv.Memory>>20), strings.Join(disks, ", "), inv.SMBIOS.Product}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), ", ")
}
