package agentapi

import "github.com/troupe-dev/troupe/internal/digest"

// A DeltaOrder is what an operator wants to be dropped of what a host's node deltas have. It stands until there is another one, and
// each node delta is brought up to it once, when it is mounted next.
type DeltaOrder struct {
	ID string `json:"id"` // tells one order from another
	// Paths are dropped, with all that is below: absolute and clean. None: everything is.
	Paths []string `json:"paths,omitempty"`
	// Reboot asks for that at once, and not whenever the node boots next.
	Reboot bool `json:"reboot,omitempty"`
}

// A DeltaKind is what a node did to a path of its release.
type DeltaKind string

// The kinds of a DeltaChange.
const (
	DeltaAdded   DeltaKind = "added"
	DeltaChanged DeltaKind = "changed"
	DeltaRemoved DeltaKind = "removed"
)

// A DeltaChange is one path that a node changed.
type DeltaChange struct {
	Path string    `json:"path"` // absolute
	Kind DeltaKind `json:"kind"`
	Type string    `json:"type"` // "file", "dir", "link" or "other"; "" of what was removed
	Size int64     `json:"size"` // bytes of a file
}

// DeltaCount is how much a node changed.
type DeltaCount struct {
	Changes int   `json:"changes"` // paths
	Bytes   int64 `json:"bytes"`   // of the files among them
}

// Bounds of a DeltaDiff.
const (
	MaxDeltaChanges = 5000
	MaxDeltaPaths   = 512 << 10 // bytes of all paths
)

// A DeltaDiff is what a node changed over its release, and over what its node delta began with.
type DeltaDiff struct {
	Host    string        `json:"host"`
	Release digest.Digest `json:"release"`
	DeltaCount
	List []DeltaChange `json:"list"` // by path; the first MaxDeltaChanges, or as many as MaxDeltaPaths allows
	More int           `json:"more"` // of DeltaCount that the list leaves out
}

// A DeltaAnswer is a DeltaDiff that a server asked for.
type DeltaAnswer struct {
	Identity
	ID    string    `json:"id"` // of ReportReply.Diff
	Diff  DeltaDiff `json:"diff"`
	Error string    `json:"error,omitempty"` // why there is none
}
