package api

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
)

// LUNs tells what hosts have on the server's iSCSI target, and resets it. An error with a method Conflict() bool that says
// true is about how things are, not about the request.
type LUNs interface {
	// Targets are those of all hosts that have one, by host.
	Targets() []Target
	// InUse are the hosts that have a session.
	InUse() map[string]bool
	// Waiting is what keeps hosts from their LUNs, by host, for people.
	Waiting() map[string]string
	// Reset has a host begin with a disk as it was made first; with force also where that takes the disk from a system that
	// nobody can ask to let go of it. It returns when that is on record.
	Reset(ctx context.Context, host string, force bool) error
}

// A Target is what one host has on the server's iSCSI target.
type Target struct {
	Host      string    `json:"host"`
	Name      string    `json:"name"`              // of the target
	Initiator string    `json:"initiator"`         // that may use it, and no other
	Disk      string    `json:"disk,omitempty"`    // id of the disk behind LUN 0
	Made      time.Time `json:"made,omitzero"`     // when it was
	Resetting bool      `json:"resetting"`         // it was reset, and is still in use
	Waiting   string    `json:"waiting,omitempty"` // what keeps the host from its LUNs
	LUNs      []LUN     `json:"luns"`              // by number
	Sessions  []Session `json:"sessions"`          // the oldest first
}

// A LUN is a logical unit of a host's target.
type LUN struct {
	Host  string        `json:"host"`
	LUN   uint16        `json:"lun"`
	Kind  LUNKind       `json:"kind"`
	Image digest.Digest `json:"image,omitempty"` // that it is, or began as
	Name  string        `json:"name,omitempty"`  // of the image or role that this is of
	Size  int64         `json:"size"`            // bytes
	// Delta is how many bytes what the host wrote takes on the server; 0 for an image.
	Delta    int64 `json:"delta"`
	Sessions int   `json:"sessions"` // of the host
}

// LUNKind is what a LUN is.
type LUNKind string

// The kinds of a LUN.
const (
	LUNImage LUNKind = "ro"  // an image, shared by all hosts that have it
	LUNDelta LUNKind = "cow" // an image and what the host wrote to it
	LUNDisk  LUNKind = "rw"  // a disk that began blank
)

// A Session is one between a host's initiator and its target.
type Session struct {
	Peer     string    `json:"peer"` // "IP:PORT"
	Since    time.Time `json:"since"`
	Commands uint64    `json:"commands"`
	BytesIn  uint64    `json:"bytesIn"`  // that the host wrote
	BytesOut uint64    `json:"bytesOut"` // that it read
}

func (s *Server) getLUNs(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	all := []LUN{}
	for _, t := range s.targets() {
		all = append(all, recs.named(t).LUNs...)
	}
	return writeJSON(w, http.StatusOK, all)
}

// targets are those of all hosts; none where there is no iSCSI target.
func (s *Server) targets() []Target {
	if s.LUNs == nil {
		return nil
	}
	return s.LUNs.Targets()
}

// named is t with the names of the images that are in it.
func (r *Records) named(t Target) Target {
	names := map[digest.Digest]string{}
	for _, b := range r.Builds {
		if b.Result != "" && (names[b.Result] == "" || b.Name < names[b.Result]) {
			names[b.Result] = b.Name
		}
	}
	t.LUNs = slices.Clone(t.LUNs)
	for i := range t.LUNs {
		t.LUNs[i].Name = names[t.LUNs[i].Image]
	}
	slices.SortFunc(t.LUNs, func(a, b LUN) int { return cmp.Compare(a.LUN, b.LUN) })
	return t
}

// target finds the target of a host; nil if it has none.
func (s *Server) target(recs *Records, host string) *Target {
	for _, t := range s.targets() {
		if t.Host == host && host != "" {
			t = recs.named(t)
			return &t
		}
	}
	return nil
}

// A ResetRequest asks for a host to be reset.
type ResetRequest struct {
	// Force takes the disk also from a system that nobody can ask to let go of it.
	Force bool `json:"force,omitempty"`
}

func (s *Server) resetHost(w http.ResponseWriter, r *http.Request) error {
	var req ResetRequest
	if err := readJSON(w, r, maxBody, &req); err != nil {
		return err
	}
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	host := r.PathValue("host")
	if _, declared := recs.declared()[host]; !declared {
		return notFound("there is no host %q", host)
	}
	if a, assigned := recs.Assignments[host]; assigned && a.ISCSI == nil && s.Deltas != nil {
		if err := s.Deltas.Drop(r.Context(), host, nil, true); err != nil {
			return err
		}
		return writeJSON(w, http.StatusAccepted, Target{Host: host, Resetting: true, LUNs: []LUN{}, Sessions: []Session{}})
	}
	if s.LUNs == nil {
		return notHere("iSCSI target")
	}
	if err := s.LUNs.Reset(r.Context(), host, req.Force); err != nil {
		return err
	}
	t := s.target(recs, host)
	if t == nil {
		t = &Target{Host: host}
	}
	return writeJSON(w, http.StatusAccepted, *t)
}
