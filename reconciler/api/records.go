package api

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/version"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// Records is what the views are made of: the records as they were at about one moment, and the fleet in force.
type Records struct {
	Now         time.Time
	Started     time.Time     // when the server could first hear of machines
	Version     string        // of the server
	Planned     string        // the commit that the assignments are those of
	Fleet       *schema.Fleet // nil before the first good commit was loaded
	Source      state.Source
	Assignments map[string]state.Assignment
	Builds      map[string]state.Build
	Bases       map[string]images.Base
	Deltas      map[string]images.Delta
	Disks       map[string]images.Disk
	Apps        map[string]images.App
	Releases    map[string]state.Release
	Machines    map[string]state.Machine
	Nodes       map[string]state.Node
	Orders      map[string]state.Order
	Boots       map[string]state.Boot // the newest of each machine, by MAC
	Events      map[string]state.Event
	NoLUNs      map[string]string // what keeps hosts from their LUNs, by host
}

// records lists everything that Records has.
func (s *Server) records(ctx context.Context) (*Records, error) {
	r := &Records{Now: time.Now(), Started: s.Started, Version: version.String()}
	if s.Planned != nil {
		r.Planned = s.Planned() // before all that it is about, so that nothing counts as planned that is not
	}
	var err error
	r.Source, err = state.Sources.Get(ctx, s.Store, state.SourceID)
	if errors.Is(err, state.ErrNotFound) { // nothing was fetched yet
		err = nil
	}
	if s.Planned == nil && r.Source.Applied != nil {
		r.Planned = r.Source.Applied.Hash
	}
	r.Fleet = s.Fleet() // not that of a commit before
	list(ctx, s.Store, state.Assignments, &r.Assignments, &err)
	list(ctx, s.Store, state.Builds, &r.Builds, &err)
	list(ctx, s.Store, state.Bases, &r.Bases, &err)
	list(ctx, s.Store, state.Deltas, &r.Deltas, &err)
	list(ctx, s.Store, state.Disks, &r.Disks, &err)
	list(ctx, s.Store, state.Apps, &r.Apps, &err)
	list(ctx, s.Store, state.Releases, &r.Releases, &err)
	list(ctx, s.Store, state.Machines, &r.Machines, &err)
	list(ctx, s.Store, state.Nodes, &r.Nodes, &err)
	list(ctx, s.Store, state.Orders, &r.Orders, &err)
	var luns map[string]state.LUNs
	list(ctx, s.Store, state.LUNSets, &luns, &err)
	list(ctx, s.Store, state.Events, &r.Events, &err)
	if s.LUNs != nil && err == nil {
		r.Nodes = state.WithDisks(r.Nodes, luns, s.LUNs.InUse(), r.Now)
		r.NoLUNs = s.LUNs.Waiting()
	}
	if err == nil {
		r.Boots, err = s.newestBoots(ctx)
	}
	return r, err
}

// newestBoots asks who has them in memory, if there is somebody: the store has several for each machine.
func (s *Server) newestBoots(ctx context.Context) (map[string]state.Boot, error) {
	var boots []state.Boot
	if s.Boots != nil {
		boots = s.Boots()
	} else {
		all, err := state.Boots.List(ctx, s.Store)
		if err != nil {
			return nil, err
		}
		boots = slices.Collect(maps.Values(all))
	}
	newest := make(map[string]state.Boot, len(boots))
	for _, b := range boots {
		if other, ok := newest[b.MAC]; !ok || other.Started.Before(b.Started) {
			newest[b.MAC] = b
		}
	}
	return newest, nil
}

// list reads all records of one kind into to, unless err says that something went wrong before.
func list[T any](ctx context.Context, s *state.Store, kind state.Kind[T], to *map[string]T, err *error) {
	if *err == nil {
		*to, *err = kind.List(ctx, s)
	}
}

// watched are the kinds of record that a Snapshot is made of.
func watched() []string {
	return []string{
		state.Sources.Prefix(), state.Assignments.Prefix(), state.Builds.Prefix(), state.Bases.Prefix(),
		state.Deltas.Prefix(), state.Disks.Prefix(), state.Apps.Prefix(), state.Releases.Prefix(), state.Machines.Prefix(), state.Nodes.Prefix(),
		state.LUNSets.Prefix(), state.Orders.Prefix(), state.Boots.Prefix(), state.Events.Prefix(),
	}
}
