package api

import (
	"context"
	"fmt"
	"net/http"

	"github.com/troupe-dev/troupe/reconciler/plan"
	"github.com/troupe-dev/troupe/schema"
)

// Planner says what would happen if a fleet were in force. A revision that is no valid fleet is a schema.Problems; one
// that the repo does not have wraps state.ErrNotFound.
type Planner interface {
	Plan(ctx context.Context, fleet *schema.Fleet) (plan.Plan, error)
	PlanRevision(ctx context.Context, revision string) (plan.Plan, error)
}

// A PlanRequest asks what would happen if a fleet were in force; exactly one field is set.
type PlanRequest struct {
	Fleet    *schema.Fleet `json:"fleet,omitempty"`    // as schema/load returns it
	Revision string        `json:"revision,omitempty"` // of the fleet's repo: a commit's hash, a branch, a tag
}

func (s *Server) plan(w http.ResponseWriter, r *http.Request) error {
	if s.Planner == nil {
		return notHere("planner")
	}
	if !s.shared.plans.enter(maxPlans) {
		return &Error{Status: http.StatusServiceUnavailable, Message: fmt.Sprintf("%d plans are being made already", maxPlans)}
	}
	defer s.shared.plans.leave()
	ctx, cancel := context.WithTimeout(r.Context(), planTime)
	defer cancel()
	var req PlanRequest
	if err := readJSON(w, r, maxPlanBody, &req); err != nil {
		return err
	}
	switch {
	case (req.Fleet == nil) == (req.Revision == ""):
		return badRequest("want a fleet or a revision")
	case req.Fleet != nil:
		if err := schema.Emptied(s.Fleet(), req.Fleet); err != nil { // it would never come into force
			return err
		}
		p, err := s.Planner.Plan(ctx, req.Fleet)
		if err != nil {
			return fmt.Errorf("planning: %w", err)
		}
		return writeJSON(w, http.StatusOK, p)
	}
	p, err := s.Planner.PlanRevision(ctx, req.Revision)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, p)
}

// Plan asks what would happen if fleet were in force.
func (c *Client) Plan(ctx context.Context, fleet *schema.Fleet) (plan.Plan, error) {
	var p plan.Plan
	return p, c.post(ctx, "/api/v1/plan", PlanRequest{Fleet: fleet}, &p)
}

// PlanRevision asks what would happen if a revision of the fleet's repo, as the server knows it, were in force. A
// revision that is no valid fleet gives an *Error with Problems.
func (c *Client) PlanRevision(ctx context.Context, revision string) (plan.Plan, error) {
	var p plan.Plan
	return p, c.post(ctx, "/api/v1/plan", PlanRequest{Revision: revision}, &p)
}
