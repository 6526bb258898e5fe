package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/reconciler/source"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// API is the HTTP interface for operators and agents.
func (r *Reconciler) API() *api.Server { return r.operators }

func newAPI(r *Reconciler) *api.Server {
	return &api.Server{
		Store: r.cfg.Store, Agents: r.agents, Fleet: r.Fleet, Poke: r.Poke, Look: r.Look,
		Planner: planner{r}, Images: imageBuilds{r}, Planned: r.planned, LUNs: r.luns, Deltas: r.deltas, Artifacts: r, Boots: r.boots.newest, Started: time.Now(), Log: r.log,
	}
}

// planned is the commit that all assignments are those of; "" before there is one.
func (r *Reconciler) planned() string {
	if c := r.assign.planned.Load(); c != nil {
		return *c
	}
	return ""
}

// planner answers what would happen if another fleet were in force. It changes nothing.
type planner struct{ r *Reconciler }

func (p planner) Plan(ctx context.Context, fleet *schema.Fleet) (plan.Plan, error) {
	obs, err := p.r.observed(ctx)
	if err != nil {
		return plan.Plan{}, err
	}
	return plan.Make(fleet, "", obs), nil
}

func (p planner) PlanRevision(ctx context.Context, revision string) (plan.Plan, error) {
	rev, err := p.r.cfg.Repo.Revision(ctx, revision)
	if errors.Is(err, source.ErrNoRevision) {
		return plan.Plan{}, fmt.Errorf("%w: %w", state.ErrNotFound, err)
	}
	if err != nil {
		return plan.Plan{}, err
	}
	fleet, err := p.r.cfg.Loader.Load(ctx, rev.Tree)
	if err == nil {
		err = schema.Emptied(p.r.Fleet(), fleet)
	}
	if err != nil {
		return plan.Plan{}, err
	}
	obs, err := p.r.observed(ctx)
	if err != nil {
		return plan.Plan{}, err
	}
	return plan.Make(fleet, rev.Commit.Hash, obs), nil
}

// imageBuilds lets operators see and hasten builds.
type imageBuilds struct{ r *Reconciler }

// Build has the image or the role of that name built now: also where a build failed and waits to be tried again, and
// where no host needs it.
func (b imageBuilds) Build(ctx context.Context, name string) ([]digest.Digest, error) {
	fleet := b.r.Fleet()
	if fleet == nil {
		return nil, &UnavailableError{Reason: errNoFleet.Error()}
	}
	builds := plan.BuildsOf(fleet, name)
	if len(builds) == 0 {
		return nil, fmt.Errorf("no image and no role of the fleet is called %q: %w", name, state.ErrNotFound)
	}
	var recipes []digest.Digest
	for _, want := range builds {
		recipes = append(recipes, want.Recipe)
	}
	return recipes, b.r.builds.ask(ctx, builds)
}

// Log reads the output of a recipe's last build; with follow, until that build ends.
func (b imageBuilds) Log(ctx context.Context, recipe digest.Digest, follow bool) (io.ReadCloser, error) {
	rec, err := state.Builds.Get(ctx, b.r.cfg.Store, recipe.String())
	if err != nil {
		return nil, err
	}
	if !follow || rec.Phase != state.BuildRunning {
		return b.r.builds.logs.follow(ctx, recipe, nil)
	}
	return b.r.builds.logs.follow(ctx, recipe, func(ctx context.Context) (bool, error) {
		rec, err := state.Builds.Get(ctx, b.r.cfg.Store, recipe.String())
		return rec.Phase != state.BuildRunning, err
	})
}
