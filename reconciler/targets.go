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

// hostSessions is how many sessions a host may have: its boot loader's, its system's, and those that they left behind when
// they began anew.
const hostSessions = 8

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
	read   bool               // all hosts were looked at: who is not here has no target
	byHost map[string]portal  // immutable values
	atBoot map[string]*atBoot // by host: the last boot that its controller has not heard of yet
	proven map[string]string  // by host: the id of the disk that comes next, where a login was made with its secrets
	news   bool               // something else is open than when settled was called last
}

// A portal is what a host's login finds.
type portal struct {
	target *iscsi.Target
	chap   iscsi.CHAP
	ready  bool          // all that the host may need is open
	next   state.LUNDisk // that the machine's next boot gets, where that is another one and open; it has no id where not
	booted bool          // its last boot was of an image that is booted as it is
	lunView

	current state.LUNDisk // behind LUN 0; it has no id while that is not open
	file    string        // of that
	sizes   map[digest.Digest]int64
}

// An atBoot is a machine that says that it boots: one whose boot loader asked what to boot, or whose agent has not begun.
// Anybody can say so, so that nothing is taken from what runs for it.
type atBoot struct {
	told state.LUNBoot // it has no Disk where that is not an image that is booted as it is
}

// nextDisk is the disk that comes next, as a login finds it. Two of the same disk are equal.
type nextDisk struct {
	portals              *luns
	host, id             string
	secret, mutualSecret string
}

func (n nextDisk) Secrets() (secret, mutual string) { return n.secret, n.mutualSecret }

// Proven hears that a machine logs in to the disk that comes next: it has nothing of the one before mounted.
func (n nextDisk) Proven() {
	n.portals.mu.Lock()
	n.portals.proven[n.host] = n.id
	n.portals.mu.Unlock()
	n.portals.poke()
}

// A lunView is what is open of a host's LUNs.
type lunView struct {
	disk   state.LUNDisk            // that the host is to write to; it has no id while that is not open
	images map[digest.Digest]uint16 // those that are open
	why    string                   // for people: what keeps the host from its disk, "" where nothing is known to
}

func newPortals() portals {
	return portals{byHost: map[string]portal{}, atBoot: map[string]*atBoot{}, proven: map[string]string{}}
}

// Discover tells an initiator of its own target.
func (p *portals) Discover(initiator string) (*iscsi.CHAP, []string) {
	host := hostOf(initiator)
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.byHost[host]
	if !ok || at.chap.Secret == "" {
		return nil, nil
	}
	return &at.chap, []string{targetName(host)}
}

// Open gives a host's target to the host's own initiator, once all that it may need is there.
func (l *luns) Open(initiator, target string) (*iscsi.Target, *iscsi.CHAP, error) {
	host, ours := strings.CutPrefix(target, iqn)
	l.mu.Lock()
	defer l.mu.Unlock()
	at, known := l.byHost[host]
	switch {
	case !ours || l.read && !known:
		return nil, nil, iscsi.ErrNoTarget
	case initiator != initiatorName(host):
		return nil, nil, iscsi.ErrForbidden
	case !at.ready && at.next.ID == "":
		return nil, nil, iscsi.ErrNotReady
	case !at.ready:
		// A login asks twice, and is told to try again where it gets two targets: this one is only for who proves that he
		// does not need the disk that cannot be had.
		at.target = iscsi.NewTarget(target)
	}
	if d := at.next; d.ID != "" {
		at.chap.Next = nextDisk{portals: l, host: host, id: d.ID, secret: d.Secret, mutualSecret: d.MutualSecret}
	}
	return at.target, &at.chap, nil
}

// publish makes at what a host's logins find. The boot heard, nil for none, is on record.
func (p *portals) publish(host string, at portal, heard *atBoot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.news = p.news || !reflect.DeepEqual(p.byHost[host].lunView, at.lunView)
	p.byHost[host] = at
	if heard != nil && p.atBoot[host] == heard {
		delete(p.atBoot, host)
	}
	if p.proven[host] != at.next.ID {
		delete(p.proven, host)
	}
}

// unready has a host's logins try again, while its disk changes.
func (p *portals) unready(host string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := p.byHost[host]
	at.ready, at.next = false, state.LUNDisk{}
	p.byHost[host] = at
}

// hold has the logins of a host try again that has LUNs, and of which nothing could be opened yet: "no such target" is final
// to many initiators.
func (p *portals) hold(host, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, known := p.byHost[host]; !known {
		p.byHost[host], p.news = portal{lunView: lunView{why: why}}, true
	}
}

func (p *portals) unpublish(host string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, had := p.byHost[host]
	p.news = p.news || had
	delete(p.byHost, host)
	delete(p.atBoot, host)
	delete(p.proven, host)
}

// settled says that all hosts that have LUNs are published, and returns whether something is new since the last time.
func (p *portals) settled() (news bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	news, p.read, p.news = p.news, true, false
	return news
}

// fresh returns whether something is new since the last time that settled or fresh was called.
func (p *portals) fresh() (news bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	news, p.news = p.news, false
	return news
}

// booting hears that a host's machine boots, or somebody in its name, and what it is told to boot; nil where that is not an
// image that is booted as it is.
func (l *luns) booting(host string, told *state.LUNBoot) {
	l.mu.Lock()
	at, known := l.byHost[host]
	if told == nil {
		told = &state.LUNBoot{Told: l.now()}
	}
	news := known && (at.booted || told.Disk != "")
	if news {
		l.atBoot[host] = &atBoot{told: *told}
	}
	l.mu.Unlock()
	if news {
		l.poke()
	}
}

// heard are the hosts that booting heard of, and those of which a login with the next secrets was. It tells of them again
// until publish has what that led to.
func (p *portals) heard() (booting map[string]*atBoot, proven map[string]string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.atBoot), maps.Clone(p.proven)
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
	case !known || at.disk.ID == "" || agents && (base == 0 || delta == 0) || !reflect.DeepEqual(at.disk.Image, a.ISCSI.Image):
		return nil, "its disk on the server is being opened"
	}
	return &agentapi.ISCSI{
		Port: v.port, Target: targetName(host), Initiator: initiatorName(host),
		User: host, Secret: at.disk.Secret, MutualUser: mutualUser, MutualSecret: at.disk.MutualSecret,
		Base: base, Delta: delta, Disk: at.disk.ID,
	}, ""
}
