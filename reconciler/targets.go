package reconciler

import (
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/api"
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
	read   bool               // the records were read: who is not here has no target
	byHost map[string]portal  // immutable values
	atBoot map[string]*atBoot // by host: the last boot that its controller has not heard of yet
	news   bool               // something else is open than when settled was called last
}

// A portal is what a host's login finds.
type portal struct {
	target *iscsi.Target
	chap   iscsi.CHAP
	ready  bool // all that the host may need is open
	other  bool // the machine's next boot gets another disk
	booted bool // its last boot was of an image that is booted as it is
	lunView

	current state.LUNDisk // behind LUN 0; it has no id while that is not open
	file    string        // of that
	sizes   map[digest.Digest]int64
}

// An atBoot is a machine that has nothing mounted: one whose boot loader is told what to boot, or whose agent has not begun.
type atBoot struct {
	told *state.LUNBoot // nil where it is not an image that is booted as it is
}

// A lunView is what is open of a host's LUNs.
type lunView struct {
	disk   state.LUNDisk            // that the host is to write to; it has no id while that is not open
	images map[digest.Digest]uint16 // those that are open
	why    string                   // for people: what keeps the host from its disk, "" where nothing is known to
}

func newPortals() portals {
	return portals{byHost: map[string]portal{}, atBoot: map[string]*atBoot{}}
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
	case !at.ready || at.other && p.atBoot[host] != nil:
		return nil, nil, iscsi.ErrNotReady
	}
	return at.target, &at.chap, nil
}

// publish makes at what a host's logins find. The boot heard, nil for none, was heard of once it has led to its disk.
func (p *portals) publish(host string, at portal, heard *atBoot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.news = p.news || !reflect.DeepEqual(p.byHost[host].lunView, at.lunView)
	p.byHost[host] = at
	if heard != nil && p.atBoot[host] == heard && !at.other {
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

// booting hears that a host's machine has nothing mounted, and what it is told to boot; nil where that is not an image that
// is booted as it is.
func (l *luns) booting(host string, told *state.LUNBoot) {
	l.mu.Lock()
	at, known := l.byHost[host]
	news := known && (at.other || at.booted || told != nil)
	if news {
		l.atBoot[host] = &atBoot{told: told}
	}
	l.mu.Unlock()
	if news {
		l.poke()
	}
}

// takeBooting are the hosts that booting heard of. It tells of them again until publish has what their boot led to.
func (p *portals) takeBooting() map[string]*atBoot {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.atBoot)
}

// InUse are the hosts that have a session.
func (l *luns) InUse() map[string]bool {
	open := map[string]bool{}
	for _, s := range l.target.Sessions() {
		open[hostOf(s.Initiator)] = true
	}
	return open
}

// Targets tell operators what hosts have.
func (l *luns) Targets() []api.Target {
	sessions := map[string][]api.Session{}
	for _, s := range l.target.Sessions() {
		host := hostOf(s.Initiator)
		sessions[host] = append(sessions[host], api.Session{
			Peer: s.Peer, Since: s.Since, Commands: s.Commands, BytesIn: s.BytesIn, BytesOut: s.BytesOut,
		})
	}
	l.mu.Lock()
	portals := maps.Clone(l.byHost)
	l.mu.Unlock()
	all := make([]api.Target, 0, len(portals))
	for _, host := range slices.Sorted(maps.Keys(portals)) {
		open := sessions[host]
		slices.SortFunc(open, func(a, b api.Session) int { return a.Since.Compare(b.Since) })
		all = append(all, portals[host].forPeople(host, open))
	}
	return all
}

func (p portal) forPeople(host string, sessions []api.Session) api.Target {
	t := api.Target{
		Host: host, Name: targetName(host), Initiator: initiatorName(host), Disk: p.current.ID, Made: p.current.Made,
		Resetting: !p.current.Ends.IsZero(), Waiting: p.why, LUNs: []api.LUN{}, Sessions: sessions,
	}
	if t.Sessions == nil {
		t.Sessions = []api.Session{}
	}
	if p.current.ID != "" {
		disk := api.LUN{Host: host, Kind: api.LUNDisk, Size: p.current.Size, Delta: takes(p.file), Sessions: len(sessions)}
		if img := p.current.Image; img != nil {
			disk.Kind, disk.Image = api.LUNDelta, img.Digest
		}
		t.LUNs = append(t.LUNs, disk)
	}
	for d, n := range p.images {
		t.LUNs = append(t.LUNs, api.LUN{Host: host, LUN: n, Kind: api.LUNImage, Image: d, Size: p.sizes[d], Sessions: len(sessions)})
	}
	return t
}

// takes is how many bytes of its file system a file takes; 0 where it is gone.
func takes(file string) int64 {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return 0
	}
	return st.Blocks * 512 // whatever st_blksize says (stat(2))
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
		return nil, targetOff
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
