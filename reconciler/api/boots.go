package api

import (
	"cmp"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/reconciler/state"
)

// BootViews are boots, the newest first.
func BootViews(boots []state.Boot) []Boot {
	all := make([]Boot, 0, len(boots))
	for _, b := range boots {
		all = append(all, bootView(b))
	}
	slices.SortFunc(all, func(a, b Boot) int { return cmp.Or(b.Started.Compare(a.Started), cmp.Compare(a.ID, b.ID)) })
	return all
}

// bootView adds up the times of a boot. Marks come from two clocks, the server's and, reckoned back, the node's: they
// are put in order here, those of one time as they came, and none comes before the start.
func bootView(b state.Boot) Boot {
	v := Boot{
		ID: b.ID, MAC: b.MAC, Host: b.Host, Started: b.Started, Healthy: !b.Healthy.IsZero(), Bytes: b.Bytes,
		Error: b.Error, Marks: make([]Mark, 0, len(b.Marks)),
	}
	marks := slices.SortedStableFunc(slices.Values(b.Marks), func(x, y state.Mark) int { return x.Time.Compare(y.Time) })
	var last time.Duration
	for _, m := range marks {
		at := max(0, m.Time.Sub(b.Started))
		mark := Mark{Stage: m.Stage, Time: m.Time, At: at, Detail: m.Detail, Bytes: m.Bytes, Error: m.Error}
		if mark.Later = v.Healthy && m.Time.After(b.Healthy); !mark.Later {
			mark.Took, last = at-last, at
		}
		v.Marks = append(v.Marks, mark)
	}
	v.Took = last
	if v.Healthy {
		v.Took = max(0, b.Healthy.Sub(b.Started))
	}
	return v
}
