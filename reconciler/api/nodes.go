package api

import (
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// hello takes the first word of an agent.
func (s *Server) hello(w http.ResponseWriter, r *http.Request) error {
	if s.Agents == nil {
		return notHere("agents")
	}
	var h agentapi.Hello
	if err := readJSON(w, r, maxBody, &h); err != nil {
		return err
	}
	if err := normalise(&h.Identity); err != nil {
		return err
	}
	a, err := s.Agents.Hello(r.Context(), peer(r), h)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, a)
}

// assignment waits for news, for as long as the agent likes and no longer than maxWait.
func (s *Server) assignment(w http.ResponseWriter, r *http.Request) error {
	if s.Agents == nil {
		return notHere("agents")
	}
	id := agentapi.Identity{MAC: r.FormValue("mac")}
	if err := normalise(&id); err != nil {
		return err
	}
	var wait time.Duration
	if v := r.FormValue("wait"); v != "" {
		seconds, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return badRequest("wait=%q: want a number of seconds", v)
		}
		wait = min(time.Duration(seconds)*time.Second, maxWait)
	}
	a, err := s.Agents.Assignment(r.Context(), id.MAC, r.FormValue("after"), wait)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, a)
}

func (s *Server) report(w http.ResponseWriter, r *http.Request) error {
	if s.Agents == nil {
		return notHere("agents")
	}
	var rep agentapi.Report
	if err := readJSON(w, r, maxBody, &rep); err != nil {
		return err
	}
	if err := normalise(&rep.Identity); err != nil {
		return err
	}
	reply, err := s.Agents.Report(r.Context(), peer(r), rep)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, reply)
}

// normalise writes a MAC as records have it, and refuses what is none.
func normalise(id *agentapi.Identity) error {
	mac, err := net.ParseMAC(id.MAC)
	if err != nil || len(mac) != 6 {
		return badRequest("mac %q: want six bytes in hexadecimal with colons between", id.MAC)
	}
	id.MAC = mac.String()
	return nil
}
