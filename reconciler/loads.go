package reconciler

import (
	"slices"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// maxLoads is how often the kernel of a release is handed out in a row though no agent came up with it. Then the machine gets
// that of its last good release once, whose agent writes down what became of the other one.
const maxLoads = 2

// serve says the kernel of which release mac is given that is to run wanted, and whether that is another one since no agent
// came up with the kernel of wanted. fits says whether a release can be handed out.
func (b *boots) serve(mac string, wanted digest.Digest, fits func(digest.Digest) bool) (release digest.Digest, isDead bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	boot := b.current[mac]
	if boot == nil { // of a machine whose boots are not kept
		return wanted, false
	}
	before := boot.Loads
	boot.Loads, isDead = nextLoad(boot.Loads, wanted, fits)
	if boot.Loads.Served != before.Served || boot.Loads.Loaded != before.Loaded || boot.Loads.Times != before.Times {
		b.changed(mac)
	}
	return boot.Loads.Served, isDead
}

func nextLoad(l state.Loads, wanted digest.Digest, fits func(digest.Digest) bool) (next state.Loads, isDead bool) {
	switch {
	case l.Loaded == "": // nothing was loaded since an agent came up, or not to the end
	case l.Loaded == l.Dead:
		l.Times++
	default:
		l.Dead, l.Times = l.Loaded, 1
	}
	l.Loaded, l.Served = "", wanted
	if l.Good == "" || l.Good == wanted || !fits(l.Good) {
		return l, false
	}
	isDead = l.Dead == wanted && l.Times >= maxLoads
	if isDead || slices.Contains(l.Bad, wanted) {
		l.Served = l.Good
	}
	return l, isDead
}

// agentCame is what an agent's report makes of loads: it came up. One that has not opened its cache yet does not know what is
// good.
func agentCame(l state.Loads, r agentapi.Report) state.Loads {
	l.Loaded, l.Dead, l.Times = "", "", 0
	if r.Good == "" && r.Bad == nil && r.Running == nil {
		return l
	}
	l.Good, l.Bad = r.Good, nil
	for _, b := range r.Bad {
		l.Bad = append(l.Bad, b.Release)
	}
	return l
}
