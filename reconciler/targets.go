package reconciler

import (
	"maps"
	"reflect"
	"strings"
	"sync"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// Names of targets and initiators (RFC 7143 section 4.2.7.3): each host has one of each.
const (
	iqn          = "iqn.2026-11.dev.troupe:"
	iqnInitiator = ":initiator"
	mutualUser   = "troupe"
)

func targetName(host string) string    { return iqn + host }
func initiatorName(host string) string { return iqn + host + iqnInitiator }

// hostOf is the host of an initiator's name; "" for one that is none of ours.
func hostOf(initiator string) string {
	rest, ok := strings.CutPrefix(initiator, iqn)
	host, is := strings.CutSuffix(rest, iqnInitiator)
	if !ok || !is {
		return ""
	}
	return host
}

// portals answers the logins of machines from memory (iscsi.Directory), and tells what of a host's LUNs is open.
type portals struct {
	mu     sync.Mutex
	read   bool              // the records were read: who is not here has no target
	byHost map[string]portal // immutable values
	atBoot map[string]bool   // hosts whose machine boots, and is to find another disk
	news   bool              // something else is open than when settled was called last
}

// A portal is what a host's login finds.
type portal struct {
	target *iscsi.Target
	chap   iscsi.CHAP
	ready  bool // all that the host may need is open
	other  bool // the machine's next boot gets another disk
	lunView
}

// A lunView is what is open of a host's LUNs.
type lunView struct {
	disk   state.LUNDisk            // that the host is to write to; it has no id while that is not open
	images map[digest.Digest]uint16 // those that are open
	why    string                   // for people: what keeps the host from its disk, "" where nothing is known to
}

func newPortals() portals {
	return portals{byHost: map[string]portal{}, atBoot: map[string]bool{}}
}

// Discover tells an initiator of its own target.
func (p *portals) Discover(initiator string) (*iscsi.CHAP, []string) {
	host := hostOf(initiator)
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.byHost[host]
	if !ok {
		return nil, nil
	}
	return &at.chap, []string{targetName(host)}
}

// Open gives a host's target to the host's own initiator, once all that it may need is there.
func (p *portals) Open(initiator, target string) (*iscsi.Target, *iscsi.CHAP, error) {
	host, ours := strings.CutPrefix(target, iqn)
	p.mu.Lock()
	defer p.mu.Unlock()
	at, known := p.byHost[host]
	switch {
	case !ours || p.read && !known:
		return nil, nil, iscsi.ErrNoTarget
	case initiator != initiatorName(host):
		return nil, nil, iscsi.ErrForbidden
	case !at.ready || at.other && p.atBoot[host]:
		return nil, nil, iscsi.ErrNotReady
	}
	return at.target, &at.chap, nil
}

// publish makes at what a host's logins find. A boot was heard of once it has led to its disk.
func (p *portals) publish(host string, at portal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.news = p.news || !reflect.DeepEqual(p.byHost[host].lunView, at.lunView)
	p.byHost[host] = at
	if !at.other {
		delete(p.atBoot, host)
	}
}

// unready has a host's logins try again, while its disk changes.
func (p *portals) unready(host string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := p.byHost[host]
	at.ready = false
	p.byHost[host] = at
}

func (p *portals) unpublish(host string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, had := p.byHost[host]
	p.news = p.news || had
	delete(p.byHost, host)
	delete(p.atBoot, host)
}

// settled says that all hosts that have LUNs are published, and returns whether something is new since the last time.
func (p *portals) settled() (news bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	news, p.read, p.news = p.news, true, false
	return news
}

// booting hears that a host's machine has nothing mounted.
func (l *luns) booting(host string) {
	if l.port == 0 || host == "" {
		return
	}
	l.mu.Lock()
	at, known := l.byHost[host]
	if known && at.other {
		l.atBoot[host] = true
	}
	l.mu.Unlock()
	if known && at.other {
		l.poke()
	}
}

// takeBooting are the hosts that booting heard of. It tells of them again until publish has what their boot led to.
func (p *portals) takeBooting() map[string]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.atBoot)
}

// views are what is open of all hosts.
func (l *luns) views() lunViews {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := lunViews{port: l.port, of: make(map[string]lunView, len(l.byHost))}
	for host, at := range l.byHost {
		v.of[host] = at.lunView
	}
	return v
}

// lunViews are what is open of all hosts, on the target at port; 0: there is none.
type lunViews struct {
	port uint16
	of   map[string]lunView
}

// iscsi is where a host finds the LUNs of its assignment; nil while they are not all open, and why.
func (v lunViews) iscsi(host string, a state.Assignment) (*agentapi.ISCSI, string) {
	at, known := v.of[host]
	rel := a.Spec.Release
	base, delta := at.images[rel.Base.Digest], at.images[rel.Delta.Digest]
	agents := a.ISCSI.Image == nil
	switch {
	case v.port == 0:
		return nil, "its role boots from LUNs of the server, whose iSCSI target is off (serve --iscsi-listen)"
	case at.why != "":
		return nil, at.why
	case !known || at.disk.ID == "" || agents && (base == 0 || delta == 0):
		return nil, "its disk on the server is being opened"
	}
	return &agentapi.ISCSI{
		Port: v.port, Target: targetName(host), Initiator: initiatorName(host),
		User: host, Secret: at.disk.Secret, MutualUser: mutualUser, MutualSecret: at.disk.MutualSecret,
		Base: base, Delta: delta, Disk: at.disk.ID,
	}, ""
}
