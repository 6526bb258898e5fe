package agent

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/choice"
	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// A probation is what the second life knows of the boot that it is judging: the running release becomes good, or the
// deadline passes. health.Runner's goroutine writes the health, and the one of watchDeadline reads it.
type probation struct {
	mu      sync.Mutex
	key     string    // of the release that runs
	passed  bool      // it was healthy in this boot
	over    bool      // the deadline passed before that
	ended   bool      // the boot was taken back from the count
	failing []string  // checks that do not pass now
	since   time.Time // that all pass; zero while they do not
	kick    chan struct{}
}

// begin takes up what an earlier process of this boot left in the record.
func (p *probation) begin(r cache.Record) {
	p.kick = make(chan struct{}, 1)
	p.key = r.Key
	p.passed = r.Used > 0 && r.Healthy == r.Used
	p.over = r.Bad != nil
}

func (p *probation) look() (passed, over bool, failing []string, since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.passed, p.over, p.failing, p.since
}

func (p *probation) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// noteHealth takes the outcome of the checks into the probation, and makes the release good where all passed.
func (s *service) noteHealth(h agentapi.Health) {
	p := &s.proof
	p.mu.Lock()
	p.failing = h.Failing
	isFirst := h.Healthy && !p.passed
	p.passed = p.passed || h.Healthy
	switch {
	case !h.Healthy:
		p.since = time.Time{}
	case p.since.IsZero():
		p.since = time.Now()
	}
	p.mu.Unlock()
	if !isFirst {
		return
	}
	err := s.cache.Change(p.key, func(r *cache.Record) {
		if r.Good.IsZero() {
			r.Good = time.Now().UTC()
		}
		r.Healthy, r.Attempts, r.Ended, r.Left, r.Again, r.Bad = r.Used, 0, 0, nil, false, nil
	})
	if err != nil {
		s.log.Error("the cache does not remember that this release is good", "error", err)
	}
	s.rep.update(false, func(r *agentapi.Report) { tellRecords(s.cache, r) })
	p.wake()
}

// watchDeadline waits until the release is healthy, or its deadline is over; then it is judged. It ends with ctx.
func (s *service) watchDeadline(ctx context.Context) {
	for {
		passed, over, _, _ := s.proof.look()
		st := s.state.get()
		within := cmp.Or(st.Assignment.HealthyWithin, agentapi.DefaultHealthyWithin)
		var late <-chan time.Time
		if !passed && !over && !keepsNothing(st.Assignment) {
			left := st.Began + within - sinceBoot()
			if left <= 0 {
				s.expire(st.Assignment, within)
				continue
			}
			late = time.After(left)
		}
		select {
		case <-late:
		case <-s.proof.kick: // it is healthy, or the assignment has another deadline
		case <-ctx.Done():
			return
		}
	}
}

// expire judges a release that is not healthy within its deadline, and wakes pursue, which goes back.
func (s *service) expire(a agentapi.Assignment, within time.Duration) {
	s.proof.mu.Lock()
	if s.proof.passed { // at the last moment
		s.proof.mu.Unlock()
		return
	}
	s.proof.over = true
	failing := s.proof.failing
	s.proof.mu.Unlock()
	why := fmt.Sprintf("%s: not passed within %v", cmp.Or(strings.Join(failing, "; "), "its checks"), within)
	rec, _ := s.cache.Record(s.proof.key)
	if rec.Healthy > 0 {
		s.log.Error("the release is not healthy, and was so before: it stays", "why", why)
		return
	}
	s.log.Error("the release is bad", "release", a.Release.ID.Short(), "why", why)
	err := judge(s.cache, choice.Verdict{Key: s.proof.key, Bad: true, Why: why, When: time.Now().UTC()}, choice.ChecksOf(a))
	if err != nil {
		s.log.Error("the cache does not remember that this release is bad", "error", err)
	}
	s.rep.update(false, func(r *agentapi.Report) { tellRecords(s.cache, r) })
	s.rep.forget(agentapi.StageBad)
	s.rep.mark(agentapi.Mark{Stage: agentapi.StageBad, Detail: fmt.Sprintf("release %s: %s", a.Release.ID.Short(), why)})
	select {
	case s.expired <- struct{}{}:
	default:
	}
}

// fallback is the release that the node goes back to from what runs, where that is bad. It has to be whole: the server may
// be away, and a node without health is better than one that waits in its initramfs.
func (s *service) fallback() (cache.Record, bool) {
	rec, _ := s.cache.Record(s.proof.key)
	if rec.Bad == nil {
		return rec, false
	}
	c := choice.Choose(choice.Question{Wanted: &rec.Assignment, Records: s.cache.Records(), Whole: s.isWhole}, time.Now())
	if c.Key == "" || c.Key == rec.Key {
		return rec, false
	}
	good, ok := s.cache.Record(c.Key)
	return good, ok
}

func (s *service) isWhole(r cache.Record) error {
	if err := check(r.Assignment); err != nil {
		return err
	}
	for _, i := range r.Images() {
		if !s.cache.Has(i.Digest, i.Size) {
			return fmt.Errorf("image %s is not in the cache", i.Digest.Short())
		}
	}
	return nil
}

// goBack reboots from a bad release into the last good one. What it boots the initramfs chooses by the same records.
func (s *service) goBack(ctx context.Context, good cache.Record) error {
	bad, _ := s.cache.Record(s.proof.key)
	why := fmt.Sprintf("back to release %s, role %s: %s", good.Assignment.Release.ID.Short(), good.Assignment.Role, bad.Bad.Why)
	tries, err := s.awaitTurn(ctx, good.Key, why)
	if err != nil {
		return err
	}
	s.rep.forget(agentapi.StageReboot, agentapi.StageStay)
	s.rep.mark(agentapi.Mark{Stage: agentapi.StageReboot, Detail: why})
	flush(ctx, s.rep, 5*time.Second)
	err = s.cache.SetState(func(st *cache.State) { st.Goal, st.GoalTries = good.Key, tries+1 })
	if err != nil {
		return err
	}
	s.log.Warn("rebooting", "why", why)
	return s.reboot(ctx, s.log)
}

// against says why what is wanted is not to be run, and after how long that is asked again; 0 for when something changes.
func (s *service) against(a agentapi.Assignment) (why string, again time.Duration) {
	if check(a) != nil || keepsNothing(a) {
		return "", 0
	}
	rec, ok := s.cache.Record(deltaID(a))
	if !ok {
		return "", 0
	}
	why, v := choice.Against(rec, a, time.Now())
	if v != nil { // its last boot used up what it had, and was not followed by one that judged it
		if err := judge(s.cache, *v, ""); err != nil {
			s.log.Error("the cache does not remember what it found of a release", "error", err)
		}
		rec, _ = s.cache.Record(rec.Key)
	}
	if why == "" || rec.Left == nil {
		return why, 0
	}
	_, _, _, since := s.proof.look()
	if since.IsZero() {
		return why, time.Minute
	}
	if left := choice.Rest - time.Since(since); left > 0 {
		return why, left
	}
	err := s.cache.Change(rec.Key, func(r *cache.Record) { r.Left, r.Again, r.Attempts, r.Ended = nil, true, 0, 0 })
	if err != nil {
		s.log.Error("a release is not tried again", "error", err)
		return why, time.Minute
	}
	s.rep.update(false, func(r *agentapi.Report) { tellRecords(s.cache, r) })
	return "", 0
}

// takeBack takes this boot from the count of those that failed: somebody ends it, and the release is not judged yet.
func (s *service) takeBack() {
	s.proof.mu.Lock()
	isOpen := !s.proof.passed && !s.proof.over && !s.proof.ended
	s.proof.ended = true
	s.proof.mu.Unlock()
	if !isOpen {
		return
	}
	err := bounded(syncLimit, func() error {
		return s.cache.Change(s.proof.key, func(r *cache.Record) {
			if r.Attempts > 0 {
				r.Attempts--
			}
			r.Ended++
		})
	})
	if err != nil {
		s.log.Warn("the end of this boot counts as one of its own", "error", err)
	}
}

// shutdownProgram is the name of PID 1 from when systemd has stopped all units: it becomes another program
// (systemd-shutdown), which ends all processes. Names of processes have 15 bytes.
const shutdownProgram = "systemd-shutdow"

// isShutdown says whether the system goes down: whoever ends the agent then does not restart it.
func isShutdown() bool {
	b, err := os.ReadFile("/proc/1/comm")
	return err == nil && strings.TrimSpace(string(b)) == shutdownProgram
}

// holdAgain is a channel that is ready after d; nil for never.
func holdAgain(d time.Duration) <-chan time.Time {
	if d <= 0 {
		return nil
	}
	return time.After(min(d, backoffHold))
}

// backoffHold is how often at least a node looks whether what it left may be tried again.
const backoffHold = 10 * time.Minute
