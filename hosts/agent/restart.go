package agent

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/apps"
	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/choice"
	"github.com/troupe-dev/troupe/hosts/agent/command"
	"github.com/troupe-dev/troupe/hosts/agent/health"
	"github.com/troupe-dev/troupe/hosts/agent/rootfs"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

// Places of the apps' images and of the units that are gone with the boot.
const (
	appsDir  = runDir + "/apps"
	unitsDir = "/run/systemd/system"
)

// An appPlace mounts and starts apps; apps.Place and systemd in a node.
type appPlace interface {
	Start(ctx context.Context, list []agentapi.App) error // mounts apps and starts their services
	Stop(ctx context.Context, list []agentapi.App) error  // stops what of them runs, and takes it down
}

// placeIn is where apps of a host are mounted in root, with images and data of a cache.
func placeIn(root, host string, c *cache.Cache) apps.Place {
	return apps.Place{
		Root: root, Run: appsDir, Cache: c.Dir(), Units: unitsDir, Host: host,
		Image: func(img agentapi.Image, dir string) error {
			checked, err := imageIn(c.Path(img.Digest), img)
			if err != nil {
				return err
			}
			return rootfs.MountImage(checked, dir)
		},
	}
}

// mountApps mounts the apps of an assignment in the new root, and has systemd start their services.
func (b *boot) mountApps(a agentapi.Assignment) error {
	p := placeIn(newRoot, a.Host, b.cache)
	if err := p.Boot(a.Release.Apps); err != nil {
		return err
	}
	if err := p.WriteUnits(a.Release.Apps); err != nil {
		return errors.Join(err, p.Unmount(a.Release.Apps))
	}
	return nil
}

// A livePlace is an appPlace of the system that runs.
type livePlace struct{ apps.Place }

func (p livePlace) Start(ctx context.Context, list []agentapi.App) error {
	if err := p.Mount(list); err != nil {
		return err
	}
	if err := p.WriteUnits(list); err != nil {
		return err
	}
	if err := systemctl(ctx, "daemon-reload"); err != nil {
		return err
	}
	if units := unitsOf(list); len(units) > 0 {
		return systemctl(ctx, append([]string{"--no-block", "restart"}, units...)...)
	}
	return nil
}

// Stop does what it can: a service that does not stop is killed by systemd, and what still has a file open keeps its mount.
func (p livePlace) Stop(ctx context.Context, list []agentapi.App) error {
	var err error
	if units := unitsOf(list); len(units) > 0 {
		err = systemctl(ctx, append([]string{"stop"}, units...)...)
	}
	return errors.Join(err, p.RemoveUnits(list), p.Unmount(list))
}

func unitsOf(list []agentapi.App) []string {
	var out []string
	for _, a := range list {
		if u := apps.UnitOf(a); u != "" {
			out = append(out, u)
		}
	}
	return out
}

// stopLimit is how long a call of systemd may take: it kills a service that does not stop after 90 s.
const stopLimit = 2 * time.Minute

func systemctl(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	if out, err := command.New(ctx, "systemctl", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// onlyApps says whether a node goes from the release of now to that of a without a reboot: a asks for that, and only apps differ. They
// are kept in a cache on a disk.
func onlyApps(now, a agentapi.Assignment) bool {
	return a.Activate == agentapi.Restart && a.Release.System() == now.Release.System() && a.ISCSI == nil && !a.RAM
}

// restartApps takes up the apps of a in place of those that run. Where they do not become healthy in time, or anything comes between,
// it goes back to those: whatever ends it, one of the two runs, and the record of a says how it went.
func (s *service) restartApps(ctx context.Context, a agentapi.Assignment) error {
	s.rep.forget(agentapi.StageStage, agentapi.StageReboot, agentapi.StageStay)
	if err := s.stage(ctx, a); err != nil {
		return err
	}
	key := deltaID(a)
	if err := s.cache.Begin(key); err != nil { // a try that cannot be counted could be the first of many
		return err
	}
	if err := s.state.change(func(st *RunState) { st.Trial = &a.Release.Apps }); err != nil {
		return err
	}
	s.log.Info("taking up other apps without a reboot", "generation", a.Generation, "role", a.Role)
	why, err := s.try(ctx, a)
	if err == nil && why == "" {
		return s.passTrial(a, key)
	}
	err = errors.Join(err, s.endTrial())
	if why == "" {
		return err
	}
	s.log.Error("the apps are bad", "release", a.Release.ID.Short(), "why", why)
	verdict := choice.Verdict{Key: key, Bad: true, Why: why, When: time.Now().UTC()}
	err = errors.Join(err, judge(s.cache, verdict, choice.ChecksOf(a)))
	s.rep.update(false, func(r *agentapi.Report) { tellRecords(s.cache, r) })
	s.rep.forget(agentapi.StageBad)
	s.rep.mark(agentapi.Mark{Stage: agentapi.StageBad, Detail: fmt.Sprintf("release %s: %s", a.Release.ID.Short(), why)})
	return err
}

// try runs the apps of a until they are healthy. It says why they are bad; "" where they are not, or nobody knows.
func (s *service) try(ctx context.Context, a agentapi.Assignment) (why string, err error) {
	place := s.apps(a.Host)
	if err := place.Stop(ctx, s.state.get().Assignment.Release.Apps); err != nil {
		s.log.Warn("the apps before are not all down", "error", err)
	}
	if err := place.Start(ctx, a.Release.Apps); err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		return err.Error(), nil
	}
	within := cmp.Or(a.HealthyWithin, agentapi.DefaultHealthyWithin)
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	healthy := false
	var failing []string
	r := health.Runner{Checks: trialChecks(a), Log: s.log, Changed: func(h agentapi.Health) {
		if failing = h.Failing; h.Healthy {
			healthy = true
			cancel()
		}
	}}
	r.Run(limited)
	switch {
	case healthy:
		return "", nil
	case ctx.Err() != nil:
		return "", ctx.Err()
	}
	return fmt.Sprintf("%s: not passed within %v", cmp.Or(strings.Join(failing, "; "), "its checks"), within), nil
}

// trialChecks are those of the role, and that the services of its apps run.
func trialChecks(a agentapi.Assignment) []agentapi.Check {
	checks := append([]agentapi.Check(nil), a.Checks...)
	for _, u := range unitsOf(a.Release.Apps) {
		checks = append(checks, agentapi.Check{Unit: u, Every: time.Second, Timeout: 5 * time.Second})
	}
	return checks
}

// passTrial makes what was tried what runs, and good.
func (s *service) passTrial(a agentapi.Assignment, key string) error {
	err := s.state.change(func(st *RunState) { st.Assignment, st.Trial = a, nil })
	if err != nil {
		return errors.Join(err, s.endTrial())
	}
	err = s.cache.Change(key, func(r *cache.Record) {
		if r.Good.IsZero() {
			r.Good = time.Now().UTC()
		}
		r.Healthy, r.Attempts, r.Ended, r.Left, r.Again, r.Bad = r.Used, 0, 0, nil, false, nil
	})
	if err != nil {
		s.log.Error("the cache does not remember that this release is good", "error", err)
	}
	s.proof.follow(key)
	s.adopt(a)
	s.rep.update(false, func(r *agentapi.Report) { tellRecords(s.cache, r) })
	return nil
}

// endTrial goes back from apps that were tried to those that ran before, also where an earlier process tried them.
func (s *service) endTrial() error {
	st := s.state.get()
	if st.Trial == nil {
		return nil
	}
	ctx := context.Background() // whatever ended the trial, the way back is gone to its end
	place := s.apps(st.Assignment.Host)
	if err := place.Stop(ctx, *st.Trial); err != nil {
		s.log.Warn("the apps that were tried are not all down", "error", err)
	}
	if err := place.Stop(ctx, st.Assignment.Release.Apps); err != nil { // the trial may have ended before it took them down
		s.log.Warn("the apps before are not all down", "error", err)
	}
	if err := place.Start(ctx, st.Assignment.Release.Apps); err != nil {
		s.log.Error("the apps before do not all run", "error", err)
		s.rep.fail(err)
	}
	return s.state.change(func(st *RunState) { st.Trial = nil })
}

// follow makes key the release that runs, which was healthy.
func (p *probation) follow(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.key, p.passed, p.over = key, true, false
}

func digestsOf(blobs []agentapi.Blob) []digest.Digest {
	out := make([]digest.Digest, len(blobs))
	for i, b := range blobs {
		out[i] = b.Digest
	}
	return out
}
