package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/choice"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// errNothingToBoot says that neither what is wanted nor anything else may be booted: the node waits, and somebody has to help.
var errNothingToBoot = errors.New("nothing to boot")

// choose says what to boot though wanted is the server's word, nil for none. A verdict that comes out of it is on the disk,
// and in the report, when this returns.
func (b *boot) choose(ctx context.Context, wanted *agentapi.Assignment) (choice.Choice, error) {
	if wanted != nil {
		if err := b.takeDead(*wanted); err != nil {
			return choice.Choice{}, err
		}
	}
	c := choice.Choose(choice.Question{
		Wanted: wanted, Records: b.cache.Records(),
		Whole: func(r cache.Record) error { return b.canBoot(r, wanted != nil) },
	}, time.Now())
	if r, _ := b.cache.Record(c.Key); wanted != nil && c.Key == deltaID(*wanted) && r.Bad != nil { // by other checks
		if err := b.cache.Change(c.Key, func(r *cache.Record) { r.Bad, r.Attempts, r.Ended = nil, 0, 0 }); err != nil {
			return c, err
		}
	}
	if v := c.Judge; v != nil {
		if err := judge(b.cache, *v, ""); err != nil {
			return c, err
		}
	}
	b.rep.update(false, func(r *agentapi.Report) { tellRecords(b.cache, r) })
	if wanted != nil && c.Why != "" {
		b.log.Error("the release that is wanted is not booted", "release", wanted.Release.ID.Short(), "why", c.Why)
		b.rep.mark(agentapi.Mark{Stage: agentapi.StageBad, Detail: fmt.Sprintf("release %s: %s", wanted.Release.ID.Short(), c.Why)})
	}
	if c.Key == "" {
		return c, fmt.Errorf("%w: %s", errNothingToBoot, c.Why)
	}
	return c, ctx.Err()
}

// canBoot says why the release of a record cannot be booted. What is missing can be fetched, and another kernel be had, only
// where the server is there.
func (b *boot) canBoot(r cache.Record, hasServer bool) error {
	if err := b.vouched(r.Assignment); err != nil {
		return err
	}
	if err := check(r.Assignment); err != nil || hasServer {
		return err
	}
	for _, i := range r.Images() {
		if !b.cache.Has(i.Digest, i.Size) {
			return fmt.Errorf("image %s is not in the cache", i.Digest.Short())
		}
	}
	if k := r.Assignment.Release.Kernel; k != "" && k != b.cmd.Kernel && b.jump == nil {
		return fmt.Errorf("it has kernel %s, and %s was booted", k.Short(), b.cmd.Kernel.Short())
	}
	return nil
}

// vouched says why what the cache has of an assignment is not to be run: its release is not the one that the server signed.
func (b *boot) vouched(a agentapi.Assignment) error {
	signed, err := agentapi.Open(a, b.keys)
	if err == nil && !reflect.DeepEqual(signed.Release, a.Release) {
		err = fmt.Errorf("%w: the cache has another release than what was signed", agentapi.ErrManifest)
	}
	return err
}

// takeDead takes the server's word that no agent came up with the kernel of a release: who could count those boots did not
// run.
func (b *boot) takeDead(wanted agentapi.Assignment) error {
	if b.cmd.Dead == "" || b.cmd.Dead != wanted.Release.ID {
		return nil
	}
	if r, ok := b.cache.Record(deltaID(wanted)); ok && (r.Bad != nil || r.Left != nil) {
		return nil
	}
	if err := b.cache.Remember(wanted); err != nil {
		return err
	}
	r, _ := b.cache.Record(deltaID(wanted))
	return judge(b.cache, choice.Verdict{
		Key: r.Key, Bad: r.Healthy == 0 || r.Again, When: time.Now(), Why: "its kernel was loaded and did not come as far as the agent, several times",
	}, "")
}

// judge writes a verdict down. checks are those that it is about, "" where it is about none.
func judge(c *cache.Cache, v choice.Verdict, checks string) error {
	return c.Change(v.Key, func(r *cache.Record) {
		if v.Bad {
			r.Bad = &cache.Bad{Why: v.Why, When: v.When, Checks: checks}
			return
		}
		r.Left = &cache.Left{Why: v.Why, When: v.When}
	})
}

// maxBad bounds what a report has of bad releases.
const maxBad = 8

// tellRecords makes a report say what the records do.
func tellRecords(c *cache.Cache, r *agentapi.Report) {
	r.Bad, r.Good, r.Warnings = nil, "", c.Warnings()
	if good := c.LastGood(""); good.Assignment.Release != nil {
		r.Good = good.Assignment.Release.ID
	}
	for _, rec := range c.Records() {
		a := rec.Assignment
		if rec.Bad == nil && rec.Left == nil || a.Release == nil {
			continue
		}
		bad := agentapi.BadRelease{Host: a.Host, Role: a.Role, Generation: a.Generation, Release: a.Release.ID, Node: a.Node.Digest}
		if rec.Bad != nil {
			bad.Why, bad.When = rec.Bad.Why, rec.Bad.When
		} else {
			bad.Why, bad.When, bad.Again = rec.Left.Why, rec.Left.When, true
		}
		r.Bad = append(r.Bad, bad)
	}
	slices.SortStableFunc(r.Bad, func(x, y agentapi.BadRelease) int { return y.When.Compare(x.When) })
	r.Bad = r.Bad[:min(len(r.Bad), maxBad)]
}

// begin counts a boot into a, and keeps what it needs, before anything of a is touched: whatever becomes of the boot, the
// next one knows of it. A node whose disk takes no write runs what was good all the same; a boot of anything else that
// cannot be counted could be the first of many.
func (b *boot) begin(a agentapi.Assignment) error {
	key := deltaID(a)
	if b.begun == key { // this boot is counted: what failed since was tried again
		return nil
	}
	err := b.cache.Remember(a)
	if err == nil {
		err = b.cache.Begin(key)
	}
	if err == nil {
		b.begun = key
	}
	if r, ok := b.cache.Record(key); err != nil && ok && r.IsGood() {
		b.log.Error("this boot cannot be counted", "error", err)
		return nil
	}
	return err
}

// giveUp makes a release bad that cannot run at all. One that was good before is left alone: it did.
func (b *boot) giveUp(key string, why error) error {
	r, ok := b.cache.Record(key)
	if !ok || r.Healthy > 0 {
		return nil
	}
	return judge(b.cache, choice.Verdict{Key: key, Bad: true, Why: why.Error(), When: time.Now()}, "")
}
