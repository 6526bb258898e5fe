package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/disk"
	"github.com/troupe-dev/troupe/hosts/agent/health"
	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/signing"
	"github.com/troupe-dev/troupe/internal/version"
)

// unclaimedTwice is how long after an answer that takes a host out of the fleet the server is asked again: a running
// system is not rebooted on one word.
const unclaimedTwice = 5 * time.Second

// service is the second life.
type service struct {
	log    *slog.Logger
	state  *stateKeeper
	cache  *cache.Cache
	client *agentapi.Client
	rep    *reporter
	fol    *follower
	staged staged
	diff   diffAsks
	proof  probation
	// expired is told that the running release is bad. It has room for one.
	expired  chan struct{}
	goesDown func() bool                                       // isShutdown; another one in tests
	settle   time.Duration                                     // settleAfter; another one in tests
	reboot   func(ctx context.Context, log *slog.Logger) error // replaced in tests
	bootable chan struct{}                                     // has room for one: see keepBootable
	jumps    bool                                              // the kernel of what was prepared is loaded
	load     func(a agentapi.Assignment) error                 // loadKernel from the cache; replaced in tests
	jump     func(ctx context.Context, log *slog.Logger) error // starts it; replaced in tests
	apps     func(host string) appPlace                        // livePlace; another one in tests
	trim     func(dir string) error                            // disk.Trim; nothing in tests, whose directories are on a disk of others
}

// Serve is the second life: a service of the booted system. It returns when ctx is done, or when the boot left nothing
// that it could go on from.
func Serve(ctx context.Context, log *slog.Logger) error {
	s, err := newService(filepath.Join(runDir, stateFile), log)
	if err != nil {
		return err
	}
	return s.run(ctx)
}

func newService(statePath string, log *slog.Logger) (*service, error) {
	k, err := loadState(statePath)
	if err != nil {
		return nil, err
	}
	st := k.get()
	if err := check(st.Assignment); err != nil {
		return nil, fmt.Errorf("what the boot left: %w", err)
	}
	s := &service{log: log, state: k, reboot: rebootSystem, jump: jumpSystem, settle: settleAfter, trim: disk.Trim, expired: make(chan struct{}, 1), bootable: make(chan struct{}, 1), goesDown: isShutdown}
	if s.client, err = agentapi.NewClient(st.Server, nil); err != nil {
		return nil, err
	}
	if s.cache, err = cache.Open(st.CacheDir, log); err != nil {
		return nil, err
	}
	s.cache.InMemory = st.Assignment.RAM
	s.load = func(a agentapi.Assignment) error { return loadKernel(s.cache, a) }
	s.rep = newReporter(s.client, log, agentapi.Report{
		Identity: st.Identity, BootID: st.BootID, Agent: version.String(),
		Running: running(st.Assignment), Cached: cached(s.cache), Marks: st.Marks,
	})
	for _, stage := range st.Marked {
		s.rep.marked[stage] = true
	}
	s.apps = func(host string) appPlace { return livePlace{placeIn("/", host, s.cache)} }
	s.rep.save = s.saveMarks
	if err := s.beginProof(st); err != nil {
		return nil, err
	}
	s.fol = newFollower(s.client, log, s.hello)
	s.fol.latest = st.Assignment
	if s.fol.keys, err = signing.ParseKeys(st.Keys); err != nil {
		return nil, fmt.Errorf("what the boot left: %w", err)
	}
	s.fol.refused = s.rep.refuse
	s.rep.update(false, func(r *agentapi.Report) { r.Running.Order = st.Order })
	s.rep.onReply = func(r agentapi.ReportReply) {
		s.fol.reply(r)
		s.diff.ask(r.Diff)
	}
	if st.Assignment.ISCSI != nil {
		s.rep.session = sessionStatus
	}
	return s, nil
}

// beginProof takes up the record of what runs, and when that began.
func (s *service) beginProof(st RunState) error {
	if _, ok := s.cache.Record(deltaID(st.Assignment)); !ok { // it was broken, or could not be written
		if err := s.cache.Remember(st.Assignment); err != nil {
			s.log.Error("the cache has no record of what runs", "error", err)
		}
	}
	rec, _ := s.cache.Record(deltaID(st.Assignment))
	rec.Key = deltaID(st.Assignment)
	s.proof.begin(rec)
	s.rep.update(false, func(r *agentapi.Report) { tellRecords(s.cache, r) })
	if st.Began != 0 {
		return nil
	}
	return s.state.change(func(st *RunState) { st.Began = sinceBoot() })
}

// saveMarks keeps the marks for a next process of this life. It is called with the reporter's lock held.
func (s *service) saveMarks(marks []agentapi.Mark) {
	err := s.state.change(func(st *RunState) {
		for _, m := range marks {
			if !slices.Contains(st.Marked, m.Stage) {
				st.Marked = append(st.Marked, m.Stage)
			}
		}
		st.Marks = marks
	})
	if err != nil {
		s.log.Warn("the marks cannot be kept", "error", err)
	}
}

func (s *service) hello() agentapi.Hello {
	st := s.state.get()
	return agentapi.Hello{Identity: st.Identity, BootID: st.BootID, Agent: version.String(), Kernel: st.Kernel, Inventory: st.Inventory}
}

// run goes on until ctx is done.
func (s *service) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	s.rep.mark(agentapi.Mark{Stage: agentapi.StageService})
	if err := s.endTrial(); err != nil {
		return err
	}
	if s.cache.State().Goal == deltaID(s.state.get().Assignment) {
		s.forgetGoal()
	}
	wg.Go(func() { s.rep.run(ctx) })
	wg.Go(func() { s.fol.run(ctx) })
	wg.Go(func() { s.watchDeadline(ctx) })
	if name := s.state.get().Watchdog; name != "" {
		wg.Go(func() { s.petWatchdog(ctx, name) })
	}
	wg.Go(s.trimDeltas)
	wg.Go(func() { s.watchImages(ctx) })
	wg.Go(func() { s.keepBootable(ctx) })
	wg.Go(func() { s.runDiffs(ctx) })
	if s.rep.session != nil {
		wg.Go(func() { s.watchKeeper(ctx) })
	}
	if l := s.state.get().Lease; l != nil {
		k := netup.Keeper{Log: s.log, Save: s.saveLease, Moving: moveSession(s.log)}
		wg.Go(func() { _ = k.Keep(ctx, l) }) // ends with its context, and with nothing else
	}
	err := s.pursue(ctx)
	if s.goesDown() {
		s.takeBack()
	}
	return err
}

// trimDeltas leaves as many node deltas as are kept. It is here, and not in the first life, since a boot does not wait
// for the removal of a hundred thousand files.
func (s *service) trimDeltas() {
	_, err := inBackground(func() (int64, error) {
		err := s.cache.TrimDeltas(s.state.get().NodeDelta)
		if s.state.get().Assignment.ISCSI != nil { // what the server keeps of it is the server's room
			err = errors.Join(err, s.trim(s.cache.Dir()))
		}
		return 0, err
	})
	if err != nil {
		s.log.Warn("old node deltas cannot be removed", "error", err)
	}
}

func (s *service) saveLease(l *netup.Lease) {
	if err := s.state.change(func(st *RunState) { st.Lease = l }); err != nil {
		s.log.Warn("the lease cannot be kept", "error", err)
	}
	if s.state.get().Assignment.ISCSI != nil {
		return
	}
	if err := saveLease(s.cache, l); err != nil {
		s.log.Warn("a boot without a DHCP server would have another address", "error", err)
	}
}

// pursue runs the checks of what runs, and acts on each newer assignment.
func (s *service) pursue(ctx context.Context) error {
	stopChecks := s.startChecks(ctx)
	defer func() { stopChecks() }()
	tries := backoff.Backoff{First: 5 * time.Second, Limit: 2 * time.Minute}
	isSettled := false
	for {
		select {
		case <-s.fol.changed:
		default:
		}
		a := s.fol.get()
		now := s.state.get().Assignment
		var again <-chan time.Time
		d := decide(now, a)
		if why, wait := s.against(a); (d == moveOn || d == restart) && why != "" {
			d, again = hold, holdAgain(wait)
			s.holdOn(a, why)
		}
		if good, isBad := s.fallback(); isBad && d != moveOn && d != restart && d != discover {
			d, again = goBack, s.tryGoingBack(ctx, good, &tries)
		}
		switch d {
		case goOn:
			s.stay()
			s.rep.update(false, func(r *agentapi.Report) { r.Staged = "" })
			s.rep.fail(nil)
			if isSettled {
				s.forgetGoal()
			} else {
				again = time.After(s.settle)
			}
		case adopt:
			stopChecks()
			s.adopt(a)
			stopChecks = s.startChecks(ctx)
			continue
		case restart:
			stopChecks()
			err := s.fol.whileCurrent(ctx, a, func(current context.Context) error { return s.restartApps(current, a) })
			stopChecks = s.startChecks(ctx)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err == nil || errors.Is(err, errNewer) {
				continue
			}
			again = s.tryAgain(a, err, &tries)
		case moveOn, discover:
			err := s.fol.whileCurrent(ctx, a, func(current context.Context) error { return s.prepare(current, a, d) })
			if err == nil {
				s.log.Warn("rebooting", "generation", a.Generation, "role", a.Role)
				err = s.leaveSystem(ctx)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, errNewer) {
				continue
			}
			again = s.tryAgain(a, err, &tries)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-again:
			isSettled = true
		case <-s.expired:
		case <-s.fol.changed:
			isSettled = false
			tries.Reset()
		}
	}
}

// tryAgain says why an assignment is not activated, and when that is tried again.
func (s *service) tryAgain(a agentapi.Assignment, err error, tries *backoff.Backoff) <-chan time.Time {
	wait := tries.Next()
	s.log.Error("the assignment cannot be activated, trying again", "generation", a.Generation, "error", err, "in", wait.Round(time.Second))
	s.rep.fail(err)
	return time.After(wait)
}

// stay tells the server that an announced reboot does not come: a newer assignment is what runs already.
func (s *service) stay() {
	if s.rep.has(agentapi.StageReboot) {
		s.rep.mark(agentapi.Mark{Stage: agentapi.StageStay})
		s.rep.forget(agentapi.StageReboot)
	}
}

// A decision is what a node does about an assignment.
type decision string

const (
	goOn     decision = "go on"    // as it runs
	adopt    decision = "adopt"    // without a reboot: only words or checks differ
	restart  decision = "restart"  // fetch, mount the apps anew and restart their services: nothing else differs
	moveOn   decision = "move on"  // fetch, where the images are to be in a cache, and reboot into it
	goBack   decision = "go back"  // what runs is bad: reboot into the last good release
	hold     decision = "hold"     // go on as it runs, since what is wanted is bad
	discover decision = "discover" // no host is this machine any more: reboot, to be found anew
)

// tryGoingBack goes back to a good release. It returns when that is to be tried again.
func (s *service) tryGoingBack(ctx context.Context, good cache.Record, tries *backoff.Backoff) <-chan time.Time {
	err := s.goBack(ctx, good)
	if ctx.Err() != nil {
		return nil
	}
	wait := tries.Next()
	s.log.Error("the node cannot go back to its last good release, trying again", "error", err, "in", wait.Round(time.Second))
	s.rep.fail(err)
	return time.After(wait)
}

// holdOn goes on with what runs, though a is wanted.
func (s *service) holdOn(a agentapi.Assignment, why string) {
	s.log.Warn("what is wanted is not run", "generation", a.Generation, "release", a.Release.ID.Short(), "why", why)
	s.stay()
	s.rep.update(true, func(r *agentapi.Report) { r.Staged = "" })
	s.rep.fail(nil)
	s.forgetGoal()
}

// decide holds an assignment against the one that runs.
func decide(now, a agentapi.Assignment) decision {
	switch {
	case a.Version == now.Version || a.State == agentapi.Waiting:
		return goOn
	case a.State == agentapi.Unclaimed:
		return discover
	case check(a) != nil:
		return moveOn // which says what is wrong with it
	case a.Host != now.Host || a.Node.Digest != now.Node.Digest:
		return moveOn
	case (a.ISCSI == nil) != (now.ISCSI == nil) || a.RAM != now.RAM || !slices.Equal(a.Persist, now.Persist) || isReset(now, a) || isOrdered(now, a):
		return moveOn
	case a.Release.ID != now.Release.ID && onlyApps(now, a):
		return restart
	case a.Release.ID != now.Release.ID:
		return moveOn
	}
	return adopt
}

// isReset says whether the server has another disk for the node than the one that it runs from.
func isReset(now, a agentapi.Assignment) bool {
	return a.ISCSI != nil && now.ISCSI != nil && a.ISCSI.Disk != now.ISCSI.Disk
}

// adopt takes over an assignment that the running system already is.
func (s *service) adopt(a agentapi.Assignment) {
	s.log.Info("assignment adopted without a reboot", "generation", a.Generation, "role", a.Role)
	if err := s.state.change(func(st *RunState) { st.Assignment = a }); err != nil {
		s.log.Warn("the assignment cannot be kept", "error", err)
	}
	if a.ISCSI != nil {
		if err := adoptSession(a.ISCSI); err != nil {
			s.log.Error("the iSCSI session is not told of its new secrets", "error", err)
		}
	}
	if err := s.cache.Remember(a); err != nil {
		s.log.Warn("the assignment cannot be kept", "error", err)
	}
	s.rep.update(true, func(r *agentapi.Report) {
		before := r.Running
		r.Running = running(a)
		r.Running.Health, r.Running.Order = before.Health, before.Order
		r.Staged = ""
	})
	s.rep.fail(nil)
	s.proof.wake()
	s.wakeBootable()
}

// startChecks checks the health of what runs, until the function that it returns is called.
func (s *service) startChecks(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	r := health.Runner{Checks: s.state.get().Assignment.Checks, Log: s.log, Changed: s.healthIs}
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

func (s *service) healthIs(h agentapi.Health) {
	s.noteHealth(h)
	s.rep.update(true, func(r *agentapi.Report) {
		n := *r.Running // the old one may be on its way to the server
		n.Health = h
		r.Running = &n
	})
	if h.Healthy {
		s.rep.mark(agentapi.Mark{Stage: agentapi.StageHealthy})
		s.wakeBootable()
	}
}

// prepare does all that comes before the reboot into an assignment.
func (s *service) prepare(ctx context.Context, a agentapi.Assignment, d decision) error {
	s.rep.forget(agentapi.StageStage, agentapi.StageReboot, agentapi.StageStay) // an earlier assignment may have come as far
	why, goal := "no host of the fleet is this machine any more", "discovery"
	if d == discover {
		if err := s.confirm(ctx); err != nil {
			return err
		}
	} else {
		if err := check(a); err != nil {
			return err
		}
		why, goal = fmt.Sprintf("generation %d, role %s", a.Generation, a.Role), deltaID(a)
		if isReset(s.state.get().Assignment, a) {
			why += "; its disk was reset"
		}
		if isOrdered(s.state.get().Assignment, a) {
			why += "; what it wrote is dropped"
		}
		if err := s.stage(ctx, a); err != nil {
			if ctx.Err() != nil || !s.needsRepair(err) {
				return err
			}
			s.log.Error("the release is left to the boot, which repairs the cache first", "error", err)
			why += "; the cache is damaged: fetched after that"
		}
	}
	tries, err := s.awaitTurn(ctx, goal, why)
	if err != nil {
		return err
	}
	s.rep.fail(nil)
	if d == moveOn {
		why += s.loadNext(a)
	}
	s.rep.mark(agentapi.Mark{Stage: agentapi.StageReboot, Detail: why})
	flush(ctx, s.rep, 5*time.Second)
	if ctx.Err() != nil { // the last moment to hear of a newer one
		return ctx.Err()
	}
	s.takeBack()
	// A reboot that cannot be counted could be the first of many. One from a cache that the kernel made read-only is
	// none of them: it repairs the cache, or does not come to a switch. One away from a disk that does not answer is none
	// either.
	err = bounded(syncLimit, func() error {
		return s.cache.SetState(func(st *cache.State) { st.Goal, st.GoalTries = goal, tries+1 })
	})
	if errors.Is(err, errPatience) {
		s.log.Warn("the disk does not answer, the reboot is not counted", "error", err)
		return nil
	}
	if errors.Is(err, unix.EROFS) {
		s.log.Warn("the cache is read-only, the reboot is not counted", "error", err)
		return nil
	}
	return err
}

// needsRepair says whether a release could not be staged since the cache's file system is damaged. The kernel makes such a
// one read-only, and nothing mends it but the next boot. Not each error says so: where nothing can be removed, a read-only
// cache is a full one, too.
func (s *service) needsRepair(err error) bool {
	if isDamage(err) {
		return true
	}
	probe, err := os.CreateTemp(s.cache.Dir(), "probe-")
	if err != nil {
		return isDamage(err)
	}
	return isDamage(errors.Join(probe.Close(), os.Remove(probe.Name())))
}

// isDamage knows what a damaged file system answers: EUCLEAN and EBADMSG where it is, EROFS from then on.
func isDamage(err error) bool {
	return errors.Is(err, unix.EROFS) || errors.Is(err, unix.EUCLEAN) || errors.Is(err, unix.EBADMSG)
}

// settleAfter is how long a node goes on as it is until its reboots before that are no longer in a row with the next
// one. A server that tells the system something else than the boot does so at once.
const settleAfter = 2 * time.Minute

// awaitTurn waits before a reboot to a goal to which reboots before it did not lead, longer each time: the boot was told
// something else than this life is. It returns how many those were.
func (s *service) awaitTurn(ctx context.Context, goal, why string) (tries int, err error) {
	if st := s.cache.State(); st.Goal == goal {
		tries = st.GoalTries
	}
	if tries == 0 {
		return 0, nil
	}
	wait := backoff.Exponential(time.Minute, 15*time.Minute, tries)
	s.rep.fail(fmt.Errorf("%s: not reached, reboots in a row: %d; rebooting again in %v", why, tries, wait))
	return tries, backoff.Sleep(ctx, wait)
}

// forgetGoal ends the row of reboots.
func (s *service) forgetGoal() {
	if err := s.cache.SetState(func(st *cache.State) { st.Goal, st.GoalTries = "", 0 }); err != nil {
		s.log.Warn("the cache's state cannot be written", "error", err)
	}
}

// confirm asks a second time whether the machine is in no fleet.
func (s *service) confirm(ctx context.Context) error {
	if err := backoff.Sleep(ctx, unclaimedTwice); err != nil {
		return err
	}
	a, err := s.client.Assignment(ctx, s.state.get().Identity.MAC, "", 0)
	if err != nil {
		return mending{fmt.Errorf("asking again whether this machine is in no fleet: %w", err)}
	}
	if a.State != agentapi.Unclaimed {
		s.fol.hear(a)
		return errNewer
	}
	return nil
}

// transfer is what brings the images of a release into the cache while another one runs.
func (s *service) transfer(a agentapi.Assignment) cache.Fetch {
	st := s.state.get()
	return cache.Fetch{
		Source: s.client, Images: a.Release.Images(), Keep: digestsOf(st.Assignment.Release.Blobs()),
		Deltas: []string{st.NodeDelta, cache.NodeDeltaOf(a)}, Rate: a.Cache.Rate,
		Report: func(done, total int64) {
			s.rep.update(false, func(r *agentapi.Report) {
				r.Fetch = &agentapi.Progress{Release: a.Release.ID, Done: done, Total: total}
			})
			s.rep.fail(nil)
		},
		Retry: func(err error, _ time.Duration) { s.rep.fail(mending{err}) },
	}
}

// stage brings what a release needs into the cache, beside the one that runs. There is nothing to bring where it runs from
// the server's LUNs, and no cache to bring it to where the node runs from them now.
func (s *service) stage(ctx context.Context, a agentapi.Assignment) error {
	st := s.state.get()
	if a.ISCSI != nil {
		s.rep.update(true, func(r *agentapi.Report) { r.Staged = a.Release.ID })
		s.rep.mark(agentapi.Mark{Stage: agentapi.StageStage, Detail: a.Release.ID.Short() + ", from LUNs"})
		return nil
	}
	if a.RAM {
		s.rep.update(true, func(r *agentapi.Report) { r.Staged = a.Release.ID })
		s.rep.mark(agentapi.Mark{Stage: agentapi.StageStage, Detail: a.Release.ID.Short() + ", fetched into memory by the next boot"})
		return nil
	}
	if keepsNothing(st.Assignment) {
		return nil
	}
	f := s.transfer(a)
	s.log.Info("fetching a release in the background", "release", a.Release.ID.Short(), "generation", a.Generation)
	had := cached(s.cache)
	n, err := inBackground(func() (int64, error) { return s.cache.Fetch(ctx, f) })
	s.staged.add(a.Release.ID, n)
	s.rep.update(err == nil, func(r *agentapi.Report) {
		r.Fetch = nil
		r.Cached = cached(s.cache)
		if err == nil {
			r.Staged = a.Release.ID
		}
	})
	if err != nil {
		return err
	}
	if _, err := s.fetchBoot(ctx, a); err != nil {
		if ctx.Err() != nil {
			return err
		}
		s.log.Warn("what starts the release without the server is not in the cache", "error", err)
	}
	if err := s.cache.Remember(a); err != nil {
		return err
	}
	if err := s.checkStaged(ctx, a.Release, had); err != nil {
		return err
	}
	s.rep.mark(agentapi.Mark{Stage: agentapi.StageStage, Detail: a.Release.ID.Short(), Bytes: s.staged.take(a.Release.ID)})
	return nil
}
