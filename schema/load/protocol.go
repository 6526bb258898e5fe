package load

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/troupe-dev/troupe/schema"
)

// A request is what the evaluating child reads from its standard input: one JSON value.
type request struct {
	Memory  int64          `json:"memory"`  // bytes it may add to what it has
	Workers int            `json:"workers"` // shards at once
	Files   []file         `json:"files"`
	Shards  []shardRequest `json:"shards"`
}

// A shardRequest is a shard to evaluate.
type shardRequest struct {
	Dir   string `json:"dir"`
	Files []int  `json:"files"` // in request.Files
}

// maxRequest is how many bytes of a request the child reads: base64 of maxTotal, and room for the rest.
const maxRequest = maxTotal/3*4 + 64<<20

// maxResponse is how many bytes the parent reads from the child.
const maxResponse = 512 << 20

// decodeRequest reads a request and checks that it can be used without further looking.
func decodeRequest(r io.Reader) (*request, error) {
	var req request
	if err := json.NewDecoder(io.LimitReader(r, maxRequest)).Decode(&req); err != nil {
		return nil, fmt.Errorf("reading the request: %w", err)
	}
	if req.Memory <= 0 || req.Workers <= 0 {
		return nil, errors.New("reading the request: no limits given")
	}
	for _, f := range req.Files {
		if !fs.ValidPath(f.Name) || f.Name == "." {
			return nil, fmt.Errorf("reading the request: bad file name %q", f.Name)
		}
	}
	for _, s := range req.Shards {
		for _, i := range s.Files {
			if i < 0 || i >= len(req.Files) {
				return nil, fmt.Errorf("reading the request: shard %q has file %d of %d", s.Dir, i, len(req.Files))
			}
		}
	}
	return &req, nil
}

// A response is one line that the child writes: that it begins a shard, or what came of it.
type response struct {
	Begin  *int   `json:"begin,omitempty"`  // in request.Shards
	End    *int   `json:"end,omitempty"`    // in request.Shards
	Result *shard `json:"result,omitempty"` // with End
}

// A shard is what a directory of the fleet declares: each value checked by itself, with its defaults filled in, and
// with the places that the checks across hosts want to name.
type shard struct {
	Dir        string                        `json:"dir"`
	Files      []string                      `json:"files"` // that places count in
	Problems   schema.Problems               `json:"problems,omitempty"`
	Network    *item[schema.Network]         `json:"network,omitempty"`
	Discovery  *item[schema.Discovery]       `json:"discovery,omitempty"`
	AllowEmpty bool                          `json:"allowEmpty,omitempty"`
	Images     map[string]item[schema.Image] `json:"images,omitempty"`
	Roles      map[string]item[schema.Role]  `json:"roles,omitempty"`
	Hosts      map[string]item[schema.Host]  `json:"hosts,omitempty"`

	// RoleProblems are what is wrong with the node of a role for some of its hosts.
	RoleProblems []roleProblem `json:"roleProblems,omitempty"`

	// Broken says that the shard as a whole could not be evaluated, so that what it declares is not known.
	Broken bool `json:"broken,omitempty"`

	key string // of the cache
}

// A roleProblem is a problem in a role that shows when its node is computed for a host.
type roleProblem struct {
	schema.Problem
	Host  string `json:"host"`  // the first of them
	Count int    `json:"count"` // of hosts
}

// An item is a value with the places of some of its fields, by path from it; "" is the item itself.
type item[T any] struct {
	Value T                `json:"value"`
	At    map[string]place `json:"at,omitempty"`

	// Bad says that the value has problems and is not given.
	Bad bool `json:"bad,omitempty"`

	// PerHost says of a role that it computes something for each of its hosts.
	PerHost bool `json:"perHost,omitempty"`
}

// A place is a file (its number in shard.Files), a line and a column; the zero place is none.
type place [3]int

// problem makes a problem at a place in a file of s.
func (s *shard) problem(at place, format string, args ...any) schema.Problem {
	p := schema.Problem{Message: cut(fmt.Sprintf(format, args...), maxMessage)}
	if p.File = s.file(at); p.File != "" {
		p.Line, p.Column = at[1], at[2]
	}
	return p
}

// file is the name of the file of a place; "" for none.
func (s *shard) file(at place) string {
	if at[1] <= 0 || at[0] < 0 || at[0] >= len(s.Files) {
		return ""
	}
	return s.Files[at[0]]
}

// where is a place in words, for the text of a problem that lies elsewhere.
func (s *shard) where(at place) string {
	p := s.problem(at, "")
	if p.File == "" {
		return "elsewhere"
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// place is the place of the field at path, or of the item where that is not known.
func (it item[T]) place(path string) place {
	if at, ok := it.At[path]; ok {
		return at
	}
	return it.At[""]
}
