// Package choice decides what a node boots: what the server wants, or, where that does not come up, what was good before.
//
// A boot proves nothing by itself. It is counted on the disk before the switch of root, and the count is taken back when the
// release becomes healthy. So a kernel that panics, an init that hangs until the watchdog resets the machine, and
// a cut of the power leave the same trace: a count that nobody took back. They cannot be told apart, and these rules do not
// try to:
//
//   - A release that was never good has MaxNew boots. When these are used up it is bad.
//   - A release that was good has MaxGood boots in a row. When these are used up another good one is run, where there is one,
//     but it is not bad: three cuts of the power in a row, each within the minute that a boot takes, are no fault of its own. So it
//     is wanted again once what runs in its place has been healthy for Rest. The power was good then, and the machine, too:
//     when another row of boots is used up, it is bad.
//   - A release that never was good and is not healthy within its deadline is bad at once, since that was seen, not
//     concluded. One that was good is not: the cause may be elsewhere, as a database that is down for a whole site, and
//     rebooting all of that site would help nobody. It stays, unhealthy, and the boot counts.
//   - A shutdown or reboot that somebody asked for is no failed boot, whether the release was healthy by then or not. But a
//     system that reboots itself before it is healthy does the same for ever, so only the first MaxEnded in a row are
//     left out.
//   - What is bad is not tried again under the same key, which is that of the release, the host and its files. A verdict of
//     checks, however, is one about the checks, too: with others, or another deadline, the same bytes are tried anew.
//   - Without a word of the server only what was good is booted, the last one first. Where nothing ever was, what the server
//     wanted last is better than nothing, as long as it has boots left.
//   - With nothing left the node waits in its initramfs, and says so: rescue.
package choice

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

const (
	// MaxNew is how many boots a release has that was never good.
	MaxNew = 2
	// MaxGood is how many boots in a row that do not become healthy a good release has.
	MaxGood = 3
	// MaxEnded is how many boots in a row that were ended before they were healthy are not counted.
	MaxEnded = 10
	// Rest is for how long what runs in place of a good release must have been healthy before that is tried again.
	Rest = time.Hour
)

// A Question is what is known when a node has to choose.
type Question struct {
	Wanted  *agentapi.Assignment // the server's word; nil for none
	Records []cache.Record       // the last one used first
	// Whole says why a release cannot be booted from what is on the disk, and is asked of what the server does not want
	// now, and so may not be there to fetch; nil says that all can.
	Whole func(cache.Record) error
}

// A Choice is what to boot.
type Choice struct {
	Key        string // of the record; "" says that there is nothing to boot
	Assignment agentapi.Assignment
	// Why is why it is not what the server wants, or why there is nothing; "" where it is.
	Why string
	// Judge is a verdict to be written down for the release that is wanted, and was not judged yet; nil for none.
	Judge *Verdict
}

// A Verdict is about the release with a key: bad, or left for now.
type Verdict struct {
	Key  string
	Bad  bool
	Why  string
	When time.Time
}

// Choose says what to boot.
func Choose(q Question, now time.Time) Choice {
	if q.Wanted == nil {
		c := goBack(q, "", true)
		if c.Key == "" {
			c.Why = "the server does not answer, and no release in the cache can be booted" + c.Why
		} else {
			c.Why = "the server does not answer"
		}
		return c
	}
	key := cache.KeyOf(*q.Wanted)
	var rec cache.Record
	if i := slices.IndexFunc(q.Records, func(r cache.Record) bool { return r.Key == key }); i >= 0 {
		rec = q.Records[i]
	}
	why, judge := Against(rec, *q.Wanted, now)
	if why == "" {
		return Choice{Key: key, Assignment: *q.Wanted}
	}
	c := goBack(q, key, false)
	switch {
	case c.Key != "":
		c.Why, c.Judge = why, judge
	case rec.IsGood(): // there is nothing better: it is the one that is known to work
		c = Choice{Key: key, Assignment: *q.Wanted}
	default:
		c.Why, c.Judge = why+"; there is no good release to go back to"+c.Why, judge
	}
	return c
}

// Against says why the release of a record is not to be booted though a, its assignment, is wanted; "" says that nothing is
// against it. Where that was not written down yet, it comes with a verdict.
func Against(r cache.Record, a agentapi.Assignment, now time.Time) (why string, judge *Verdict) {
	switch {
	case r.Bad != nil && (r.Bad.Checks == "" || r.Bad.Checks == ChecksOf(a)):
		return r.Bad.Why, nil
	case r.Left != nil:
		return r.Left.Why, nil
	case r.Bad != nil, Failed(r) < limit(r):
		return "", nil
	}
	v := &Verdict{Key: r.Key, Why: fmt.Sprintf("%d boots of it in a row did not become healthy", Failed(r)), When: now}
	// One that was good becomes bad in its second row.
	v.Bad = r.Healthy == 0 || r.Again
	return v.Why, v
}

// Failed is how many boots of a record's release in a row count as failed.
func Failed(r cache.Record) int { return r.Attempts + max(0, r.Ended-MaxEnded) }

func limit(r cache.Record) int {
	if r.Healthy > 0 {
		return MaxGood
	}
	return MaxNew
}

// goBack finds what to boot in place of what is wanted: good releases, the last one first, those that have used up their
// boots after the others; then, where new is set, what was never good and has boots left.
func goBack(q Question, except string, isNewFine bool) Choice {
	var all []cache.Record
	for _, r := range q.Records {
		isUsable := r.IsGood() || isNewFine && r.Healthy == 0 && r.Bad == nil && Failed(r) < MaxNew
		if r.Key != except && isUsable && r.Assignment.Release != nil && r.Assignment.ISCSI == nil {
			all = append(all, r)
		}
	}
	slices.SortStableFunc(all, func(a, b cache.Record) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(b.Healthy, a.Healthy), cmp.Compare(b.Used, a.Used))
	})
	broken := ""
	for _, r := range all {
		if q.Whole != nil {
			if err := q.Whole(r); err != nil {
				broken += fmt.Sprintf("; release %s: %v", r.Assignment.Release.ID.Short(), err)
				continue
			}
		}
		return Choice{Key: r.Key, Assignment: r.Assignment}
	}
	return Choice{Why: broken}
}

func rank(r cache.Record) int {
	switch {
	case r.IsGood() && r.Left == nil && Failed(r) < MaxGood:
		return 0
	case r.IsGood():
		return 1
	}
	return 2
}

// ChecksOf names the checks of an assignment and their deadline.
func ChecksOf(a agentapi.Assignment) string {
	return digest.Of(fmt.Appendf(nil, "troupe checks 1\n%v\n%+v", cmp.Or(a.HealthyWithin, agentapi.DefaultHealthyWithin), describe(a.Checks))).Short()
}

// describe follows the pointers of checks.
func describe(all []agentapi.Check) []string {
	out := make([]string, len(all))
	for i, c := range all {
		out[i] = fmt.Sprintf("%q %q %v %v", c.Unit, c.Exec, c.Every, c.Timeout)
		if c.HTTP != nil {
			out[i] += fmt.Sprintf(" http %+v", *c.HTTP)
		}
		if c.TCP != nil {
			out[i] += fmt.Sprintf(" tcp %+v", *c.TCP)
		}
	}
	return out
}
