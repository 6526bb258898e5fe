package api

import (
	"context"
	"net/http"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// Deltas tells what nodes changed, and has it dropped. An error with a method Conflict() bool that says true is about how things are.
type Deltas interface {
	// Drop has what a host wrote be dropped at its next boot: below some paths, or all of it where there are none. With reboot it
	// boots now. It returns when that is on record.
	Drop(ctx context.Context, host string, paths []string, reboot bool) error
	// Diff asks the node what it changed, and waits for its answer.
	Diff(ctx context.Context, host string) (agentapi.DeltaDiff, error)
	// Answer takes a node's answer.
	Answer(ctx context.Context, a agentapi.DeltaAnswer) error
}

// maxDiff bounds a node's answer, in bytes: paths at their worst in JSON, and what is around them.
const maxDiff = 8 << 20

// A DropRequest asks for what a host wrote to be dropped.
type DropRequest struct {
	// Paths are absolute; each goes with all that is below it. None: all that the host wrote.
	Paths []string `json:"paths,omitempty"`
}

func (s *Server) getDelta(w http.ResponseWriter, r *http.Request) error {
	host, err := s.declaredHost(r)
	if err != nil {
		return err
	}
	d, err := s.Deltas.Diff(r.Context(), host)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, d)
}

func (s *Server) dropDelta(w http.ResponseWriter, r *http.Request) error {
	var req DropRequest
	if err := readJSON(w, r, maxBody, &req); err != nil {
		return err
	}
	host, err := s.declaredHost(r)
	if err != nil {
		return err
	}
	if err := s.Deltas.Drop(r.Context(), host, req.Paths, false); err != nil {
		return err
	}
	return writeJSON(w, http.StatusAccepted, req)
}

// declaredHost is the host that a request's path names, which the fleet must have.
func (s *Server) declaredHost(r *http.Request) (string, error) {
	if s.Deltas == nil {
		return "", notHere("node deltas")
	}
	host := r.PathValue("host")
	f := s.Fleet()
	if f == nil {
		return host, nil // what it is asked for says whether there is one
	}
	if _, declared := f.Hosts[host]; !declared {
		return "", notFound("there is no host %q", host)
	}
	return host, nil
}

func (s *Server) takeDelta(w http.ResponseWriter, r *http.Request) error {
	if s.Deltas == nil {
		return notHere("node deltas")
	}
	var a agentapi.DeltaAnswer
	if err := readJSON(w, r, maxDiff, &a); err != nil {
		return err
	}
	if err := s.Deltas.Answer(r.Context(), a); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, struct{}{})
}
