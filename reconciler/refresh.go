package reconciler

import (
	"context"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// settle is how long the views controller lets changes gather: ten thousand assignments of one commit are one view.
const settle = 20 * time.Millisecond

// runViews is the controller that makes a new view whenever something that machines are told from has changed.
func (r *Reconciler) runViews(ctx context.Context) error {
	changed := r.cfg.Store.Watch(ctx, state.Assignments.Prefix(), state.Releases.Prefix(), state.Bases.Prefix(),
		state.Disks.Prefix(), state.Apps.Prefix(), state.Builds.Prefix(), state.Machines.Prefix(), state.Orders.Prefix())
	for {
		select {
		case <-changed:
		case <-r.refresh:
		case <-ctx.Done():
			return nil
		}
		v, err := r.readView(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // the read ended because ctx did
			}
			return err
		}
		r.views.set(v)
		select {
		case <-time.After(settle):
		case <-ctx.Done():
			return nil
		}
	}
}

// readView lists all that a view is made of.
func (r *Reconciler) readView(ctx context.Context) (*view, error) {
	v := newView(r.Fleet())
	v.luns = r.luns.views()
	v.local = localBoot{agent: r.cfg.Agent, loaders: r.cfg.Loaders}
	s := r.cfg.Store
	var err error
	if v.assignments, err = state.Assignments.List(ctx, s); err != nil {
		return nil, err
	}
	if v.orders, err = state.Orders.List(ctx, s); err != nil {
		return nil, err
	}
	if v.machines, err = state.Machines.List(ctx, s); err != nil {
		return nil, err
	}
	releases, err := state.Releases.List(ctx, s)
	if err != nil {
		return nil, err
	}
	v.releases = byID(releases, func(rel state.Release) images.RecipeID { return rel.ID })
	bases, err := state.Bases.List(ctx, s)
	if err != nil {
		return nil, err
	}
	v.bases = byID(bases, func(b images.Base) images.RecipeID { return b.Recipe })
	disks, err := state.Disks.List(ctx, s)
	if err != nil {
		return nil, err
	}
	v.disks = byID(disks, func(d images.Disk) images.RecipeID { return d.Recipe })
	apps, err := state.Apps.List(ctx, s)
	if err != nil {
		return nil, err
	}
	v.apps = byID(apps, func(a images.App) images.RecipeID { return a.Recipe })
	builds, err := state.Builds.List(ctx, s)
	if err != nil {
		return nil, err
	}
	v.builds = byID(builds, func(b state.Build) images.RecipeID { return b.Recipe })
	return v, nil
}

// byID keys records by the digest that they are named by.
func byID[T any](records map[string]T, id func(T) images.RecipeID) map[images.RecipeID]T {
	out := make(map[images.RecipeID]T, len(records))
	for _, rec := range records {
		out[id(rec)] = rec
	}
	return out
}

// plan computes what the fleet in force wants, from all records.
func (r *Reconciler) plan(ctx context.Context) (plan.Plan, plan.Observed, error) {
	cur := r.follow.fleet.Load()
	if cur == nil {
		return plan.Plan{}, plan.Observed{}, errNoFleet
	}
	obs, err := r.observed(ctx)
	if err != nil {
		return plan.Plan{}, obs, err
	}
	return plan.Make(cur.fleet, cur.commit.Hash, obs), obs, nil
}

// observed lists all that a plan is made from beside the fleet.
func (r *Reconciler) observed(ctx context.Context) (obs plan.Observed, err error) {
	s := r.cfg.Store
	v, err := r.readView(ctx)
	if err != nil {
		return obs, err
	}
	obs.Assignments, obs.Bases, obs.Disks, obs.Builds, obs.Machines = v.assignments, v.bases, v.disks, v.builds, v.machines
	obs.Apps = v.apps
	deltas, err := state.Deltas.List(ctx, s)
	if err != nil {
		return obs, err
	}
	obs.Deltas = byID(deltas, func(d images.Delta) images.RecipeID { return d.Recipe })
	nodes, err := state.Nodes.List(ctx, s)
	if err != nil {
		return obs, err
	}
	sets, err := state.LUNSets.List(ctx, s)
	obs.Nodes = state.WithDisks(nodes, sets, r.luns.InUse(), time.Now())
	return obs, err
}
